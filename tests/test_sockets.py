"""Listeners from outside, and the options of those that a server makes."""

from __future__ import annotations

import http.server
import os
import socket
import socketserver
import stat
import struct
import threading
import urllib.request
import xmlrpc.client
import xmlrpc.server
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastserve
from fastserve import sockets
from sockets_support import ADDRESS, FORKING, WORKERS, Upper, UpperDatagram, linux, listener, unix_server
from support import LIMIT, serving, talk

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_descriptor_is_left")]


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def address_string(self) -> str:
        return "somebody"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def backlog(sock: socket.socket) -> int:
    """Return the backlog of a listening TCP socket: ``tcpi_sacked`` of tcp(7)."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64), 28)[0])


# from_socket


@pytest.mark.parametrize("worker", [*WORKERS, FORKING])
@pytest.mark.parametrize("given", ["object", "descriptor"])
def test_a_listener_that_is_there_already_is_served(impl: str, worker: str, given: str) -> None:
    sock = listener()
    address = sock.getsockname()
    server = getattr(fastserve, f"{worker}TCPServer").from_socket(sock if given == "object" else sock.detach(), Upper)
    assert type(server.socket) is socket.socket
    assert given == "descriptor" or server.socket is sock
    assert (server.server_address, server.address_family) == (address, socket.AF_INET)
    assert "server_bind" not in vars(server)
    with serving(server):
        for _ in range(3):
            assert talk(address, b"a\n") == b"A\n"
    with pytest.raises(ConnectionRefusedError):
        talk(address, b"a\n")


@pytest.mark.parametrize("family", [socket.AF_INET6, socket.AF_UNIX])
def test_the_family_is_that_of_the_socket(impl: str, in_tmp_path: Path, family: int) -> None:
    sock = listener(("::1", 0) if family == socket.AF_INET6 else "s", family)
    server = fastserve.ThreadingTCPServer.from_socket(sock, Upper)
    assert (server.address_family, server.server_address) == (family, sock.getsockname())
    assert fastserve.TCPServer.address_family == socket.AF_INET
    with serving(server):
        assert talk(server.server_address, b"a\n", family) == b"A\n"
    assert not os.path.exists("s") or stat.S_ISSOCK(os.stat("s").st_mode)


@pytest.mark.parametrize("worker", WORKERS)
def test_a_datagram_socket_that_is_there_already_is_served(impl: str, worker: str) -> None:
    sock = listener(kind=socket.SOCK_DGRAM)
    with serving(getattr(fastserve, f"{worker}UDPServer").from_socket(sock.detach(), UpperDatagram)) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(LIMIT)
            client.connect(server.server_address)
            client.send(b"a")
            assert client.recv(10) == b"A"


@linux
def test_a_listener_that_listens_already_keeps_its_backlog(impl: str) -> None:
    with listener() as sock:
        sock.listen(77)
        with fastserve.TCPServer.from_socket(sock, Upper) as server:
            assert backlog(server.socket) == 77
    with socket.socket() as sock:
        sock.bind(ADDRESS)

        class Server(fastserve.TCPServer):
            request_queue_size = 33

        with Server.from_socket(sock, Upper) as server:
            assert backlog(server.socket) == 33
            assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("bases", ["stdlib", "threads", "greenlets", "both"])
def test_a_server_of_the_stdlib_is_given_a_listener(impl: str, bases: str, patched: bool) -> None:
    if bases == "greenlets":
        pytest.importorskip("greenlet")
    server_class: Any = {
        "stdlib": (http.server.HTTPServer,),
        "threads": (http.server.ThreadingHTTPServer,),
        "greenlets": (fastserve.GreenletMixIn, http.server.HTTPServer),
        "both": (fastserve.ThreadingMixIn, http.server.HTTPServer, fastserve.TCPServer),
    }[bases]
    server_class = type("Server", server_class, {})
    if patched:
        fastserve.patch()
    try:
        sock = listener()
        server = fastserve.from_socket(server_class, sock, Hello)
        assert (server.server_port, server.server_address) == (sock.getsockname()[1], sock.getsockname())
        assert server.server_name == socket.getfqdn("127.0.0.1")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0  # allow_reuse_address of HTTPServer
        with serving(server, 0.01):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://127.0.0.1:{server.server_port}/", timeout=LIMIT) as answer:
                assert answer.read() == b"hello"
    finally:
        fastserve.unpatch()


@pytest.mark.parametrize("address", ["s", pytest.param("\0fastserve-test-http-%d", marks=linux)])
def test_an_http_server_on_a_unix_socket_has_a_name_and_a_port(impl: str, in_tmp_path: Path, address: str) -> None:
    if address.startswith("\0"):
        address %= os.getpid()
    sock = listener(address, socket.AF_UNIX)
    server = fastserve.from_socket(http.server.ThreadingHTTPServer, sock, Hello)
    assert (server.server_address, server.server_port) == (sock.getsockname(), 0)
    assert server.server_name == socket.getfqdn("localhost")
    with serving(server, 0.01):
        assert talk(address, b"GET / HTTP/1.0\r\n\r\n", socket.AF_UNIX).endswith(b"hello")


def test_further_arguments_are_those_of_the_constructor(impl: str) -> None:
    server = fastserve.from_socket(
        xmlrpc.server.SimpleXMLRPCServer, listener(), xmlrpc.server.SimpleXMLRPCRequestHandler, logRequests=False
    )
    server.register_function(pow)
    with serving(server, 0.01), xmlrpc.client.ServerProxy(f"http://127.0.0.1:{server.server_address[1]}/") as proxy:
        assert proxy.pow(2, 5) == 32


class OwnConstructor(fastserve.TCPServer):
    """It takes fewer arguments, and uses the address that it is bound to."""

    def __init__(self, address: Any, handler: Any) -> None:
        self.steps: list[str] = []
        super().__init__(address, handler)
        self.port = self.server_address[1]

    def server_bind(self) -> None:
        self.steps.append("bind")
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # bound already, the kernel would refuse
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        super().server_bind()

    def server_activate(self) -> None:
        self.steps.append("activate")
        self.socket.listen(3)
        super().server_activate()


class BoundLater(fastserve.TCPServer):
    """It is constructed without being bound."""

    def __init__(self, address: Any, handler: Any) -> None:
        super().__init__(address, handler, bind_and_activate=False)


class BoundByTheConstructor(BoundLater):
    def __init__(self, address: Any, handler: Any) -> None:
        super().__init__(address, handler)
        self.server_bind()
        self.server_activate()


@pytest.mark.parametrize("server_class", [OwnConstructor, BoundLater, BoundByTheConstructor])
def test_the_constructor_and_the_overrides_of_a_class_are_called(impl: str, server_class: Any) -> None:
    sock = listener()
    server = server_class.from_socket(sock, Upper)
    assert server.socket is sock
    if server_class is OwnConstructor:
        assert (server.steps, server.port) == (["bind", "activate"], sock.getsockname()[1])
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= 1 << 16
    with serving(server):
        assert talk(server.server_address, b"a\n") == b"A\n"


def test_a_constructor_may_wrap_the_listener(impl: str) -> None:
    class Wrapper:
        def __init__(self, wrapped: socket.socket) -> None:
            self.wrapped = wrapped

        def __getattr__(self, name: str) -> Any:
            return getattr(self.wrapped, name)

    class Wrapping(fastserve.TCPServer):
        def __init__(self, address: Any, handler: Any) -> None:
            super().__init__(address, handler)
            self.socket = Wrapper(self.socket)  # type: ignore[assignment]

    class HandingOn(fastserve.TCPServer):
        def __init__(self, address: Any, handler: Any) -> None:
            super().__init__(address, handler)
            self.socket = socket.socket(fileno=self.socket.detach())

    for server_class in Wrapping, HandingOn:
        sock = listener()
        with serving(server_class.from_socket(sock, Upper)) as server:
            assert sock.fileno() == -1
            assert talk(server.server_address, b"a\n") == b"A\n"


def test_a_timeout_that_a_constructor_sets_is_that_of_the_listener(impl: str) -> None:
    class Patient(fastserve.TCPServer):
        def server_activate(self) -> None:
            super().server_activate()
            self.socket.settimeout(7)

    with Patient.from_socket(listener(), Upper) as server:
        assert server.socket.gettimeout() == 7


def unbound(kind: int = socket.SOCK_STREAM) -> socket.socket:
    return socket.socket(socket.AF_INET, kind)


def one_of_a_pair() -> socket.socket:
    one, other = socket.socketpair()
    other.close()
    return one


def connected() -> socket.socket:
    with listener() as sock:
        client = socket.create_connection(sock.getsockname())
        sock.accept()[0].close()
        return client


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("TCPServer", lambda: listener(kind=socket.SOCK_DGRAM), "SOCK_STREAM, not SOCK_DGRAM"),
        ("UDPServer", listener, "SOCK_DGRAM, not SOCK_STREAM"),
        ("TCPServer", unbound, "not bound"),
        ("UDPServer", lambda: unbound(socket.SOCK_DGRAM), "not bound"),
        ("TCPServer", lambda: socket.socket(socket.AF_UNIX), "not bound"),
        ("TCPServer", one_of_a_pair, "not bound"),
        ("TCPServer", connected, "connection"),
    ],
)
@pytest.mark.parametrize("given", ["object", "descriptor"])
@pytest.mark.parametrize("blocking", [True, False])
def test_a_socket_that_cannot_be_served_is_left_as_it_is(
    name: str, make: Any, said: str, given: str, blocking: bool
) -> None:
    with make() as sock:
        os.set_blocking(sock.fileno(), blocking)
        with pytest.raises(ValueError, match=said):
            getattr(fastserve, name).from_socket(sock if given == "object" else sock.fileno(), Upper)
        assert sock.fileno() >= 0 and os.get_blocking(sock.fileno()) == blocking
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or name == "UDPServer"
        if said == "not bound" and sock.family == socket.AF_INET:
            sock.bind(ADDRESS)


def test_what_is_no_open_socket_is_refused(tmp_path: Path) -> None:
    closed = socket.socket()
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        fastserve.TCPServer.from_socket(closed, Upper)
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(ValueError, match=f"descriptor {file.fileno()} is not an open socket"):
            fastserve.TCPServer.from_socket(file.fileno(), Upper)
        file.write("still open")
    for descriptor in 999_999, -1, 1 << 40:
        with pytest.raises(ValueError, match=f"descriptor {descriptor} is not an open socket"):
            fastserve.TCPServer.from_socket(descriptor, Upper)
    with pytest.raises(TypeError, match="neither a socket nor a descriptor"):
        fastserve.TCPServer.from_socket("3", Upper)  # type: ignore[arg-type]
    with listener() as sock, pytest.raises(TypeError, match="socketserver.TCPServer"):
        fastserve.from_socket(fastserve.BaseServer, sock, Upper)  # type: ignore[type-var]


@pytest.mark.parametrize("given", ["object", "descriptor"])
@pytest.mark.parametrize("step", ["server_bind", "server_activate", "constructor"])
def test_a_constructor_that_raises_leaves_the_socket_open(impl: str, step: str, given: str) -> None:
    class Server(fastserve.ThreadingTCPServer):
        def __init__(self, address: Any, handler: Any) -> None:
            super().__init__(address, handler)
            if step == "constructor":
                raise LookupError

        def server_bind(self) -> None:
            super().server_bind()
            if step == "server_bind":
                raise LookupError

        def server_activate(self) -> None:
            super().server_activate()
            if step == "server_activate":
                raise LookupError

    with listener() as sock:
        with pytest.raises(LookupError):
            Server.from_socket(sock if given == "object" else sock.fileno(), Upper)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.parametrize("worker", [*WORKERS, FORKING])
@pytest.mark.parametrize("given", ["object", "descriptor"])
def test_a_listener_that_does_not_block_is_served(impl: str, worker: str, given: str) -> None:
    sock = listener()
    sock.setblocking(False)
    server = getattr(fastserve, f"{worker}TCPServer").from_socket(sock if given == "object" else sock.detach(), Upper)
    assert not os.get_blocking(server.fileno())
    with serving(server):
        for _ in range(3):
            assert talk(server.server_address, b"a\n") == b"A\n"
        # A handler of the loop itself reads a connection that waits for its client.
        with socket.create_connection(server.server_address) as client:
            client.settimeout(LIMIT)
            assert client.send(b"b") == 1
            client.sendall(b"c\n")
            assert client.recv(10) == b"BC\n"
    if given == "object":
        assert sock.fileno() == -1


@pytest.mark.parametrize("worker", WORKERS)
def test_servers_that_share_a_listener_do_not_wait_for_what_another_has_taken(impl: str, worker: str) -> None:
    first = listener()
    first.setblocking(False)
    second = first.dup()
    server_class = getattr(fastserve, f"{worker}TCPServer")
    with (
        serving(server_class.from_socket(first.detach(), Upper)) as server,
        serving(server_class.from_socket(second.detach(), Upper)),
    ):
        for _ in range(50):
            assert talk(server.server_address, b"a\n") == b"A\n"


@linux
def test_handle_request_of_a_listener_that_does_not_block_waits(impl: str) -> None:
    sock = listener()
    os.set_blocking(sock.fileno(), False)
    with fastserve.TCPServer.from_socket(sock, Upper) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert talk(server.server_address, b"a\n") == b"A\n"
        thread.join(LIMIT)


# dual stack


class DualStack(fastserve.ThreadingTCPServer):
    address_family = socket.AF_INET6
    dual_stack = True


def test_a_dual_stack_server_takes_both_kinds_of_client(impl: str) -> None:
    seen = []

    def handle(request: Any, client_address: Any, server: Any) -> None:
        seen.append(client_address[0])
        request.sendall(b"hello")

    with serving(DualStack(("", 0), handle)) as server:
        port = server.server_address[1]
        assert talk(("127.0.0.1", port), b"") == b"hello"
        assert talk(("::1", port, 0, 0), b"", socket.AF_INET6) == b"hello"
    assert seen == ["::ffff:127.0.0.1", "::1"]


def test_an_option_counts_however_server_bind_is_overridden(impl: str, in_tmp_path: Path) -> None:
    """The ``server_bind`` of ``HTTPServer`` calls that of the stdlib by name."""

    class Server(fastserve.ThreadingMixIn, http.server.HTTPServer, fastserve.TCPServer):
        address_family = socket.AF_INET6
        dual_stack = True

    class OnUnix(fastserve.UnixStreamServer):
        socket_mode = 0o600

        def server_bind(self) -> None:
            socketserver.TCPServer.server_bind(self)

    with Server(("", 0), Hello) as server:
        assert type(server.socket) is socket.socket
        assert server.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
    with OnUnix("s", Upper):
        assert stat.S_IMODE(os.stat("s").st_mode) == 0o600


def test_an_option_may_be_set_before_the_server_is_bound_by_hand(impl: str) -> None:
    with fastserve.UDPServer(("", 0), Upper, bind_and_activate=False) as server:
        server.socket.close()
        server.address_family = socket.AF_INET6
        server.socket = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        server.dual_stack = True
        server.server_bind()
        assert server.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0


def test_without_the_option_the_kernels_choice_stands(module: ModuleType) -> None:
    with socket.socket(socket.AF_INET6) as plain:
        expected = plain.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)

    class Server(module.TCPServer):
        address_family = socket.AF_INET6

    with Server(("", 0), Upper) as server:
        assert server.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == expected


# TCP


def options_of_a_connection(server: Any) -> list[int]:
    """Return the options of a connection that ``server`` has accepted."""
    found: list[list[int]] = []

    def look(request: Any, client_address: Any, server: Any) -> None:
        options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
        options += [(socket.IPPROTO_TCP, option) for option in sockets._KEEPALIVE]
        found.append([request.getsockopt(*option) for option in options])

    server.RequestHandlerClass = look
    with serving(server):
        assert talk(server.server_address, b"") == b""
    return found[0]


def defaults() -> list[int]:
    with socket.socket() as plain:
        return [plain.getsockopt(socket.IPPROTO_TCP, option) for option in sockets._KEEPALIVE]


@pytest.mark.parametrize("inherited", [pytest.param(True, marks=linux), False])
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("source", ["made", "given"])
@pytest.mark.parametrize(
    ("options", "nodelay", "keepalive"),
    [
        ({}, 0, (0,)),
        ({"tcp_nodelay": True}, 1, (0,)),
        ({"keepalive": True}, 0, (1,)),
        ({"keepalive": False}, 0, (0,)),
        ({"keepalive": (61, 7, 3), "tcp_nodelay": True}, 1, (1, 61, 7, 3)),
    ],
)
def test_connections_have_the_options_for_tcp(
    impl: str,
    monkeypatch: pytest.MonkeyPatch,
    inherited: bool,
    worker: str,
    source: str,
    options: dict[str, Any],
    nodelay: int,
    keepalive: tuple[int, ...],
) -> None:
    monkeypatch.setattr(sockets, "INHERITED", inherited)
    server_class = type("Server", (getattr(fastserve, f"{worker}TCPServer"),), options)
    server = server_class(ADDRESS, Upper) if source == "made" else server_class.from_socket(listener(), Upper)
    assert (type(server.socket) is socket.socket) is (inherited or not options)
    expected = [nodelay, keepalive[0], *(keepalive[1:] or defaults())]
    assert options_of_a_connection(server) == expected


@linux
@pytest.mark.parametrize("worker", WORKERS)
def test_the_options_cost_no_call_for_a_connection(impl: str, worker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Server(getattr(fastserve, f"{worker}TCPServer")):  # type: ignore[misc]
        tcp_nodelay = True
        keepalive = (60, 10, 3)

    with serving(Server(ADDRESS, Upper)) as server:
        monkeypatch.setattr(socket.socket, "setsockopt", lambda *args: calls.append(args), raising=False)
        assert talk(server.server_address, b"a\n") == b"A\n"
    assert calls == []


# Wrong options


@pytest.mark.parametrize(
    ("server_class", "options", "said"),
    [
        ("TCPServer", {"dual_stack": True}, "AF_INET6"),
        ("UnixStreamServer", {"dual_stack": True}, "AF_INET6"),
        ("TCPServer", {"dual_stack": "yes"}, "dual_stack is True or False, not 'yes'"),
        ("TCPServer", {"socket_mode": 0o600}, "Unix sockets that have a file"),
        ("TCPServer", {"socket_owner": (0, 0)}, "Unix sockets that have a file"),
        ("UnixStreamServer", {"socket_mode": 0o1777}, "from 0 to 0o777"),
        ("UnixStreamServer", {"socket_mode": "660"}, "from 0 to 0o777"),
        ("UnixStreamServer", {"socket_owner": "root"}, "a pair"),
        ("UnixStreamServer", {"socket_owner": ("no-such-user", None)}, "no-such-user"),
        ("UnixDatagramServer", {"socket_owner": (None, "no-such-group")}, "no-such-group"),
        ("UnixStreamServer", {"tcp_nodelay": True}, "tcp_nodelay is for TCP"),
        ("UnixStreamServer", {"keepalive": True}, "keepalive is for TCP"),
        ("UDPServer", {"keepalive": False}, "keepalive is for TCP"),
        ("TCPServer", {"keepalive": 30}, "keepalive is True, False, None or"),
        ("TCPServer", {"keepalive": (30, 10)}, "keepalive is True, False, None or"),
        ("TCPServer", {"keepalive": (30, 0, 3)}, "keepalive is True, False, None or"),
    ],
)
@pytest.mark.parametrize("bound", ["constructor", "by hand"])
def test_a_wrong_option_is_refused(
    impl: str, in_tmp_path: Path, server_class: str, options: dict[str, Any], said: str, bound: str
) -> None:
    address = "s" if server_class.startswith("Unix") else ADDRESS
    made = type("Server", (getattr(fastserve, server_class),), options)
    with pytest.raises(ValueError, match=said):
        if bound == "constructor":
            made(address, Upper)
        else:
            with made(address, Upper, bind_and_activate=False) as server:
                server.server_bind()
    assert not os.path.lexists("s")


@linux
def test_permissions_of_an_abstract_address_are_refused(impl: str) -> None:
    with pytest.raises(ValueError, match="Unix sockets that have a file"):
        unix_server("Stream", f"\0fastserve-test-{os.getpid()}", socket_mode=0o600)


def test_a_class_of_the_stdlib_may_use_the_names_of_options_for_something_else(impl: str) -> None:
    class Server(socketserver.TCPServer):
        keepalive = 30
        dual_stack = "no"

        def socket_mode(self) -> None:
            pass

    for patched in False, True:
        if patched:
            fastserve.patch()
        try:
            with serving(Server(ADDRESS, Upper), 0.01) as server:
                assert talk(server.server_address, b"a\n") == b"A\n"
        finally:
            fastserve.unpatch()


def test_a_listener_without_options_is_bound_by_one_call(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Listener(socket.socket):
        def bind(self, address: Any, /) -> None:
            calls.append("bind")
            super().bind(address)

        def setsockopt(self, *args: Any) -> None:  # type: ignore[override]
            calls.append("setsockopt")

    monkeypatch.setattr(socket, "socket", Listener)
    with module.TCPServer(ADDRESS, Upper):
        assert calls == ["bind"]
