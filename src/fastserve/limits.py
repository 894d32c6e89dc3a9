"""Limits of what clients may take: opt-in, by a mix-in."""

from __future__ import annotations

import heapq
import socket
import sys
import threading
import time
import weakref
from typing import Any, Final

from fastserve import _lines
from fastserve._loop import Loop, State, watch_forks
from fastserve._order import BeforeServer

_KEY: Final = "_fastserve_limits"  # in the server's __dict__

MANY: Final = 100  # deadlines that are kept at most after their requests, beside as many as there are in all

REST: Final = 10.0  # seconds after which the thread that looks after deadlines ends, if there are none


class LimitsMixIn(BeforeServer):
    """Limit connections and the time that they take: ``class Server(LimitsMixIn, ThreadingTCPServer)``.

    It is named before the worker mix-in, goes with each of them and over the servers of the stdlib, and is for streams.
    With ``PreforkMixIn`` each process counts for itself. With ``ForkingMixIn`` a connection counts as long as it takes
    to fork the child: ``max_children`` is the limit there.

    :cvar max_connections: connections at a time, at least 1; further ones wait in the kernel's backlog. ``None``, the
        default, is unlimited.
    :cvar max_connections_per_client: connections at a time from one address, whatever the port; further ones are closed
        at once. ``None``, the default, is unlimited. Clients of Unix sockets have no address, and are not counted.
    :cvar request_timeout: seconds from the begin of a handler until its connection is shut down; it finds the end of
        the stream, or an error, in whatever it does with the connection next; such an error is not reported. ``None``,
        the default, is endless.
    :cvar idle_timeout: seconds that the client may take for each read and write, as ``StreamRequestHandler.timeout``,
        but for handlers of every class, and without a report. ``None``, the default, is endless.
    :cvar max_line: bytes that a line may have, with its newline, for handlers of every class: the first file that is
        made of the connection to read, ``rfile``, raises :exc:`LineTooLong` for a longer one, and that is reported.
        ``readline(size)`` is as without it, and so is every other read. ``None``, the default, is endless, as for the
        stdlib; the handlers of :mod:`http.server` give a size themselves.
    :ivar refused_connections: how many were closed because of ``max_connections_per_client``.
    :ivar overdue_requests: how many connections were shut down because of ``request_timeout``.
    """

    max_connections: int | None = None

    max_connections_per_client: int | None = None

    request_timeout: float | None = None

    idle_timeout: float | None = None

    max_line: int | None = None

    refused_connections = 0

    overdue_requests = 0

    def server_activate(self) -> None:
        """Listen. Raises ``ValueError`` if a limit makes no sense; the constructor closes the listener then."""
        for name in ("max_connections", "max_connections_per_client", "request_timeout", "idle_timeout", "max_line"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be greater than 0")
        super().server_activate()  # type: ignore[misc]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Count the connection, and refuse it if its client has too many. The loop's thread calls it."""
        limits = _limits_of(self)
        if not super().verify_request(request, client_address):  # type: ignore[misc]
            return False
        host = client_address[0] if isinstance(client_address, tuple) else None
        if not limits.begin(request, host, self.max_connections_per_client):
            with limits.lock:  # a server may have several loops
                self.refused_connections += 1
            meter = State.of(self).meter
            if meter is not None:
                meter.refuse(request, "max_connections_per_client")
            return False
        if self.max_connections is not None:
            loop = State.of(self).own_loop()
            if isinstance(loop, Loop):
                limits.hold(loop, self.max_connections)
        return True

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Handle the request within its limits. The worker's thread calls it."""
        if self.idle_timeout is not None:
            request.settimeout(self.idle_timeout)
        if self.max_line is not None:
            _lines.limit(request, self.max_line)
        try:
            if self.request_timeout is None:
                super().finish_request(request, client_address)  # type: ignore[misc]
            else:
                self._finish_in_time(request, client_address, self.request_timeout)
        finally:
            # Before the client sees the end: it may be back at once, and is not to be one too many then.
            _limits_of(self).end(request)

    def _finish_in_time(self, request: Any, client_address: Any, seconds: float) -> None:
        deadline = deadlines.add(seconds, request, self)
        try:
            super().finish_request(request, client_address)  # type: ignore[misc]
        except OSError as error:
            # It is counted. A report of each would let slow clients fill the log.
            if not (deadline.has_passed and _is_of_connection(error)):
                raise
        finally:
            deadlines.remove(deadline)
            meter = State.of(self).meter
            # Not when it is cut off: the thread that does so may have no time left in a child that ends then.
            if meter is not None and deadline.has_passed:
                meter.add(("request_timeout", 1))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what a handler has raised, unless it is that the client was idle for too long."""
        if not is_idle(self, request):
            super().handle_error(request, client_address)  # type: ignore[misc]

    def close_request(self, request: Any) -> None:
        """Close a connection, and count it no longer, also if no handler had it."""
        try:
            super().close_request(request)  # type: ignore[misc]
        finally:
            _limits_of(self).end(request)


def is_idle(server: Any, request: Any) -> bool:
    """Return whether the current exception is that of a client that was idle for longer than ``idle_timeout``."""
    limit = getattr(server, "idle_timeout", None)
    if limit is None or not isinstance(sys.exc_info()[1], TimeoutError):
        return False
    gettimeout = getattr(request, "gettimeout", None)
    return gettimeout is not None and gettimeout() == limit


class _Limits:
    """The connections of a server that are counted. Any thread may use it."""

    def __init__(self) -> None:
        watch_forks(_after_fork_in_child)
        _counted.add(self)
        self.begin_afresh()

    def begin_afresh(self) -> None:
        """Count from 0: what a forked child inherits are its parent's connections."""
        self.lock = threading.Lock()
        self._hosts: dict[int, Any] = {}  # by the identity of a request: where it came from
        self._counts: dict[Any, int] = {}  # by where they came from
        self._held: Loop | None = None
        self._most = 0

    def begin(self, request: Any, host: Any, most: int | None) -> bool:
        """Count a request; return whether there may be one more of its host."""
        with self.lock:
            if host is not None:
                count = self._counts.get(host, 0)
                if most is not None and count >= most:
                    return False
                self._counts[host] = count + 1
            self._hosts[id(request)] = host
        return True

    def hold(self, loop: Loop, most: int) -> None:
        """Have the loop of the calling thread take no more requests when there are so many."""
        with self.lock:
            if len(self._hosts) >= most:
                self._held = loop
                self._most = most
                loop.hold()

    def end(self, request: Any) -> None:
        """Count a request no longer, if it was counted."""
        with self.lock:
            host = self._hosts.pop(id(request), self)
            if host is self:
                return
            if host is not None:
                self._counts[host] -= 1
                if not self._counts[host]:
                    del self._counts[host]
            if self._held is not None and len(self._hosts) < self._most:
                self._held.resume()
                self._held = None


def _limits_of(server: Any) -> _Limits:
    limits: _Limits | None = vars(server).get(_KEY)
    # setdefault, because two threads may come here at once and must get the same object.
    return vars(server).setdefault(_KEY, _Limits()) if limits is None else limits


def _is_of_connection(error: OSError) -> bool:
    """Return whether a call of a connection raises this when the connection was shut down."""
    return isinstance(error, ConnectionError) or type(error).__module__ == "ssl"


class _Deadline:
    """When a connection is shut down. ``request`` is ``None`` when it was handled before."""

    __slots__ = ("at", "has_passed", "request", "server")

    def __init__(self, at: float, request: Any, server: Any) -> None:
        self.at = at
        self.has_passed = False
        self.request = request
        self.server = weakref.ref(server)
        self.has_passed = False

    def __lt__(self, other: _Deadline) -> bool:
        return self.at < other.at


class _Deadlines:
    """All deadlines of this process, and the daemon thread that looks after them while there are any."""

    def __init__(self) -> None:
        self.begin_afresh()

    def begin_afresh(self) -> None:
        """Forget all: a forked child has no such thread, and what was locked stays locked."""
        self._changed = threading.Condition()
        self._heap: list[_Deadline] = []
        self._removed = 0  # about as many of the heap were handled before their time
        self._thread: threading.Thread | None = None

    def add(self, seconds: float, request: Any, server: Any) -> _Deadline:
        """Have ``request`` shut down in that many seconds."""
        watch_forks(_after_fork_in_child)
        deadline = _Deadline(time.monotonic() + seconds, request, server)
        with self._changed:
            heapq.heappush(self._heap, deadline)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look_after, name="fastserve-deadlines", daemon=True)
                self._thread.start()
            elif self._heap[0] is deadline:
                self._changed.notify()
        return deadline

    def remove(self, deadline: _Deadline) -> None:
        """Forget a deadline: the request was handled."""
        deadline.request = None
        self._removed += 1
        if self._removed > MANY and self._removed > len(self._heap) // 2:
            with self._changed:
                self._heap = [other for other in self._heap if other.request is not None]
                heapq.heapify(self._heap)
                self._removed = 0

    def _look_after(self) -> None:
        while True:
            with self._changed:
                while self._heap and self._heap[0].request is None:
                    heapq.heappop(self._heap)
                left = self._heap[0].at - time.monotonic() if self._heap else REST
                if left > 0:
                    self._changed.wait(left)
                    if not self._heap:
                        self._thread = None
                        return
                    continue
                deadline = heapq.heappop(self._heap)
            _shut_down(deadline)
            del deadline


def _shut_down(deadline: _Deadline) -> None:
    request, server = deadline.request, deadline.server()
    if request is None or server is None:
        return
    deadline.has_passed = True
    try:
        # The method of ssl.SSLSocket would take away from under the handler what it uses at this moment.
        socket.socket.shutdown(request, socket.SHUT_RDWR)
    except OSError:
        deadline.has_passed = False
        return  # it is closed already
    server.overdue_requests += 1


deadlines: Final = _Deadlines()

_counted: Final[weakref.WeakSet[_Limits]] = weakref.WeakSet()  # those of all servers of this process


def _after_fork_in_child() -> None:
    deadlines.begin_afresh()
    for limits in list(_counted):
        limits.begin_afresh()
