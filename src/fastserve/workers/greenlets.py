"""A greenlet for each request, in one thread: blocking handlers, event-driven."""

from __future__ import annotations

import socket
import socketserver
import threading
from typing import Any

from fastserve import _backend, _waiting
from fastserve._loop import Loop, State, new_event
from fastserve.server import BaseServer, TCPServer, UDPServer
from fastserve.workers._following import IsShutDown, following
from fastserve.workers.threads import ThreadingMixIn

_std: Any = socketserver  # see server.py

_SHUTDOWN_REQUEST = "_BaseServer__shutdown_request"


class GreenletMixIn(ThreadingMixIn):
    max_connections: int | None = None

    slow_handler_seconds = 0.1

    _BaseServer__shutdown_request = vars(BaseServer)[_SHUTDOWN_REQUEST]

    _BaseServer__is_shut_down: Any = IsShutDown()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        serve = following(__class__, self, "serve_forever")  # type: ignore[name-defined]
        hub = _backend.hub().Hub()
        hub.server = self
        hub.enter()
        try:
            serve(poll_interval)
            hub.drain()
        finally:
            hub.leave()
            hub.end()

    def process_request(self, request: Any, client_address: Any) -> None:
        hub = _waiting.running()
        if hub is None or hub.server is not self:
            self.process_request_thread(request, client_address)
            return
        kind = type(request)
        if kind is socket.socket or kind is _backend.streams.Connection:
            request.__class__ = _backend.green().Connection
            request.settimeout(request.gettimeout())
        hub.start(_handle, self, request, client_address)

    def get_request(self) -> Any:
        get = following(__class__, self, "get_request")  # type: ignore[name-defined]
        if get.__func__ in (TCPServer.get_request,) and type(self.socket) is socket.socket and _waiting.running() is not None:
            return _backend.green().accept(self.socket)
        return get()


def _handle(server: Any, request: Any, client_address: Any) -> None:
    try:
        server.process_request_thread(request, client_address)
    except Exception as error:
        threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread())))


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
