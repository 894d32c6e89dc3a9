"""The handlers under measurement: one source for the stdlib and for fastserve.

``python -m fastserve.bench.server IMPLEMENTATION WORKER bench/handlers.py:Echo`` serves one. Under ``stdlib`` the name
``fastserve`` below is the module ``socketserver`` itself.
"""

from __future__ import annotations

import socket

import fastserve as socketserver

AT_ONCE = 65536  # bytes received at a time, in all servers that can choose


class Echo(socketserver.BaseRequestHandler):
    """Send back what comes, until the client ends the connection."""

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def handle(self) -> None:
        while data := self.request.recv(AT_ONCE):
            self.request.sendall(data)


class Lines(socketserver.StreamRequestHandler):
    """Send back line after line."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line)


class TimedLines(Lines):
    """The same with a deadline for every wait."""

    timeout = 600  # seconds: longer than any run takes, so that those that only wait stay


class OneShot(socketserver.BaseRequestHandler):
    """Send back what comes first; the server then closes the connection."""

    def handle(self) -> None:
        self.request.sendall(self.request.recv(AT_ONCE))


class OneLine(socketserver.StreamRequestHandler):
    """Send back the first line; the server then closes the connection."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


class Datagram(socketserver.BaseRequestHandler):
    """Send back a datagram with the server's socket."""

    def handle(self) -> None:
        data, server_socket = self.request
        server_socket.sendto(data, self.client_address)


class DatagramFile(socketserver.DatagramRequestHandler):
    """Send back a datagram through ``rfile`` and ``wfile``."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.read())
