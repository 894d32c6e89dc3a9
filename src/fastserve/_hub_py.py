"""The Python twin of the greenlet hub: the same names as ``_hub``, and the source of their types and of their contract.

A hub runs the handlers of one thread, each in a greenlet. Whoever has to wait looks itself for what is to go on, and
switches straight to it; there is no loop in the middle that everything goes through. Waits are reached through
:mod:`selectors` by name at call time. Descriptors are watched while somebody waits for them, level-triggered.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import heapq
import itertools
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from greenlet import GreenletExit, getcurrent, greenlet

from fastserve import _core_py, _waiting

POOLED: Final = 512  # greenlets kept for later requests
BUDGET: Final = 32  # calls of the kernel that succeed until it is the turn of others

# What a forked child inherits of its parent's hubs. Were it collected there, the handlers would be ended in the child,
# and with them the connections of the parent.
_inherited: Final[list[Any]] = []


class Task:
    """What a greenlet of the hub does, and what it waits for.

    :ivar killed: whether its waits raise ``GreenletExit``.
    """

    def __init__(self, hub: Hub) -> None:
        self.killed = False
        self._hub = hub
        self._greenlet: greenlet
        self._function: Callable[..., object] | None = None
        self._arguments: tuple[Any, ...] | None = None
        self._deadline: float | None = None  # of the wait, time.monotonic()
        self._heap_deadline: float | None = None  # of its place in the heap of timers
        self._woken = False  # False while it waits for its turn, or has not begun
        self._queued = False
        self._timed_out = False
        self._ending = False
        self._begun = False
        self._parked = False  # or pooled; not while it runs, or has left for a greenlet of its own

    def _run(self) -> None:
        """Run requests, one after the other: the greenlet's life."""
        self._begun = True
        hub = self._hub
        while self._function is not None:
            try:
                # One that was killed before it began too, so that it releases what it was given: its waits raise.
                contextvars.Context().run(self._function, *self._arguments or ())
            except GreenletExit:
                pass
            except BaseException as error:
                hub._failure = error
            if hub.stale:
                # A child that a handler has forked, and whose handler has returned: with threads it would end here.
                os._exit(0)
            self._function = self._arguments = None
            self.killed = False
            hub._finished()
            if len(hub._pool) >= POOLED or self._ending or hub._has_ended:
                break
            hub._pool.append(self)
            while self._function is None and not self._ending:
                hub._park(self)  # again, if it was woken for a request that has ended
        del hub._tasks[self._greenlet]
        # The greenlet goes on in its parent, the root, which looks again what there is to do.


class _Watched:
    """Who waits for a descriptor."""

    def __init__(self) -> None:
        self.mask = 0  # with which the selector watches it
        self.for_root = False
        self.muted = False  # for the root, which waits for something else
        self.readers: list[Task] = []
        self.writers: list[Task] = []

    def wanted(self) -> int:
        reading = self.readers or (self.for_root and not self.muted)
        return (selectors.EVENT_READ if reading else 0) | (selectors.EVENT_WRITE if self.writers else 0)


class Hub:
    """The greenlets of one thread, and all that they wait for.

    The greenlet that makes it is its *root*, for which the hub is a poller: see ``_core_py.EpollPoller``. All methods
    are called by its thread, but for :meth:`post`, :meth:`forget`, :meth:`arguments` and :meth:`watch`.

    :ivar root: the task of the greenlet that made the hub.
    :ivar server: whose requests the tasks handle; the caller's to set.
    :ivar thread: that runs the hub; the caller's to set.
    :ivar executor: the threads of ``tasks.to_thread()``; its to set.
    :ivar owner: the identifier of that thread.
    :ivar active: how many tasks run.
    :ivar idle: whether the thread waits in the kernel.
    :ivar progress: a number that grows whenever somebody goes on.
    :ivar stale: whether this is a forked child, in which the hub of its parent cannot be used.
    :raises OSError: if there are not enough descriptors.
    """

    def __init__(self) -> None:
        self.server: Any = None
        self.thread: threading.Thread | None = None
        self.executor: Any = None
        self.owner = threading.get_ident()
        self.active = 0
        self.idle = False
        self.progress = 0
        self.stale = False
        self._has_ended = False
        self._selector = selectors.DefaultSelector()
        self._watched: dict[int, _Watched] = {}
        self._ready: deque[Task] = deque()
        self._ready_in_turn = 0
        self._timers: list[tuple[float, int, Task]] = []
        self._numbers = itertools.count()  # of timers, so that those of the same instant fire in their order
        self._pool: list[Task] = []
        self._tasks: dict[greenlet, Task] = {}
        self._root_ready: list[int] = []
        self._muted: set[int] = set()
        self._root_waits = False
        self._root_drains = False
        self._failure: BaseException | None = None
        self._posted: deque[Task] = deque()
        self._notified = False
        self._watcher: Any = None
        self._budget = BUDGET
        try:
            self._wakeup = _core_py.Wakeup()
        except BaseException:
            self._selector.close()
            raise
        self._wakeup_fd = self._wakeup.fileno()
        self.root = self._current = Task(self)
        self.root._greenlet = getcurrent()
        self.root._woken = True
        self._urgent: Task | None = None  # who is to go on before all others
        self._beginning: Task | None = None  # who the root is to switch to
        self.register(self._wakeup_fd)
        _waiting.hubs.append(self)

    # The life of a hub: its thread enters it, and connections wait in it until it is left.

    def enter(self) -> None:
        """Have the connections of this thread wait in this hub.

        :raises RuntimeError: if they wait in one already, or in another thread than that which made the hub.
        """
        if _waiting.local.hub is not None:
            raise RuntimeError("a hub runs in this thread already")
        if threading.get_ident() != self.owner:
            raise RuntimeError("a hub runs in the thread that has made it")
        _waiting.local.hub = self

    def leave(self) -> None:
        """End what :meth:`enter` began. Without it this does nothing."""
        if _waiting.local.hub is self:
            _waiting.local.hub = None

    def close(self) -> None:
        """Watch no more for the root. The tasks go on."""
        for fd in [fd for fd, watched in self._watched.items() if watched.for_root and fd != self._wakeup_fd]:
            self.unregister(fd)
        self._root_ready.clear()

    def end(self) -> None:
        """End the greenlets of the pool, and release the descriptors. Called by the root, when no task runs.

        Calling it again does nothing; in a forked child too, where nothing is the child's to release.
        """
        if self._has_ended or self.stale:
            return
        while self._pool:
            task = self._pool.pop()
            task._ending = True
            task._woken = True
            task._greenlet.switch()
        self._has_ended = True
        _waiting.hubs.remove(self)
        self._selector.close()
        self._wakeup.close()

    def forget_parent(self) -> None:
        """Use nothing of this hub again. Called in a forked child, which shares it with its parent."""
        self.stale = True
        self.leave()
        _inherited.append(self)

    # The interface of a poller, for the root.

    def register(self, fd: int) -> None:
        """Watch ``fd`` for reading. Raises ``ValueError`` if it is negative, ``OSError`` if the kernel refuses."""
        if fd < 0:
            raise ValueError(f"Invalid file descriptor: {fd}")
        watched = self._watched.setdefault(fd, _Watched())
        if watched.for_root:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        watched.for_root = True
        try:
            self._update(fd, watched)
        except BaseException:
            watched.for_root = False
            self._watched.pop(fd)
            raise

    def unregister(self, fd: int) -> None:
        """Stop watching ``fd``. Does nothing if it is not watched."""
        watched = self._watched.get(fd)
        if watched is not None and watched.for_root and not self.stale:
            watched.for_root = watched.muted = False
            self._muted.discard(fd)
            if fd in self._root_ready:
                self._root_ready.remove(fd)
            self._update(fd, watched)

    def wait(self, timeout: float | None = None) -> list[int]:
        """Return the readable descriptors of the root, after at most ``timeout`` seconds (``None``: endless).

        It may return early, with none. The tasks go on meanwhile. What one of them raises that is no ``Exception``,
        and what a signal handler raises while all wait, is raised here.
        """
        for fd in self._muted:
            self._watched[fd].muted = False
            self._update(fd, self._watched[fd])
        self._muted.clear()
        if not self._root_ready:
            self._root_waits = True
            try:
                self._park_until(self.root, _deadline(timeout))
            finally:
                self._root_waits = False
        found, self._root_ready = self._root_ready, []
        return found

    def wait_for_one(self, fd: int) -> bool:
        """Wait endlessly; return whether ``fd`` is ready, and no other descriptor of the root."""
        return self.wait() == [fd]

    def pending(self) -> int:
        """Return how many tasks may go on and wait for their turn, at about this moment. Any thread may call it."""
        return len(self._ready)

    # Tasks.

    def start(self, function: Callable[..., object], *arguments: Any) -> None:
        """Begin a task at once, in the calling greenlet's place; go on when it waits for the first time, or has ended.

        The task has a context of its own (:mod:`contextvars`), which is empty, as a thread has.
        """
        try:
            task = self._new_task(function, arguments)
            me = self._this()
            if self._urgent is not None:  # only one can be next
                self.wake(task)
                return
            me._woken = False
            self._urgent = me
            task._woken = True
            self._go_on(me, task)
            if me is self.root:
                self._raise_failure()
        except BaseException:
            self._mend()
            raise

    def spawn(self, function: Callable[..., object], *arguments: Any) -> None:
        """Begin a task when it is its turn. The calling greenlet goes on."""
        try:
            self.wake(self._new_task(function, arguments))
        except BaseException:
            self._mend()
            raise

    def _new_task(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> Task:
        if self._pool:
            task = self._pool.pop()
        else:
            task = Task(self)
            task._greenlet = greenlet(task._run, self.root._greenlet)
            self._tasks[task._greenlet] = task
        task._function = function
        task._arguments = arguments
        self.active += 1
        return task

    def _finished(self) -> None:
        self.active -= 1
        if self._failure is not None or (self._root_drains and self.active == 0):
            self.wake(self.root)

    def this(self) -> Task:
        """Return the task of the calling greenlet, for :meth:`wake` and :meth:`post`."""
        return self._this()

    def park(self, timeout: float | None = None) -> bool:
        """Wait for :meth:`wake` or :meth:`post`, for at most ``timeout`` seconds (``None``: endless).

        Return ``False`` if the time is over. It may return early: whoever waits for a condition looks again.

        :raises GreenletExit: if the task was killed.
        """
        me = self._this()
        self._park_until(me, _deadline(timeout))
        return not me._timed_out

    def wake(self, task: Task) -> None:
        """Let a task go on when it is its turn. Does nothing if it waits for nothing."""
        if not task._queued:
            task._queued = True
            self._ready.append(task)

    def post(self, task: Task) -> None:
        """Do what :meth:`wake` does, from any thread."""
        self._posted.append(task)
        if not self._notified:
            self._notified = True
            self._wakeup.set()

    def drain(self, timeout: float | None = None) -> bool:
        """Let the tasks go on until all have ended; return whether they have within the seconds. The root calls it."""
        deadline = _deadline(timeout)
        if self.stale:
            return True  # they are the parent's
        self._root_drains = True
        try:
            while self.active:
                self._park_until(self.root, deadline)
                if self.root._timed_out:
                    break
        finally:
            self._root_drains = False
        return self.active == 0

    def kill(self) -> None:
        """Have every wait of every task raise ``GreenletExit``, from now on, but for those of the calling task."""
        for task in self._tasks.values():
            if task._function is not None and task is not self._current:
                task.killed = True
                self.wake(task)

    def pace(self) -> None:
        """Count a call of the kernel that may not wait at all; let others have their turn after some of them."""
        self._budget -= 1
        if self._budget <= 0:
            me = self._this()
            if me is not self.root:
                self.wake(me)
                self._park(me)
            self._budget = BUDGET

    def arguments(self) -> tuple[Any, ...] | None:
        """Return the arguments of the task that runs, ``None`` if it has none. Any thread may call it."""
        return self._current._arguments

    def watch(self, watcher: Any) -> None:
        """Call ``watcher.set()``, once, when the hub goes on after a wait in the kernel. Any thread may call it."""
        self._watcher = watcher

    def _this(self) -> Task:
        mine = getcurrent()
        task = self._current
        if task._greenlet is mine:
            return task
        # A greenlet that a handler has made itself, or one that it has left for another and come back to.
        found = self.root if mine is self.root._greenlet else self._tasks.get(mine)
        if found is None:
            found = Task(self)
            found._greenlet = mine
        found._woken = True
        self._current = found
        return found

    def _raise_failure(self) -> None:
        error, self._failure = self._failure, None
        if error is not None:
            raise error

    def _mend(self) -> None:
        """Have all who wait look again.

        What a signal handler raises may have interrupted the hub between any two steps: it was to wake somebody, say,
        whom it had taken off the list already.
        """
        self._urgent = self._beginning = None
        self._tasks = {mine: task for mine, task in self._tasks.items() if not mine.dead}
        ours = {self.root, *self._tasks.values()}  # others are of greenlets that handlers have made
        self._ready = deque(task for task in self._ready if task not in ours)
        self._ready_in_turn = 0
        self._timers = [timer for timer in self._timers if timer[2] not in ours]
        heapq.heapify(self._timers)
        self.active = 0
        waiting = [task for task in self._tasks.values() if task._parked or not task._begun]
        self._pool = [task for task in waiting if task._function is None]
        for task in ours:
            task._queued = False
            task._heap_deadline = None
            self.active += task._function is not None
        for task in (self.root, *waiting):
            task._woken = task._greenlet is getcurrent()
            if task._function is not None or task is self.root:
                self.wake(task)
        for fd in set(self._selector.get_map()) - set(self._watched):
            self._selector.unregister(fd)
        for fd, watched in list(self._watched.items()):
            key = self._selector.get_map().get(fd)
            watched.mask = 0 if key is None else key.events
            with contextlib.suppress(OSError):  # closed by another thread; those who waited for it look again
                self._update(fd, watched)

    # Descriptors.

    def wait_io(self, sock: socket.socket, fd: int, writing: bool, deadline: float | None) -> None:
        """Wait until a socket may be written to, or read. It may return early: the caller tries, and waits again.

        :param fd: the descriptor of ``sock``.
        :param deadline: of :func:`time.monotonic`; ``None`` is endless.
        :raises TimeoutError: at the deadline.
        :raises GreenletExit: if the task was killed.
        :raises OSError: if the kernel does not watch the descriptor.
        """
        me = self._this()
        watched = self._watched.setdefault(fd, _Watched())
        waiting = watched.writers if writing else watched.readers
        try:
            waiting.append(me)
            self._update(fd, watched)
            if socket.socket.fileno(sock) != fd:
                return  # another thread has closed it meanwhile
            self._park_until(me, deadline)
        finally:
            if me in waiting:
                waiting.remove(me)
                if self._watched.get(fd) is watched and not self.stale:
                    self._update(fd, watched)
        if me._timed_out:
            raise TimeoutError("timed out")

    def expose(self, sock: socket.socket, fd: int) -> None:
        """Gather nothing for ``sock``, whose descriptor somebody has asked for. Nothing is gathered here."""

    def send_gathered(self) -> None:
        """Send what was gathered of earlier replies: nothing, where it is sent at once."""

    def forget(self, fd: int) -> None:
        """Let those who wait for ``fd`` look again: it is closed, or changes hands. Any thread may call it."""
        watched = self._watched.get(fd)
        if watched is None:
            return
        waiting = watched.readers + watched.writers
        watched.readers.clear()
        watched.writers.clear()
        if watched.for_root and fd != self._wakeup_fd:
            self.unregister(fd)
        elif not self.stale:
            self._update(fd, watched)
        for task in waiting:
            if threading.get_ident() == self.owner:
                self.wake(task)
            else:
                self.post(task)

    def _update(self, fd: int, watched: _Watched) -> None:
        """Have the selector watch a descriptor for what is waited for."""
        wanted = watched.wanted()
        before, watched.mask = watched.mask, wanted
        if wanted == before:
            return
        if not wanted and not watched.for_root:
            del self._watched[fd]
        try:
            if before:
                self._selector.unregister(fd)  # it passes over one that is closed
            if wanted:
                self._selector.register(fd, wanted)
        except BaseException:
            watched.mask = 0
            raise

    # Waiting.

    def _park_until(self, me: Task, deadline: float | None) -> None:
        me._timed_out = False
        if deadline is not None:
            me._deadline = deadline
            if me._heap_deadline is None or deadline < me._heap_deadline:
                self._set_timer(me, deadline)
        try:
            self._park(me)
        finally:
            me._deadline = None  # its place in the heap remains: mostly the next wait has a later deadline

    def _park(self, me: Task) -> None:
        """Let others go on until somebody wakes the calling greenlet."""
        if self.stale:
            raise RuntimeError("this process has forked and cannot go on with the greenlets of its parent")
        if self._has_ended:
            raise RuntimeError("the hub has ended")
        if me.killed:
            raise GreenletExit
        me._woken = False
        try:
            self._go_on(me)
            if me is self.root:
                self._raise_failure()
        except BaseException:
            if me is self.root:
                self._mend()
            raise
        if me.killed:
            raise GreenletExit

    def _go_on(self, me: Task, target: Task | None = None) -> None:
        """Let others go on, ``target`` first, until it is the turn of the calling greenlet."""
        me._parked = True
        while not me._woken:
            has_left = False
            try:
                if target is None:
                    target = self._next_task()
                if target is not me:
                    self._current = target
                    self.progress += 1
                    has_left = True  # a signal handler is called before this line, or when the greenlet is back
                    target._greenlet.switch()
            except BaseException as error:
                if has_left or me._woken or me is self.root:
                    me._parked = False
                    raise
                # Whoever happens to wait has nothing to do with what a signal handler raises: it is the root's.
                self._failure = error
                self._urgent = self.root
            finally:
                self._current = me
            target = None
        me._parked = False
        self._budget = BUDGET

    def _next_task(self) -> Task:
        """Return the task that is to go on, which is noted in it."""
        while True:
            if self._urgent is not None:
                task, self._urgent = self._urgent, None
                task._woken = True
                return task
            if self._beginning is not None:
                task, self._beginning = self._beginning, None
                task._woken = True
                return task
            while self._ready_in_turn:
                self._ready_in_turn -= 1
                task = self._ready.popleft()
                task._queued = False
                if not task._woken:
                    if not task._begun and self._current is not self.root:
                        # A new greenlet counts its recursion from where it begins: the root's place.
                        self._beginning = task
                        return self.root
                    task._woken = True
                    return task
            # Those that become ready meanwhile have their turn after the next look at the kernel's.
            if not self._collect():
                return self.root
            self._ready_in_turn = len(self._ready)

    def _collect(self) -> bool:
        """Ask the kernel for events, waiting for them if nothing is ready; ``False`` if the root is to raise."""
        timeout: float | None = None
        if self._ready or self._posted:
            timeout = 0.0
        elif self._timers:
            timeout = max(self._timers[0][0] - time.monotonic(), 0.0)
        self.progress += 1
        try:
            self.idle = True
            try:
                events = self._selector.select(timeout)
            finally:
                self.idle = False
                watcher, self._watcher = self._watcher, None
                if watcher is not None:
                    watcher.set()
            for key, mask in events:
                self._dispatch(key.fd, mask)
            if self._posted:
                self._take_posted()
            if self._timers:
                self._fire_timers()
        except BaseException as error:
            # Whoever happens to wait has nothing to do with it: it is the root's, as in a server without greenlets.
            self._failure = error
            self.root._woken = True
            return False
        return True

    def _dispatch(self, fd: int, mask: int) -> None:
        """Wake those who wait for what has happened."""
        watched = self._watched.get(fd)
        if fd == self._wakeup_fd:
            self._notified = True  # whatever its thread has seen meanwhile
            self._take_posted()
        elif watched is not None:
            if watched.for_root and mask & selectors.EVENT_READ and not watched.muted:
                if not self._root_waits:
                    # The root is busy with something else: without this the selector would tell it again and again.
                    watched.muted = True
                    self._muted.add(fd)
                else:
                    if fd not in self._root_ready:
                        self._root_ready.append(fd)
                    self.wake(self.root)
            woken = []
            if mask & selectors.EVENT_READ:
                woken += watched.readers
                watched.readers.clear()
            if mask & selectors.EVENT_WRITE:
                woken += watched.writers
                watched.writers.clear()
            for task in woken:
                self.wake(task)
            self._update(fd, watched)

    def _take_posted(self) -> None:
        if self._notified:
            # In this order: what is posted in between is found below, or sets the wake-up again.
            self._wakeup.clear()
            self._notified = False
        while self._posted:
            self.wake(self._posted.popleft())

    # The heap of timers. A task keeps its place when its wait is over; an earlier deadline gives it one more.

    def _set_timer(self, task: Task, deadline: float) -> None:
        heapq.heappush(self._timers, (deadline, next(self._numbers), task))
        task._heap_deadline = deadline  # last: it is true although a signal handler raised something before

    def _fire_timers(self) -> None:
        """Wake the tasks whose deadline has passed; find those a new place that have a later one by now."""
        moment = time.monotonic()
        while self._timers and self._timers[0][0] <= moment:
            place, _, task = heapq.heappop(self._timers)
            if place != task._heap_deadline:
                continue  # it has an earlier place, or had
            task._heap_deadline = None
            if task._deadline is None:
                continue
            if task._deadline > moment:
                self._set_timer(task, task._deadline)
            elif not task._queued:  # else what it waited for has come in time
                task._timed_out = True
                self.wake(task)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + min(max(timeout, 0.0), _core_py.MAX_WAIT)


def _after_fork_in_child() -> None:
    for hub in list(_waiting.hubs):
        if isinstance(hub, Hub):  # its C twin looks after its own
            hub.forget_parent()
            _waiting.hubs.remove(hub)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
