"""Servers whose listener was wrapped for TLS, under every worker model."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import os
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastserve
from fastserve import _loop
from support import LIMIT, open_descriptors, serving, talk, wait_until

pytest.importorskip("trustme")

from tls_support import (  # noqa: E402
    NAME,
    ask,
    authority,
    client_context,
    client_of,
    is_ended,
    server_context,
    silent_client,
    wrapped,
)

ADDRESS = ("127.0.0.1", 0)

WORKERS = ["Threading", "ThreadPool"]
if importlib.util.find_spec("greenlet") is not None:
    WORKERS.append("Greenlet")
FORKING = ["Forking"] if hasattr(os, "fork") else []


class Upper(socketserver.StreamRequestHandler):
    """Answer each line in capitals."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line.upper())


def class_of(worker: str) -> Any:
    return getattr(fastserve, f"{worker}TCPServer")


def server_of(worker: str, handler: Any = Upper, context: Any = None, **attributes: Any) -> Any:
    """Return a server of a worker model whose class has these attributes, with TLS."""
    cls = type("Server", (class_of(worker),), {"request_queue_size": 100, **attributes})
    return wrapped(cls(ADDRESS, handler), context)


@pytest.fixture(params=WORKERS)
def worker(request: pytest.FixtureRequest, impl: str) -> str:
    """A worker model that does the handshake beside the loop, in the same process."""
    return str(request.param)


@pytest.fixture(params=[*WORKERS, *FORKING])
def any_worker(request: pytest.FixtureRequest, impl: str) -> str:
    return str(request.param)


# What is the same in the stdlib


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_a_wrapped_listener_serves_tls(module: ModuleType, name: str) -> None:
    with serving(wrapped(getattr(module, name)(ADDRESS, Upper))) as server:
        assert ask(server) == b"HELLO\n"


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_a_request_is_an_ssl_socket_whose_handshake_is_done(module: ModuleType, name: str) -> None:
    seen: list[Any] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            request = self.request
            seen.extend([type(request), request.version(), request.gettimeout(), request.do_handshake_on_connect])

    with serving(wrapped(getattr(module, name)(ADDRESS, Handler))) as server, client_of(server) as client:
        assert client.recv(1) == b""
    assert seen == [ssl.SSLSocket, "TLSv1.3", None, True]


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_a_failed_handshake_is_not_reported(module: ModuleType, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(wrapped(getattr(module, name)(ADDRESS, Upper))) as server:
        with silent_client(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert is_ended(client)
        with silent_client(server):
            pass
        with pytest.raises(ssl.SSLCertVerificationError), client_of(server, name="other.test"):
            pass
        assert ask(server) == b"HELLO\n"
    assert capfd.readouterr().err == ""


def test_a_listener_that_does_no_handshakes_leaves_them_to_the_handler(module: ModuleType) -> None:
    done = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            done.append(self.request.version() is not None and self.request.cipher() is not None)
            self.request.do_handshake()
            done.append(self.request.cipher() is not None)

    server = wrapped(module.ThreadingTCPServer(ADDRESS, Handler), do_handshake_on_connect=False)
    with serving(server), client_of(server) as client:
        assert client.recv(1) == b""
    assert done == [False, True]


@pytest.mark.parametrize("suppress", [True, False])
def test_a_ragged_end_is_what_the_listener_says(module: ModuleType, suppress: bool) -> None:
    seen: list[Any] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                seen.append(self.request.recv(10))
            except ssl.SSLEOFError as error:
                seen.append(type(error))

    server = wrapped(module.ThreadingTCPServer(ADDRESS, Handler), suppress_ragged_eofs=suppress)
    with serving(server):
        with client_of(server) as client:
            client.shutdown(socket.SHUT_WR)
        wait_until(lambda: seen)
    assert seen == [b"" if suppress else ssl.SSLEOFError]


# Every worker model


def test_every_worker_model_serves_tls(any_worker: str) -> None:
    with serving(server_of(any_worker)) as server:
        with client_of(server) as client, client.makefile("rb") as answers:
            for line in (b"one\n", b"two\n"):
                client.sendall(line)
                assert answers.readline() == line.upper()
        assert ask(server) == b"HELLO\n"


@pytest.mark.parametrize("when", ["before", "in server_bind"])
def test_the_listener_may_be_wrapped_before_it_is_bound_or_served(worker: str, when: str) -> None:
    class Server(class_of(worker)):  # type: ignore[misc]
        def server_bind(self) -> None:
            if when == "in server_bind":
                wrapped(self)
            super().server_bind()

    server = Server(ADDRESS, Upper, bind_and_activate=False)
    if when == "before":
        wrapped(server)
    server.server_bind()
    server.server_activate()
    with serving(server):
        assert ask(server) == b"HELLO\n"


def test_clients_that_do_not_speak_hold_up_nobody(any_worker: str) -> None:
    count = 4 if any_worker == "ThreadPool" else 20
    with serving(server_of(any_worker, max_workers=8)) as server, contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(silent_client(server))
        slow = stack.enter_context(silent_client(server))
        slow.sendall(b"\x16\x03\x01")  # the beginning of a handshake
        assert ask(server) == b"HELLO\n"
        stack.close()


def test_a_handshake_that_takes_too_long_is_ended_in_silence(
    any_worker: str, capfd: pytest.CaptureFixture[str]
) -> None:
    errors: list[Any] = []
    server = server_of(any_worker, handshake_timeout=0.05, handle_error=lambda *args: errors.append(args))
    with serving(server):
        with silent_client(server) as client:
            assert is_ended(client)
        with silent_client(server) as client:
            client.sendall(b"\x16\x03\x01")
            assert is_ended(client)
        server.handshake_timeout = LIMIT
        assert ask(server) == b"HELLO\n"
    assert errors == []
    assert capfd.readouterr().err == ""


def test_the_time_limit_is_over_with_the_handshake(worker: str) -> None:
    seen: list[Any] = []

    class Handler(Upper):
        def setup(self) -> None:
            seen.extend([self.request.gettimeout(), self.request.getblocking()])
            super().setup()

    def goes_on() -> bool:
        """Return whether a handshake was in time, as it may not be on a busy machine; if it was, all goes on."""
        answer = b""
        with contextlib.suppress(OSError), client_of(server) as client:
            time.sleep(0.3)
            client.sendall(b"late\n")
            answer = client.recv(10)
        assert answer == b"LATE\n" or not seen
        return bool(seen)

    with serving(server_of(worker, Handler, handshake_timeout=0.2)) as server:
        wait_until(goes_on)
    assert seen == [None, True]


def test_a_default_timeout_counts_for_the_handshake_as_in_the_stdlib(worker: str) -> None:
    seen: list[Any] = []

    class Handler(Upper):
        def setup(self) -> None:
            seen.append(self.request.gettimeout())
            super().setup()

    with serving(server_of(worker, Handler, handshake_timeout=None)) as server:
        socket.setdefaulttimeout(0.05)
        try:
            with silent_client(server) as client:
                assert is_ended(client)
            socket.setdefaulttimeout(LIMIT)
            assert ask(server) == b"HELLO\n"
        finally:
            socket.setdefaulttimeout(None)
    assert seen == [LIMIT]


def test_a_request_that_was_processed_is_shut_down_though_its_handshake_failed(worker: str) -> None:
    # Overrides of the two count requests, or take and release a semaphore.
    calls: list[str] = []

    class Server(class_of(worker)):  # type: ignore[misc]
        def process_request(self, request: Any, client_address: Any) -> None:
            calls.append(f"process {isinstance(request, ssl.SSLSocket)}")
            super().process_request(request, client_address)

        def finish_request(self, request: Any, client_address: Any) -> None:
            calls.append("finish")

        def shutdown_request(self, request: Any) -> None:
            super().shutdown_request(request)
            calls.append("shut down")

    with serving(wrapped(Server(ADDRESS, Upper))) as server:
        with silent_client(server) as client:
            client.sendall(b"not TLS\r\n\r\n")
            assert is_ended(client)
        wait_until(lambda: "shut down" in calls)
    assert calls == ["process True", "shut down"]


def test_a_hundred_failed_handshakes_leave_nothing(worker: str, capfd: pytest.CaptureFixture[str]) -> None:
    server = server_of(worker, reuse_threads=False)
    with serving(server):
        assert ask(server) == b"HELLO\n"
        wait_until(lambda: not getattr(server, "_threads", ()) or worker != "Threading")
        before = open_descriptors()
        for number in range(100):
            with silent_client(server) as client:
                if number % 3:
                    client.sendall(b"GET / HTTP/1.0\r\n\r\n" if number % 3 == 1 else b"\x16\x03\x01")
                if number % 3 == 1:
                    assert is_ended(client)
        assert ask(server) == b"HELLO\n"
        wait_until(lambda: open_descriptors() <= before)
        if worker == "Greenlet":
            (hub,) = _loop.State.of(server).hubs
            wait_until(lambda: hub.active == 0)
        elif worker == "Threading":
            wait_until(lambda: len(server._threads) == 0)
        (loop,) = _loop.State.of(server).loops
        assert loop._backoff.pause == 0
    assert capfd.readouterr().err == ""


def test_a_client_that_was_refused_has_had_no_handshake(worker: str) -> None:
    requests: list[Any] = []

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        requests.append(request)
        return False

    with serving(server_of(worker, verify_request=verify_request)) as server:
        with silent_client(server) as client:
            assert is_ended(client)
    assert isinstance(requests[0], ssl.SSLSocket)
    assert requests[0].fileno() == -1


def test_verify_request_may_ask_for_the_certificate_of_the_client(any_worker: str) -> None:
    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        certificate = request.getpeercert()
        return ("email", "client@client.test") in (certificate or {}).get("subjectAltName", ())

    context = server_context(verify_mode=ssl.CERT_OPTIONAL)
    with serving(server_of(any_worker, context=context, verify_request=verify_request)) as server:
        assert ask(server, context=client_context(certificate=True)) == b"HELLO\n"
        with client_of(server) as client:
            assert is_ended(client)


def test_a_handshake_that_fails_in_verify_request_refuses_the_client(
    any_worker: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        request.getpeercert()
        return True

    with serving(server_of(any_worker, verify_request=verify_request, handshake_timeout=1.0)) as server:
        with silent_client(server) as client:
            client.sendall(b"not TLS\r\n\r\n")
            assert is_ended(client)
        with silent_client(server) as client:
            assert is_ended(client)
        server.handshake_timeout = LIMIT
        assert ask(server) == b"HELLO\n"
    assert capfd.readouterr().err == ""


def test_an_error_of_verify_request_still_ends_the_loop(worker: str) -> None:
    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        request.close()
        asked.set()
        raise OSError("its own")

    asked = threading.Event()
    server = server_of(worker, verify_request=verify_request)
    with pytest.raises(OSError, match="its own"), serving(server), silent_client(server):
        assert asked.wait(LIMIT)


def test_an_override_that_handles_requests_itself_gets_the_handshake_done(worker: str) -> None:
    seen: list[Any] = []

    class Handler(Upper):
        def setup(self) -> None:
            seen.append(self.request.cipher() is not None)
            super().setup()

    class Server(class_of(worker)):  # type: ignore[misc]
        process_request = fastserve.TCPServer.process_request

    with serving(wrapped(Server(ADDRESS, Handler))) as server:
        assert ask(server) == b"HELLO\n"
    assert seen == [True]


def test_a_handshake_that_fails_in_the_hands_of_an_override_is_raised_there(worker: str) -> None:
    errors: list[Any] = []

    class Server(class_of(worker)):  # type: ignore[misc]
        process_request = fastserve.TCPServer.process_request

        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(sys.exc_info()[1])

    with serving(wrapped(Server(ADDRESS, Upper))) as server:
        with silent_client(server) as client:
            client.sendall(b"not TLS\r\n\r\n")
            assert is_ended(client)
        assert ask(server) == b"HELLO\n"
    assert [type(error) for error in errors] == [ssl.SSLError]


def test_process_request_thread_may_be_extended_and_finish_request_replaced(worker: str) -> None:
    class Server(class_of(worker)):  # type: ignore[misc]
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            super().process_request_thread(request, client_address)

        def finish_request(self, request: Any, client_address: Any) -> None:
            assert request.cipher()
            self.RequestHandlerClass(request, client_address, self)

    with serving(wrapped(Server(ADDRESS, Upper))) as server:
        assert ask(server) == b"HELLO\n"


def test_certificates_of_clients_can_be_required(any_worker: str, capfd: pytest.CaptureFixture[str]) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            ((_, address),) = self.request.getpeercert()["subjectAltName"]
            self.wfile.write(address.encode() + b"\n")

    with serving(server_of(any_worker, Handler, server_context(verify_mode=ssl.CERT_REQUIRED))) as server:
        assert ask(server, context=client_context(certificate=True)) == b"client@client.test\n"
        with client_of(server) as client, pytest.raises((ssl.SSLError, ConnectionError)):
            # In TLS 1.3 the client hears of it with its first read.
            client.sendall(b"hello\n")
            raise ConnectionAbortedError(client.recv(1))
    assert capfd.readouterr().err == ""


def test_the_server_name_and_the_protocol_are_negotiated(any_worker: str) -> None:
    context, other = server_context(), server_context("other.test")

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name == "other.test":
            connection.context = other

    context.sni_callback = choose  # type: ignore[assignment]
    other.set_alpn_protocols(["second"])
    context.set_alpn_protocols(["second", "first"])

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(str(self.request.selected_alpn_protocol()).encode() + b"\n")

    offering = client_context()
    offering.set_alpn_protocols(["first", "second"])
    with serving(server_of(any_worker, Handler, context)) as server:
        assert ask(server, context=offering, name="other.test") == b"second\n"
        assert ask(server, context=offering) == b"second\n"
        assert ask(server) == b"None\n"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_of_tls_are_spoken(worker: str, version: ssl.TLSVersion) -> None:
    with serving(server_of(worker)) as server:
        context = client_context(minimum_version=version, maximum_version=version)
        assert ask(server, context=context) == b"HELLO\n"


# What leaves the handshake where it is in the stdlib


class Counting(ssl.SSLSocket):
    """A user's own."""

    accepted = 0

    def accept(self) -> Any:
        type(self).accepted += 1
        return super().accept()


class OwnWrap(ssl.SSLContext):
    """A user's own."""

    wraps: list[Any] = []

    def wrap_socket(self, *args: Any, **kwargs: Any) -> Any:
        self.wraps.append(kwargs.get("do_handshake_on_connect"))
        return super().wrap_socket(*args, **kwargs)


def test_a_derived_listener_accepts_as_it_likes(worker: str) -> None:
    context = server_context()
    context.sslsocket_class = Counting
    Counting.accepted = 0
    with serving(server_of(worker, context=context)) as server:
        assert ask(server) == b"HELLO\n"
    assert Counting.accepted == 1


def test_a_context_with_a_class_for_its_connections_does_their_handshakes(worker: str) -> None:
    seen: list[Any] = []

    class Handler(Upper):
        def setup(self) -> None:
            seen.append(type(self.request))
            super().setup()

    context = server_context()
    server = server_of(worker, Handler, context)
    assert type(server.socket) is ssl.SSLSocket
    context.sslsocket_class = Counting
    with serving(server):
        assert ask(server) == b"HELLO\n"
    assert seen == [Counting]


def test_a_derived_context_wraps_as_it_likes(worker: str) -> None:
    context = OwnWrap(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(NAME).configure_cert(context)
    server = server_of(worker, context=context)
    OwnWrap.wraps.clear()
    with serving(server):
        assert ask(server) == b"HELLO\n"
    assert OwnWrap.wraps == [True]


def test_an_overridden_get_request_does_what_it_likes(worker: str) -> None:
    context = server_context()

    class Server(class_of(worker)):  # type: ignore[misc]
        def get_request(self) -> Any:
            request, address = super().get_request()
            return context.wrap_socket(request, server_side=True), address

    with serving(Server(ADDRESS, Upper)) as server:
        with client_of(server) as first, client_of(server) as second:
            for client in (second, first):
                client.sendall(b"a\n")
                assert client.recv(10) == b"A\n"


def test_a_failed_handshake_in_accept_does_not_stop_the_loop_for_a_while(impl: str) -> None:
    # Without a worker it is done there, as in the stdlib.
    with serving(wrapped(fastserve.TCPServer(ADDRESS, Upper))) as server:
        with silent_client(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert is_ended(client)
        (loop,) = _loop.State.of(server).loops
        assert loop._backoff.pause == 0
        assert ask(server) == b"HELLO\n"


@pytest.mark.parametrize("mixin", ["ThreadingMixIn", "ThreadPoolMixIn"])
def test_over_a_server_of_the_stdlib_alone_the_handshake_stays_in_accept(impl: str, mixin: str) -> None:
    seen: list[Any] = []

    class Server(getattr(fastserve, mixin), socketserver.TCPServer):  # type: ignore[misc]
        def verify_request(self, request: Any, client_address: Any) -> bool:
            seen.append((type(request), ssl.SSLSocket.cipher(request) is not None))
            return True

    with serving(wrapped(Server(ADDRESS, Upper))) as server:
        assert ask(server) == b"HELLO\n"
    assert seen == [(ssl.SSLSocket, True)]


# http.server


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.path} {threading.get_ident()}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def web_servers() -> list[Any]:
    names = ["patched", "Threading", "ThreadPool"]
    return [*names, "Greenlet"] if "Greenlet" in WORKERS else names


@contextlib.contextmanager
def web_server(kind: str) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        if kind == "patched":
            stack.enter_context(fastserve.patched())
            cls: Any = http.server.ThreadingHTTPServer
        elif kind == "Greenlet":
            cls = type("Server", (fastserve.GreenletMixIn, http.server.HTTPServer), {})
        else:
            mixin = getattr(fastserve, f"{kind}MixIn")
            cls = type("Server", (mixin, http.server.HTTPServer, fastserve.TCPServer), {})
        yield stack.enter_context(serving(wrapped(cls(ADDRESS, Page))))


@pytest.mark.parametrize("kind", web_servers())
def test_a_web_server_is_not_held_up_by_a_silent_client(impl: str, kind: str) -> None:
    with web_server(kind) as server, silent_client(server), client_of(server) as client:
        client.sendall(b"GET /one HTTP/1.1\r\nHost: a\r\n\r\nGET /two HTTP/1.0\r\n\r\n")
        answer = b""
        while data := client.recv(65536):
            answer += data
        assert re.findall(rb"^/\w+", answer, re.MULTILINE) == [b"/one", b"/two"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("kind", web_servers())
def test_curl_keeps_its_connection(impl: str, kind: str, tmp_path: Path) -> None:
    authority().cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    with web_server(kind) as server, silent_client(server):
        url = f"https://{NAME}:{server.server_port}"
        command = ["curl", "-sS", "--http1.1", "--noproxy", "*", "--cacert", str(tmp_path / "authority.pem")]
        command += ["--resolve", f"{NAME}:{server.server_port}:127.0.0.1", "-w", "%{num_connects}\n"]
        result = subprocess.run(
            [*command, *(f"{url}/{number}" for number in range(3))], capture_output=True, text=True, timeout=LIMIT
        )
        assert result.returncode == 0, result.stderr
        lines = result.stdout.split("\n")
        assert [line.split()[0] for line in lines if line] == ["/0", "1", "/1", "0", "/2", "0"]


# The module ssl


def test_ssl_is_not_imported_for_servers_without_tls(impl: str) -> None:
    code = (
        "import sys, fastserve; fastserve.TCPServer(('127.0.0.1', 0), None).server_close(); print('ssl' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_a_plain_listener_is_served_beside_one_with_tls(worker: str) -> None:
    with serving(server_of(worker)) as server, serving(class_of(worker)(ADDRESS, Upper)) as plain:
        assert ask(server) == b"HELLO\n"
        assert talk(plain.server_address, b"a\n") == b"A\n"
