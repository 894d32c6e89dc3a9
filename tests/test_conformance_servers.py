"""The servers: binding, options, what they accept, handling single requests, and the edges of serving."""

from __future__ import annotations

import errno
import os
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastserve import _backend
from support import open_descriptors, serving, talk

ADDRESS = ("127.0.0.1", 0)


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address[:2], timeout=60)


def waiting(server: Any) -> socket.socket:
    """Connect, and return when the client can be accepted: on a busy machine that may be a moment later."""
    client = connect(server)
    assert select.select([server], [], [], 60)[0]
    return client


def connection_class(module: ModuleType) -> type[socket.socket]:
    return socket.socket if module is socketserver else _backend.streams.Connection


def described(request: socket.socket) -> tuple[Any, ...]:
    """Return what a program can ask of a connection."""
    return (
        type(request),
        request.family,
        request.type,
        request.proto,
        request.gettimeout(),
        request.getblocking(),
        request.get_inheritable(),
    )


@pytest.fixture
def default_timeout() -> Iterator[None]:
    """Put the default timeout of new sockets back after the test."""
    yield
    socket.setdefaulttimeout(None)


@pytest.fixture
def short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the names of Unix sockets are short enough."""
    monkeypatch.chdir(tmp_path)
    return Path()


# get_request


def test_get_request_over_ipv4(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, None) as server, connect(server) as client:
        request, client_address = server.get_request()
        with request:
            expected = (connection_class(module), socket.AF_INET, socket.SOCK_STREAM, 0, None, True, False)
            assert described(request) == expected
            assert [type(value) for value in (request.family, request.type)] == [
                socket.AddressFamily,
                socket.SocketKind,
            ]
            assert client_address == client.getsockname() == request.getpeername()
            assert type(client_address) is tuple
            assert [type(part) for part in client_address] == [str, int]


def test_get_request_over_ipv6(module: ModuleType) -> None:
    class Server(module.TCPServer):
        address_family = socket.AF_INET6

    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        server = Server(("::1", 0), None)
    except OSError as error:
        pytest.skip(f"no IPv6: {error}")
    with server, connect(server) as client:
        assert len(server.server_address) == 4
        request, client_address = server.get_request()
        with request:
            assert described(request)[1] == socket.AF_INET6
            assert client_address == client.getsockname() == request.getpeername()
            assert [type(part) for part in client_address] == [str, int, int, int]


def test_get_request_of_a_dual_stack_listener_maps_ipv4_addresses(module: ModuleType) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no dual-stack IPv6")
    with module.TCPServer(ADDRESS, None, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        port = server.socket.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            request, client_address = server.get_request()
            request.close()
            assert client_address == ("::ffff:127.0.0.1", client.getsockname()[1], 0, 0)


@pytest.mark.parametrize("bound", ["unnamed", "path", "undecodable", "longest", "abstract"])
def test_get_request_over_a_unix_socket(module: ModuleType, short_path: Path, bound: str) -> None:
    if bound in ("undecodable", "longest", "abstract") and sys.platform != "linux":
        pytest.skip("only on Linux")
    names: dict[str, Any] = {
        "path": "client",
        "undecodable": b"cli\xff",
        "longest": "c" * 107,
        "abstract": b"\0fastserve test \xff" + str(os.getpid()).encode(),
    }
    with module.UnixStreamServer("server", None) as server:
        assert server.server_address == "server"
        with socket.socket(socket.AF_UNIX) as client:
            if bound in names:
                client.bind(names[bound])
            client.connect("server")
            request, client_address = server.get_request()
            with request:
                expected = (connection_class(module), socket.AF_UNIX, socket.SOCK_STREAM, 0, None, True, False)
                assert described(request) == expected
                assert client_address == client.getsockname()
                assert type(client_address) is (bytes if bound == "abstract" else str)
                assert client_address == {"unnamed": "", "undecodable": os.fsdecode(b"cli\xff")}.get(
                    bound, names.get(bound)
                )


def test_a_server_on_an_abstract_name(module: ModuleType) -> None:
    if sys.platform != "linux":
        pytest.skip("only on Linux")
    name = b"\0fastserve server " + os.urandom(4)
    with module.UnixStreamServer(name, lambda request, *_: request.sendall(b"here")) as server:
        assert server.server_address == name
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
            server.handle_request()
            assert client.recv(10) == b"here"


@pytest.mark.parametrize("timeout", [None, 5.0, 0.0])
def test_the_request_of_a_listener_with_a_timeout_blocks(module: ModuleType, timeout: float | None) -> None:
    with module.TCPServer(ADDRESS, None) as server, waiting(server):
        server.socket.settimeout(timeout)
        request, _ = server.get_request()
        with request:
            assert (request.gettimeout(), request.getblocking()) == (None, True)
            assert os.get_blocking(request.fileno())


@pytest.mark.parametrize("listener_timeout", [None, 5.0, 0.0])
def test_the_default_timeout_is_that_of_requests(
    module: ModuleType, default_timeout: None, listener_timeout: float | None
) -> None:
    with module.TCPServer(ADDRESS, None) as server, waiting(server):
        server.socket.settimeout(listener_timeout)
        socket.setdefaulttimeout(3.5)
        request, _ = server.get_request()
        with request:
            assert request.gettimeout() == 3.5
            assert not os.get_blocking(request.fileno())


def test_the_default_timeout_is_that_of_the_listener(module: ModuleType, default_timeout: None) -> None:
    socket.setdefaulttimeout(0.02)
    with module.TCPServer(ADDRESS, None) as server:
        assert server.socket.gettimeout() == 0.02
        with pytest.raises(TimeoutError):
            server.get_request()
        timeouts: list[int] = []
        server.handle_timeout = lambda: timeouts.append(1)
        server.handle_request()
        assert timeouts == [1]


@pytest.mark.parametrize(("timeout", "error"), [(0.0, BlockingIOError), (0.02, TimeoutError)])
def test_get_request_without_a_client_raises_what_accept_raises(
    module: ModuleType, timeout: float, error: type[OSError]
) -> None:
    with module.TCPServer(ADDRESS, None) as server:
        server.socket.settimeout(timeout)
        with pytest.raises(error) as caught:
            server.get_request()
        assert type(caught.value) is error


def test_get_request_of_a_closed_server_raises_ebadf(module: ModuleType) -> None:
    server = module.TCPServer(ADDRESS, None)
    server.server_close()
    with pytest.raises(OSError) as caught:
        server.get_request()
    assert caught.value.errno == errno.EBADF


def test_get_request_of_a_listener_that_does_not_listen_raises_einval(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, None, bind_and_activate=False) as server, pytest.raises(OSError) as caught:
        server.get_request()
    assert caught.value.errno == errno.EINVAL


def test_get_request_blocks_until_a_client_comes(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, None) as server:
        clients: list[socket.socket] = []
        timer = threading.Timer(0.03, lambda: clients.append(connect(server)))
        timer.start()
        request, client_address = server.get_request()
        timer.join()
        with request, clients[0] as client:
            assert client_address == client.getsockname()


def test_requests_have_descriptors_of_their_own_that_are_closed(module: ModuleType) -> None:
    seen: set[int] = set()
    with module.TCPServer(ADDRESS, lambda request, *_: seen.add(request.fileno())) as server:
        before = open_descriptors()
        for _ in range(20):
            with connect(server):
                server.handle_request()
        assert open_descriptors() == before
    assert len(seen) == 1


# Binding and options


def test_the_address_after_binding_is_that_of_the_listener(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, None) as server:
        assert server.server_address == server.socket.getsockname()
        assert server.server_address[1] > 0
        assert server.fileno() == server.socket.fileno()
        assert not server.socket.get_inheritable()


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("option", ["ADDR", "PORT"])
@pytest.mark.parametrize("base", ["TCPServer", "UDPServer"])
def test_the_reuse_options_are_set_on_the_listener(module: ModuleType, base: str, option: str, wanted: bool) -> None:
    if option == "PORT" and not hasattr(socket, "SO_REUSEPORT"):
        pytest.skip("no SO_REUSEPORT here")
    name = {"ADDR": "allow_reuse_address", "PORT": "allow_reuse_port"}[option]
    with type("Server", (getattr(module, base),), {name: wanted})(ADDRESS, None) as server:
        assert bool(server.socket.getsockopt(socket.SOL_SOCKET, getattr(socket, f"SO_REUSE{option}"))) is wanted


def test_two_servers_share_a_port_with_allow_reuse_port(module: ModuleType) -> None:
    if not hasattr(socket, "SO_REUSEPORT"):
        pytest.skip("no SO_REUSEPORT here")

    class Server(module.TCPServer):
        allow_reuse_port = True

    with Server(ADDRESS, None) as first, Server(first.server_address, None) as second:
        assert second.server_address == first.server_address


def test_the_request_queue_size_is_the_backlog(module: ModuleType) -> None:
    class Listener:
        backlog: int | None = None

        def listen(self, backlog: int) -> None:
            self.backlog = backlog

        def close(self) -> None:
            real.close()

    with module.TCPServer(ADDRESS, None, False) as server:
        real, server.socket = server.socket, Listener()
        server.server_activate()
        assert server.socket.backlog == (socket.SOMAXCONN if sys.version_info >= (3, 15) else 5)
        server.request_queue_size = 77
        server.server_activate()
        assert server.socket.backlog == 77


@pytest.mark.skipif(sys.platform != "linux", reason="reads the backlog from Linux's TCP_INFO")
def test_the_backlog_reaches_the_kernel(module: ModuleType) -> None:
    class Server(module.TCPServer):
        request_queue_size = 19

    with Server(ADDRESS, None) as server:
        information = server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert int.from_bytes(information[28:32], sys.byteorder) == 19  # tcpi_sacked: of a listener, its backlog


def test_without_bind_and_activate_the_listener_is_unbound(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, None, bind_and_activate=False) as server:
        assert server.server_address == ADDRESS
        assert server.socket.getsockname() == ("0.0.0.0", 0)
        server.server_bind()
        assert server.server_address[1] != 0
        assert not server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        server.server_activate()
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.parametrize("failing", ["server_bind", "server_activate"])
def test_a_failing_constructor_closes_the_listener(module: ModuleType, failing: str) -> None:
    sockets: list[socket.socket] = []

    def fail(self: Any) -> None:
        sockets.append(self.socket)
        raise KeyboardInterrupt  # whatever it is

    with pytest.raises(KeyboardInterrupt):
        type("Server", (module.TCPServer,), {failing: fail})(ADDRESS, None)
    assert sockets[0].fileno() == -1


def test_an_address_in_use_is_an_error_and_leaves_no_descriptor(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, None) as server:
        before = open_descriptors()
        with pytest.raises(OSError) as caught:
            module.TCPServer(server.server_address, None)
        assert caught.value.errno == errno.EADDRINUSE
        assert open_descriptors() == before


def test_a_base_server_has_no_listener(module: ModuleType) -> None:
    server = module.BaseServer(("where", 1), "handler")
    assert (server.server_address, server.RequestHandlerClass, server.timeout) == (("where", 1), "handler", None)
    assert not hasattr(server, "socket")
    assert not hasattr(server, "fileno")
    assert server.verify_request(None, None) is True
    for name in ("server_activate", "server_close", "handle_timeout", "service_actions"):
        assert getattr(server, name)() is None


def test_server_close_may_be_called_twice(module: ModuleType) -> None:
    server = module.ThreadingTCPServer(ADDRESS, None)
    server.server_close()
    server.server_close()
    assert server.fileno() == -1


# handle_request


@pytest.mark.parametrize(
    ("timeout", "listener_timeout"),
    [(0, None), (0.02, None), (None, 0.02), (60, 0.02), (0.02, 60), (0, 60), (None, 0.0)],
)
@pytest.mark.parametrize("base", ["TCPServer", "UDPServer"])
def test_handle_request_calls_handle_timeout_once_after_the_shorter_timeout(
    module: ModuleType, timeout: float | None, listener_timeout: float | None, base: str
) -> None:
    timeouts: list[int] = []

    class Server(getattr(module, base)):
        def handle_timeout(self) -> None:
            timeouts.append(1)

    with Server(ADDRESS, None) as server:
        server.timeout = timeout
        server.socket.settimeout(listener_timeout)
        before = time.monotonic()
        assert server.handle_request() is None
        passed = time.monotonic() - before
    assert timeouts == [1]
    shorter = min(value for value in (timeout, listener_timeout) if value is not None)
    assert shorter <= passed < 30


@pytest.mark.parametrize("timeout", [None, 0, 10])
def test_handle_request_handles_a_client_that_waits_already(module: ModuleType, timeout: float | None) -> None:
    with module.TCPServer(ADDRESS, lambda request, *_: request.sendall(b"hello")) as server, waiting(server) as client:
        server.timeout = timeout
        server.handle_timeout = lambda: pytest.fail("a client was there")
        server.handle_request()
        assert client.recv(10) == b"hello"


def test_handle_request_waits_for_a_client(module: ModuleType) -> None:
    clients: list[socket.socket] = []
    with module.TCPServer(ADDRESS, lambda request, *_: request.sendall(b"hello")) as server:
        timer = threading.Timer(0.03, lambda: clients.append(connect(server)))
        timer.start()
        server.handle_request()
        timer.join()
        with clients[0] as client:
            assert client.recv(10) == b"hello"


@pytest.mark.parametrize("timeout", [None, 0, 1])
def test_handle_request_on_a_closed_server_raises_value_error(module: ModuleType, timeout: float | None) -> None:
    server = module.TCPServer(ADDRESS, None)
    server.timeout = timeout
    server.server_close()
    with pytest.raises(ValueError, match="-1"):
        server.handle_request()


def test_handle_request_leaves_no_descriptor(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, None) as server:
        server.timeout = 0
        before = open_descriptors()
        for _ in range(3):
            server.handle_request()
        assert open_descriptors() == before


def test_handle_request_does_not_heed_the_flag_of_shutdown(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, lambda request, *_: request.sendall(b"hello")) as server, connect(server) as client:
        server._BaseServer__shutdown_request = True
        server.handle_request()
        assert client.recv(10) == b"hello"
        assert server._BaseServer__shutdown_request is True


# serve_forever


def test_serve_forever_on_a_closed_server_raises_value_error(module: ModuleType) -> None:
    server = module.TCPServer(ADDRESS, None)
    server.server_close()
    with pytest.raises(ValueError, match="-1"):
        server.serve_forever(0.01)
    assert server._BaseServer__is_shut_down.is_set()
    assert server._BaseServer__shutdown_request is False


def test_serve_forever_may_be_called_again(module: ModuleType) -> None:
    server = module.TCPServer(ADDRESS, lambda request, *_: request.sendall(b"round"))
    for _ in range(3):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert talk(server.server_address, b"") == b"round"
        server.shutdown()
        thread.join(60)
        assert not thread.is_alive()
    server.server_close()


def test_serve_forever_ignores_the_timeout(module: ModuleType) -> None:
    server = module.TCPServer(ADDRESS, lambda request, *_: request.sendall(b"here"))
    server.timeout = 0
    server.handle_timeout = lambda: pytest.fail("serve_forever has no timeout")
    with serving(server, 0.01):
        assert talk(server.server_address, b"") == b"here"


def test_a_second_shutdown_of_a_stopped_server_returns(module: ModuleType) -> None:
    with serving(module.TCPServer(ADDRESS, None), 0.01) as server:
        server.shutdown()
    assert server._BaseServer__is_shut_down.is_set()
    server.shutdown()
