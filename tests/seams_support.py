"""What the tests of the seams share: a handler, and one request in the calling thread."""

from __future__ import annotations

import socket
from types import ModuleType
from typing import Any


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address, timeout=60)


def upper_handler(module: ModuleType) -> Any:
    """Return a handler that answers a line in capitals."""

    class Upper(module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    return Upper


def handle_one(server: Any, sent: bytes = b"line\n") -> bytes:
    """Let the server handle one connection of ours in this thread; return what it answers."""
    with connect(server) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        server.handle_request()
        answer = b""
        while data := client.recv(65536):
            answer += data
        return answer
