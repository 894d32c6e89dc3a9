"""Servers behind a proxy that speaks the PROXY protocol, under every worker model."""

from __future__ import annotations

import contextlib
import gc
import http.server
import importlib.util
import inspect
import ipaddress
import json
import logging
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import fastserve
from fastserve import _backend, proxy
from fastserve import server as server_module
from proxy_support import LOCAL, V1, V1_CLIENT, V2, V2_LOCAL, binary, ipv4, ipv6, tlv, unix, with_checksum
from support import LIMIT, open_descriptors, serving, wait_until

pytestmark = pytest.mark.once

ADDRESS = ("127.0.0.1", 0)

WORKERS = ["Threading", "ThreadPool"]
if importlib.util.find_spec("greenlet") is not None:
    WORKERS.append("Greenlet")
FORKING = ["Forking"] if hasattr(os, "fork") else []


class Tell(socketserver.BaseRequestHandler):
    """Answer with what a handler knows of its client, and with all that has come behind the header."""

    def handle(self) -> None:
        info: Any = fastserve.proxy_info(self.request)
        same = self.server.proxy_info  # type: ignore[attr-defined]
        data = b""
        while part := self.request.recv(65536):
            data += part
        answer = {
            "client": self.client_address,
            "source": info.source,
            "destination": info.destination,
            "command": info.command,
            "version": info.version,
            "alpn": (info.alpn or b"").decode(),
            "same": info is same is self.server.proxy_info,  # type: ignore[attr-defined]
            "timeout": self.request.gettimeout(),
            "data": data.decode(),
        }
        self.request.sendall(json.dumps(answer).encode())


def class_of(worker: str, base: Any = None, **attributes: Any) -> Any:
    bases = (fastserve.ProxyProtocolMixIn, base or getattr(fastserve, f"{worker}TCPServer"))
    return type("Server", bases, {"request_queue_size": 128, "proxy_header_timeout": LIMIT, **attributes})


def server_of(worker: str, handler: Any = Tell, **attributes: Any) -> Any:
    return class_of(worker, **attributes)(ADDRESS, handler)


@pytest.fixture(params=["", *WORKERS, *FORKING])
def any_worker(request: pytest.FixtureRequest, impl: str) -> str:
    return str(request.param)


@pytest.fixture(params=WORKERS)
def worker(request: pytest.FixtureRequest, impl: str) -> str:
    """A worker model that handles requests beside the loop, in the same process."""
    return str(request.param)


@contextlib.contextmanager
def client_of(server: Any) -> Iterator[socket.socket]:
    with socket.create_connection(server.server_address[:2], LIMIT) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            yield client
        finally:
            with contextlib.suppress(OSError):  # a child that was forked meanwhile may hold it too
                client.shutdown(socket.SHUT_RDWR)


def rest_of(client: socket.socket) -> bytes:
    """Return what comes until the server ends the connection, in whatever way."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            data += part
    return data


def ask(server: Any, *sent: bytes) -> Any:
    """Send pieces, each in a packet of its own, and return what the handler tells; ``None`` if it tells nothing."""
    with client_of(server) as client:
        peer = list(client.getsockname())
        with contextlib.suppress(OSError):  # it has been refused
            for piece in sent:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        answer = rest_of(client)
    return {**json.loads(answer), "peer": peer} if answer else None


class Failures:
    """A hook that notes how headers have failed."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.addresses: list[Any] = []

    def __call__(self, request: Any, client_address: Any, error: Any) -> None:
        self.errors.append(error)
        self.addresses.append(client_address)


# What a handler sees


@pytest.mark.parametrize("header", [V1, V2, with_checksum(V2)], ids=["v1", "v2", "checksum"])
def test_a_handler_has_the_address_of_the_client(any_worker: str, header: bytes) -> None:
    with serving(server_of(any_worker)) as server:
        told = ask(server, header + b"hello")
    assert told["client"] == list(V1_CLIENT) == told["source"]
    assert told["destination"] == ["198.51.100.1", 443]
    assert told["version"] == (1 if header is V1 else 2)
    assert (told["command"], told["data"], told["same"], told["timeout"]) == ("PROXY", "hello", True, None)


def test_a_header_may_come_byte_by_byte_and_what_is_behind_it_is_the_handlers(any_worker: str) -> None:
    long = ipv6(("2001:db8::7", 1), ("2001:db8::1", 2), tlv(1, b"h2") + tlv(4, bytes(300)))
    line = b"PROXY TCP6 2001:db8::7 2001:db8:ffff:ffff:ffff:ffff:ffff:1 65535 65535\r\n"
    with serving(server_of(any_worker)) as server:
        for header in (V1, V2, line, long):
            pieces = [header[place : place + 1] for place in range(len(header))]
            for sent in ([*pieces, b"PROXY UNKNOWN\r\n"], [*pieces[:-1], header[-1:] + b"PROXY UNKNOWN\r\n"]):
                told = ask(server, *sent)
                assert told["data"] == "PROXY UNKNOWN\r\n"
                assert told["source"][0] in ("192.0.2.7", "2001:db8::7")
        assert told["alpn"] == "h2"
        assert told["client"] == ["2001:db8::7", 1, 0, 0]


@pytest.mark.parametrize(
    "header",
    [b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN a b c d\r\n", V2_LOCAL, binary(bytes(12), LOCAL, 0x11), binary(bytes(9))],
    ids=["v1", "v1 with fields", "local", "local with addresses", "unspecified"],
)
def test_without_addresses_the_connections_own_stays(any_worker: str, header: bytes) -> None:
    with serving(server_of(any_worker)) as server:
        told = ask(server, header, b"hello")
    assert told["client"] == told["peer"]
    assert (told["source"], told["destination"], told["data"]) == (None, None, "hello")


def test_a_client_on_a_unix_socket_has_its_path_for_an_address(any_worker: str) -> None:
    with serving(server_of(any_worker)) as server:
        assert ask(server, unix(b"/run/client", b"/run/server"))["client"] == "/run/client"


def test_requests_at_a_time_have_each_their_own(worker: str) -> None:
    count = 8
    with serving(server_of(worker, max_workers=count)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(server)) for _ in range(count)]
        for number, client in enumerate(clients):
            client.sendall(ipv4((f"192.0.2.{number}", number), ("198.51.100.1", 443)))
            client.sendall(b"%d" % number)
        for number, client in reversed(list(enumerate(clients))):
            client.shutdown(socket.SHUT_WR)
            told = json.loads(rest_of(client))
            assert told["client"] == told["source"] == [f"192.0.2.{number}", number]
            assert (told["same"], told["data"]) == (True, str(number))


def test_outside_of_a_handler_the_server_tells_nothing(worker: str) -> None:
    seen: list[Any] = []

    class Server(class_of(worker)):  # type: ignore[misc]
        def process_request(self, request: Any, client_address: Any) -> None:
            seen.append((self.proxy_info, fastserve.proxy_info(request)))
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            seen.append((self.proxy_info, fastserve.proxy_info(request).source))  # type: ignore[union-attr]
            super().shutdown_request(request)

    server = Server(ADDRESS, Tell, True)
    with serving(server):
        for _ in range(3):
            assert ask(server, V1)["same"]
        wait_until(lambda: len(seen) == 6)
        assert server.proxy_info is None
    assert sorted(seen, key=str) == [(None, V1_CLIENT)] * 3 + [(None, None)] * 3


def test_a_server_tells_of_its_own_requests_alone(worker: str) -> None:
    other = server_of(worker)
    seen: list[Any] = []

    class Handler(Tell):
        def setup(self) -> None:
            seen.extend([other.proxy_info, self.server.proxy_info.source])  # type: ignore[attr-defined]

    with other, serving(server_of(worker, Handler)) as server:
        assert ask(server, V1)
    assert seen == [None, V1_CLIENT]


def test_what_is_called_for_a_handler_in_a_thread_tells_the_same(worker: str) -> None:
    seen: list[Any] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(fastserve.to_thread(lambda: self.server.proxy_info.source))  # type: ignore[attr-defined]

    with serving(server_of(worker, Handler)) as server, client_of(server) as client:
        client.sendall(V1)
        assert rest_of(client) == b""
    assert seen == [V1_CLIENT]


def test_what_a_connection_is_not_has_no_header() -> None:
    assert fastserve.proxy_info((b"data", None)) is None
    assert fastserve.proxy_info(None) is None
    with socket.socket() as plain:
        assert fastserve.proxy_info(plain) is None


def test_a_timeout_of_the_connection_is_what_it_was(any_worker: str) -> None:
    with serving(server_of(any_worker)) as server:
        socket.setdefaulttimeout(LIMIT)
        try:
            told = ask(server, V1[:20], V1[20:], b"hello")
        finally:
            socket.setdefaulttimeout(None)
    assert (told["timeout"], told["data"]) == (LIMIT, "hello")


def test_the_hooks_before_the_handler_have_the_address_of_the_proxy(worker: str) -> None:
    seen: list[Any] = []

    class Server(class_of(worker)):  # type: ignore[misc]
        def verify_request(self, request: Any, client_address: Any) -> bool:
            seen.append(client_address)
            return super().verify_request(request, client_address)  # type: ignore[no-any-return]

        def process_request(self, request: Any, client_address: Any) -> None:
            seen.append(client_address)
            super().process_request(request, client_address)

        def finish_request(self, request: Any, client_address: Any) -> None:
            seen.append(client_address)
            super().finish_request(request, client_address)

    with serving(Server(ADDRESS, Tell)) as server:
        told = ask(server, V1)
    assert [list(address) for address in seen] == [told["peer"]] * 3
    assert told["client"] == list(V1_CLIENT)


def test_what_comes_after_the_mix_in_has_the_address_of_the_client(worker: str) -> None:
    seen: list[Any] = []

    class Checks:
        def finish_request(self, request: Any, client_address: Any) -> Any:
            seen.append(client_address)
            return super().finish_request(request, client_address)  # type: ignore[misc]

    class Server(fastserve.ProxyProtocolMixIn, Checks, getattr(fastserve, f"{worker}TCPServer")):  # type: ignore[misc]
        proxy_header_timeout = LIMIT

    with serving(Server(ADDRESS, Tell)) as server:
        assert ask(server, V1)
    assert seen == [V1_CLIENT]


def test_an_error_of_a_handler_is_reported_with_the_address_of_its_client(
    any_worker: str, capfd: pytest.CaptureFixture[str]
) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            raise ValueError("an error of a handler")

    with serving(server_of(any_worker, Handler)) as server:
        assert ask(server, V1) is None
        with client_of(server) as client:
            client.sendall(V2_LOCAL)
            peer = client.getsockname()
            assert rest_of(client) == b""
    reported = capfd.readouterr().err
    assert f"request from {V1_CLIENT}" in reported
    assert f"request from {peer}" in reported
    assert reported.count("ValueError: an error of a handler") == 2


# Over which servers


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", *(["ForkingTCPServer"] if FORKING else [])])
def test_the_servers_of_the_stdlib_have_it_too(module: ModuleType, name: str) -> None:
    cls = class_of("", getattr(module, name))
    with serving(cls(ADDRESS, Tell), 0.01) as server:
        assert ask(server, V1, b"hello")["client"] == list(V1_CLIENT)
        assert ask(server, b"no header") is None
        assert ask(server, V2)["client"] == list(V1_CLIENT)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_whoever_connects_to_a_unix_socket_is_trusted(any_worker: str, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    cls = class_of("", getattr(fastserve, f"{any_worker}UnixStreamServer"), trusted_proxies=())
    with serving(cls(path, Tell)), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT)
        client.connect(path)
        client.sendall(V1 + b"hello")
        client.shutdown(socket.SHUT_WR)
        told = json.loads(rest_of(client))
    assert (told["client"], told["data"]) == (list(V1_CLIENT), "hello")


@pytest.mark.parametrize("mixin", ["", *(f"{worker}MixIn" for worker in (*WORKERS, *FORKING))])
@pytest.mark.parametrize("family", ["stdlib", "fastserve"])
def test_http_server_logs_the_address_of_the_client(
    impl: str, mixin: str, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bases: list[Any] = [fastserve.ProxyProtocolMixIn, http.server.HTTPServer]
    if mixin:
        bases.insert(1, getattr(fastserve, mixin))
    if family == "fastserve":
        bases.append(fastserve.TCPServer)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps([self.client_address, self.path, self.request_version]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server_class = type("Server", tuple(bases), {"proxy_header_timeout": LIMIT})
    with serving(server_class(ADDRESS, Handler), 0.01) as server, client_of(server) as client:
        client.sendall(
            V2 + b"GET /one HTTP/1.1\r\nHost: a\r\n\r\nGET /two HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )
        answer = rest_of(client)
    for path in ("/one", "/two"):
        assert json.dumps([V1_CLIENT, path, "HTTP/1.1"]).encode() in answer
    assert capfd.readouterr().err.count("192.0.2.7 - - ") == 2


def test_handle_request_reads_the_header(any_worker: str) -> None:
    with server_of(any_worker) as server:
        with client_of(server) as client:
            client.sendall(V1)
            client.shutdown(socket.SHUT_WR)
            server.handle_request()
            assert json.loads(rest_of(client))["client"] == list(V1_CLIENT)


@pytest.mark.parametrize("name", ["UDPServer", "ThreadingUDPServer", "UnixDatagramServer"])
def test_a_server_of_datagrams_is_refused(module: ModuleType, name: str, tmp_path: Path) -> None:
    cls = class_of("", getattr(module, name))
    before = open_descriptors()
    with pytest.raises(TypeError, match="datagrams"):
        cls(str(tmp_path / "socket") if "Unix" in name else ADDRESS, Tell)
    assert open_descriptors() == before


def test_a_log_has_the_addresses_of_the_clients(worker: str, caplog: pytest.LogCaptureFixture) -> None:
    class Handler(Tell):
        def finish(self) -> None:
            if self.request.gettimeout() is None and self.client_address[1] == 2:
                raise ValueError("an error of a handler")

    base = type("Base", (fastserve.LoggingMixIn, getattr(fastserve, f"{worker}TCPServer")), {})
    ended: list[Any] = []

    class Server(class_of("", base)):  # type: ignore[misc]
        def shutdown_request(self, request: Any) -> None:
            super().shutdown_request(request)
            ended.append(request)

    with caplog.at_level(logging.INFO, "fastserve"), serving(Server(ADDRESS, Handler)) as server:
        for sent in (V1, b"no header", ipv6(("2001:db8::7", 2), ("::1", 1))):
            ask(server, sent)
        wait_until(lambda: len(ended) == 3)
    lines = [record.getMessage() for record in caplog.records if record.name == "fastserve"]
    assert [line.split()[:2] for line in lines if " of " not in line] == [
        ["192.0.2.7:56324", "ok"],
        ["[2001:db8::7]:2", "ValueError"],
    ]
    assert "request of [2001:db8::7]:2" in lines


@pytest.mark.skipif(not FORKING, reason="no fork here")
def test_the_processes_of_prefork_read_headers() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fastserve, json, socket, threading
from test_proxy_servers import ADDRESS, V1, V1_CLIENT, Tell, ask

class Server(fastserve.ProxyProtocolMixIn, fastserve.PreforkMixIn, fastserve.ThreadingTCPServer):
    workers = 2
    proxy_header_timeout = 60

server = Server(ADDRESS, Tell)
serving = threading.Thread(target=server.serve_forever)
serving.start()
try:
    for _ in range(10):
        assert ask(server, V1, b"hello")["client"] == list(V1_CLIENT)
        assert ask(server, b"no header") is None
finally:
    server.shutdown()
    serving.join()
    server.server_close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_request_that_is_no_socket_is_refused_with_an_error(impl: str, capfd: pytest.CaptureFixture[str]) -> None:
    class Request:
        def close(self) -> None:
            pass

        shutdown = send = recv = settimeout = gettimeout = close

    class Server(class_of("")):  # type: ignore[misc]
        def get_request(self) -> Any:
            super().get_request()[0].close()
            return Request(), ("127.0.0.1", 1)

        def shutdown_request(self, request: Any) -> None:
            pass

    with Server(ADDRESS, Tell) as server, client_of(server):
        server.handle_request()
    assert "TypeError: the header of the PROXY protocol is read from a socket.socket" in capfd.readouterr().err


def test_the_loop_runs_in_c_as_without_the_mix_in(impl: str) -> None:
    seen: list[str] = []

    class Handler(Tell):
        def setup(self) -> None:
            seen.extend(frame.function for frame in inspect.stack(0))

    with serving(server_of("", Handler)) as server:
        assert ask(server, V1)
    assert ("_handle_request_noblock" in seen) is (impl == "py" or _backend.FREE_THREADED)


def test_errors_of_accept_are_those_of_the_servers_own_get_request() -> None:
    class Own(fastserve.TCPServer):
        def get_request(self) -> Any:
            return super().get_request()

    for base, expected in (
        (fastserve.ThreadingTCPServer, fastserve.TCPServer.get_request),
        (Own, Own.get_request),
        (socketserver.TCPServer, socketserver.TCPServer.get_request),
    ):
        with class_of("", base)(ADDRESS, Tell) as server:
            assert server_module._get_request_of(server) is expected


# Who is trusted


def trusts_address(address: Any, *trusted: Any) -> bool:
    with class_of("", trusted_proxies=trusted)(ADDRESS, Tell) as server, socket.socket() as connection:
        return bool(proxy._trust_of(server)(connection, address))


def test_by_default_this_machine_alone_is_trusted() -> None:
    default = fastserve.ProxyProtocolMixIn.trusted_proxies
    for host in ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"):
        assert trusts_address((host, 1), *default)
    for host in ("10.0.0.1", "192.168.1.1", "::", "::2", "fe80::1", "::ffff:10.0.0.1", "0.0.0.0"):
        assert not trusts_address((host, 1), *default)


def test_networks_and_addresses_are_strings_or_objects() -> None:
    trusted = ("10.1.0.0/16", "192.0.2.1", ipaddress.ip_network("2001:db8::/32"), ipaddress.ip_address("fe80::1"))
    for host in ("10.1.255.255", "192.0.2.1", "2001:db8::7", "fe80::1", "fe80::1%eth0", "::ffff:10.1.2.3"):
        assert trusts_address((host, 1), *trusted), host
    for host in ("10.2.0.0", "192.0.2.2", "2001:db9::", "fe80::2", "127.0.0.1"):
        assert not trusts_address((host, 1), *trusted), host


@pytest.mark.parametrize(
    "address", [None, "", b"", (), (1, 2), ("", 1), ("localhost", 1), (None, 1), (b"127.0.0.1", 1)]
)
def test_an_address_that_is_none_of_ip_is_not_trusted_over_tcp(address: Any) -> None:
    assert not trusts_address(address, "0.0.0.0/0", "::/0")


def test_what_is_no_network_is_refused_when_the_server_is_made() -> None:
    for wrong, error in (("10.0.0.0/8", TypeError), ((1,), TypeError), (("10.0.0.1/8",), ValueError)):
        with pytest.raises(error):
            class_of("", trusted_proxies=wrong)(ADDRESS, Tell)
    with pytest.raises(ValueError, match="localhost"):
        class_of("", trusted_proxies=["localhost"])(ADDRESS, Tell)


def test_an_untrusted_peer_has_its_connection_closed_and_no_handler(
    any_worker: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(server_of(any_worker, trusted_proxies=("192.0.2.0/24",))) as server:
        assert ask(server, V1, b"hello") is None
        with client_of(server) as silent:
            assert rest_of(silent) == b""  # at once, and not when the header is too late
    assert capfd.readouterr().err == ""


def test_who_is_trusted_may_change_while_the_server_runs(worker: str) -> None:
    failures = Failures()
    with serving(server_of(worker, trusted_proxies=["192.0.2.0/24"], proxy_header_failed=failures)) as server:
        assert ask(server, V1) is None
        server.trusted_proxies = ["127.0.0.1"]
        assert ask(server, V1)
        server.trusted_proxies = []
        assert ask(server, V1) is None
        server.trusted_proxies.append("127.0.0.0/8")
        assert ask(server, V1)
    assert [type(error) for error in failures.errors] == [fastserve.ProxyProtocolError] * 2
    assert all("127.0.0.1" in str(error) for error in failures.errors)


# What is refused


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"G",
        b"\x16\x03\x01",
        b"",
        V1[:-1],
        V2[:20],
        V1.replace(b"TCP4", b"TCP9"),
        V1.replace(b"192.0.2.7", b"client.example"),
        b"PROXY UNKNOWN " + b"x" * 93,
        V2[:12] + b"\x2f" + V2[13:],
        binary(bytes(4081)),
        ipv4(V1_CLIENT, V1_CLIENT, tlv(3, bytes(4))),
    ],
)
def test_what_is_no_header_closes_the_connection_without_a_report(
    any_worker: str, sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(server_of(any_worker, proxy_header_timeout=LIMIT)) as server:
        assert ask(server, sent) is None
        assert ask(server, V1, b"hello")["data"] == "hello"
    assert capfd.readouterr().err == ""


def test_what_failed_is_told_to_a_hook_in_the_worker(worker: str) -> None:
    failures = Failures()
    ended: list[Any] = []

    class Server(class_of(worker)):  # type: ignore[misc]
        def proxy_header_failed(self, request: Any, client_address: Any, error: Any) -> None:
            assert request.fileno() >= 0
            failures(request, client_address, error)

        def shutdown_request(self, request: Any) -> None:
            ended.append(request)
            super().shutdown_request(request)

    with serving(Server(ADDRESS, Tell)) as server:
        with client_of(server) as client:
            address = client.getsockname()
            client.sendall(b"nothing of the kind")
            assert rest_of(client) == b""
        assert ask(server) is None
        wait_until(lambda: len(ended) == 2)
    assert failures.addresses[0] == address
    assert [type(error) for error in failures.errors] == [fastserve.ProxyProtocolError] * 2


def test_an_error_of_the_hook_is_reported(any_worker: str, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(self: Any, request: Any, client_address: Any, error: Exception) -> None:
        raise ValueError("an error of the hook") from error

    with serving(server_of(any_worker, proxy_header_failed=fail)) as server:
        assert ask(server, b"no header") is None
    assert "ValueError: an error of the hook" in capfd.readouterr().err


@pytest.mark.parametrize("header", [V1, V2])
def test_a_header_that_comes_too_late_is_refused(any_worker: str, header: bytes) -> None:
    with serving(server_of(any_worker, proxy_header_timeout=0.05)) as server:
        for begin in (b"", header[:1], header[:17], header[:-1]):
            with client_of(server) as client:
                client.sendall(begin)
                assert rest_of(client) == b""


def test_a_client_that_trickles_is_cut_at_the_deadline(worker: str) -> None:
    failures = Failures()
    header = ipv4(V1_CLIENT, V1_CLIENT, tlv(4, bytes(4000)))
    # Each byte comes well within the limit, all of them do not.
    with serving(server_of(worker, proxy_header_timeout=0.5, proxy_header_failed=failures)) as server:
        with client_of(server) as client:
            sent = 0
            with contextlib.suppress(ConnectionError):
                while not failures.errors and sent < len(header):
                    client.sendall(header[sent : sent + 1])
                    sent += 1
                    time.sleep(0.05)
            assert rest_of(client) == b""
    assert sent < len(header)
    assert [type(error) for error in failures.errors] == [TimeoutError]


def test_without_a_limit_a_header_may_come_at_any_time(worker: str) -> None:
    with serving(server_of(worker, proxy_header_timeout=None)) as server, client_of(server) as client:
        client.sendall(V1[:30])
        assert ask(server, V2)
        client.sendall(V1[30:])
        client.shutdown(socket.SHUT_WR)
        assert json.loads(rest_of(client))["client"] == list(V1_CLIENT)


def test_the_limit_of_bytes_is_the_servers(worker: str) -> None:
    header = ipv4(V1_CLIENT, V1_CLIENT, tlv(4, bytes(5000)))
    with serving(server_of(worker)) as server:
        assert ask(server, header) is None
        server.proxy_header_limit = len(header)
        assert ask(server, header, b"hello")["data"] == "hello"
        server.proxy_header_limit -= 1
        assert ask(server, header) is None


def test_clients_without_a_header_hold_up_nobody(worker: str) -> None:
    count = 4 if worker == "ThreadPool" else 20
    with serving(server_of(worker, max_workers=8, proxy_header_timeout=LIMIT)) as server:
        with contextlib.ExitStack() as stack:
            for number in range(count):
                stack.enter_context(client_of(server)).sendall(V1[:number])
            assert ask(server, V1)


def test_a_reset_of_the_client_is_no_error(worker: str, capfd: pytest.CaptureFixture[str]) -> None:
    failures = Failures()
    with serving(server_of(worker, proxy_header_failed=failures, proxy_header_timeout=LIMIT)) as server:
        with socket.create_connection(server.server_address, LIMIT) as client:
            client.sendall(V1[:20])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_until(lambda: failures.errors)
    assert isinstance(failures.errors[0], ConnectionResetError | fastserve.ProxyProtocolError)
    assert capfd.readouterr().err == ""


def test_a_hundred_refused_connections_leave_nothing(worker: str, capfd: pytest.CaptureFixture[str]) -> None:
    gc.collect()
    # Without the GIL, 3.13 frees no class that a test has defined, nor what it refers to.
    known = 0 if _backend.has_gil() else len(proxy._known)
    with serving(server_of(worker, reuse_threads=False, proxy_header_timeout=LIMIT)) as server:
        assert ask(server, V1)
        before = open_descriptors()
        for number in range(100):
            assert ask(server, (b"GET / HTTP/1.0\r\n\r\n", V1[:-1], b"")[number % 3]) is None
        assert ask(server, V1)
        wait_until(lambda: open_descriptors() <= before)
        # Earlier tests may have left a connection in a cycle of references.
        wait_until(lambda: gc.collect() >= 0 and len(proxy._known) <= known)
    assert capfd.readouterr().err == ""


class Piecemeal(socket.socket):
    """A connection whose ``recv`` counts its calls."""

    calls = 0

    def recv(self, *arguments: Any) -> bytes:
        self.calls += 1
        return super().recv(*arguments)


def test_pieces_are_not_waited_for_in_a_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with Piecemeal(fileno=ours.detach()) as connection, theirs:

        def trickle() -> None:
            for place in range(len(V1)):
                time.sleep(0.002)
                theirs.send(V1[place : place + 1])

        sender = threading.Thread(target=trickle)
        sender.start()
        info = proxy._receive(connection, connection.recv, 4096, LIMIT)
        sender.join()
        assert info.source == V1_CLIENT
        assert connection.calls <= len(V1) + 1
        theirs.sendall(V1 + V2 + V1[:20])
        connection.calls = 0
        for _ in range(2):
            proxy._receive(connection, connection.recv, 4096, LIMIT)
        assert connection.calls == 4
        # Its clock stands still: on a busy machine the time may be over before all of the beginning was taken.
        monkeypatch.setattr(proxy, "time", SimpleNamespace(monotonic=lambda: 0.0))
        with pytest.raises(TimeoutError):
            proxy._receive(connection, connection.recv, 4096, 0.01)
        assert connection.calls <= 8
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)


# A proxy that is not ours


class Listing(socketserver.StreamRequestHandler):
    """Answer each line with the address of the client; note what the header said."""

    infos: list[Any]

    def handle(self) -> None:
        self.infos.append(fastserve.proxy_info(self.request))
        with contextlib.suppress(ConnectionError):  # HAProxy resets the connections of its checks
            while self.rfile.readline():
                self.wfile.write(json.dumps(self.client_address).encode() + b"\n")


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
@pytest.mark.parametrize(("option", "version"), [("send-proxy", 1), ("send-proxy-v2", 2)])
def test_haproxy_tells_of_its_clients_and_checks_the_server(
    worker: str, option: str, version: int, tmp_path: Path
) -> None:
    handler: Any = type("Handler", (Listing,), {"infos": []})
    failures = Failures()
    with serving(server_of(worker, handler, proxy_header_failed=failures)) as server, socket.socket() as listener:
        listener.bind(ADDRESS)
        listener.listen()
        configuration = tmp_path / "haproxy.cfg"
        configuration.write_text(f"""
defaults
    mode tcp
    timeout connect 30s
    timeout client 30s
    timeout server 30s
listen proxy
    bind fd@{listener.fileno()}
    server one 127.0.0.1:{server.server_address[1]} {option} check inter 50ms fall 1000
""")
        command = ["haproxy", "-db", "-f", str(configuration)]
        with subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL) as process:
            try:
                with (
                    socket.create_connection(listener.getsockname(), LIMIT) as client,
                    client.makefile("rb") as answers,
                ):
                    for _ in range(2):
                        client.sendall(b"who am I?\n")
                        assert json.loads(answers.readline()) == list(client.getsockname())
                    (info,) = (info for info in handler.infos if info.source == client.getsockname())
                    assert (info.version, info.command) == (version, "PROXY")
                    assert info.destination == listener.getsockname()
                # The line of version 1 that belongs to a check names the two ends of its connection.
                ours = (None, server.server_address)
                wait_until(lambda: sum(info.destination in ours for info in handler.infos) >= 2)
                checks = {(info.version, info.command) for info in handler.infos if info.destination in ours}
                assert checks == {(version, "LOCAL" if version == 2 else "PROXY")}
            finally:
                process.terminate()
                process.wait(LIMIT)
    # On a busy machine a check may be over before its header was sent.
    refused = [error for error in failures.errors if isinstance(error, fastserve.ProxyProtocolError)]
    assert not [error for error in refused if "has ended before its header" not in str(error)]


def curl_speaks_it() -> bool:
    if shutil.which("curl") is None:
        return False
    done = subprocess.run(["curl", "--help", "all"], capture_output=True, text=True)
    return "--haproxy-protocol" in done.stdout


@pytest.mark.skipif(not curl_speaks_it(), reason="there is no curl that has --haproxy-protocol")
def test_curl_is_a_client_of_http_server(worker: str, tmp_path: Path) -> None:
    infos: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            infos.append((fastserve.proxy_info(self.request), self.client_address))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"found")

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(fastserve.ProxyProtocolMixIn, getattr(fastserve, f"{worker}MixIn"), http.server.HTTPServer):  # type: ignore[misc]
        proxy_header_timeout = LIMIT

    with serving(Server(ADDRESS, Handler)) as server:
        done = subprocess.run(
            ["curl", "-sS", "--haproxy-protocol", "--noproxy", "*", f"http://127.0.0.1:{server.server_address[1]}/"],
            capture_output=True,
            timeout=LIMIT,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"found", b"")
    ((info, client_address),) = infos
    assert (info.version, info.source) == (1, client_address)
    assert info.destination == ("127.0.0.1", server.server_address[1])
