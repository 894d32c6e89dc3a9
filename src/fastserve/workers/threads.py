"""A thread for each request."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from fastserve import _backend, tls
from fastserve._annotations import Any, Final
from fastserve._stdlib import socketserver
from fastserve.server import TCPServer, UDPServer
from fastserve.workers import _reuse
from fastserve.workers._past import past

_std: Any = socketserver  # see server.py

_STDLIB_THREADS: Any = _std._Threads
_NoThreads: Any = _std._NoThreads


_BEGIN: Final = 1.0  # seconds that threads may take to begin
_TICK: Final = 0.0001  # seconds between two looks at one
_FEW: Final = 16  # ended threads that are kept at most, beside as many as run


class _Threads(_STDLIB_THREADS):  # type: ignore[misc]
    """The threads of a server that are no daemons, for ``server_close()`` to join; ``len()`` counts them."""

    # How many there may be until those that have ended are looked for: twice what was left the last time, so that the
    # cost for each request does not grow with their number.
    _reap_at = 0

    def append(self, thread: threading.Thread) -> None:
        """Add a thread, unless it is a daemon. Those that have ended are forgotten from time to time."""
        if not thread.daemon:
            if list.__len__(self) >= self._reap_at:
                self.reap()
                self._reap_at = 2 * list.__len__(self) + _FEW
            list.append(self, thread)

    def __len__(self) -> int:
        """Return how many threads run. Any thread may call it, and it takes none off the list.

        A thread that is used again is waited for until it has begun, as in the stdlib its start would have been.
        """
        threads = self[:]
        deadline = time.monotonic() + _BEGIN
        for thread in threads:
            while not getattr(thread, "has_begun", True) and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(_TICK)
        return sum(thread.ident is None or thread.is_alive() for thread in threads)

    def pop_all(self) -> list[threading.Thread]:
        """Remove and return all threads."""
        threads: list[threading.Thread]
        self[:], threads = [], self[:]
        return threads

    def join(self) -> None:
        """Wait for all threads. One that could not be started is passed over; the stdlib raises for it."""
        for thread in self.pop_all():
            if thread.ident is not None:
                thread.join()

    def reap(self) -> None:
        """Forget the threads that have ended."""
        self[:] = (thread for thread in self if thread.is_alive())


def method_for_thread(server: Any) -> Callable[[Any, Any], object]:
    """Return what a thread calls with a request and its address: ``process_request_thread``, or what does the same."""
    if _backend.turns is None:
        method: Callable[[Any, Any], object] = server.process_request_thread
    else:
        method = _backend.turns.method_for_thread(server)
    return method


class ThreadingMixIn(socketserver.ThreadingMixIn):
    """Handle each request in a thread of its own: ``class Server(ThreadingMixIn, TCPServer)``.

    :cvar daemon_threads: whether the threads are daemons, which the interpreter does not wait for at its end;
        ``False`` by default.
    :cvar block_on_close: whether :meth:`server_close` waits for the threads that are no daemons; ``True`` by
        default.
    :cvar reuse_threads: whether an operating-system thread may handle one request after the other; ``True`` by
        default. ``threading`` shows a new thread for each request in any case.
    :cvar handshake_timeout: seconds that a client may take for the handshake, where the listener was wrapped by
        ``ssl.SSLContext.wrap_socket``; 10 by default, ``None`` is endless. The thread does the handshake before it
        handles the request. One that fails is not reported, as in the stdlib.
    """

    daemon_threads = False

    block_on_close = True

    reuse_threads = True

    handshake_timeout: float | None = tls.HANDSHAKE_TIMEOUT

    _threads = _NoThreads()

    @tls.finishes_handshakes
    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a request, and its errors, in its thread. It may be overridden on the class or an instance."""
        try:
            if type(request) not in tls.unfinished or tls.finish_handshake(request):
                self.finish_request(request, client_address)  # type: ignore[attr-defined]
        except Exception:
            self.handle_error(request, client_address)  # type: ignore[attr-defined]
        finally:
            self.shutdown_request(request)  # type: ignore[attr-defined]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread handle the request. The loop's thread calls it.

        An operating-system thread that has ended its request waits for the next one for a while. Where there is none,
        or where it is not allowed (``reuse_threads``) or not possible (without the C extensions, under gevent, in
        a debugger), a new one is started.

        :raises RuntimeError: if no thread can be started; the loop then gives it to ``handle_error`` and closes
            the request.
        """
        if self.block_on_close and "_threads" not in vars(self):
            vars(self).setdefault("_threads", _Threads())  # two threads may come here at once
        thread: threading.Thread
        # On a class of the stdlib, under patch(), there is no attribute of that name.
        if getattr(self, "reuse_threads", True) and _reuse.is_possible():
            thread = _reuse.RequestThread(method_for_thread(self), (request, client_address), bool(self.daemon_threads))
        else:
            thread = _std.threading.Thread(target=self.process_request_thread, args=(request, client_address))
            thread.daemon = self.daemon_threads
        self._threads.append(thread)
        thread.start()

    def server_close(self) -> None:
        """Close the server, and wait for the threads if ``block_on_close`` says so. Idle threads end."""
        past(__class__, socketserver.ThreadingMixIn, self).server_close()  # type: ignore[name-defined]
        self._threads.join()
        _reuse.end_idle_threads()


if _backend.turns is not None:
    _backend.turns.know({"process_request_thread": ThreadingMixIn.process_request_thread})


class ThreadingTCPServer(ThreadingMixIn, TCPServer, socketserver.ThreadingTCPServer):
    """A :class:`~fastserve.TCPServer` with a thread for each connection."""


class ThreadingUDPServer(ThreadingMixIn, UDPServer, socketserver.ThreadingUDPServer):
    """A :class:`~fastserve.UDPServer` with a thread for each datagram."""


if hasattr(socket, "AF_UNIX"):
    from fastserve.server import UnixDatagramServer, UnixStreamServer

    class ThreadingUnixStreamServer(ThreadingMixIn, UnixStreamServer, socketserver.ThreadingUnixStreamServer):
        """A :class:`~fastserve.UnixStreamServer` with a thread for each connection."""

    class ThreadingUnixDatagramServer(ThreadingMixIn, UnixDatagramServer, socketserver.ThreadingUnixDatagramServer):
        """A :class:`~fastserve.UnixDatagramServer` with a thread for each datagram."""
