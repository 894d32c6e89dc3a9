"""``fastserve.testing``, and the fixture of the plugin of pytest."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import inspect
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import pytest

import fastserve
from fastserve import testing
from support import LIMIT, open_descriptors, wait_until

ROOT = Path(__file__).resolve().parent.parent
FORKS = hasattr(os, "fork")
WORKERS = ["sync", "threads", "threadpool"]
if FORKS:
    WORKERS.append("fork")
if find_spec("greenlet") is not None:
    WORKERS.append("greenlet")
IN_THIS_PROCESS = [worker for worker in WORKERS if worker != "fork"]


class Upper(fastserve.StreamRequestHandler):
    """Answer each line in capitals, and raise for one that says so."""

    def handle(self) -> None:
        for line in self.rfile:
            if line == b"raise\n":
                raise LookupError("as it was told")
            self.wfile.write(line.upper())


class Shout(fastserve.DatagramRequestHandler):
    """Answer a datagram in capitals, and raise for one that says so."""

    def handle(self) -> None:
        if self.packet == b"raise":
            raise LookupError("as it was told")
        self.wfile.write(self.packet.upper())


class Page(http.server.BaseHTTPRequestHandler):
    """A page, over a connection that stays."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """See that no thread, descriptor or child process is there afterwards that was not before."""
    threads, descriptors = threading.active_count(), open_descriptors()
    yield
    # A thread that was joined may take a moment to leave the list.
    wait_until(lambda: threading.active_count() <= threads)
    wait_until(lambda: open_descriptors() <= descriptors)
    if FORKS:
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a busy machine as other tests do, where a test does not say how long."""
    monkeypatch.setattr(testing.Served.connect, "__defaults__", (LIMIT,))
    monkeypatch.setattr(testing.Served.take_error, "__defaults__", (LIMIT,))
    function: Any = inspect.unwrap(testing.serve)
    monkeypatch.setitem(function.__kwdefaults__, "stop_timeout", LIMIT)


def line_of(client: socket.socket) -> bytes:
    with client.makefile("rb") as file:
        return file.readline()


def exchange(client: socket.socket, sent: bytes) -> bytes:
    client.sendall(sent)
    return line_of(client)


# Serving


@pytest.mark.parametrize("worker", WORKERS)
def test_a_server_serves_for_the_time_of_the_block(impl: str, worker: str) -> None:
    with nothing_left():
        with testing.serve(Upper, worker=worker) as served:
            assert exchange(served.connect(), b"a\n") == b"A\n"
            address = served.address
            assert address == served.server.server_address
            assert address[0] == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


@pytest.mark.parametrize("worker", WORKERS)
def test_connections_that_are_open_at_the_end_are_ended_and_the_handlers_waited_for(impl: str, worker: str) -> None:
    with nothing_left(), socket.socket() as client:
        begun = time.monotonic()
        with testing.serve(Upper, worker=worker, stop_timeout=LIMIT) as served:
            client.connect(served.address)
            client.settimeout(LIMIT)
            assert exchange(client, b"a\n") == b"A\n"
        assert client.recv(1) == b""
        assert time.monotonic() - begun < LIMIT / 2


@pytest.mark.parametrize("worker", IN_THIS_PROCESS)
def test_a_handler_that_runs_at_the_end_reads_the_end_of_the_stream_and_ends_by_itself(impl: str, worker: str) -> None:
    ended: list[bytes] = []

    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"begun\n")
            ended.append(self.rfile.read())

    with testing.serve(Handler, worker=worker) as served:
        assert line_of(served.connect()) == b"begun\n"
        assert not ended
    assert ended == [b""]


@pytest.mark.parametrize("worker", IN_THIS_PROCESS)
def test_what_has_come_before_the_end_is_still_handled(impl: str, worker: str) -> None:
    handled: list[bytes] = []
    may_read = threading.Event()

    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"begun\n")
            if worker == "greenlet":
                fastserve.to_thread(may_read.wait, LIMIT)
            else:
                may_read.wait(LIMIT)
            handled.append(self.rfile.readline())

    with testing.serve(Handler, worker=worker) as served:
        client = served.connect()
        assert line_of(client) == b"begun\n"
        client.sendall(b"order\n")
        threading.Timer(0.05, may_read.set).start()
    assert handled == [b"order\n"]


@pytest.mark.parametrize("worker", IN_THIS_PROCESS)
def test_a_handler_that_writes_to_a_client_that_does_not_read_is_ended(impl: str, worker: str) -> None:
    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            while True:
                self.wfile.write(bytes(1 << 20))

    with nothing_left(), testing.serve(Handler, worker=worker, stop_timeout=LIMIT) as served:
        assert served.connect().recv(1) == b"\0"


@pytest.mark.parametrize("worker", IN_THIS_PROCESS)
def test_the_block_ends_when_it_raises(impl: str, worker: str) -> None:
    with nothing_left(), pytest.raises(ZeroDivisionError) as raised:
        with testing.serve(Upper, worker=worker) as served:
            assert exchange(served.connect(), b"a\n") == b"A\n"
            raise ZeroDivisionError
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize("worker", WORKERS)
def test_a_client_that_is_closed_ends_its_handler(impl: str, worker: str, tmp_path: Path) -> None:
    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())
            (tmp_path / "rest").write_bytes(self.rfile.read() + b"end")

    with testing.serve(Handler, worker=worker) as served:
        with served.connect() as client:
            assert exchange(client, b"a\n") == b"a\n"
        wait_until(lambda: (tmp_path / "rest").exists() and (tmp_path / "rest").read_bytes() == b"end")


def test_a_block_that_does_nothing_ends(impl: str) -> None:
    with nothing_left():
        for worker in WORKERS:
            with testing.serve(Upper, worker=worker):
                pass


@pytest.mark.parametrize("worker", WORKERS)
def test_datagrams(impl: str, worker: str) -> None:
    with nothing_left(), testing.serve(Shout, worker=worker, udp=True) as served:
        client = served.connect()
        client.send(b"a")
        assert client.recv(10) == b"A"
        with pytest.raises(AttributeError, match="no URL"):
            print(served.url)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("place", ["made", "given"])
def test_unix_sockets(impl: str, worker: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket is short
    unix = Path("sock") if place == "given" else True
    with nothing_left():
        with testing.serve(Upper, worker=worker, unix=unix) as served:
            assert exchange(served.connect(), b"a\n") == b"A\n"
            path = served.address
            assert os.path.exists(path)
            with pytest.raises(AttributeError, match="no URL"):
                print(served.url)
        assert not os.path.exists(path)
        with testing.serve(Shout, worker=worker, unix=unix, udp=True) as served:
            client = served.connect()
            client.send(b"a")
            assert client.recv(10) == b"A"
            directory = os.path.dirname(client.getsockname())
        assert not os.path.exists(directory)


def test_an_address_of_ipv6(impl: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with testing.serve(Upper, address=("::1", 0)) as served:
            assert exchange(served.connect(), b"a\n") == b"A\n"
            assert served.url == f"http://[::1]:{served.address[1]}"
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


def test_a_server_on_all_addresses_is_connected_to(impl: str) -> None:
    with testing.serve(Upper, address=("", 0)) as served:
        assert exchange(served.connect(), b"a\n") == b"A\n"
        assert served.url == f"http://127.0.0.1:{served.address[1]}"


@pytest.mark.parametrize(
    "server_class",
    [
        http.server.HTTPServer,
        http.server.ThreadingHTTPServer,
        socketserver.TCPServer,
        socketserver.ThreadingTCPServer,
        fastserve.TCPServer,
        fastserve.ThreadPoolTCPServer,
        type("Mixed", (fastserve.ThreadingMixIn, http.server.HTTPServer), {}),
    ],
)
def test_any_server_class(impl: str, server_class: type) -> None:
    with nothing_left():
        with testing.serve(Page, server_class=server_class) as served:
            assert type(served.server) is server_class
            assert urllib.request.urlopen(served.url, timeout=LIMIT).read() == b"hello"
            # A connection that stays keeps a handler, and for the sync ones the loop.
            kept = http.client.HTTPConnection(*served.address, timeout=LIMIT)
            kept.request("GET", "/")
            assert kept.getresponse().read() == b"hello"
        kept.close()


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_model_comes_over_a_server_class(impl: str, worker: str) -> None:
    with testing.serve(Page, server_class=http.server.HTTPServer, worker=worker) as served:
        assert isinstance(served.server, http.server.HTTPServer)
        assert urllib.request.urlopen(served.url, timeout=LIMIT).read() == b"hello"


def test_a_wsgi_server(impl: str) -> None:
    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    def app(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [environ["PATH_INFO"].encode()]

    with testing.serve(Quiet, server_class=WSGIServer) as served:
        served.server.set_app(app)
        assert urllib.request.urlopen(f"{served.url}/path", timeout=LIMIT).read() == b"/path"


def test_a_server_that_is_there_already(impl: str) -> None:
    with testing.serve(server=fastserve.ThreadingTCPServer(("127.0.0.1", 0), Upper)) as served:
        assert exchange(served.connect(), b"a\n") == b"A\n"


def test_attributes_are_those_of_the_server_class(impl: str) -> None:
    with testing.serve(Upper, worker="threadpool", max_workers=1, request_queue_size=7) as served:
        assert (served.server.max_workers, served.server.request_queue_size) == (1, 7)
        assert exchange(served.connect(), b"a\n") == b"A\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "no handler"),
        ({"handler": Upper, "worker": "thread"}, "sync, threads"),
        ({"handler": Upper, "unix": True, "address": ("", 0)}, "both addresses"),
        ({"handler": Upper, "server_class": fastserve.UDPServer, "udp": True}, "without server_class"),
        ({"server": object(), "handler": Upper}, "there already"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said), testing.serve(**arguments):
        pytest.fail("it was begun")


def test_an_address_that_cannot_be_had_leaves_nothing(impl: str) -> None:
    with nothing_left(), testing.serve(Upper) as served:
        with pytest.raises(OSError), testing.serve(Upper, address=served.address):
            pytest.fail("it was begun")


def test_a_server_that_no_thread_can_serve_is_closed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with nothing_left(), monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"), testing.serve(Upper):
            pytest.fail("it was begun")


def test_several_servers_at_a_time_in_several_threads(impl: str) -> None:
    answers: list[bytes] = []

    def run(worker: str) -> None:
        with testing.serve(Upper, worker=worker) as first, testing.serve(Upper, worker=worker) as second:
            answers.append(exchange(first.connect(), b"a\n") + exchange(second.connect(), b"b\n"))

    with nothing_left():
        threads = [threading.Thread(target=run, args=(worker,)) for worker in IN_THIS_PROCESS * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [b"A\nB\n"] * len(threads)


# Errors


@pytest.mark.parametrize("worker", WORKERS)
def test_what_a_handler_has_raised_and_nobody_has_taken_is_raised_at_the_end(
    impl: str, worker: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with nothing_left(), pytest.raises(ExceptionGroup, match="handlers have raised") as raised:
        with testing.serve(Upper, worker=worker) as served:
            assert exchange(served.connect(), b"raise\n") == b""
    (error,) = raised.value.exceptions
    assert type(error) is LookupError
    assert error.args == ("as it was told",)
    assert "LookupError: as it was told" in capfd.readouterr().err  # reported as usual too


@pytest.mark.parametrize("worker", WORKERS)
def test_what_a_handler_has_raised_can_be_taken(impl: str, worker: str) -> None:
    with nothing_left(), testing.serve(Upper, worker=worker) as served:
        assert served.errors == []
        assert exchange(served.connect(), b"raise\n") == b""
        assert [type(error) for error in served.errors] == [LookupError]
        assert str(served.take_error()) == "as it was told"
        assert served.errors == []


@pytest.mark.parametrize("worker", WORKERS)
def test_what_a_handler_raises_is_waited_for(impl: str, worker: str) -> None:
    with testing.serve(Shout, worker=worker, udp=True) as served:
        served.connect().send(b"raise")
        assert type(served.take_error(LIMIT)) is LookupError
        with pytest.raises(AssertionError, match="no handler has raised anything within 0.01 s"):
            served.take_error(timeout=0.01)


def test_what_handlers_have_raised_can_be_left_alone(impl: str) -> None:
    with testing.serve(Upper, check_errors=False) as served:
        assert exchange(served.connect(), b"raise\n") == b""
    assert [type(error) for error in served.errors] == [LookupError]


def test_a_block_that_raises_is_told_what_handlers_have_raised(impl: str) -> None:
    with pytest.raises(AssertionError) as raised, testing.serve(Upper) as served:
        assert exchange(served.connect(), b"raise\n") == b"RAISE\n"
    assert raised.value.__notes__ == ["a handler has raised LookupError('as it was told')"]


@pytest.mark.skipif(not FORKS, reason="no fork here")
def test_an_exception_of_a_child_process_tells_where_it_was_raised(impl: str) -> None:
    class Unpicklable(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("of two")

    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            raise Unpicklable(1, 2)

    with testing.serve(Handler, worker="fork") as served:
        assert line_of(served.connect()) == b""
        error = served.take_error()
    assert str(error).endswith("Unpicklable: of two")
    assert "raise Unpicklable(1, 2)" in error.__notes__[0]


@pytest.mark.skipif(not FORKS, reason="no fork here")
def test_errors_of_prefork_workers(impl: str) -> None:
    server_class = type("Server", (fastserve.PreforkMixIn, fastserve.ThreadingTCPServer), {"workers": 2})
    with nothing_left(), testing.serve(Upper, server_class=server_class, stop_timeout=LIMIT) as served:
        assert exchange(served.connect(), b"a\n") == b"A\n"
        assert exchange(served.connect(), b"raise\n") == b""
        assert type(served.take_error()) is LookupError


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("leave", [reset, socket.socket.close])
def test_a_client_that_goes_is_no_error(impl: str, worker: str, leave: Callable[[socket.socket], None]) -> None:
    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            while True:
                self.wfile.write(bytes(1 << 20))

    with nothing_left(), testing.serve(Handler, worker=worker, stop_timeout=LIMIT) as served:
        for _ in range(3):
            client = served.connect()
            assert client.recv(1) == b"\0"
            leave(client)


def test_a_connection_of_the_handlers_own_that_breaks_is_its_error(impl: str) -> None:
    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            raise ConnectionResetError("of a database")

    with testing.serve(Handler) as served:
        assert line_of(served.connect()) == b""
        assert str(served.take_error()) == "of a database"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_a_client_of_a_unix_datagram_socket_that_goes_is_no_error(impl: str, tmp_path: Path) -> None:
    may_answer = threading.Event()

    class Handler(fastserve.DatagramRequestHandler):
        def handle(self) -> None:
            may_answer.wait(LIMIT)
            self.wfile.write(b"too late")

    with testing.serve(Handler, unix=True, udp=True) as served:
        client = served.connect()
        client.send(b"a")
        client.close()
        may_answer.set()


@pytest.mark.parametrize("worker", IN_THIS_PROCESS)
def test_what_comes_of_the_end_of_the_block_is_no_error(impl: str, worker: str) -> None:
    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"begun\n")
            struct.unpack("!I", self.rfile.read(4))

    with nothing_left(), testing.serve(Handler, worker=worker) as served:
        assert line_of(served.connect()) == b"begun\n"


def test_an_error_of_the_loop_is_raised_from_the_block(impl: str) -> None:
    class Server(fastserve.ThreadingTCPServer):
        def service_actions(self) -> None:
            raise ZeroDivisionError("in the loop")

    with nothing_left():
        with pytest.raises(ZeroDivisionError, match="in the loop"):
            with testing.serve(Upper, server_class=Server) as served:
                exchange(served.connect(), b"a\n")
        with pytest.raises(ZeroDivisionError, match="in the loop") as raised:
            with testing.serve(Upper, server_class=Server) as served:
                # The listener is closed with the loop, so that no client waits for long.
                with contextlib.suppress(OSError):
                    while exchange(served.connect(LIMIT), b"a\n") == b"A\n":
                        pass
                raise KeyError("in the block")
    assert isinstance(raised.value.__context__, KeyError)


def end_loop(served: testing.Served) -> None:
    """Have the loop ended before the block, so that what still runs at its end are the handlers alone."""
    served.server.shutdown()
    served._thread.join(LIMIT)


@pytest.mark.parametrize("worker", [worker for worker in IN_THIS_PROCESS if worker != "greenlet"])
def test_a_handler_that_does_not_end_is_an_error_that_shows_it(impl: str, worker: str) -> None:
    go_on = threading.Event()

    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            go_on.wait(LIMIT)

    try:
        with pytest.raises(RuntimeError, match="handlers still ran 0.1 s after the end of the block") as raised:
            with testing.serve(Handler, worker=worker, stop_timeout=0.1) as served:
                served.connect()
                wait_until(lambda: go_on._cond._waiters)  # type: ignore[attr-defined]
                if worker != "sync":  # whose loop is in the handler; that of the others may take longer than 0.1 s
                    end_loop(served)
        assert "go_on.wait(LIMIT)" in str(raised.value)
    finally:
        go_on.set()
    wait_until(lambda: not any("fastserve.testing" in thread.name for thread in threading.enumerate()))


@pytest.mark.skipif(not FORKS, reason="no fork here")
def test_a_child_process_that_does_not_end_is_killed(impl: str) -> None:
    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.wfile.write(b"begun\n")
            while True:
                time.sleep(LIMIT)

    with nothing_left(), pytest.raises(RuntimeError, match="child processes"):
        with testing.serve(Handler, worker="fork", stop_timeout=1.5) as served:
            assert line_of(served.connect()) == b"begun\n"
            end_loop(served)


# The plugin of pytest

TESTS = """\
import sys
import pytest

def test_it_is_not_imported_without_use():
    assert "fastserve" not in sys.modules

def test_it_answers(fastserve_server):
    import fastserve

    class Echo(fastserve.StreamRequestHandler):
        def handle(self):
            line = self.rfile.readline()
            if line == b"raise\\n":
                raise LookupError("as it was told")
            self.wfile.write(line)

    served = fastserve_server(Echo, worker=WORKER)
    other = fastserve_server(Echo)
    for one in (served, other):
        client = one.connect(60)
        client.sendall(b"LINE\\n")
        assert client.recv(100) == ANSWER
"""


def run_pytest(path: Path, tests: str, *options: str) -> tuple[int, str]:
    (path / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-p", "_fastserve_pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, "-W", "error", "test_it.py"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("worker", WORKERS)
def test_the_fixture_serves(tmp_path: Path, worker: str) -> None:
    tests = TESTS.replace("LINE", "a").replace("ANSWER", 'b"a\\n"').replace("WORKER", repr(worker))
    status, said = run_pytest(tmp_path, tests)
    assert status == 0, said
    assert "2 passed" in said


def test_the_fixture_makes_a_handler_that_raises_an_error_of_the_test(tmp_path: Path) -> None:
    tests = TESTS.replace("LINE", "raise").replace("ANSWER", 'b""').replace("WORKER", "'threads'")
    status, said = run_pytest(tmp_path, tests)
    assert status == 1, said
    assert "2 passed, 1 error" in said
    assert "handlers have raised" in said
    assert "LookupError: as it was told" in said


def test_the_fixture_is_listed_with_its_description(tmp_path: Path) -> None:
    status, said = run_pytest(tmp_path, TESTS.replace("LINE", ""), "--fixtures")
    assert "fastserve_server" in said
    assert "Return a function that starts a server" in said


def test_the_examples_of_the_documentation_pass(tmp_path: Path) -> None:
    if not (ROOT / "docs").exists():
        pytest.skip("these tests are not in a source tree")
    blocks = (ROOT / "docs" / "testing.md").read_text("utf-8").split("```python\n")[1:]
    examples = [
        code for block in blocks if "def test_" in (code := block.partition("```")[0]) and "unittest" not in code
    ]
    for number, code in enumerate(examples, 1):
        directory = tmp_path / str(number)
        directory.mkdir()
        status, said = run_pytest(directory, code)
        assert status == 0, said
        assert "1 passed" in said
    assert len(examples) == 2


def test_the_entry_point_is_that_of_the_plugin() -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("these tests are not in a source tree")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["entry-points"]["pytest11"] == {"fastserve": "_fastserve_pytest"}
    assert find_spec("_fastserve_pytest") is not None
