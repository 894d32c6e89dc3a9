"""Greenlets in the place of threads, for programs that are not changed: what holds, and what differs."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastserve
import greenlets_in_place
from children import IMPLEMENTATIONS, TIME_LIMIT, Child, child
from support import serving, talk, wait_until

pytest.importorskip("greenlet", reason="greenlets need the package greenlet")

TESTS = Path(__file__).parent
ADDRESS = ("127.0.0.1", 0)
IN_PLACE = [
    "test_conformance_handlers.py",
    "test_conformance_life_cycle.py",
    "test_conformance_servers.py",
    "test_conformance_workers.py",
    "test_datagrams.py",
    "test_errors.py",
    "test_seams_loop.py",
    "test_seams_names.py",
    "test_seams_requests.py",
    "test_seams_shape.py",
    "test_seams_sockets.py",
    "test_shutdown.py",
    "test_streams.py",
    "test_streams_writer.py",
    "test_workers_threads.py",
]


# What holds


@pytest.mark.timeout(900)
def test_what_the_stdlib_promises_holds_with_greenlets() -> None:
    """Run the tests that run on the stdlib itself, all but those that are known to differ."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "greenlets_in_place"]
    result = subprocess.run(
        [*command, *(str(TESTS / name) for name in IN_PLACE)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=880,
        cwd=TESTS.parent,
        env={
            **os.environ,
            "PYTEST_ADDOPTS": "",
            "PYTHONPATH": os.pathsep.join([str(Path(fastserve.__file__).parent.parent), str(TESTS)]),
        },
    )
    found = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0 and found and int(found[1]) > 300, result.stdout


def test_the_tests_that_are_left_out_exist() -> None:
    sources = "".join((TESTS / name).read_text() for name in IN_PLACE)
    for name in greenlets_in_place.DIFFERENT | greenlets_in_place.OF_THE_STDLIB:
        assert f"def {name}(" in sources


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Child]]:
    """Run a program, unchanged: ``with run(source, *arguments) as child``."""

    def start(source: str, *arguments: str) -> contextlib.AbstractContextManager[Child]:
        (tmp_path / "program.py").write_text(source)
        command = ["-m", "fastserve", "run", "--worker", "greenlet"]
        return child(request.param, tmp_path, [*command, *(arguments or ["program.py"])])

    return start


@contextlib.contextmanager
def idle_clients(port: int, count: int) -> Iterator[None]:
    """Be connected and send nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        yield


# It ends as a program does that is interrupted.
SERVE = """
with server:
    print("listening on", f"127.0.0.1:{server.server_address[1]}", threading.get_ident())
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("interrupted")
"""


def port_and_thread(server: Child) -> tuple[int, int]:
    port, thread = server.line().rpartition(":")[2].split()
    return int(port), int(thread)


def test_an_http_server_serves_beside_idle_and_kept_connections(run: Any) -> None:
    source = f"""
import http.server, threading

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = b"%d " % threading.get_ident() + body[::-1]
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
{SERVE}
"""
    with run(source) as server:
        port, thread = port_and_thread(server)
        with idle_clients(port, 5), contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)))
                for _ in range(5)
            ]
            for _ in range(3):
                for client in clients:
                    body = os.urandom(100_000)
                    client.request("POST", "/", body)
                    assert client.getresponse().read() == b"%d " % thread + body[::-1]
            assert server.interrupt() == "interrupted\n"


def test_python_m_http_server_serves_files_beside_idle_connections(run: Any, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "large.bin").write_bytes(data)
    with run("", "-m", "http.server", "--bind", "127.0.0.1", "0") as server:
        found = re.search(r"port (\d+) ", server.line())
        assert found
        port = int(found[1])
        with idle_clients(port, 5), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as client:
            client.request("GET", "/large.bin")
            assert client.getresponse().read() == data
            assert server.interrupt() == "\nKeyboard interrupt received, exiting.\n"


def test_an_xmlrpc_server_answers_beside_idle_connections(run: Any) -> None:
    source = f"""
import socketserver, threading
from xmlrpc.server import SimpleXMLRPCServer

class Server(socketserver.ThreadingMixIn, SimpleXMLRPCServer):
    daemon_threads = True

server = Server(("127.0.0.1", 0), logRequests=False)
server.register_function(lambda a, b: [a + b, str(threading.get_ident())], "add")
{SERVE}
"""
    with run(source) as server:
        port, thread = port_and_thread(server)
        url = f"http://127.0.0.1:{port}"
        with idle_clients(port, 5), xmlrpc.client.ServerProxy(url) as first, xmlrpc.client.ServerProxy(url) as second:
            for number in range(3):
                assert first.add(2, number) == [2 + number, str(thread)]
                assert second.add("a" * 100_000, "b") == ["a" * 100_000 + "b", str(thread)]
            assert server.interrupt() == "interrupted\n"


def test_wsgiref_with_the_threading_mix_in_answers_beside_idle_connections(run: Any) -> None:
    source = f"""
import socketserver, threading
from wsgiref import simple_server, validate

class Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    daemon_threads = True

def application(environ, start_response):
    received = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d " % threading.get_ident(), received]

server = simple_server.make_server("127.0.0.1", 0, validate.validator(application), Server)
{SERVE}
"""
    with run(source) as server:
        port, thread = port_and_thread(server)
        with idle_clients(port, 5):
            for sent in b"", b"x" * 200_000:
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
                    client.request("POST", "/", sent, {"Content-Type": "text/plain"})
                    assert client.getresponse().read() == b"%d " % thread + sent
            assert server.interrupt() == "interrupted\n"


def test_werkzeugs_threaded_server_answers_beside_idle_connections(run: Any) -> None:
    pytest.importorskip("werkzeug")
    source = """
import threading
from werkzeug import Request, Response
from werkzeug.serving import make_server

@Request.application
def application(request):
    def parts():
        yield b"%d " % threading.get_ident()
        yield request.get_data()
    return Response(parts())

server = make_server("127.0.0.1", 0, application, threaded=True)
print("listening on", f"127.0.0.1:{server.port}", threading.get_ident())
server.serve_forever()
"""
    with run(source) as server:
        port, thread = port_and_thread(server)
        with idle_clients(port, 5):
            for sent in b"", b"x" * 200_000:
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
                    client.request("POST", "/", sent)
                    assert client.getresponse().read() == b"%d " % thread + sent
            server.interrupt()


def test_dnslib_answers_over_udp_and_tcp(run: Any) -> None:
    dnslib = pytest.importorskip("dnslib")
    source = """
from dnslib import RR
from dnslib.server import DNSLogger, DNSServer

class Resolver:
    def resolve(self, request, handler):
        reply = request.reply()
        reply.add_answer(*RR.fromZone(f"{request.q.qname} 60 A 192.0.2.7"))
        return reply

servers = [
    DNSServer(Resolver(), address="127.0.0.1", port=0, tcp=tcp, logger=DNSLogger("error", prefix=False))
    for tcp in (False, True)
]
for server in servers:
    server.start_thread()
    print("listening on", f"127.0.0.1:{server.server.server_address[1]}")
input_ended = __import__("threading").Event()
try:
    input_ended.wait()
except KeyboardInterrupt:
    for server in servers:
        server.stop()
        server.server.server_close()
        server.thread.join(60)
        assert not server.isAlive()
"""
    with run(source) as server:
        for tcp in False, True:
            port = server.port()
            for number in range(20):
                question = dnslib.DNSRecord.question(f"host{number}.example")
                answer = dnslib.DNSRecord.parse(question.send("127.0.0.1", port, tcp=tcp, timeout=60))
                assert [str(record.rdata) for record in answer.rr] == ["192.0.2.7"]
        server.interrupt()


# What differs: each is a section of docs/differences.md


@pytest.fixture
def patched(impl: str) -> Iterator[None]:
    """Put greenlets in the place of the threads of the stdlib's mix-in."""
    with fastserve.patched(threading="greenlet"):
        yield


def server_of(handle: Callable[[Any], None], base: type = socketserver.StreamRequestHandler, **attributes: Any) -> Any:
    """Return a server of the stdlib's classes; its handlers call ``handle(handler)``."""
    server_class: Any = type("Server", (socketserver.ThreadingTCPServer,), {"daemon_threads": True, **attributes})
    return server_class(ADDRESS, type("Handler", (base,), {"handle": handle}))


@pytest.mark.usefixtures("patched")
def test_with_greenlets_every_handler_runs_in_the_thread_of_the_loop() -> None:
    local = threading.local()

    def handle(handler: Any) -> None:
        for line in handler.rfile:
            before = getattr(local, "line", b"nothing\n")
            local.line = line
            handler.wfile.write(threading.current_thread().name.encode() + b" " + before)

    with serving(server_of(handle)) as server:
        first = socket.create_connection(server.server_address, timeout=60)
        second = socket.create_connection(server.server_address, timeout=60)
        with first, second:
            first.sendall(b"first\n")
            assert first.recv(100) == b"serving nothing\n"
            second.sendall(b"second\n")
            assert second.recv(100) == b"serving first\n", "a threading.local is shared"
        assert isinstance(server._threads, socketserver._NoThreads)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("patched")
def test_with_greenlets_a_handler_that_blocks_holds_up_the_others() -> None:
    entered, may_go_on = threading.Event(), threading.Event()

    def handle(handler: Any) -> None:
        if handler.rfile.readline() == b"block\n":
            entered.set()
            assert may_go_on.wait(60)
        handler.wfile.write(b"done\n")

    with serving(server_of(handle, slow_handler_seconds=0)) as server:
        first = socket.create_connection(server.server_address, timeout=60)
        second = socket.create_connection(server.server_address, timeout=60)
        with first, second:
            first.sendall(b"block\n")
            assert entered.wait(60)
            second.sendall(b"go on\n")
            second.settimeout(0.05)
            with pytest.raises(TimeoutError):
                second.recv(100)
            may_go_on.set()
            second.settimeout(60)
            assert first.recv(100) == second.recv(100) == b"done\n"


@pytest.mark.usefixtures("patched")
def test_with_greenlets_context_variables_are_those_of_the_request() -> None:
    import contextvars

    variable: contextvars.ContextVar[bytes] = contextvars.ContextVar("variable", default=b"nothing\n")

    def handle(handler: Any) -> None:
        for line in handler.rfile:
            handler.wfile.write(variable.get())
            variable.set(line)

    with serving(server_of(handle)) as server:
        first = socket.create_connection(server.server_address, timeout=60)
        second = socket.create_connection(server.server_address, timeout=60)
        with first, second:
            for client, answer in (first, b"nothing\n"), (second, b"nothing\n"), (first, b"1\n"), (second, b"1\n"):
                client.sendall(b"1\n")
                assert client.recv(100) == answer


@pytest.mark.usefixtures("patched")
def test_with_greenlets_the_files_of_a_handler_are_fastserves_own(impl: str) -> None:
    kinds: list[Any] = []

    def handle(handler: Any) -> None:
        kinds.append(handler.rfile)
        handler.wfile.write(handler.rfile.readline())

    with serving(server_of(handle)) as server:
        assert talk(server.server_address, b"a\n") == b"a\n"
    assert isinstance(kinds[0], io.BufferedIOBase)
    assert isinstance(kinds[0], io.BufferedReader) == (impl == "py")


@pytest.mark.usefixtures("patched")
def test_with_greenlets_serve_forever_ends_the_requests_of_daemon_threads() -> None:
    ended: list[BaseException] = []

    def handle(handler: Any) -> None:
        handler.wfile.write(b"begun\n")
        try:
            handler.rfile.readline()
        except BaseException as error:
            ended.append(error)
            raise

    server = server_of(handle)
    with serving(server), socket.create_connection(server.server_address, timeout=60) as client:
        assert client.recv(100) == b"begun\n"
        server.shutdown()
        assert client.recv(100) == b""
    assert [type(error).__name__ for error in ended] == ["GreenletExit"]


@pytest.mark.usefixtures("patched")
def test_with_greenlets_serve_forever_waits_for_requests_that_are_no_daemons() -> None:
    def handle(handler: Any) -> None:
        handler.wfile.write(b"begun\n")
        handler.wfile.write(handler.rfile.readline())

    server = server_of(handle, daemon_threads=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(server.server_address, timeout=60) as client:
        assert client.recv(100) == b"begun\n"
        server.shutdown()  # it does not wait for the request, as with threads
        thread.join(0.05)
        assert thread.is_alive(), "serve_forever() has left a request behind"
        client.sendall(b"finished\n")
        assert client.recv(100) == b"finished\n"
    thread.join(60)
    assert not thread.is_alive()
    server.server_close()


@pytest.mark.usefixtures("patched")
def test_with_greenlets_a_slow_handler_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def handle(handler: Any) -> None:
        deadline = time.monotonic() + TIME_LIMIT
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)

    with caplog.at_level("WARNING", "fastserve"), serving(server_of(handle)) as server:
        assert talk(server.server_address, b"") == b""
    assert "has let no other client go on" in caplog.text


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_with_greenlets_what_ends_a_thread_ends_the_request_alone(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: told.append(arguments.exc_type))

    def handle(handler: Any) -> None:
        if handler.rfile.readline() == b"raise\n":
            raise error
        handler.wfile.write(b"goes on\n")

    with serving(server_of(handle)) as server:
        assert talk(server.server_address, b"raise\n") == b""
        wait_until(lambda: told)
        assert talk(server.server_address, b"again\n") == b"goes on\n"
    assert told == [error]
