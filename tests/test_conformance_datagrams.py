"""The datagram servers and their handler."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support import serving

ADDRESS = ("127.0.0.1", 0)


def echo_handler(module: ModuleType) -> Any:
    """Return a handler that answers a datagram in capitals."""

    class Upper(module.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read().upper())

    return Upper


@contextlib.contextmanager
def udp_client(family: int = socket.AF_INET, name: Any = None) -> Iterator[socket.socket]:
    """Give a datagram socket, bound if it gets a name."""
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(60)
        if name is not None:
            client.bind(name)
        yield client


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory current in which the names of Unix sockets are short enough."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_request_is_the_data_and_the_listener(module: ModuleType) -> None:
    with module.UDPServer(ADDRESS, None) as server, udp_client() as client:
        client.sendto(b"payload", server.server_address)
        request, client_address = server.get_request()
        assert type(request) is tuple
        assert request[0] == b"payload"
        assert type(request[0]) is bytes
        assert request[1] is server.socket
        assert client_address == ("127.0.0.1", client.getsockname()[1])


@pytest.mark.parametrize("base", ["UDPServer", "ThreadingUDPServer"])
@pytest.mark.parametrize("size", [0, 1, 1000, 8192])
def test_a_datagram_is_answered(module: ModuleType, base: str, size: int) -> None:
    with serving(getattr(module, base)(ADDRESS, echo_handler(module)), 0.01) as server, udp_client() as client:
        client.sendto(b"a" * size, server.server_address)
        assert client.recv(10_000) == b"A" * size


def test_a_handler_that_writes_nothing_answers_with_an_empty_datagram(module: ModuleType) -> None:
    with serving(module.UDPServer(ADDRESS, module.DatagramRequestHandler), 0.01) as server, udp_client() as client:
        client.sendto(b"question", server.server_address)
        assert client.recvfrom(100) == (b"", server.server_address)


def test_a_datagram_is_cut_at_max_packet_size(module: ModuleType) -> None:
    with module.UDPServer(ADDRESS, echo_handler(module)) as server, udp_client() as client:
        for size, expected in ((8192, 9000), (5, 9000), (20_000, 9000)):
            server.max_packet_size = size
            client.sendto(b"b" * 9000, server.server_address)
            server.handle_request()
            assert client.recv(20_000) == b"B" * min(size, expected)


def test_the_handler_has_the_packet_and_the_socket(module: ModuleType) -> None:
    seen: list[Any] = []

    class Handler(module.DatagramRequestHandler):
        def handle(self) -> None:
            seen.append((self.packet, self.socket is self.server.socket, self.rfile.getvalue(), self.wfile.tell()))
            self.wfile.write(b"one ")
            self.wfile.write(b"datagram")

    with serving(module.UDPServer(ADDRESS, Handler), 0.01) as server, udp_client() as client:
        client.sendto(b"line\n", server.server_address)
        assert client.recv(100) == b"one datagram"
    assert seen == [(b"line\n", True, b"line\n", 0)]


def test_a_handler_that_raises_has_answered_what_it_wrote(
    module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    class Handler(module.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"partial")
            raise ZeroDivisionError

    with module.UDPServer(ADDRESS, Handler) as server, udp_client() as client:
        client.sendto(b"x", server.server_address)
        server.handle_request()
        assert client.recv(100) == b"partial"
        assert server.fileno() >= 0
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_answer_that_is_too_long_goes_to_handle_error(module: ModuleType) -> None:
    class Handler(module.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(bytes(70_000))

    errors: list[Any] = []
    with module.UDPServer(ADDRESS, Handler) as server, udp_client() as client:
        server.handle_error = lambda request, client_address: errors.append(sys.exc_info()[0])
        client.sendto(b"x", server.server_address)
        server.handle_request()
    assert errors == [OSError]


def test_a_base_handler_may_answer_through_the_listener(module: ModuleType) -> None:
    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            data, listener = self.request
            for part in data.split():
                listener.sendto(part, self.client_address)

    with serving(module.UDPServer(ADDRESS, Handler), 0.01) as server, udp_client() as client:
        client.sendto(b"two answers", server.server_address)
        assert [client.recv(100), client.recv(100)] == [b"two", b"answers"]


def test_udp_over_ipv6(module: ModuleType) -> None:
    class Server(module.UDPServer):
        address_family = socket.AF_INET6

    try:
        server = Server(("::1", 0), echo_handler(module))
    except OSError as error:
        pytest.skip(f"no IPv6: {error}")
    with serving(server, 0.01), udp_client(socket.AF_INET6) as client:
        client.sendto(b"six", server.server_address)
        answer, address = client.recvfrom(100)
        assert answer == b"SIX"
        assert address == server.server_address
        assert len(address) == 4


def test_a_bound_unix_client_is_answered(module: ModuleType, directory: Path) -> None:
    with serving(module.UnixDatagramServer("server", echo_handler(module)), 0.01):
        with udp_client(socket.AF_UNIX, "client") as client:
            client.sendto(b"unix", "server")
            assert client.recvfrom(100) == (b"UNIX", "server")


def test_a_unix_client_on_an_abstract_name_is_answered(module: ModuleType, directory: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("abstract names are Linux's")
    name = b"\0fastserve client " + os.urandom(4)
    with serving(module.UnixDatagramServer("server", echo_handler(module)), 0.01):
        with udp_client(socket.AF_UNIX, name) as client:
            client.sendto(b"unix", "server")
            assert client.recv(100) == b"UNIX"


def test_an_unbound_unix_client_has_no_address_and_cannot_be_answered(module: ModuleType, directory: Path) -> None:
    seen: list[Any] = []
    with module.UnixDatagramServer("server", echo_handler(module)) as server, udp_client(socket.AF_UNIX) as client:
        server.handle_error = lambda request, client_address: seen.append((client_address, sys.exc_info()[0]))
        client.sendto(b"unix", "server")
        server.handle_request()
    if sys.platform == "linux":
        assert seen == [(None, TypeError)]
    else:
        assert len(seen) == 1


def test_closing_a_datagram_request_leaves_the_listener_open(module: ModuleType) -> None:
    with module.UDPServer(ADDRESS, None) as server:
        server.shutdown_request((b"", server.socket))
        server.close_request((b"", server.socket))
        assert server.fileno() >= 0


def test_a_refused_datagram_is_dropped(module: ModuleType) -> None:
    with module.UDPServer(ADDRESS, echo_handler(module)) as server, udp_client() as client:
        server.verify_request = lambda request, client_address: request[0] == b"good"
        for data in (b"bad", b"good"):
            client.sendto(data, server.server_address)
            server.handle_request()
        assert client.recv(100) == b"GOOD"


def test_datagrams_wait_in_the_kernel_while_a_handler_runs(module: ModuleType) -> None:
    with udp_client() as client:
        with serving(module.UDPServer(ADDRESS, echo_handler(module)), 0.01) as server:
            for number in range(50):
                client.sendto(b"n%d" % number, server.server_address)
            assert [client.recv(100) for _ in range(50)] == [b"N%d" % number for number in range(50)]
