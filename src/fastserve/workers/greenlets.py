"""A greenlet for each request, all in one thread: handlers that block, served event-driven."""

from __future__ import annotations

import importlib
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from fastserve import _backend, _uncaught, _waiting, tls
from fastserve._loop import Loop, State
from fastserve._order import BeforeServer
from fastserve.draining import REQUESTS
from fastserve.server import ACCEPTING_GET_REQUESTS, BaseServer, TCPServer, UDPServer, own_get_requests
from fastserve.workers._following import IsShutDown, following
from fastserve.workers._watchdog import SLOW_HANDLER_SECONDS, Watchdog
from fastserve.workers.threads import ThreadingMixIn

TICK: Final = 0.05  # seconds between two looks at a hub, while another thread waits for its handlers


class GreenletMixIn(ThreadingMixIn, BeforeServer):
    """Handle each request in a greenlet: ``class Server(GreenletMixIn, TCPServer)``.

    The handlers are those of a threading server, unchanged, and all of them run in the thread of
    :meth:`serve_forever`. A handler that waits for its client (``recv``, ``rfile.readline``, a ``sendall`` that fills
    the kernel's buffer) lets others go on; so do :func:`fastserve.sleep` and :func:`fastserve.to_thread`. Anything else
    that blocks, such as ``time.sleep`` or the driver of a database, holds up all clients.

    The loop comes with the mix-in, also on a server of the stdlib:
    ``class Server(GreenletMixIn, http.server.HTTPServer)``. Where no ``serve_forever()`` runs, as in
    ``handle_request()`` or under a loop of the program's own, a request is handled at once, as by a server without
    mix-in. It needs the package greenlet: ``pip install "fastserve[greenlet]"``.

    :cvar max_connections: requests that are handled at a time, at least 1; further connections wait in the kernel's
        backlog. ``None``, the default, is unlimited.
    :cvar slow_handler_seconds: seconds after which a handler that lets nobody else go on is reported, with its stack,
        to the logger ``fastserve``; 0.1 by default, 0 never.
    :cvar block_on_close: whether requests that still run when :meth:`serve_forever` is to end are waited for; ``True``
        by default. Otherwise, and with ``daemon_threads``, they are ended: what they wait for raises ``GreenletExit``.
    """

    max_connections: int | None = None

    slow_handler_seconds = SLOW_HANDLER_SECONDS

    _BaseServer__shutdown_request = vars(BaseServer)["_BaseServer__shutdown_request"]

    _BaseServer__is_shut_down: Any = IsShutDown()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Handle requests until :meth:`shutdown`: see :meth:`BaseServer.serve_forever`.

        It then waits for the requests that still run, or ends them: ``block_on_close``. When it ends with an
        exception, such as ``KeyboardInterrupt``, :meth:`server_close` does that, in the same thread.

        :raises ImportError: if greenlet is not installed.
        :raises RuntimeError: in a handler that runs in a greenlet itself.
        """
        serve = following(__class__, self, "serve_forever")  # type: ignore[name-defined]
        hub = _hub_of(self)
        listener = _make_nonblocking(self)
        watchdog = Watchdog(self, hub)
        try:
            hub.enter()
            watchdog.start()
            try:
                serve(poll_interval)
                _end_requests(self, hub)
            except BaseException:
                if not _waits_for_requests(self):
                    _end_requests(self, hub)
                raise
            finally:
                watchdog.stop()
                hub.leave()
        finally:
            if not hub.stale:
                if listener is not None and listener.fileno() >= 0:
                    os.set_blocking(listener.fileno(), True)
                _release(self, hub)

    def shutdown(self) -> None:
        """Stop :meth:`serve_forever`: see :meth:`BaseServer.shutdown`. Requests that run are not waited for here."""
        following(__class__, self, "shutdown")()  # type: ignore[name-defined]

    def handle_request(self) -> None:
        """Handle one request to its end: see :meth:`BaseServer.handle_request`."""
        following(__class__, self, "handle_request")()  # type: ignore[name-defined]

    def _handle_request_noblock(self) -> None:
        following(__class__, self, "_handle_request_noblock")()  # type: ignore[name-defined]

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection that lets others go on while it waits; an override that follows is called as it is."""
        get_request: Callable[[], tuple[Any, Any]] = super().get_request  # type: ignore[misc]
        if getattr(get_request, "__func__", None) in ACCEPTING_GET_REQUESTS and _waiting.running() is not None:
            listener = self.socket  # type: ignore[attr-defined]
            if type(listener) is socket.socket:
                return _backend.green().accept(listener)  # type: ignore[no-any-return]
            if tls.is_listener(listener):
                return tls.accept(self, True)
        return get_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a greenlet handle the request: it begins at once, and the loop goes on when it waits for something.

        Where no :meth:`serve_forever` runs in the calling thread it is handled to its end.
        """
        hub = _waiting.running()
        if hub is None or hub.server is not self:
            self.process_request_thread(request, client_address)
            return
        if self.max_connections is None:
            start(hub, self, request, client_address)
        else:
            _start_counted(self, hub, request, client_address)

    def server_close(self) -> None:
        """Close the server, and wait for the requests that run if ``block_on_close`` says so, else end them.

        Called by a handler it does not wait.
        """
        super().server_close()
        for hub in list(State.of(self).hubs):
            if hub is _waiting.running():
                continue
            if hub.owner == threading.get_ident():
                hub.enter()
                try:
                    _end_requests(self, hub)
                finally:
                    hub.leave()
                    _release(self, hub)
            elif _waits_for_requests(self):
                while hub.active and hub.thread.is_alive():
                    hub.thread.join(TICK)


own_get_requests.add(GreenletMixIn.get_request)

_PROCESS_REQUEST: Final = GreenletMixIn.process_request

_PLAIN: Final = frozenset({socket.socket, _backend.streams.Connection})


def _hub_of(server: Any) -> Any:
    """Return the hub for a ``serve_forever`` of the calling thread: one that was left with requests, or a new one."""
    if _waiting.running() is not None:
        raise RuntimeError("serve_forever() was called by a handler that runs in a greenlet: it would never go on")
    hubs = State.of(server).hubs
    for hub in hubs:
        if hub.owner == threading.get_ident():
            return hub
    hub = _backend.hub().Hub()
    if _backend.turns is not None:
        green = _backend.green()
        _backend.turns.know_greenlets(type(hub), green.Connection, green.accept, green.end, _ended_by, _PROCESS_REQUEST)
    hub.server = server
    hub.thread = threading.current_thread()
    hubs.append(hub)
    return hub


def _release(server: Any, hub: Any) -> None:
    """Release what a hub holds, unless requests are left in it."""
    if not hub.active:
        State.of(server).hubs.remove(hub)
        if hub.executor is not None:
            hub.executor.shutdown(wait=False)
        hub.end()


def _make_nonblocking(server: Any) -> socket.socket | None:
    """Let the accept of a connection that another process has taken meanwhile fail, instead of waiting for the next."""
    listener: socket.socket | None = getattr(server, "socket", None)
    if listener is None or not (type(listener) is socket.socket or tls.is_listener(listener)):
        return None
    if listener.type != socket.SOCK_STREAM or listener.gettimeout() is not None:
        return None
    if listener.fileno() < 0 or not os.get_blocking(listener.fileno()):
        return None
    os.set_blocking(listener.fileno(), False)
    return listener


def _waits_for_requests(server: Any) -> bool:
    return bool(server.block_on_close and not server.daemon_threads)


def _end_requests(server: Any, hub: Any) -> None:
    """Wait for the requests of a hub, or end them."""
    waits = _waits_for_requests(server)
    requests = getattr(server, "__dict__", {}).get(REQUESTS)  # None without a DrainMixIn
    if requests is not None:
        waits = requests.wait_in_hub(server, hub, waits)
    if not waits:
        hub.kill()
    hub.drain()


def start(hub: Any, server: Any, request: Any, client_address: Any) -> None:
    """Have a greenlet of the hub handle a request."""
    _make_cooperative(request)
    hub.start(_process_request_greenlet(), server, request, client_address)


def _make_cooperative(request: Any) -> None:
    if type(request) in _PLAIN:
        _backend.green().adopt(request)
    elif type(request).__module__ == "ssl" or type(request) in tls.unfinished:
        tls.make_cooperative(request)


def _process_request_greenlet() -> Any:
    """Return what handles a request in its greenlet."""
    if _backend.turns is None:
        return process_request_greenlet
    return _backend.turns.process_request_greenlet


def process_request_greenlet(server: Any, request: Any, client_address: Any) -> None:
    """Handle a request in its greenlet. What comes out of it is told, as if it had ended a thread."""
    try:
        server.process_request_thread(request, client_address)
    except BaseException as error:
        _ended_by(error, request)


def _ended_by(error: BaseException, request: Any) -> None:
    """Deal with what has come out of a request, and would have ended its thread.

    In the main thread what is no ``Exception`` ends ``serve_forever()``, and is raised again: most likely it is of a
    signal handler, which runs in whatever the main thread is doing, such as closing this request.
    """
    # There is no greenlet without this module, and no need for it elsewhere.
    if isinstance(error, importlib.import_module("greenlet").GreenletExit):
        raise error
    if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
        if isinstance(request, socket.socket):
            request._io_refs = 0  # type: ignore[attr-defined]  # files that were not closed do not keep it open
            request.close()
        raise error
    _uncaught.report(error)


def _start_counted(server: Any, hub: Any, request: Any, client_address: Any) -> None:
    """Start a request, and leave the listener alone while there are as many as there may be."""
    limit = server.max_connections
    if limit < 1:
        raise ValueError("max_connections must be greater than 0")
    state = State.of(server)
    loop = state.own_loop()

    def handle(server: Any, request: Any, client_address: Any) -> None:  # arguments that the watchdog knows
        try:
            _process_request_greenlet()(server, request, client_address)
        finally:
            state.connections -= 1
            if isinstance(loop, Loop) and state.connections < limit:
                loop.resume()

    _make_cooperative(request)
    state.connections += 1
    hub.start(handle, server, request, client_address)
    if isinstance(loop, Loop) and state.connections >= limit:
        loop.hold()


if _backend.turns is not None:
    _backend.turns.know({}, {GreenletMixIn._handle_request_noblock, GreenletMixIn.get_request})


class GreenletTCPServer(GreenletMixIn, TCPServer):
    """A :class:`~fastserve.TCPServer` with a greenlet for each connection."""


class GreenletUDPServer(GreenletMixIn, UDPServer):
    """A :class:`~fastserve.UDPServer` with a greenlet for each datagram."""


if hasattr(socket, "AF_UNIX"):
    from fastserve.server import UnixDatagramServer, UnixStreamServer

    class GreenletUnixStreamServer(GreenletMixIn, UnixStreamServer):
        """A :class:`~fastserve.UnixStreamServer` with a greenlet for each connection."""

    class GreenletUnixDatagramServer(GreenletMixIn, UnixDatagramServer):
        """A :class:`~fastserve.UnixDatagramServer` with a greenlet for each datagram."""
