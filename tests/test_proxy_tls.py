"""The header of the PROXY protocol before the handshake of TLS, under every worker model."""

from __future__ import annotations

import contextlib
import gc
import http.server
import json
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import fastserve
from fastserve import proxy
from proxy_support import V1, V1_CLIENT, V2, V2_LOCAL
from support import LIMIT, open_descriptors, serving, wait_until

pytest.importorskip("trustme")

from test_proxy_servers import ADDRESS, FORKING, WORKERS, Failures, class_of, rest_of  # noqa: E402
from test_proxy_servers import Tell as Plain  # noqa: E402
from tls_support import NAME, client_context, end, server_context, wrapped  # noqa: E402

pytestmark = pytest.mark.once


class Tell(socketserver.StreamRequestHandler):
    """Answer each line with it, and what the handler knows of its client."""

    def handle(self) -> None:
        info: Any = fastserve.proxy_info(self.request)
        same = self.server.proxy_info  # type: ignore[attr-defined]
        while line := self.rfile.readline():
            answer = {
                "client": self.client_address,
                "version": info.version,
                "same": info is same,
                "tls": self.request.version(),
                "timeout": self.request.gettimeout(),
                "line": line.decode(),
            }
            self.wfile.write(json.dumps(answer).encode() + b"\n")


@pytest.fixture(params=["", *WORKERS, *FORKING])
def any_worker(request: pytest.FixtureRequest, impl: str) -> str:
    return str(request.param)


@pytest.fixture(params=WORKERS)
def worker(request: pytest.FixtureRequest, impl: str) -> str:
    """A worker model that does the handshake beside the loop, in the same process."""
    return str(request.param)


def server_of(worker: str, context: Any = None, base: Any = None, handler: Any = Tell, **attributes: Any) -> Any:
    attributes = {"handshake_timeout": LIMIT, **attributes}
    return wrapped(class_of(worker, base, **attributes)(ADDRESS, handler), context)


@contextlib.contextmanager
def plain_client(server: Any) -> Iterator[socket.socket]:
    with socket.create_connection(server.server_address[:2], LIMIT) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            yield client
        finally:
            end(client)


@contextlib.contextmanager
def client_of(server: Any, *header: bytes, context: Any = None) -> Iterator[ssl.SSLSocket]:
    """Connect, send the header in these pieces, and do the handshake."""
    context = context or client_context()
    with plain_client(server) as plain:
        for piece in header:
            plain.sendall(piece)
        with context.wrap_socket(plain, server_hostname=NAME) as client:
            yield client
            end(client)


def ask(server: Any, *header: bytes, context: Any = None) -> Any:
    with client_of(server, *header, context=context) as client, client.makefile("rb") as answers:
        client.sendall(b"hello\n")
        return json.loads(answers.readline())


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_the_header_comes_before_the_handshake(any_worker: str, header: bytes) -> None:
    with serving(server_of(any_worker)) as server:
        for pieces in ([header], [header[place : place + 1] for place in range(len(header))]):
            told = ask(server, *pieces)
            assert told == {
                "client": list(V1_CLIENT),
                "version": 1 if header is V1 else 2,
                "same": True,
                "tls": "TLSv1.3",
                "timeout": None,
                "line": "hello\n",
            }
        assert ask(server, V2_LOCAL)["client"][0] == "127.0.0.1"


def test_the_header_and_the_beginning_of_the_handshake_may_come_together(any_worker: str) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context().wrap_bio(incoming, outgoing, server_hostname=NAME)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    with serving(server_of(any_worker)) as server, plain_client(server) as plain:
        plain.sendall(V1 + outgoing.read())
        finished = False
        while not finished:
            incoming.write(plain.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
                finished = True
        client.write(b"hello\n")
        plain.sendall(outgoing.read())
        answer = b""
        while not answer.endswith(b"\n"):
            incoming.write(plain.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                answer += client.read()
    assert json.loads(answer)["client"] == list(V1_CLIENT)


@pytest.mark.parametrize("mixin", ["", *(f"{worker}MixIn" for worker in (*WORKERS, *FORKING))])
def test_http_server_has_it_with_tls_too(impl: str, mixin: str) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(self.client_address).encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    bases: list[Any] = [fastserve.ProxyProtocolMixIn, http.server.HTTPServer]
    if mixin:
        bases.insert(1, getattr(fastserve, mixin))
    server = wrapped(type("Server", tuple(bases), {"proxy_header_timeout": LIMIT})(ADDRESS, Handler))
    with serving(server, 0.01), client_of(server, V2) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert rest_of(client).endswith(json.dumps(V1_CLIENT).encode())


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", *(["ForkingTCPServer"] if FORKING else [])])
def test_the_servers_of_the_stdlib_have_it_with_tls_too(module: ModuleType, name: str) -> None:
    with serving(server_of("", base=getattr(module, name)), 0.01) as server:
        assert ask(server, V1)["client"] == list(V1_CLIENT)


@pytest.mark.parametrize("threading", ["thread", *(["greenlet"] if "Greenlet" in WORKERS else [])])
@pytest.mark.parametrize("secure", [False, True])
def test_the_servers_of_the_stdlib_have_it_under_the_patch_too(impl: str, threading: Any, secure: bool) -> None:
    cls = class_of("", socketserver.ThreadingTCPServer)
    with fastserve.patched(threading):
        with serving(wrapped(cls(ADDRESS, Tell)) if secure else cls(ADDRESS, Plain)) as server:
            for _ in range(2):
                with contextlib.ExitStack() as stack:
                    for _ in range(3):
                        stack.enter_context(plain_client(server)).sendall(V1[:20])
                    if secure:
                        assert ask(server, V2)["client"] == list(V1_CLIENT)
                    else:
                        client = stack.enter_context(plain_client(server))
                        client.sendall(V2 + b"hello")
                        client.shutdown(socket.SHUT_WR)
                        assert json.loads(rest_of(client))["client"] == list(V1_CLIENT)


def test_what_was_imported_under_the_patch_works_without_it() -> None:
    program = """
import socketserver, fastserve
fastserve.patch()
import fastserve.proxy
fastserve.unpatch()
assert socketserver.TCPServer.get_request in fastserve.server.ACCEPTING_GET_REQUESTS
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_listener_that_leaves_the_handshake_to_the_handler_has_the_header_read_first(any_worker: str) -> None:
    server = wrapped(class_of(any_worker)(ADDRESS, Tell), do_handshake_on_connect=False)

    with serving(server):
        for pieces in ([V1], [V1[:20], V1[20:]]):
            told = ask(server, *pieces)
            assert (told["client"], told["timeout"]) == (list(V1_CLIENT), None)


def test_the_limits_of_header_and_handshake_count_one_by_one(any_worker: str) -> None:
    server = server_of(any_worker, proxy_header_timeout=0.05, handshake_timeout=LIMIT)
    with serving(server):
        for begin in (b"", V1[:20]):
            with plain_client(server) as client:
                client.sendall(begin)
                assert rest_of(client) == b""
        server.proxy_header_timeout, server.handshake_timeout = LIMIT, 0.05
        for begin in (V1, V1 + b"\x16\x03\x01"):
            with plain_client(server) as client:
                client.sendall(begin)
                assert rest_of(client) == b""
        server.handshake_timeout = LIMIT
        assert ask(server, V1)


@pytest.mark.parametrize("trusted", [True, False])
def test_what_is_refused_is_told_to_the_hook_once_and_not_reported(
    worker: str, trusted: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    failures = Failures()
    server = server_of(worker, proxy_header_failed=failures, proxy_header_timeout=LIMIT)
    if not trusted:
        server.trusted_proxies = ()
    with serving(server):
        for _ in range(2):
            with pytest.raises((ssl.SSLError, ConnectionError)), client_of(server):
                pass
        wait_until(lambda: len(failures.errors) == 2)
    assert [type(error) for error in failures.errors] == [fastserve.ProxyProtocolError] * 2
    assert capfd.readouterr().err == ""


def test_verify_request_may_ask_for_the_certificate_of_the_client(any_worker: str) -> None:
    class Server(class_of(any_worker)):  # type: ignore[misc]
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return bool(request.getpeercert()["subjectAltName"] == (("email", "client@client.test"),))

    server = wrapped(Server(ADDRESS, Tell), server_context(verify_mode=ssl.CERT_REQUIRED))
    with serving(server):
        assert ask(server, V1, context=client_context(True))["client"] == list(V1_CLIENT)
        with plain_client(server) as client:
            client.sendall(b"no header, which is no error of the loop")
            assert rest_of(client) == b""
        assert ask(server, V2, context=client_context(True))["client"] == list(V1_CLIENT)


def test_clients_without_a_header_hold_up_nobody(worker: str) -> None:
    count = 4 if worker == "ThreadPool" else 20
    with serving(server_of(worker, max_workers=8, proxy_header_timeout=LIMIT)) as server:
        with contextlib.ExitStack() as stack:
            for number in range(count):
                stack.enter_context(plain_client(server)).sendall(V1[:number])
            assert ask(server, V1)["client"] == list(V1_CLIENT)


def test_many_refused_connections_leave_nothing(worker: str) -> None:
    with serving(server_of(worker, reuse_threads=False, proxy_header_timeout=LIMIT)) as server:
        assert ask(server, V1)
        before = open_descriptors()
        for number in range(30):
            with plain_client(server) as client:
                client.sendall((b"no header", V1[:20], V1 + b"no handshake")[number % 3])
                with contextlib.suppress(OSError):  # it has been refused
                    client.shutdown(socket.SHUT_WR)
                rest_of(client)
        assert ask(server, V1)
        wait_until(lambda: open_descriptors() <= before)
        # Earlier tests may have left a connection in a cycle of references.
        wait_until(lambda: gc.collect() >= 0 and not len(proxy._known))


# What is refused with a reason


def test_a_handshake_that_get_request_has_done_is_an_error(worker: str, capfd: pytest.CaptureFixture[str]) -> None:
    context = server_context()

    class Server(class_of(worker)):  # type: ignore[misc]
        def get_request(self) -> Any:
            request, address = super().get_request()
            return context.wrap_socket(request, server_side=True), address

    with serving(Server(ADDRESS, Tell)) as server, client_of(server) as client:
        assert rest_of(client) == b""
    assert "RuntimeError: the header of the PROXY protocol comes before the handshake" in capfd.readouterr().err


def test_a_listener_whose_handshake_cannot_be_put_off_is_an_error(worker: str) -> None:
    class Own(ssl.SSLSocket):
        pass

    context = server_context()
    context.sslsocket_class = Own
    raised: list[Any] = []
    with server_of(worker, context) as server:

        def serve() -> None:
            try:
                server.serve_forever()
            except RuntimeError as error:
                raised.append(str(error))

        thread = threading.Thread(target=serve)
        thread.start()
        with socket.create_connection(server.server_address, LIMIT):
            thread.join(LIMIT)
    assert raised and "do_handshake_on_connect=False" in raised[0]


@pytest.mark.parametrize("first", ["proxy", "tls"])
def test_the_header_comes_before_the_handshake_of_the_mix_in_too(any_worker: str, first: str) -> None:
    mixins = [fastserve.ProxyProtocolMixIn, fastserve.TLSMixIn]
    workers = [getattr(fastserve, f"{any_worker}MixIn")] if any_worker else []
    bases = (*(mixins if first == "proxy" else mixins[::-1]), *workers, fastserve.TCPServer)
    server = type("Server", bases, {"ssl_context": server_context(), "proxy_header_timeout": LIMIT})(ADDRESS, Tell)
    context = client_context()
    with server, serving(server):
        for _ in range(2):
            with contextlib.ExitStack() as opened:
                plain = opened.enter_context(plain_client(server))
                plain.sendall(V1)
                connection = opened.enter_context(context.wrap_socket(plain, server_hostname=NAME))
                connection.sendall(b"hello\n")
                with connection.makefile("rb") as lines:
                    answer = json.loads(lines.readline())
                end(connection)  # a forked child has a copy of the client's end
            assert tuple(answer["client"]) == V1_CLIENT and answer["same"] and answer["tls"].startswith("TLS")
        with plain_client(server) as plain:
            plain.sendall(b"no header at all, and more than enough to see that")
            assert rest_of(plain) == b""
