"""Several processes that serve the same address: worker processes, forked before there are requests."""

from __future__ import annotations

import os

from fastserve import _waiting
from fastserve._order import BeforeServer
from fastserve.draining import DrainMixIn, requests_of
from fastserve.workers import _worker
from fastserve.workers._following import following
from fastserve.workers._supervisor import Supervisor

ENDLESS = 1e9  # seconds

if hasattr(os, "fork"):

    class PreforkMixIn(DrainMixIn, BeforeServer):
        """Serve with several processes: ``class Server(PreforkMixIn, ThreadingTCPServer)``.

        It goes with each of the other mix-ins, which then handle the requests in each of the processes, with each kind
        of server, and with those of the stdlib: ``class Server(PreforkMixIn, GreenletMixIn, http.server.HTTPServer)``.
        What a handler changes in memory stays in its process.

        :meth:`serve_forever` forks the workers and watches over them: one that has ended is replaced. SIGTERM has the
        workers handle the requests that run, and :meth:`serve_forever` return; SIGINT, as ``KeyboardInterrupt``, and
        a second SIGTERM end them at once; SIGHUP replaces them one by one, while the listener stays open. A worker
        whose parent is gone ends as after SIGTERM.

        It is a :class:`DrainMixIn`: a worker that is to end closes the connections of idle clients, where their
        handlers have said that it may.

        :cvar workers: how many processes, at least 1; ``None``, the default, is one for each processor that may be
            used.
        :cvar reuse_port: whether each worker has a listener of its own (``SO_REUSEPORT``, socket(7)), between which the
            kernel spreads connections and datagrams; ``False`` by default. ``allow_reuse_port`` is true then.
        :cvar max_requests: requests after which a worker is replaced; ``None``, the default, is never.
        :cvar max_requests_jitter: at most so many more, at random, that they are not replaced all at a time; 0.
        :cvar worker_timeout: seconds in which the loop of a worker must go round, or it is killed and replaced;
            ``None``, the default, is endless. The loop of a server without other mix-in goes round between requests.
        :cvar graceful_timeout: seconds that a worker has to handle what runs when it is to end; 30 by default. It is
            given them whatever ``daemon_threads`` and ``block_on_close`` say.
        :cvar handle_signals: whether :meth:`serve_forever` handles SIGTERM and SIGHUP; ``True`` by default. It does so
            in the main thread, and where the program has no handlers of its own.
        """

        workers: int | None = None

        reuse_port = False

        max_requests: int | None = None

        max_requests_jitter = 0

        worker_timeout: float | None = None

        graceful_timeout: float = 30.0

        handle_signals = True

        def server_bind(self) -> None:
            """Bind the listener: see :meth:`TCPServer.server_bind`."""
            if self.reuse_port:
                self.allow_reuse_port = True
            super().server_bind()  # type: ignore[misc]

        def worker_started(self, place: int) -> None:
            """Do nothing. A worker calls it when it was forked, before it takes requests; may be overridden.

            What it raises ends the worker.

            :param place: which of the workers it is, from 0; the one that replaces it has the same.
            """

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            """Have the workers handle requests until :meth:`shutdown`, which any thread of the parent may call.

            The listener does not block any more then, nor afterwards: other processes may share it. A handler that
            calls ``shutdown()`` ends the workers too. ``service_actions()`` is called by the loop of
            each worker, and by this one, also while it waits for the workers to end.

            :raises ValueError: if ``workers`` is less than 1, or the server is closed.
            :raises RuntimeError: if :class:`GreenletMixIn` was named before this mix-in, or a greenlet calls it.
            """
            if _waiting.running() is not None:
                # The greenlets would be those of this process, and the workers would have none.
                raise RuntimeError("this process has greenlets already: name PreforkMixIn before GreenletMixIn")
            serve = following(__class__, self, "serve_forever")  # type: ignore[name-defined]
            with requests_of(self).serving(self) as may_serve:
                if may_serve:
                    Supervisor(self, serve, poll_interval).run()

        def drain(self, timeout: float | None = None) -> int:
            """Stop the workers, and wait for their end: see :meth:`DrainMixIn.drain`.

            In the parent the workers are told to end, as by SIGTERM, and have ``timeout`` in the place of
            ``graceful_timeout``. It returns how many had to be killed. In a worker, which is in a handler, it does
            what :meth:`shutdown` does there.
            """
            supervisor: Supervisor | None = vars(self).get(_worker.SUPERVISOR)
            if supervisor is None:
                return super().drain(timeout)
            requests = requests_of(self)
            supervisor.drain(ENDLESS if timeout is None else max(timeout, 0.0))
            requests.begin(self, None)
            if not requests.is_own_thread():
                requests.wait(self)
            return supervisor.killed

        def shutdown(self) -> None:
            """Stop :meth:`serve_forever`, and wait until the workers have handled what runs, and ended."""
            following(__class__, self, "shutdown")()  # type: ignore[name-defined]

        def handle_request(self) -> None:
            """Handle one request in this process: see :meth:`BaseServer.handle_request`."""
            following(__class__, self, "handle_request")()  # type: ignore[name-defined]

        def _handle_request_noblock(self) -> None:
            following(__class__, self, "_handle_request_noblock")()  # type: ignore[name-defined]
