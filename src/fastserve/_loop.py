"""What one running ``serve_forever`` holds: its poller, its wake-up descriptor, its pause after a failed accept.

A server has no loop until it serves; every call of ``serve_forever`` makes its own and closes it again. What a
server keeps of them is its :class:`State`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import selectors
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Set

from fastserve import _backend, _core_py, _waiting, pollers
from fastserve._annotations import Any, Final
from fastserve._stdlib import socketserver

# The process or the system has no descriptor or no memory left for a connection: accept(2), ERRORS.
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# The listener cannot be accepted from: it was closed or shut down, or it is no listener.
UNUSABLE: Final = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})

# The private attributes of a server that programs read and set.
SHUTDOWN_REQUEST: Final = "_BaseServer__shutdown_request"
IS_SHUT_DOWN: Final = "_BaseServer__is_shut_down"

FIRST_PAUSE: Final = 0.01  # seconds until accept is tried again; doubled with every failure
LONGEST_PAUSE: Final = 0.5  # seconds
EPISODE_GAP: Final = 5.0  # seconds without a failure after which the next one is reported again


class Backoff:
    """How long to leave a listener alone whose ``accept`` fails, and whether to say so."""

    def __init__(self) -> None:
        self.pause = 0.0  # seconds; above zero from a failure until accept works again
        self._last_failure = -EPISODE_GAP  # time.monotonic()

    def failed(self, server: Any, error: OSError) -> float:
        """Return the seconds to pause. The first failure of an episode is reported on standard error."""
        now = time.monotonic()
        if now - self._last_failure >= EPISODE_GAP and sys.stderr is not None:
            print(
                f"fastserve: cannot accept on {getattr(server, 'server_address', server)!r}: {error}; "
                f"trying again every {FIRST_PAUSE * 1000:.0f} to {LONGEST_PAUSE * 1000:.0f} ms",
                file=sys.stderr,
            )
        self._last_failure = now
        self.pause = min(self.pause * 2, LONGEST_PAUSE) if self.pause else FIRST_PAUSE
        return self.pause


class Loop:
    """The wait of one ``serve_forever``: for a listener, a wake-up, signals and forked children.

    The thread that makes it is its owner and calls its methods; any thread may call :meth:`wake`,
    :meth:`retry` and :meth:`resume`, and so may a signal handler.
    """

    _poller: pollers.Poller
    _wakeup: _core_py.Wakeup

    def __init__(self, server: Any) -> None:
        self.owner = threading.get_ident()
        # Whether the owner must look around every poll_interval, because something has no way to wake it.
        self.ticks = False
        # Set by any thread: the owner is to end.
        self.stopping = False
        # Set in a forked child, which shares the poller and the wake-up with its parent and must not use them.
        self.stale = False
        self._is_open = False
        self._server = server
        self._listener = -1
        self._children: dict[int, int] = {}  # the process ids of watched children, by pidfd
        self._ended: set[int] = set()  # those that have ended since somebody asked
        self._watched: dict[int, Callable[[], None]] = {}  # what to call, by descriptor
        self._holds_signals = False
        self._backoff = Backoff()
        self._resume_at: float | None = None  # time.monotonic(); the listener is not watched until then
        self._retry = False  # set by any thread: end the pause now
        # Whether no request is to be taken before resume(). Who takes several in a turn asks before each of them.
        self.held = False
        self._resumed = False  # set by any thread: it is to be held no longer
        self._trying = False  # whether accept is being tried for the first time after a pause
        self._calls: deque[Callable[[], None]] = deque()  # to be made when the owner comes round

    def open(self) -> None:
        """Watch ``server.fileno()``.

        Raises ``ValueError`` if the server is closed, ``OSError`` if there are not enough descriptors.
        """
        self._listener = pollers.descriptor_of(self._server)
        patched = _backend.monkey_patched()
        core = _core_py if patched else _backend.core
        in_main_thread = self.owner == threading.main_thread().ident
        # Without the GIL an object is freed by the thread that has made it, when that thread runs. Connections are made
        # here, and mostly let go of by others.
        self.ticks = self.ticks or patched or not _backend.has_gil()
        hub = _waiting.running()
        # A hub is the poller of the server that it runs for: who waits for the listener lets handlers go on.
        self._poller = hub if hub is not None and hub.server is self._server else pollers.new_poller()
        try:
            self._wakeup = core.Wakeup(in_main_thread)
        except BaseException:
            self._poller.close()
            raise
        self._is_open = True
        watch_forks(_after_fork_in_child)
        _loops.add(self)
        self._poller.register(self._wakeup.fileno())
        self._poller.register(self._listener)
        if in_main_thread:
            self._watch_signals()
        if self._calls:
            self._wakeup.set()

    def _watch_signals(self) -> None:
        """Have Python's C-level signal handler write to the wake-up.

        An endless wait must end for a signal that another thread received and for ``_thread.interrupt_main()``,
        which interrupt no system call of this thread.
        """
        try:
            before = signal.set_wakeup_fd(self._wakeup.signal_fileno(), warn_on_full_buffer=False)
        except ValueError:
            return  # the main thread of a subinterpreter, where no signal is handled
        if before == -1:
            self._holds_signals = True
        else:
            signal.set_wakeup_fd(before)  # it is somebody's already, such as an asyncio loop's
            self.ticks = True

    def wait(self, timeout: float | None) -> bool:
        """Wait for at most ``timeout`` seconds (``None``: endless); return whether the listener is ready.

        It also returns, with ``False``, for a wake-up, a signal, an ended child and the end of a pause.
        """
        if self.stale:
            self._start_afresh()
        if self.held:
            self._wait_held(timeout)
            return False
        if self._backoff.pause:
            return self._wait_in_episode(timeout)
        ready = self._poller.wait(timeout)
        if len(ready) == 1 and ready[0] == self._listener:
            return True
        return self._look_at(ready)

    def _wait_in_episode(self, timeout: float | None) -> bool:
        """Wait while accept fails, or until it is known to work again."""
        if self._resume_at is not None:
            self._pause(timeout)
            return False
        if self._trying:  # and it has not failed again
            self._trying = False
            self._backoff.pause = 0.0
            return self.wait(timeout)
        self._trying = self._look_at(self._poller.wait(timeout))
        return self._trying

    def hold(self) -> None:
        """Take no request until :meth:`resume`: leave the listener alone, and what comes in the kernel's backlog."""
        if not self.held:
            self._resumed = False
            self.held = True
            if self._is_open and not self.stale:
                self._poller.unregister(self._listener)

    def resume(self) -> None:
        """End what :meth:`hold` began. Any thread may call it; without a hold it does nothing."""
        self._resumed = True
        if self.held:
            self.wake()

    def _wait_held(self, timeout: float | None) -> None:
        """Wait without the listener, unless the hold is over; watch it again when it is."""
        if not self._resumed:
            self._look_at(self._poller.wait(timeout))
        if self._resumed:
            self.held = False
            if self._resume_at is None:  # else accept fails, and the listener is left alone for that reason too
                self._watch_listener()

    def _watch_listener(self) -> None:
        """Watch the listener again, unless it was closed meanwhile: nothing will come then."""
        if self._server.fileno() == self._listener:
            self._poller.register(self._listener)

    def _look_at(self, ready: list[int]) -> bool:
        """Take note of what is ready beside the listener; return whether the listener is."""
        for fd in ready:
            if fd == self._wakeup.fileno():
                self._wakeup.clear()
                while self._calls:
                    self._calls.popleft()()
            elif fd in self._children:
                self._ended.add(self._children.pop(fd))
                self._poller.unregister(fd)
                os.close(fd)
            elif fd in self._watched:
                self._watched[fd]()
        return self._listener in ready

    def abandon(self) -> None:
        """Release, in a forked child, what it shares with its parent. The loop is not used again."""
        self._poller.close()
        self._wakeup.close()
        for pidfd in self._children:
            os.close(pidfd)
        self._children.clear()
        self._watched.clear()
        _loops.discard(self)
        paused.discard(self)
        self._is_open = False

    def _start_afresh(self) -> None:
        """Make a forked child that goes on in the loop independent of its parent, as it is in the stdlib."""
        self.abandon()
        self._resume_at = None
        self.held = False
        self.stale = False
        self.owner = threading.get_ident()
        self.open()

    def wake(self) -> None:
        """End the wait of the owner. A loop that is not open yet looks around before it waits."""
        if self._is_open and not self.stale:
            self._wakeup.set()

    def call(self, function: Callable[[], None]) -> None:
        """Have the owner call a function when it comes round. Any thread may call this, and a signal handler."""
        self._calls.append(function)
        self.wake()

    def accept_failed(self, error: OSError, own_accept: bool) -> None:
        """Leave the listener alone for a while if trying again at once would fail again.

        :param error: what ``get_request`` raised.
        :param own_accept: whether ``get_request`` is ours, not an override that raises for reasons of its own.
        """
        if own_accept and error.errno in UNUSABLE and self._server.fileno() < 0:
            # Closed by server_close() while it was served. Nothing will come; shutdown() still wakes the loop.
            self._poller.unregister(self._listener)
        elif error.errno in EXHAUSTED or (own_accept and error.errno in UNUSABLE):
            self._poller.unregister(self._listener)
            self._resume_at = time.monotonic() + self._backoff.failed(self._server, error)
            self._retry = self._trying = False
            paused.add(self)

    def _pause(self, timeout: float | None) -> None:
        """Wait without the listener, and watch it again when the pause is over."""
        assert self._resume_at is not None
        # The wake-up of a retry may have been seen already, by ended_children().
        left = 0.0 if self._retry else max(self._resume_at - time.monotonic(), 0.0)
        self._look_at(self._poller.wait(left if timeout is None else min(left, timeout)))
        if self._retry or time.monotonic() >= self._resume_at:
            self._resume_at = None
            paused.discard(self)
            self._watch_listener()

    def retry(self) -> None:
        """End a pause at once, because a descriptor has become free."""
        self._retry = True
        self.wake()

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Have ``call()`` called by the loop whenever ``fd`` can be read, until :meth:`unwatch`."""
        self._watched[fd] = call
        self._poller.register(fd)

    def unwatch(self, fd: int) -> None:
        """End what :meth:`watch` began, while ``fd`` is open still. Without it, does nothing."""
        if self._watched.pop(fd, None) is not None:
            self._poller.unregister(fd)

    def watch_child(self, pid: int) -> None:
        """End the wait when the child process ``pid`` ends, where the kernel can tell (pidfd_open(2))."""
        if not hasattr(os, "pidfd_open"):
            return
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return  # no descriptor left, or an old kernel: watches() tells that one child is not watched
        self._children[pidfd] = pid
        self._poller.register(pidfd)

    def watches(self, children: Set[int]) -> bool:
        """Return whether the end of each of these child processes ends the wait."""
        return children <= set(self._children.values())

    def ended_children(self, children: Set[int]) -> Set[int]:
        """Return those of the child processes that have ended, or may have: those that are not watched too."""
        if self.stale or not self._is_open:
            return children
        self._look_at(self._poller.wait(0))
        ended, self._ended = self._ended, set()
        # One that was found ended before, and was not collected then, is watched no longer.
        return ended & children if self.watches(children - ended) else children

    def close(self) -> None:
        """Release the descriptors and let go of the signals. Calling it again, or unopened, does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        _loops.discard(self)
        paused.discard(self)
        if self._holds_signals:
            self._holds_signals = False
            present = signal.set_wakeup_fd(-1)
            if present != self._wakeup.signal_fileno():
                signal.set_wakeup_fd(present)  # taken over by what a handler has started, such as an asyncio loop
        for pidfd in self._children:
            os.close(pidfd)
        self._children.clear()
        self._watched.clear()
        self._wakeup.close()
        self._poller.close()


class SelectorLoop:
    """The wait as the stdlib does it, a selector and a tick: for a ``_ServerSelector`` that was replaced.

    It has the interface of :class:`Loop` and needs no descriptor of its own.
    """

    ticks = True
    held = False  # a worker model that takes no more makes the loop's thread wait for it

    def __init__(self, server: Any, selector_class: Callable[[], selectors.BaseSelector]) -> None:
        self.owner = threading.get_ident()
        self.stopping = False
        self._server = server
        self._backoff = Backoff()
        self._failed = False
        self._watched: dict[int, Callable[[], None]] = {}
        self._selector_class = selector_class
        self._opened = contextlib.ExitStack()

    def open(self) -> None:
        """Watch the server. Raises what the selector raises."""
        self._selector = self._opened.enter_context(self._selector_class())
        self._selector.register(self._server, selectors.EVENT_READ)

    def wait(self, timeout: float | None) -> bool:
        """Wait for at most ``timeout`` seconds; return whether the listener is ready."""
        if not self._failed:
            self._backoff.pause = 0.0
        self._failed = False
        ready = self._selector.select(timeout)
        if not self._watched:
            return bool(ready)  # whatever a selector of somebody's own has put into it
        calls = [self._watched.get(key.fd) for key, _ in ready]
        for call in calls:
            if call is not None:
                call()
        return None in calls

    def wake(self) -> None:
        """Do nothing: the owner looks around every ``poll_interval``."""

    def accept_failed(self, error: OSError, own_accept: bool) -> None:
        """Sleep for a while if trying again at once would fail again."""
        if error.errno in EXHAUSTED or (own_accept and error.errno in UNUSABLE):
            self._failed = True
            time.sleep(self._backoff.failed(self._server, error))

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Have ``call()`` called by the loop whenever ``fd`` can be read, until :meth:`unwatch`."""
        self._watched[fd] = call
        self._selector.register(fd, selectors.EVENT_READ)

    def unwatch(self, fd: int) -> None:
        """End what :meth:`watch` began. Without it, does nothing."""
        if self._watched.pop(fd, None) is not None:
            self._selector.unregister(fd)

    def watch_child(self, pid: int) -> None:
        """Do nothing: children are looked for at every tick."""

    def watches(self, children: Set[int]) -> bool:
        """Return ``False``: no child ends the wait."""
        return False

    def ended_children(self, children: Set[int]) -> Set[int]:
        """Return ``children``: each of them may have ended."""
        return children

    def close(self) -> None:
        """Close the selector, if it was opened."""
        self._opened.close()


# The open loops of this process, and those of them that pause. Descriptors belong to the process: whichever
# server closes one may be the help of another.
_loops: set[Loop] = set()
paused: set[Loop] = set()


def retry_paused() -> None:
    """Let every loop that pauses for want of a descriptor try again. Any thread may call it."""
    for loop in list(paused):
        loop.retry()


def make_all_tick() -> None:
    """Have every loop of this process look around from now on, because setting its server's flag no longer wakes it."""
    for loop in list(_loops):
        loop.ticks = True
        loop.wake()


def new_loop(server: Any) -> Loop | SelectorLoop:
    """Return the loop with which ``server`` is to be served by the calling thread, not opened yet."""
    replaced = pollers.replaced_selector()
    return Loop(server) if replaced is None else SelectorLoop(server, replaced)


# Implementations of service_actions() for which an idle loop need not tick, each with the question whether that
# is so at this moment (``None``: it always is). Any other one is an override, which is called every poll_interval.
quiet_service_actions: dict[Any, Callable[[Any, Loop | SelectorLoop], bool] | None] = {}


def idle_timeout(server: Any, loop: Loop | SelectorLoop, poll_interval: float) -> float | None:
    """Return the seconds after which ``loop`` must look around although nothing happened (``None``: never)."""
    if loop.ticks:
        return poll_interval
    is_quiet = quiet_service_actions.get(getattr(server.service_actions, "__func__", None), _never)
    return None if is_quiet is None or is_quiet(server, loop) else poll_interval


def _never(server: Any, loop: Loop | SelectorLoop) -> bool:
    return False


@functools.cache
def watch_forks(after_in_child: Callable[[], None]) -> None:
    """Have a function called in the children of the next forks, from its first use on.

    Nothing is registered before it is needed: what a forked child runs costs it page faults.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=after_in_child)


def _after_fork_in_child() -> None:
    for loop in _loops:
        loop.stale = True
        # The child inherits the wake-up of Python's signals: a signal to the child would wake its parent.
        if loop._holds_signals:
            loop._holds_signals = False
            signal.set_wakeup_fd(-1)


STATE: Final = "_fastserve_state"  # the key in the server's __dict__


class State:
    """What a server remembers of its loops. It is made lazily: ``__init__`` may have been mocked away."""

    __slots__ = ("connections", "datagrams", "hubs", "loops", "meter", "opened", "shut_down", "socket_file")

    def __init__(self) -> None:
        self.loops: list[Loop | SelectorLoop] = []  # those that run, one for each thread in serve_forever
        self.shut_down = False  # whether shutdown() was ever called
        self.hubs: list[Any] = []  # in which requests run in greenlets, one for each thread in serve_forever
        self.meter: Any = None  # what the server counts, if it has a StatsMixIn: _meter.Meter
        self.connections = 0  # that run in greenlets, where their number is limited
        self.opened: Callable[[Loop | SelectorLoop], None] | None = None  # called with each loop that begins to wait
        self.datagrams: Any = None  # what a datagram server keeps: datagrams.Datagrams
        self.socket_file: Any = None  # that server_close() is to remove: sockets.SocketFile

    @staticmethod  # the bound method of a class method is one object more, in the turn of a forking server too
    def of(server: Any) -> State:
        """Return the state of ``server``, which may be any object with a ``__dict__``."""
        attributes = getattr(server, "__dict__", None)
        if attributes is None:
            return State()  # a stand-in with slots: nobody else will find its loops, but it can be served
        state: State | None = attributes.get(STATE)
        # setdefault, because two threads may come here at once and must get the same object.
        return attributes.setdefault(STATE, State()) if state is None else state

    def own_loop(self) -> Loop | SelectorLoop | None:
        """Return the loop that runs in the calling thread, or ``None``."""
        me = threading.get_ident()
        for loop in tuple(self.loops):  # while another one ends, and is removed, this one would be passed over
            if loop.owner == me:
                return loop
        return None

    def stop_loops(self) -> None:
        """Have all loops end, not only the first to see the flag. Any thread may call it, and a signal handler."""
        for loop in list(self.loops):
            loop.stopping = True
            loop.wake()


class ServingEvent(threading.Event):
    """``_BaseServer__is_shut_down``: an event that knows whether a ``serve_forever`` is going to set it.

    The stdlib's is unset before the first ``serve_forever`` as well as during one, so that ``shutdown()`` waits
    for ever where nothing is served. Every ``serve_forever``, also one that a program wrote itself after the
    stdlib's example, clears it at first.
    """

    _server: tuple[int, int] | None = None  # process and thread that cleared it last

    def __init__(self) -> None:
        super().__init__()
        self.made_in = os.getpid()  # the process in which the constructor of the server ran

    def clear(self) -> None:
        """Note who serves, and make threads wait."""
        self._server = (os.getpid(), threading.get_ident())
        super().clear()

    @property
    def must_be_awaited(self) -> bool:
        """Whether another thread of this process has begun to serve; if it has ended since, no wait is long."""
        return self._server is not None and self._server[0] == os.getpid() and self._server[1] != threading.get_ident()


def new_event() -> threading.Event:
    """Return the event of a new server. A ``threading`` put into ``socketserver`` makes one of its own."""
    names = vars(socketserver)["threading"]
    event: threading.Event = ServingEvent() if names is threading else names.Event()
    return event
