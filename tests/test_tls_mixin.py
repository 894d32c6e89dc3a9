"""``TLSMixIn``, over every worker model."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastserve
from fastserve import _loop, tls_mixin
from support import LIMIT, open_descriptors, serving, wait_until

pytest.importorskip("trustme")

from tls_support import (  # noqa: E402
    NAME,
    ask,
    authority,
    client_context,
    client_of,
    end,
    is_ended,
    serial_at,
    serial_of,
    serials_under_load,
    server_context,
    silent_client,
    wrapped,
    write_authority,
    write_certificate,
)

pytestmark = pytest.mark.once

ADDRESS = ("127.0.0.1", 0)

IN_PROCESS = ["Threading", "ThreadPool"]
if importlib.util.find_spec("greenlet") is not None:
    IN_PROCESS.append("Greenlet")
CONCURRENT = [*IN_PROCESS, "Forking"] if hasattr(os, "fork") else IN_PROCESS


class Upper(socketserver.StreamRequestHandler):
    """Answer each line in capitals."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line.upper())


class Telling(socketserver.StreamRequestHandler):
    """Answer a line with what ``tell`` returns for the connection."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(f"{self.tell(self.request)}\n".encode())

    @staticmethod
    def tell(request: Any) -> object:
        raise NotImplementedError


def telling(function: Callable[[Any], object]) -> type[Telling]:
    return type("Handler", (Telling,), {"tell": staticmethod(function)})


@pytest.fixture(params=IN_PROCESS)
def worker(request: pytest.FixtureRequest, impl: str) -> str:
    """A worker model that handles requests beside the loop, in the same process."""
    return str(request.param)


@pytest.fixture(params=CONCURRENT)
def concurrent(request: pytest.FixtureRequest, impl: str) -> str:
    """A worker model that handles requests beside the loop."""
    return str(request.param)


@pytest.fixture(params=["", *CONCURRENT])
def model(request: pytest.FixtureRequest, impl: str) -> str:
    """A worker model, or none."""
    return str(request.param)


def class_of(model: str, **attributes: Any) -> Any:
    """Return the class of a server of a worker model, with TLS and these attributes."""
    bases = (fastserve.TLSMixIn, getattr(fastserve, f"{model}TCPServer"))
    return type("Server", bases, {"request_queue_size": 100, **attributes})


def server_of(model: str, handler: Any = Upper, **attributes: Any) -> Any:
    """Return such a server, with a context unless there are files."""
    if "tls_cert" not in attributes:
        attributes.setdefault("ssl_context", server_context())
    return class_of(model, **attributes)(ADDRESS, handler)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The attributes of a server with files."""
    cert, key = write_certificate(tmp_path)
    return {"tls_cert": cert, "tls_key": key}


# What is served


def test_a_context_is_all_that_is_needed(model: str) -> None:
    with serving(server_of(model)) as server:
        with client_of(server) as client, client.makefile("rb") as answers:
            for line in (b"one\n", b"two\n"):
                client.sendall(line)
                assert answers.readline() == line.upper()
        assert ask(server) == b"HELLO\n"
        assert type(server.socket) is socket.socket


@pytest.mark.parametrize("kind", [str, Path])
def test_a_certificate_and_its_key_come_out_of_files(
    model: str, kind: type, files: dict[str, Path], tmp_path: Path
) -> None:
    with serving(server_of(model, **{name: kind(path) for name, path in files.items()})) as server:
        with client_of(server) as client:
            assert serial_at(client) == serial_of(files["tls_cert"])
        assert ask(server) == b"HELLO\n"


def test_the_key_may_be_in_the_file_of_the_certificate(files: dict[str, Path], impl: str) -> None:
    both = files["tls_cert"]
    both.write_bytes(both.read_bytes() + files["tls_key"].read_bytes())
    with serving(server_of("Threading", tls_cert=both)) as server:
        assert ask(server) == b"HELLO\n"


def test_the_attributes_may_be_those_of_the_instance(model: str, files: dict[str, Path]) -> None:
    server = class_of(model)(ADDRESS, Upper, bind_and_activate=False)
    vars(server).update(files)
    server.server_bind()
    server.server_activate()
    with serving(server):
        assert ask(server) == b"HELLO\n"


def describe(request: Any) -> list[object]:
    kind = type(request)
    return [
        f"{kind.__module__}.{kind.__qualname__}",
        request.version(),
        request.gettimeout(),
        request.getblocking(),
        request.do_handshake_on_connect,
        request.suppress_ragged_eofs,
        request.server_side,
        sorted(vars(request)),
    ]


def test_the_request_is_the_same_as_by_the_recipe(model: str) -> None:
    recipe = wrapped(getattr(fastserve, f"{model}TCPServer")(ADDRESS, telling(describe)))
    with serving(recipe) as server:
        expected = ask(server)
    with serving(server_of(model, telling(describe))) as server:
        assert ask(server) == expected
    assert b"TLSv1.3" in expected
    assert (b"fastserve.tls.Connection" if model == "Greenlet" else b"'ssl.SSLSocket") in expected


@pytest.mark.parametrize("base", ["TCPServer", "HTTPServer"])
@pytest.mark.parametrize("mixin", ["", "ThreadingMixIn", "ForkingMixIn"])
def test_it_works_over_the_classes_of_the_stdlib_alone(impl: str, mixin: str, base: str) -> None:
    if not hasattr(socketserver, mixin or "TCPServer"):
        pytest.skip("no fork here")
    bases = [getattr(http.server if base == "HTTPServer" else socketserver, base)]
    bases[:0] = [getattr(socketserver, mixin)] if mixin else []
    attributes = {"ssl_context": server_context(), "request_queue_size": 100}
    cls = type("Server", (fastserve.TLSMixIn, *bases), attributes)
    with serving(cls(ADDRESS, Upper), 0.01) as server, contextlib.ExitStack() as stack:
        if mixin:
            stack.enter_context(silent_client(server))
        assert ask(server) == b"HELLO\n"
        stack.close()


@pytest.mark.skipif("Greenlet" not in IN_PROCESS, reason="greenlets need the package greenlet")
def test_it_may_come_after_the_worker_model(impl: str) -> None:
    class Server(fastserve.GreenletMixIn, fastserve.TLSMixIn, fastserve.TCPServer):
        ssl_context = server_context()

    with serving(Server(ADDRESS, telling(describe))) as server, silent_client(server):
        assert b"fastserve.tls.Connection" in ask(server)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_unix_sockets_are_served_too(worker: str, tmp_path: Path) -> None:
    class Server(fastserve.TLSMixIn, getattr(fastserve, f"{worker}UnixStreamServer")):  # type: ignore[misc]
        ssl_context = server_context()

    path = str(tmp_path / "socket")
    with serving(Server(path, Upper)), socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(LIMIT)
        plain.connect(path)
        with client_context().wrap_socket(plain, server_hostname=NAME) as client:
            client.sendall(b"a\n")
            assert client.recv(10) == b"A\n"


def test_handle_request_handles_one(model: str) -> None:
    with server_of(model) as server, ThreadPoolExecutor(1) as clients:
        answer = clients.submit(ask, server)
        server.handle_request()
        assert answer.result(LIMIT) == b"HELLO\n"


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def web_server(model: str) -> Any:
    """Return a web server of the stdlib with a mix-in of ours."""
    bases = (getattr(fastserve, f"{model}MixIn"), http.server.HTTPServer) if model else (http.server.HTTPServer,)
    attributes = {"ssl_context": server_context(), "request_queue_size": 100}
    return type("Server", (fastserve.TLSMixIn, *bases), attributes)(ADDRESS, Page)


def test_a_web_server_answers(model: str) -> None:
    with serving(web_server(model), 0.01) as server, contextlib.ExitStack() as stack:
        if model:
            stack.enter_context(silent_client(server))
        with client_of(server) as client:
            client.sendall(b"GET /one HTTP/1.1\r\nHost: a\r\n\r\nGET /two HTTP/1.0\r\n\r\n")
            answer = b""
            while data := client.recv(65536):
                answer += data
        assert re.findall(rb"^/\w+", answer, re.MULTILINE) == [b"/one", b"/two"]
        stack.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_keeps_its_connection(model: str, tmp_path: Path) -> None:
    with serving(web_server(model), 0.01) as server:
        url = f"https://{NAME}:{server.server_port}"
        command = ["curl", "-sS", "--http1.1", "--noproxy", "*", "--cacert", str(write_authority(tmp_path))]
        command += ["--resolve", f"{NAME}:{server.server_port}:127.0.0.1", "-w", "%{num_connects}\n"]
        result = subprocess.run(
            [*command, *(f"{url}/{number}" for number in range(3))], capture_output=True, text=True, timeout=LIMIT
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.split() == ["/0", "1", "/1", "0", "/2", "0"]


# The handshake


def test_a_client_is_verified_before_its_handshake(model: str) -> None:
    verified = threading.Event()
    seen: list[Any] = []

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        seen.append(isinstance(request, ssl.SSLSocket))
        verified.set()
        return True

    with serving(server_of(model, verify_request=verify_request)) as server:
        with socket.create_connection(server.server_address, LIMIT) as plain:
            assert verified.wait(LIMIT)  # and the client has not sent anything yet
            with client_context().wrap_socket(plain, server_hostname=NAME) as client:
                client.sendall(b"a\n")
                assert client.recv(10) == b"A\n"
                end(client)
    assert seen == [True]


def test_a_client_that_was_refused_has_had_no_handshake(model: str) -> None:
    requests: list[Any] = []

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        requests.append(request)
        return False

    with serving(server_of(model, verify_request=verify_request)) as server, silent_client(server) as client:
        assert is_ended(client)
    assert requests[0].fileno() == -1


def test_clients_that_do_not_speak_hold_up_nobody(concurrent: str) -> None:
    accepted = threading.Semaphore(0)

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        accepted.release()
        return True

    # Without a limit each of the silent ones would stall for ever whoever waits for it.
    server = server_of(concurrent, verify_request=verify_request, handshake_timeout=None, max_workers=8)
    with serving(server), contextlib.ExitStack() as stack:
        for number in range(4):
            client = stack.enter_context(silent_client(server))
            client.sendall(b"\x16\x03\x01" if number % 2 else b"")  # the beginning of a handshake
            assert accepted.acquire(timeout=LIMIT)
        assert ask(server) == b"HELLO\n"
        stack.close()


def test_a_handshake_that_takes_too_long_is_ended_in_silence(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    errors: list[Any] = []
    server = server_of(model, handshake_timeout=0.05, handle_error=lambda *args: errors.append(args))
    with serving(server):
        for sent in (b"", b"\x16\x03\x01"):
            with silent_client(server) as client:
                client.sendall(sent)
                assert is_ended(client)
        server.handshake_timeout = LIMIT
        assert ask(server) == b"HELLO\n"
    assert errors == []
    assert capfd.readouterr().err == ""


def test_the_time_limit_is_that_of_the_class_which_follows(impl: str) -> None:
    class Patient(fastserve.ThreadingTCPServer):
        handshake_timeout = 42.0

    class Server(fastserve.TLSMixIn, Patient):
        ssl_context = server_context()

    with serving(Server(ADDRESS, Upper)) as server:
        assert server.handshake_timeout == 42.0
        assert ask(server) == b"HELLO\n"


def test_a_failed_handshake_is_not_reported(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(server_of(model)) as server:
        with silent_client(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert is_ended(client)
        with silent_client(server):
            pass
        with pytest.raises(ssl.SSLCertVerificationError), client_of(server, name="other.test"):
            pass
        assert ask(server) == b"HELLO\n"
    assert capfd.readouterr().err == ""


def test_a_hundred_failed_handshakes_leave_no_descriptor(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(server_of(model)) as server:
        assert ask(server) == b"HELLO\n"
        wait_until(lambda: model != "Threading" or not server._threads)
        wait_until(lambda: not getattr(server, "active_children", None))
        before = open_descriptors()
        for number in range(100):
            with silent_client(server) as client:
                if number % 3:
                    client.sendall(b"GET / HTTP/1.0\r\n\r\n" if number % 3 == 1 else b"\x16\x03\x01")
                if number % 3 == 1:
                    assert is_ended(client)
        assert ask(server) == b"HELLO\n"
        wait_until(lambda: open_descriptors() <= before)
    assert capfd.readouterr().err == ""


def test_a_handshake_that_fails_in_verify_request_refuses_the_client(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        request.getpeercert()
        return True

    with serving(server_of(model, verify_request=verify_request, handshake_timeout=1.0)) as server:
        with silent_client(server) as client:
            client.sendall(b"not TLS\r\n\r\n")
            assert is_ended(client)
        server.handshake_timeout = LIMIT
        assert ask(server) == b"HELLO\n"
    assert capfd.readouterr().err == ""


def test_so_it_does_in_the_loop_of_the_stdlib(impl: str) -> None:
    class Server(fastserve.TLSMixIn, http.server.ThreadingHTTPServer):
        ssl_context = server_context()

        def verify_request(self, request: Any, client_address: Any) -> bool:
            return bool(request.getpeercert() is None)

    with serving(Server(ADDRESS, Upper), 0.01) as server:
        with silent_client(server) as client:
            client.sendall(b"not TLS\r\n\r\n")
            assert is_ended(client)
        assert ask(server) == b"HELLO\n"


def test_an_override_that_handles_requests_itself_gets_the_handshake_done(model: str) -> None:
    class Server(class_of(model)):  # type: ignore[misc]
        ssl_context = server_context()

        def finish_request(self, request: Any, client_address: Any) -> None:
            assert request.cipher()
            self.RequestHandlerClass(request, client_address, self)

    with serving(Server(ADDRESS, Upper)) as server:
        assert ask(server) == b"HELLO\n"


class Own(ssl.SSLSocket):
    """A user's own."""


def test_connections_of_a_derived_class_have_their_handshake_in_the_worker_too(concurrent: str) -> None:
    context = server_context()
    context.sslsocket_class = Own
    server = server_of(concurrent, telling(type), ssl_context=context, handshake_timeout=None)
    if concurrent == "Greenlet":  # they do not wait in the hub
        server.handshake_timeout = 0.05
    with serving(server), silent_client(server) as client:
        client.sendall(b"\x16\x03\x01")
        if concurrent == "Greenlet":
            assert is_ended(client)
            server.handshake_timeout = LIMIT
        assert b"Own" in ask(server)
        end(client)


def test_a_listener_that_is_wrapped_already_makes_its_connections_itself(model: str) -> None:
    server = server_of(model)
    server.socket = server_context("other.test").wrap_socket(server.socket, server_side=True)
    with serving(server):
        assert ask(server, name="other.test") == b"HELLO\n"


def test_a_listener_that_cannot_be_accepted_from_is_left_alone(impl: str, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(server_of("Threading")) as server:
        assert ask(server) == b"HELLO\n"
        server.socket.shutdown(socket.SHUT_RDWR)
        (loop,) = _loop.State.of(server).loops
        wait_until(lambda: loop._backoff.pause > 0)
    assert "cannot accept on" in capfd.readouterr().err


# What is negotiated


def test_a_client_without_a_certificate_is_refused(
    model: str, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = telling(lambda request: request.getpeercert()["subjectAltName"][0][1])
    with serving(server_of(model, handler, **files, tls_client_ca=write_authority(tmp_path))) as server:
        assert ask(server, context=client_context(certificate=True)) == b"client@client.test\n"
        for context in (client_context(), stranger()):
            with pytest.raises((ssl.SSLError, ConnectionError)), client_of(server, context) as client:
                # In TLS 1.3 the client hears of it with its first read.
                client.sendall(b"hello\n")
                raise ConnectionAbortedError(client.recv(1))
        assert ask(server, context=client_context(certificate=True)) == b"client@client.test\n"
    assert capfd.readouterr().err == ""


def stranger() -> ssl.SSLContext:
    """Return the context of a client whose certificate another authority has signed."""
    import trustme

    context = client_context()
    trustme.CA().issue_cert("stranger@client.test").configure_cert(context)
    return context


def test_verify_request_may_ask_for_the_certificate_of_the_client(
    model: str, files: dict[str, Path], tmp_path: Path
) -> None:
    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        return ("email", "client@client.test") in request.getpeercert()["subjectAltName"]

    attributes = {**files, "tls_client_ca": write_authority(tmp_path), "verify_request": verify_request}
    with serving(server_of(model, **attributes)) as server:
        assert ask(server, context=client_context(certificate=True)) == b"HELLO\n"


def test_the_protocol_is_agreed_upon(model: str, files: dict[str, Path]) -> None:
    handler = telling(lambda request: request.selected_alpn_protocol())
    with serving(server_of(model, handler, **files, alpn_protocols=("second", "first"))) as server:
        offering = client_context()
        offering.set_alpn_protocols(["first", "second"])
        assert ask(server, context=offering) == b"second\n"
        offering.set_alpn_protocols(["third"])
        assert ask(server, context=offering) == b"None\n"
        assert ask(server) == b"None\n"


def test_several_names_have_their_certificates_through_the_callback_of_the_context(model: str) -> None:
    context, other = server_context(), server_context("other.test")

    def choose(connection: Any, name: str | None, _: ssl.SSLContext) -> None:
        if name == "other.test":
            connection.context = other

    context.sni_callback = choose  # type: ignore[assignment]
    with serving(server_of(model, ssl_context=context)) as server:
        with client_of(server, name="other.test") as client:
            assert dict(client.getpeercert())["subjectAltName"] == (("DNS", "other.test"),)  # type: ignore[arg-type]
        assert ask(server, name="other.test") == b"HELLO\n"
        assert ask(server) == b"HELLO\n"
        with pytest.raises(ssl.SSLCertVerificationError), client_of(server, name="third.test"):
            pass


def test_a_context_that_is_made_is_a_sound_one(files: dict[str, Path], tmp_path: Path) -> None:
    context = tls_mixin.new_context(*files.values())
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert context.protocol == ssl.PROTOCOL_TLS_SERVER
    assert context.verify_mode == ssl.CERT_NONE
    assert context.get_ca_certs() == []
    context = tls_mixin.new_context(*files.values(), write_authority(tmp_path))
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1


# Other certificates


def test_new_connections_get_the_new_certificate_and_open_ones_go_on(model: str, files: dict[str, Path]) -> None:
    first = serial_of(files["tls_cert"])
    with serving(server_of(model, **files)) as server, contextlib.ExitStack() as stack:
        client = stack.enter_context(client_of(server))
        client.sendall(b"one\n")
        assert client.recv(10) == b"ONE\n"
        write_certificate(files["tls_cert"].parent)
        second = serial_of(files["tls_cert"])
        assert first != second
        if model:
            with client_of(server) as before:
                assert serial_at(before) == first
        server.reload_certificates()
        client.sendall(b"two\n")
        assert client.recv(10) == b"TWO\n"
        assert serial_at(client) == first
        stack.close()
        with client_of(server) as after:
            assert serial_at(after) == second
        assert ask(server) == b"HELLO\n"


def test_the_authority_of_clients_is_loaded_again(impl: str, files: dict[str, Path], tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    stranger_ca = __import__("trustme").CA()
    stranger_ca.cert_pem.write_to_path(str(ca))
    with serving(server_of("Threading", **files, tls_client_ca=ca)) as server:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            if ask(server, context=client_context(certificate=True)) == b"":
                raise ConnectionAbortedError
        authority().cert_pem.write_to_path(str(ca))
        server.reload_certificates()
        assert ask(server, context=client_context(certificate=True)) == b"HELLO\n"


def spoil_missing(cert: Path, key: Path, ca: Path) -> None:
    cert.unlink()


def spoil_key(cert: Path, key: Path, ca: Path) -> None:
    key.unlink()


def spoil_mismatch(cert: Path, key: Path, ca: Path) -> None:
    _, other = write_certificate(cert.parent, stem="other")
    other.replace(key)


def spoil_garbage(cert: Path, key: Path, ca: Path) -> None:
    cert.write_text("nothing of that kind")


def spoil_empty(cert: Path, key: Path, ca: Path) -> None:
    key.write_bytes(b"")


def spoil_authority(cert: Path, key: Path, ca: Path) -> None:
    ca.write_bytes(b"")


def spoil_encrypted(cert: Path, key: Path, ca: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


SPOILT = {
    spoil_missing: (FileNotFoundError, "server.pem"),
    spoil_key: (FileNotFoundError, "server.key"),
    spoil_mismatch: (ssl.SSLError, "KEY_VALUES_MISMATCH"),
    spoil_garbage: (ssl.SSLError, ""),
    spoil_empty: (ssl.SSLError, ""),
    spoil_authority: (ssl.SSLError, "NO_CERTIFICATE_OR_CRL_FOUND"),
    spoil_encrypted: (ssl.SSLError, "server.key' is encrypted"),
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_files_that_cannot_be_used_leave_those_in_use_that_were(
    impl: str, files: dict[str, Path], tmp_path: Path, spoil: Callable[[Path, Path, Path], None]
) -> None:
    cert, key = files.values()
    ca = write_authority(tmp_path)
    serial = serial_of(cert)
    kind, said = SPOILT[spoil]
    with serving(server_of("Threading", **files, tls_client_ca=ca)) as server:
        spoil(cert, key, ca)
        for _ in range(2):
            with pytest.raises(kind) as caught:
                server.reload_certificates()
            assert said in str(caught.value)
            with client_of(server, client_context(certificate=True)) as client:
                assert serial_at(client) == serial
                client.sendall(b"a\n")
                assert client.recv(10) == b"A\n"
        write_certificate(tmp_path)
        write_authority(tmp_path)
        server.reload_certificates()
        with client_of(server, client_context(certificate=True)) as client:
            assert serial_at(client) == serial_of(cert)


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_files_that_cannot_be_used_are_an_error_of_the_constructor(
    impl: str, files: dict[str, Path], tmp_path: Path, spoil: Callable[[Path, Path, Path], None]
) -> None:
    ca = write_authority(tmp_path)
    spoil(*files.values(), ca)
    kind, said = SPOILT[spoil]
    before = open_descriptors()
    with pytest.raises(kind) as caught:
        server_of("Threading", **files, tls_client_ca=ca)
    assert said in str(caught.value)
    if kind is ssl.SSLError and spoil is not spoil_encrypted:
        assert str(ca if spoil is spoil_authority else files["tls_cert"]) in caught.value.__notes__[0]
    assert open_descriptors() == before


def test_another_context_may_be_assigned(model: str) -> None:
    with serving(server_of(model, ssl_context=server_context())) as server, contextlib.ExitStack() as stack:
        client = stack.enter_context(client_of(server))
        client.sendall(b"one\n")
        assert client.recv(10) == b"ONE\n"
        server.ssl_context = server_context("other.test")
        client.sendall(b"two\n")
        assert client.recv(10) == b"TWO\n"
        stack.close()
        assert ask(server, name="other.test") == b"HELLO\n"
        with pytest.raises(ValueError, match="assign a new context"):
            server.reload_certificates()


@pytest.mark.parametrize("wrong", [lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), lambda: "context"])
def test_a_wrong_context_that_was_assigned_is_told_and_the_server_goes_on(
    model: str, wrong: Callable[[], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(server_of(model)) as server:
        right, server.ssl_context = server.ssl_context, wrong()
        with silent_client(server) as client:
            assert is_ended(client)
        server.ssl_context = right
        assert ask(server) == b"HELLO\n"
    assert "ssl_context is " in capfd.readouterr().err


@pytest.mark.parametrize("how", ["files", "contexts"])
def test_certificates_are_exchanged_under_load(
    worker: str, how: str, files: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    # A forking server is tried in a process of its own, in test_cli_tls: a child must not be forked while other threads
    # are in OpenSSL.
    known = {serial_of(files["tls_cert"])}
    server = server_of(worker, **files)

    def exchange() -> None:
        write_certificate(files["tls_cert"].parent)
        known.add(serial_of(files["tls_cert"]))
        if how == "files":
            server.reload_certificates()
        else:
            server.ssl_context = tls_mixin.new_context(*files.values())

    with serving(server):
        serials_under_load(server, exchange, known)
    assert capfd.readouterr().err == ""


def test_of_two_that_load_at_once_the_later_one_counts(
    impl: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when a signal handler loads newer files while the main thread loads.
    new_context = tls_mixin.new_context
    calls: list[Any] = []

    def interrupted(*arguments: Any) -> ssl.SSLContext:
        context = new_context(*arguments)
        calls.append(context)
        if len(calls) == 1:
            write_certificate(files["tls_cert"].parent)
            server.reload_certificates()
        return context

    with serving(server_of("Threading", **files)) as server:
        monkeypatch.setattr(tls_mixin, "new_context", interrupted)
        server.reload_certificates()
        assert len(calls) == 2
        with client_of(server) as client:
            assert serial_at(client) == serial_of(files["tls_cert"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_that_was_forked_while_files_were_loaded_may_load_them(
    impl: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, forked = threading.Event(), threading.Event()
    new_context = tls_mixin.new_context

    def slow(*arguments: Any) -> ssl.SSLContext:
        loading.set()
        assert forked.wait(LIMIT)
        return new_context(*arguments)

    with server_of("Threading", **files) as server:
        monkeypatch.setattr(tls_mixin, "new_context", slow)
        loader = threading.Thread(target=server.reload_certificates)
        loader.start()
        assert loading.wait(LIMIT)
        pid = os.fork()
        if pid == 0:
            signal.alarm(int(LIMIT))  # where it would wait for ever
            status = 1
            try:
                monkeypatch.undo()
                server.reload_certificates()
                status = 0
            finally:
                os._exit(status)
        forked.set()
        loader.join()
        assert os.waitpid(pid, 0)[1] == 0


# What is refused


def test_without_a_certificate_there_is_no_server(model: str, tmp_path: Path) -> None:
    before = open_descriptors()
    for attributes in ({}, {"tls_client_ca": write_authority(tmp_path)}, {"alpn_protocols": ["a"]}):
        with pytest.raises(ValueError, match="needs an ssl_context, or a certificate"):
            class_of(model, **attributes)(ADDRESS, Upper)
    assert open_descriptors() == before


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_nothing_is_bound_without_a_certificate(tmp_path: Path) -> None:
    class Server(fastserve.TLSMixIn, fastserve.UnixStreamServer):
        pass

    path = tmp_path / "socket"
    with pytest.raises(ValueError, match="certificate"):
        Server(str(path), Upper)
    assert not path.exists()


def test_an_override_of_server_bind_does_not_do_without_a_certificate(impl: str) -> None:
    class Server(class_of("Threading")):  # type: ignore[misc]
        def server_bind(self) -> None:
            self.socket.bind(self.server_address)

    before = open_descriptors()
    with pytest.raises(ValueError, match="certificate"):
        Server(ADDRESS, Upper)
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("tls_cert", "a.pem"), ("tls_key", "a.key"), ("tls_client_ca", "ca.pem"), ("alpn_protocols", ["h2"])],
)
def test_what_belongs_into_the_context_is_not_given_beside_it(name: str, value: Any) -> None:
    before = open_descriptors()
    with pytest.raises(ValueError, match=f"both ssl_context and {name}"):
        class_of("Threading", ssl_context=server_context(), **{name: value})(ADDRESS, Upper)
    assert open_descriptors() == before


def test_a_context_of_another_kind_is_refused(files: dict[str, Path]) -> None:
    before = open_descriptors()
    with pytest.raises(ValueError, match="PROTOCOL_TLS_SERVER"):
        server_of("Threading", ssl_context=client_context())
    with pytest.raises(ValueError, match="PROTOCOL_TLS_SERVER"):
        server_of("Threading", ssl_context=server_context(verify_mode=ssl.CERT_REQUIRED, check_hostname=True))
    with pytest.raises(TypeError, match="ssl.SSLContext"):
        server_of("Threading", ssl_context=object())
    with pytest.raises(TypeError, match="sequence of names, not 'h2'"):
        server_of("Threading", **files, alpn_protocols="h2")
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["UDPServer", "ThreadingUDPServer", "UnixDatagramServer"])
def test_datagrams_are_refused(name: str, tmp_path: Path) -> None:
    if not hasattr(fastserve, name):
        pytest.skip("no Unix sockets here")
    cls = type("Server", (fastserve.TLSMixIn, getattr(fastserve, name)), {"ssl_context": server_context()})
    path = tmp_path / "socket"
    before = open_descriptors()
    with pytest.raises(TypeError, match="serves datagrams"):
        cls(str(path) if "Unix" in name else ADDRESS, Upper)
    assert open_descriptors() == before
    assert not path.exists()
