"""A thread for each request."""

from __future__ import annotations

import socket
import socketserver
import threading
from typing import Any

from fastserve.server import TCPServer, UDPServer
from fastserve.workers._past import past

_std: Any = socketserver  # see server.py

_STDLIB_THREADS: Any = _std._Threads
_NoThreads: Any = _std._NoThreads


class _Threads(_STDLIB_THREADS):  # type: ignore[misc]
    """The threads of a server that are no daemons, for ``server_close()`` to join; ``len()`` counts them."""

    def append(self, thread: threading.Thread) -> None:
        """Add a thread, unless it is a daemon, and forget those that have ended."""
        self.reap()
        if not thread.daemon:
            list.append(self, thread)

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


class ThreadingMixIn(socketserver.ThreadingMixIn):
    """Handle each request in a thread of its own: ``class Server(ThreadingMixIn, TCPServer)``.

    :cvar daemon_threads: whether the threads are daemons, which the interpreter does not wait for at its end;
        ``False`` by default.
    :cvar block_on_close: whether :meth:`server_close` waits for the threads that are no daemons; ``True`` by
        default.
    """

    daemon_threads = False

    block_on_close = True

    _threads = _NoThreads()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a request, and its errors, in its thread. It may be overridden on the class or an instance."""
        try:
            self.finish_request(request, client_address)  # type: ignore[attr-defined]
        except Exception:
            self.handle_error(request, client_address)  # type: ignore[attr-defined]
        finally:
            self.shutdown_request(request)  # type: ignore[attr-defined]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request. The loop's thread calls it.

        :raises RuntimeError: if no thread can be started; the loop then gives it to ``handle_error`` and closes
            the request.
        """
        if self.block_on_close:
            vars(self).setdefault("_threads", _Threads())
        thread = _std.threading.Thread(target=self.process_request_thread, args=(request, client_address))
        thread.daemon = self.daemon_threads
        self._threads.append(thread)
        thread.start()

    def server_close(self) -> None:
        """Close the server, and wait for the threads if :attr:`block_on_close` says so."""
        past(__class__, socketserver.ThreadingMixIn, self).server_close()  # type: ignore[name-defined]
        self._threads.join()


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
