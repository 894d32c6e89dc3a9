"""The graceful stop of a server: opt-in, by a mix-in.

What is known of a request begins where the loop hands it on, and ends where it is closed. The end of the input of a
connection is made by shutdown(2) with ``SHUT_RD``: whoever reads finds the end of the stream, as if the client had
closed, and what is under way to the client is not touched.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

from fastserve import _backend, sockets
from fastserve._loop import SHUTDOWN_REQUEST, State
from fastserve._order import BeforeServer
from fastserve._stdlib import FORKING, socketserver
from fastserve.server import BaseServer
from fastserve.workers._following import IsShutDown, following

REQUESTS: Final = "_fastserve_requests"  # the key in the server's __dict__

TICK: Final = 0.05  # seconds between two looks at the requests, while there are some that may be ended
SLOW_TICK: Final = 0.5  # seconds between two looks otherwise: for a time limit that another call has set meanwhile
QUIET: Final = 0.1  # seconds for which a handler is to be seen idle; it may just have received something

CUT: Final = 1.0  # seconds that are left to handlers to find out that their connections were cut

# There what the kernel has received can still be read after SHUT_RD; elsewhere it is dropped.
_KEEPS_RECEIVED: Final = sys.platform == "linux"


class DrainMixIn(BeforeServer):
    """Stop gracefully: ``class Server(DrainMixIn, ThreadingTCPServer)``, and :meth:`drain`.

    It is named before the worker mix-in, goes with each of them, with datagrams, and over the servers of the stdlib,
    and brings the loop with it. :class:`PreforkMixIn` is one itself.

    Handlers that run are waited for. A client that stays connected and is idle would be waited for as well: the
    handler says when its connection may be closed, by :class:`idle` or :class:`DrainHTTPMixIn`, or by an attribute of
    its class, ``drain_ends_input = True``. That one says that the end of the stream does no harm at any time: as soon
    as the server drains, its handlers find it after what has been received already. It may be in the middle of a
    request, as if a client had broken down.
    """

    _BaseServer__shutdown_request = vars(BaseServer)[SHUTDOWN_REQUEST]

    _BaseServer__is_shut_down: Any = IsShutDown()

    def drain(self, timeout: float | None = None) -> int:
        """Stop the server, and wait until its handlers have ended; return how many requests had to be cut off.

        Nothing is accepted any more, and the listener of a stream server is closed as soon as no loop uses it.
        Connections whose handlers wait for a request, and have said that they may be closed then, are. What is left
        after ``timeout`` is cut off: connections are shut down, greenlets are ended, children are killed. Handlers in
        threads have a second to find out; one that does something else goes on, and ``server_close()`` waits for it.

        The server cannot be served again: ``serve_forever()`` returns at once. Call ``server_close()`` afterwards.

        Any thread may call it, at any time, and again: all calls wait for the same end, the earliest time limit counts,
        and each returns the number of all that were cut off. In a thread that serves or handles a request, which is
        also that of a signal handler while the main thread serves, it does not wait, but returns the number up to then:
        the stop goes on beside it, and a call after ``serve_forever()`` waits for its end.

        :param timeout: seconds that handlers have; 0 cuts off at once, ``None``, the default, is endless.
        """
        requests = requests_of(self)
        requests.begin(self, timeout)
        if requests.is_own_thread():
            requests.drive(self)
        else:
            requests.wait(self)
        return requests.cut

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Handle requests until :meth:`shutdown` or :meth:`drain`: see :meth:`BaseServer.serve_forever`."""
        requests = requests_of(self)
        with requests.serving(self) as may_serve:
            if may_serve:
                following(DrainMixIn, self, "serve_forever")(poll_interval)

    def shutdown(self) -> None:
        """Stop :meth:`serve_forever`: see :meth:`BaseServer.shutdown`."""
        following(DrainMixIn, self, "shutdown")()

    def handle_request(self) -> None:
        """Handle one request: see :meth:`BaseServer.handle_request`."""
        following(DrainMixIn, self, "handle_request")()

    def _handle_request_noblock(self) -> None:
        following(DrainMixIn, self, "_handle_request_noblock")()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the request, and have it handled. The loop's thread calls it."""
        requests = requests_of(self)
        requests.add(request)
        if not isinstance(self, FORKING):
            super().process_request(request, client_address)  # type: ignore[misc]
            return
        # A child has its own handler before a signal comes to it.
        requests.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().process_request(request, client_address)  # type: ignore[misc]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, requests.mask)

    def finish_request(self, request: Any, client_address: Any) -> Any:
        """Have the request handled, and know by which thread. The worker's thread calls it."""
        requests_of(self).begin_request(self, request)
        return super().finish_request(request, client_address)  # type: ignore[misc]

    def close_request(self, request: Any) -> None:
        """Close a request, and forget it."""
        requests_of(self).remove(request)
        super().close_request(request)  # type: ignore[misc]


if _backend.turns is not None:
    _backend.turns.know({}, {DrainMixIn._handle_request_noblock})


class idle:
    """Say that a handler waits for the next request: the drain of its server may end its input.

    Within the block the handler waits for the first byte of a request, and does nothing else::

        while True:
            with fastserve.idle(self):
                data = self.request.recv(65536)
            if not data:
                break
            ...

    and, where there is an ``rfile``, ``self.rfile.peek(1)``, which takes nothing off it. It finds the end of the stream
    when the server drains. It costs no call of the kernel, and does nothing in a server without :class:`DrainMixIn`.
    The thread of the handler uses it.

    A request that arrives in the moment in which the input is ended may be found cut: some of it, and then the end of
    the stream. ``ended`` tells, after the block. Whoever must not handle such a request closes the connection
    without an answer; to the client it is one that was closed while idle, after which HTTP sends the request again (RFC
    9112, section 9.3.1).

    :param handler: the request handler, or any object with its attributes ``request`` and ``server``.
    """

    __slots__ = ("_entry", "_requests")

    def __init__(self, handler: Any) -> None:
        self._requests = _requests_without_making(handler.server)
        self._entry = None if self._requests is None else self._requests.find(handler.request)

    @property
    def ended(self) -> bool:
        """Whether the input was ended by the drain."""
        return self._entry is not None and self._entry.ended

    def __enter__(self) -> idle:
        if self._entry is not None and self._requests is not None:
            self._entry.turn += 1
            self._entry.idle = True
            if self._requests.draining:  # else whoever sets that finds that this one is idle
                self._requests.end_idle(self._entry)
        return self

    def __exit__(self, *error: object) -> None:
        if self._entry is not None and self._requests is not None:
            with self._requests.lock:
                self._entry.idle = False


class DrainHTTPMixIn:
    """Say that a handler of :mod:`http.server` waits for its next request::

        class Handler(fastserve.DrainHTTPMixIn, http.server.SimpleHTTPRequestHandler):

    A connection is closed while no byte of a request has come, kept or new, and never in the middle of one. Answers
    that begin while the server drains have ``Connection: close`` (RFC 9112, section 9.6). A request whose first bytes
    came in the very moment in which the connection was closed is not handled, nor is one that was pipelined: the client
    finds the connection closed, and sends the request again (section 9.3.1), as it has to with every server.
    """

    def handle_one_request(self) -> None:
        """Wait for a request, and handle it."""
        handler: Any = self
        peek = getattr(handler.rfile, "peek", None)
        if peek is not None:  # without a buffer nothing can be waited for that is not taken
            with idle(self) as waiting:
                try:
                    peek(1)
                except TimeoutError as error:  # what http.server does; reading again would raise something else
                    handler.log_error("Request timed out: %r", error)
                    handler.close_connection = True
                    return
            if waiting.ended:
                handler.close_connection = True
                return
        super().handle_one_request()  # type: ignore[misc]

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin an answer: the last one of its connection, if the server drains."""
        super().send_response(code, message)  # type: ignore[misc]
        handler: Any = self
        requests = _requests_without_making(handler.server)
        if requests is not None and requests.draining and code >= 200:
            handler.send_header("Connection", "close")


class _Entry:
    """What is known of a request."""

    __slots__ = ("cut", "ended", "idle", "request", "seen", "seen_at", "thread", "turn")

    def __init__(self, request: Any) -> None:
        self.request = request
        self.thread = 0  # that handles it; 0 before
        self.idle = False  # whether its handler waits for the next request, and may find the end of the stream
        self.turn = 0  # how often it began to
        self.seen = 0  # the turn in which it was seen idle first, and time.monotonic() of that
        self.seen_at = 0.0
        self.ended = False  # whether its input was ended
        self.cut = False


class Requests:
    """The requests of a server with :class:`DrainMixIn`, and how far its stop is. Any thread may use it.

    :ivar lock: guards the entries while something is done with their descriptors, that none is closed meanwhile. A
        signal handler may interrupt its holder, in the same thread.
    :ivar draining: whether the server is to stop.
    :ivar cut: how many requests were cut off.
    :ivar mask: the signals that the thread of a forking server blocked before the last fork.
    """

    def __init__(self) -> None:
        self.draining = False
        self.cut = 0
        self.mask: Any = set()
        self._deadline: float | None = None  # time.monotonic(): what is left then is cut off
        self._entries: dict[int, _Entry] = {}  # by the identity of the request
        self._serving: list[int] = []  # the threads in serve_forever()
        self._is_driven = False
        self._is_child = False  # of a forking server
        self._told: set[tuple[int, int]] = set()  # children, and the signals that they were sent
        self._begin_process()

    def _begin_process(self) -> None:
        self._process = os.getpid()
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)

    # The life of a request.

    def add(self, request: Any) -> None:
        """Remember a request that is handed on. The loop's thread calls it."""
        self._entries[id(request)] = _Entry(request)

    def find(self, request: Any) -> _Entry | None:
        """Return what is known of a request, ``None`` if nothing is."""
        return self._entries.get(id(request))

    def begin_request(self, server: Any, request: Any) -> None:
        """Note which thread handles a request."""
        entry = self.find(request)
        if entry is None:  # an override of process_request() has handled it in its own way
            entry = self._entries.setdefault(id(request), _Entry(request))
        entry.thread = threading.get_ident()
        if self._process != os.getpid() and isinstance(server, FORKING):
            self._begin_process()
            self._is_child = True
            self._is_driven = False
            signal.signal(signal.SIGTERM, lambda number, frame: self._on_term(server, number, frame))
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        if self.draining:
            self.look(server)
            if self._is_child:
                self.drive(server)

    def _on_term(self, server: Any, number: int, frame: FrameType | None) -> None:
        """Be told, in a child, that its parent drains."""
        self.draining = True
        _close_listener(server)  # as long as it is open anywhere, clients connect, and wait in vain
        self.drive(server)

    def remove(self, request: Any) -> None:
        """Forget a request, which is closed, and tell who waits for the last one."""
        if self._process != os.getpid():
            self._begin_process()  # a forked child: somebody may have held the lock
        with self.lock:
            self._entries.pop(id(request), None)
            if self.draining:
                self._changed.notify_all()

    # Serving.

    @contextlib.contextmanager
    def serving(self, server: Any) -> Iterator[bool]:
        """Note that the calling thread serves; yield whether it may."""
        with self.lock:
            if self.draining:
                may_serve = False
            else:
                may_serve = True
                self._serving.append(threading.get_ident())
        try:
            yield may_serve
        finally:
            if may_serve:
                with self.lock:
                    self._serving.remove(threading.get_ident())
                    self._loops_ended(server)
                    self._changed.notify_all()

    def _loops_ended(self, server: Any) -> None:
        if self.draining and not self._serving:
            _close_listener(server)

    # The stop.

    def begin(self, server: Any, timeout: float | None) -> None:
        """Have the server stop. It does not wait, and a signal handler may call it."""
        with self.lock:
            self.draining = True
            if timeout is not None:
                deadline = time.monotonic() + max(timeout, 0.0)
                self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        State.of(server).shut_down = True
        setattr(server, SHUTDOWN_REQUEST, True)
        if timeout is not None and timeout <= 0:
            self.cut_off(server)
        self.look(server)
        self._signal_children(server, signal.SIGTERM)

    def is_own_thread(self) -> bool:
        """Return whether the calling thread cannot wait for the end, because it serves or handles a request."""
        me = threading.get_ident()
        with self.lock:
            return me in self._serving or any(entry.thread == me for entry in self._entries.values())

    def drive(self, server: Any) -> None:
        """Have the stop go on, beside the caller, who may be a signal handler."""
        with self.lock:
            if self._is_driven:
                return
            self._is_driven = True
        # Not a threading.Thread: starting one takes a lock that who is interrupted by a signal may hold.
        _thread.start_new_thread(self.wait, (server,))

    def wait(self, server: Any) -> None:
        """Wait for the end, and cut off what is left at the time limit."""
        while True:
            with self.lock:
                self.look(server)
                self._loops_ended(server)
                self._signal_children(server, signal.SIGTERM)
                children = self._children_of(server)
                if not (self._serving or self._entries or children):
                    return
                seconds = TICK if children or self._have_idle() else SLOW_TICK
                if self._deadline is not None:
                    left = self._deadline - time.monotonic()
                    if left <= 0:
                        self.cut_off(server)
                    if left <= -CUT:
                        return
                    seconds = min(seconds, left if left > 0 else left + CUT)
                self._changed.wait(seconds)

    def wait_in_hub(self, server: Any, hub: Any, waits: bool) -> bool:
        """Let the greenlets of a hub go on, until they have ended; return whether those that are left may go on.

        The thread of the hub calls it, after its loop.

        :param waits: whether they are waited for although the server does not drain.
        """
        while hub.active:
            seconds = SLOW_TICK
            if self.draining:
                _close_listener(server)
                self.look(server, certain=True)  # they all wait, or have not begun
                if self._have_idle():
                    seconds = TICK
                if self._deadline is not None:
                    left = self._deadline - time.monotonic()
                    if left <= 0:
                        self.cut_off(server)
                        return False
                    seconds = min(seconds, left)
            elif not waits:
                return False
            hub.drain(seconds)
        return True

    def look(self, server: Any, certain: bool = False) -> None:
        """End the input of all connections of which the handlers have said that it may be.

        :param certain: whether no handler of the calling thread has received anything that it has not taken note of.
        """
        handler = server.RequestHandlerClass
        at_once = getattr(getattr(handler, "func", handler), "drain_ends_input", False)  # it may be a partial
        me = threading.get_ident()
        with self.lock:
            for entry in list(self._entries.values()):
                if at_once or (entry.idle and ((certain and entry.thread == me) or _is_quiet(entry))):
                    _end_input(entry, at_once)

    def _have_idle(self) -> bool:
        """Return whether there are handlers that wait for a request, and are to find the end of the stream."""
        return any(entry.idle and not entry.ended for entry in list(self._entries.values()))

    def end_idle(self, entry: _Entry) -> None:
        """End the input of a connection whose handler has just begun to wait for a request."""
        with self.lock:
            _end_input(entry, False)

    def cut_off(self, server: Any) -> None:
        """Cut off what is left."""
        # A forking server holds a request for a moment that its child, which is counted, has already.
        is_parent = isinstance(server, FORKING) and not self._is_child
        with self.lock:
            for entry in list(self._entries.values()):
                if not entry.cut:
                    entry.cut = True
                    self.cut += not (is_parent or entry.idle)  # one that is idle has no request
                    if isinstance(entry.request, socket.socket):
                        with contextlib.suppress(OSError):  # the client has gone
                            socket.socket.shutdown(entry.request, socket.SHUT_RDWR)
            self.cut += self._signal_children(server, getattr(signal, "SIGKILL", signal.SIGTERM))

    def _signal_children(self, server: Any, number: int) -> int:
        """Send a signal to the children of a forking server; return to how many for the first time.

        It is sent again and again: one that comes just before a call of the kernel does not interrupt it, and Python
        would see to it afterwards.
        """
        count = 0
        for pid in self._children_of(server):
            count += (pid, number) not in self._told
            self._told.add((pid, number))
            with contextlib.suppress(ProcessLookupError):  # somebody else has collected it
                os.kill(pid, number)
        return count

    def _children_of(self, server: Any) -> list[int]:
        """Return the children of a forking server that run; collect the others when no loop does so any more."""
        children: set[int] = getattr(server, "active_children", None) or set()
        if self._is_child:
            return []  # they are its parent's
        if not self._serving:
            for pid in list(children):
                try:
                    ended, _ = os.waitpid(pid, os.WNOHANG)
                    children.discard(ended)
                except ChildProcessError:
                    children.discard(pid)  # somebody else has, or nobody has to: SIGCHLD is ignored
        return list(children)


def _is_quiet(entry: _Entry) -> bool:
    """Return whether a handler has been seen idle for so long that it has received nothing.

    What it has received is not with the kernel any more, and it may have to wait for its turn to take note of it, or be
    interrupted by the signal handler that asks.
    """
    now = time.monotonic()
    if entry.seen != entry.turn:
        entry.seen = entry.turn
        entry.seen_at = now
    return now - entry.seen_at >= QUIET


def _end_input(entry: _Entry, at_once: bool) -> None:
    """Let the handler find the end of the stream; if not at once, then only while nothing has come."""
    request = entry.request
    if entry.ended or not isinstance(request, socket.socket):
        return
    try:
        if (at_once and _KEEPS_RECEIVED) or not _is_readable(request):
            # An idle client gets nothing any more: OpenSSL 3 would tell it that the end of the stream is an error.
            both = not at_once and _is_tls(request)
            # The method of ssl.SSLSocket would take away from under the handler what it uses.
            socket.socket.shutdown(request, socket.SHUT_RDWR if both else socket.SHUT_RD)
            entry.ended = True
    except OSError:
        pass  # the client has gone, which the handler finds out itself


def _is_tls(connection: socket.socket) -> bool:
    ssl = sys.modules.get("ssl")  # whoever has such a connection has imported it
    return ssl is not None and isinstance(connection, ssl.SSLSocket)


def _is_readable(connection: socket.socket) -> bool:
    descriptor = socket.socket.fileno(connection)  # a connection in a hub would take note of who asks for it
    if descriptor < 0:
        return True  # the handler has closed it, or given it away
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([descriptor], [], [], 0)[0])


def _close_listener(server: Any) -> None:
    """Have clients refused from now on. That of datagrams stays open: it sends the answers."""
    if not isinstance(server, socketserver.UDPServer):
        sockets.unlink(server)
        server.socket.close()


def requests_of(server: Any) -> Requests:
    """Return the requests of a server with :class:`DrainMixIn`."""
    attributes = vars(server)
    found: Requests | None = attributes.get(REQUESTS)
    # setdefault, because two threads, or a thread and a signal handler, may come here at once.
    return attributes.setdefault(REQUESTS, Requests()) if found is None else found


def _requests_without_making(server: Any) -> Requests | None:
    found: Requests | None = getattr(server, "__dict__", {}).get(REQUESTS)
    return found
