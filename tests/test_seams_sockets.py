"""The sockets and files that servers and handlers hold: what real code replaces, wraps and hands around."""

from __future__ import annotations

import io
import os
import select
import socket
import socketserver
import ssl
import threading
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from seams_support import connect, handle_one, upper_handler
from support import serving, talk, wait_until

ADDRESS = ("127.0.0.1", 0)

# The listener


def test_the_listener_may_be_replaced_after_construction(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module), bind_and_activate=False) as server:
        server.socket.close()
        server.socket = socket.create_server(ADDRESS)
        server.server_address = server.socket.getsockname()
        assert handle_one(server) == b"LINE\n"
        with serving(server, 0.01):
            assert talk(server.server_address, b"again\n") == b"AGAIN\n"


def test_the_listener_may_be_wrapped_in_tls(module: ModuleType) -> None:
    def context(side: int) -> ssl.SSLContext:
        made = ssl.SSLContext(side)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            made.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")  # anonymous: needs no certificate
        except ssl.SSLError:
            pytest.skip("this OpenSSL has no anonymous cipher suites")
        return made

    requests: list[Any] = []

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            requests.append(self.request)
            super().handle()

    server = module.TCPServer(ADDRESS, Handler)
    server.socket = context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(server.socket, server_side=True)
    with serving(server, 0.01), connect(server) as plain:
        with context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain) as client:
            client.sendall(b"listener\n")
            assert client.recv(100) == b"LISTENER\n"
    assert isinstance(requests[0], ssl.SSLSocket)


class Wrapper:
    """A listener that is no ``socket.socket``, with the methods that a server needs, as pyOpenSSL's is."""

    def __init__(self, wrapped: socket.socket) -> None:
        self._wrapped = wrapped
        self.accepted = 0

    def accept(self) -> Any:
        self.accepted += 1
        request, address = self._wrapped.accept()
        return Wrapper(request), ("wrapped", address[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


@pytest.mark.parametrize("base", ["TCPServer", "ThreadingTCPServer"])
def test_the_listener_may_be_an_object_that_is_no_socket(module: ModuleType, base: str) -> None:
    seen: list[Any] = []

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            seen.append((type(self.request), self.client_address[0]))
            super().handle()

    server = getattr(module, base)(ADDRESS, Handler)
    server.socket = Wrapper(server.socket)
    with serving(server, 0.01):
        assert talk(server.server_address, b"wrapped\n") == b"WRAPPED\n"
    assert server.socket.accepted == 1
    assert seen == [(Wrapper, "wrapped")]


def test_the_accept_of_a_listener_derived_from_socket_is_used(module: ModuleType) -> None:
    class Listener(socket.socket):
        accepted = 0

        def accept(self) -> Any:
            self.accepted += 1
            return super().accept()

    with module.TCPServer(ADDRESS, upper_handler(module), bind_and_activate=False) as server:
        server.socket.close()
        server.socket = Listener(socket.AF_INET, socket.SOCK_STREAM)
        server.server_bind()
        server.server_activate()
        assert handle_one(server) == b"LINE\n"
        assert server.socket.accepted == 1


def test_the_listener_may_be_a_connection(module: ModuleType) -> None:
    """Serve the messages of one connection, each as a request, with a ``get_request`` that does not accept."""
    ours, theirs = socket.socketpair()
    messages: list[bytes] = []

    class Server(module.TCPServer):
        def get_request(self) -> Any:
            return self.socket.recv(100), "peer"

        def shutdown_request(self, request: Any) -> None:
            self._BaseServer__shutdown_request = len(messages) == 2

    def handle(request: Any, client_address: Any, server: Any) -> None:
        messages.append(request)
        if len(messages) == 1:
            theirs.sendall(b"two")

    with theirs, Server(ADDRESS, handle, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = ours
        theirs.sendall(b"one")
        server.serve_forever(0.01)
    assert messages == [b"one", b"two"]


def test_bind_goes_through_the_socket_object(module: ModuleType) -> None:
    server = module.TCPServer(("192.0.2.1", 80), None, bind_and_activate=False)
    server.socket.close()
    server.socket = mock.MagicMock()
    server.socket.getsockname.return_value = ("192.0.2.1", 8080)
    server.allow_reuse_address = True
    server.server_bind()
    server.server_activate()
    server.server_close()
    assert server.socket.mock_calls == [
        mock.call.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        mock.call.bind(("192.0.2.1", 80)),
        mock.call.getsockname(),
        mock.call.listen(socketserver.TCPServer.request_queue_size),
        mock.call.close(),
    ]
    assert server.server_address == ("192.0.2.1", 8080)


def test_bind_replaced_on_the_socket_class_is_used(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(self: socket.socket, address: Any) -> None:
        raise OSError(98, "mocked")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(OSError, match="mocked"):
        module.TCPServer(ADDRESS, None)


# The request


def run_in_handler(module: ModuleType, handle: Any, base: str = "StreamRequestHandler") -> Any:
    """Return the server of a handler whose ``handle`` is the given function."""
    return module.ThreadingTCPServer(ADDRESS, type("Handler", (getattr(module, base),), {"handle": handle}))


def test_the_request_is_a_real_socket_with_a_real_descriptor(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        request = self.request
        assert isinstance(request, socket.socket)
        assert request.fileno() > 2
        assert os.fstat(request.fileno())
        assert not os.get_inheritable(request.fileno())
        assert (request.family, request.type) == (socket.AF_INET, socket.SOCK_STREAM)
        assert request.getsockname() == self.server.server_address
        assert request.getpeername() == self.client_address
        assert request is self.connection
        request.sendall(b"real")

    with serving(run_in_handler(module, handle), 0.01) as server:
        assert talk(server.server_address, b"") == b"real"


def test_a_handler_may_wrap_the_request_in_tls(module: ModuleType) -> None:
    server_context, client_context = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    for context in (client_context, server_context):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")  # anonymous: needs no certificate
        except ssl.SSLError:
            pytest.skip("this OpenSSL has no anonymous cipher suites")

    def handle(self: Any) -> None:
        with server_context.wrap_socket(self.request, server_side=True) as encrypted:
            encrypted.sendall(encrypted.recv(100).upper())

    with serving(run_in_handler(module, handle, "BaseRequestHandler"), 0.01) as server, connect(server) as plain:
        with client_context.wrap_socket(plain) as client:
            client.sendall(b"wrapped")
            assert client.recv(100) == b"WRAPPED"


def test_select_works_on_the_request_and_on_rfile(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        assert self.rfile.fileno() == self.request.fileno() == self.wfile.fileno()
        assert select.select([self.request], [], [], 60)[0] == [self.request]
        assert select.select([self.rfile], [self.wfile], [], 60) == ([self.rfile], [self.wfile], [])
        assert self.rfile.read(3) == b"abc"
        self.wfile.write(b"selected")

    with serving(run_in_handler(module, handle), 0.01) as server:
        assert talk(server.server_address, b"abc") == b"selected"


def test_a_detached_request_outlives_its_handler(module: ModuleType) -> None:
    detached: list[int] = []

    def handle(self: Any) -> None:
        if not detached:
            detached.append(self.request.detach())

    with serving(run_in_handler(module, handle, "BaseRequestHandler"), 0.01) as server, connect(server) as client:
        wait_until(lambda: detached)
        server._threads.join()
        assert talk(server.server_address, b"") == b""  # another one comes and goes meanwhile
        with socket.socket(fileno=detached[0]) as kept:
            kept.sendall(b"kept")
            assert client.recv(10) == b"kept"


def test_a_duplicate_of_the_request_is_shut_down_with_it_but_stays_open(module: ModuleType) -> None:
    duplicates: list[socket.socket] = []

    def handle(self: Any) -> None:
        duplicates.append(self.request.dup())

    with serving(run_in_handler(module, handle), 0.01) as server, connect(server) as client:
        assert client.recv(1) == b""  # shut down, although a descriptor is open
        client.sendall(b"still read")
        with duplicates[0] as duplicate:
            duplicate.settimeout(60)
            assert duplicate.recv(100) == b"still read"


def test_a_server_may_keep_the_request_past_its_handler(module: ModuleType) -> None:
    """Override ``shutdown_request`` so that the connection lives on, as pynetdicom does."""
    kept: list[socket.socket] = []

    class Server(module.TCPServer):
        def shutdown_request(self, request: Any) -> None:
            kept.append(request)

    handlers: list[Any] = []

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            handlers.append(self)

    with serving(Server(ADDRESS, Handler), 0.01) as server, connect(server) as one, connect(server) as two:
        wait_until(lambda: len(kept) == 2)
        assert kept[0].fileno() != kept[1].fileno()
        assert handlers[0] is not handlers[1]
        assert [handler.request for handler in handlers] == kept
        for client, request in zip((one, two), kept, strict=True):
            with request:
                request.sendall(b"later")
                assert client.recv(10) == b"later"


# rfile, wfile


def test_wfile_writes_everything(module: ModuleType) -> None:
    size = 3_000_000  # more than the buffers of a connection hold

    def handle(self: Any) -> None:
        assert self.wfile.write(bytes(size)) == size

    with serving(run_in_handler(module, handle), 0.01) as server:
        assert len(talk(server.server_address, b"")) == size


def test_wfile_is_unbuffered_by_default(module: ModuleType) -> None:
    received = threading.Event()

    def handle(self: Any) -> None:
        self.wfile.write(b"at once")
        assert received.wait(60)

    with serving(run_in_handler(module, handle), 0.01) as server, connect(server) as client:
        assert client.recv(100) == b"at once"
        received.set()


def test_rfile_is_a_buffered_reader(module: ModuleType) -> None:
    seen: list[Any] = []

    def handle(self: Any) -> None:
        seen.append((type(self.rfile), self.rfile.readable(), self.rfile.writable(), self.rfile.mode))

    with serving(run_in_handler(module, handle), 0.01) as server:
        assert talk(server.server_address, b"") == b""
    assert seen == [(io.BufferedReader, True, False, "rb")]
