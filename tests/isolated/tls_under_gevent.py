"""Serve with ``TLSMixIn`` under gevent's monkey-patching: ``tls_under_gevent VARIANT before|after`` the import."""

from __future__ import annotations

import sys

import gevent.monkey

if sys.argv[2] == "before":
    gevent.monkey.patch_all()

from isolated import harness  # noqa: E402

module = harness.module_under_test()

if sys.argv[2] == "after":
    gevent.monkey.patch_all()

import socket  # noqa: E402
import ssl  # noqa: E402

import gevent  # noqa: E402

from tls_support import ask, client_context, server_context  # noqa: E402


class Upper(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


context = client_context(sslsocket_class=ssl.SSLSocket)  # that of gevent

for name in ("TCPServer", "ThreadingTCPServer", "ThreadPoolTCPServer"):

    class Server(module.TLSMixIn, getattr(module, name)):  # type: ignore[misc, name-defined]
        ssl_context = server_context()
        handshake_timeout = 0.05 if name == "TCPServer" else 30.0

    with Server(("127.0.0.1", 0), Upper) as server, gevent.Timeout(60):
        serving = gevent.spawn(server.serve_forever, 0.01)
        with socket.create_connection(server.server_address) as silent:
            if name == "TCPServer":
                assert silent.recv(1) == b""
                server.handshake_timeout = 30.0
            assert ask(server, context=context) == b"HELLO\n"
        server.shutdown()
        serving.get()
