"""A limited number of threads, which are used again from request to request."""

from __future__ import annotations

import socket
import threading
import time
import weakref
from typing import Any, Final

from fastserve import _backend, datagrams, pollers
from fastserve._loop import SHUTDOWN_REQUEST, Loop, State
from fastserve._order import BeforeServer
from fastserve.server import BaseServer, TCPServer, UDPServer, request_timeout
from fastserve.workers._following import IsShutDown, following
from fastserve.workers._pool import Limits, Pool, default_workers
from fastserve.workers.threads import ThreadingMixIn, method_for_thread

POOL: Final = "_fastserve_pool"  # the key in the server's __dict__
TICK: Final = 0.05  # seconds between two looks at the flag, while a loop's thread waits inside process_request()


class ThreadPoolMixIn(ThreadingMixIn, BeforeServer):
    """Handle requests in threads that are used again: ``class Server(ThreadPoolMixIn, TCPServer)``.

    A thread is started when a request comes and all others are busy, up to ``max_workers``; then requests are
    queued. When the queue is full too, the loop leaves its listener alone: further connections wait in the
    kernel's backlog, where another process may take them, until a request is done.

    The threads are plainly reused, as those of :class:`concurrent.futures.ThreadPoolExecutor`: what a handler leaves
    in a :class:`threading.local` or in a context variable is there in later requests. A handler that waits for its
    client keeps a thread; kept connections need as many threads as there are clients.

    The loop comes with the mix-in, also on a server of the stdlib:
    ``class Server(ThreadPoolMixIn, http.server.HTTPServer)``.

    :cvar max_workers: threads, at least 1. ``None``, the default, is the number that ``ThreadPoolExecutor`` takes:
        the processors and 4 more, at most 32.
    :cvar max_queued: requests that wait for a thread, at least 0; 64 by default. Each one holds a descriptor.
    :cvar daemon_threads: whether the threads are daemons, ``False`` by default. The interpreter drops at its end
        what daemons have not done; otherwise it waits for the requests that run and are queued, never for idle threads.
    :cvar block_on_close: whether :meth:`server_close` waits for them, ``True`` by default. They are done in any case.
    """

    max_workers: int | None = None

    max_queued = 64

    _BaseServer__shutdown_request = vars(BaseServer)[SHUTDOWN_REQUEST]

    _BaseServer__is_shut_down: Any = IsShutDown()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Queue the request for ``process_request_thread()``, in one of the threads. The loop's thread calls it.

        Called when the queue is full, by a loop that is not fastserve's, it waits for a place; ``shutdown()`` ends
        this wait, and the request is queued beyond the limit.

        :raises ValueError: if ``max_workers`` or ``max_queued`` is too small.
        :raises RuntimeError: if there is no thread and none can be started. As long as there is one, the request waits
            for it.
        """
        pool = vars(self).get(POOL) or _pool_of(self)
        limits = _limits(self, pool)
        if pool.is_full(limits):
            _wait_for_place(self, pool, limits)
        if pool.submit((method_for_thread(self), request, client_address), limits, self.daemon_threads):
            loop = State.of(self).own_loop()
            if isinstance(loop, Loop):
                pool.hold(loop)

    def server_close(self) -> None:
        """Close the server, and wait for the requests that run or are queued if ``block_on_close`` says so.

        Idle threads end, the others when the queue is empty. Called by a handler, in one of the threads, it does not
        wait.
        """
        super().server_close()
        pool = _pool_of(self)
        pool.end()
        if self.block_on_close:
            pool.join()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Handle requests until :meth:`shutdown`: see :meth:`BaseServer.serve_forever`."""
        following(ThreadPoolMixIn, self, "serve_forever")(poll_interval)

    def shutdown(self) -> None:
        """Stop :meth:`serve_forever`: see :meth:`BaseServer.shutdown`. Queued requests are still done."""
        following(ThreadPoolMixIn, self, "shutdown")()

    def handle_request(self) -> None:
        """Wait for a place and a request, both in ``timeout`` seconds: see :meth:`BaseServer.handle_request`."""
        handle_request = following(ThreadPoolMixIn, self, "handle_request")
        pool = _pool_of(self)
        limits = _limits(self, pool)
        if handle_request.__func__ is not BaseServer.handle_request or not pool.is_full(limits):
            handle_request()
            return
        timeout = request_timeout(self)
        deadline = None if timeout is None else time.monotonic() + timeout
        if pool.wait_for_place(limits, timeout):
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if datagrams.are_kept(self) or pollers.wait_for_request(self, left):
                self._handle_request_noblock()
                return
        self.handle_timeout()  # type: ignore[attr-defined]

    def _handle_request_noblock(self) -> None:
        following(ThreadPoolMixIn, self, "_handle_request_noblock")()


def _pool_of(server: Any) -> Pool:
    """Return the pool of ``server``, which is made when it is first asked for."""
    attributes = vars(server)
    pool: Pool | None = attributes.get(POOL)
    if pool is None:
        made = Pool(type(server).__name__, default_workers())
        pool = attributes.setdefault(POOL, made)  # two threads may come here at once and must get the same one
        if pool is made:
            # Idle threads of a server that nobody has closed end with it.
            weakref.finalize(server, pool.end).atexit = False
    return pool


def end_pool(server: Any) -> list[threading.Thread]:
    """Have the threads of the pool of ``server`` end, as ``server_close()`` does; return them. It may have no pool."""
    pool: Pool | None = vars(server).get(POOL)
    if pool is None:
        return []
    pool.end()
    return pool.threads()


def _limits(server: Any, pool: Pool) -> Limits:
    """Return the limits of the pool of ``server``. Raises ``ValueError``."""
    asked = server.max_workers, server.max_queued
    if asked != pool.asked:
        workers: int = pool.default_workers if server.max_workers is None else server.max_workers
        if workers < 1:
            raise ValueError("max_workers must be greater than 0")
        if server.max_queued < 0:
            raise ValueError("max_queued must not be negative")
        pool.limits = Limits(workers, server.max_queued)
        pool.asked = asked
    return pool.limits


def _wait_for_place(server: Any, pool: Pool, limits: Limits) -> None:
    """Wait until there is a place, or the loop of the calling thread is to stop."""
    loop = State.of(server).own_loop()
    while not pool.wait_for_place(limits, TICK):
        if getattr(server, SHUTDOWN_REQUEST, False) or (loop is not None and loop.stopping):
            return


if _backend.turns is not None:
    _backend.turns.know({}, {ThreadPoolMixIn._handle_request_noblock})


class ThreadPoolTCPServer(ThreadPoolMixIn, TCPServer):
    """A :class:`~fastserve.TCPServer` with a pool of threads for its connections."""


class ThreadPoolUDPServer(ThreadPoolMixIn, UDPServer):
    """A :class:`~fastserve.UDPServer` with a pool of threads for its datagrams."""


if hasattr(socket, "AF_UNIX"):
    from fastserve.server import UnixDatagramServer, UnixStreamServer

    class ThreadPoolUnixStreamServer(ThreadPoolMixIn, UnixStreamServer):
        """A :class:`~fastserve.UnixStreamServer` with a pool of threads for its connections."""

    class ThreadPoolUnixDatagramServer(ThreadPoolMixIn, UnixDatagramServer):
        """A :class:`~fastserve.UnixDatagramServer` with a pool of threads for its datagrams."""
