"""What a server tells to logging, where it is asked to."""

from __future__ import annotations

import http.server
import importlib.util
import logging
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastserve
from support import LIMIT, serving, talk, wait_until

MODELS = ["TCPServer", "ThreadingTCPServer", "ThreadPoolTCPServer"]
if importlib.util.find_spec("greenlet") is not None:
    MODELS.append("GreenletTCPServer")


class Handler(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        if line == b"raise\n":
            raise RuntimeError("deliberate")
        if line == b"other\n":
            raise ConnectionResetError("of a database")
        if line == b"timeout\n":
            self.connection.settimeout(0.05)
            self.rfile.readline()
        if line == b"flood\n":
            while True:
                self.wfile.write(bytes(100_000))
        self.wfile.write(line)


@pytest.fixture(params=MODELS)
def server(request: pytest.FixtureRequest, impl: str, caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG, "fastserve")
    base = getattr(fastserve, request.param)
    made = type("Server", (fastserve.LoggingMixIn, base), {})(("127.0.0.1", 0), Handler)
    with made, serving(made):
        yield made


def found(caplog: pytest.LogCaptureFixture, count: int) -> list[tuple[str, str]]:
    """Return what was logged, when there are so many entries."""
    wait_until(lambda: len(caplog.records) >= count)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_each_request_has_a_line(server: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
    assert talk(server.server_address, b"hello\n") == b"hello\n"
    ((level, text),) = found(caplog, 1)
    assert level == "INFO" and re.fullmatch(r"127\.0\.0\.1:\d+ ok \d\.\d{6} s", text)
    assert caplog.records[0].name == "fastserve"
    assert capfd.readouterr() == ("", "")


def test_an_error_has_its_traceback(
    server: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    assert talk(server.server_address, b"raise\n") == b""
    (first, second) = found(caplog, 2)
    assert first[0] == "INFO" and "RuntimeError" in first[1]
    assert second[0] == "ERROR" and re.fullmatch(r"request of 127\.0\.0\.1:\d+", second[1])
    assert "RuntimeError: deliberate" in caplog.text and "in handle" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_a_broken_connection_of_the_handlers_own_is_an_error(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert talk(server.server_address, b"other\n") == b""
    assert found(caplog, 2)[1][0] == "ERROR"


@pytest.mark.parametrize("sent", [b"flood\n", b"timeout\n"])
def test_a_client_that_has_gone_is_no_error(server: Any, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(server.server_address, timeout=LIMIT) as client:
        client.sendall(sent)
        if sent == b"flood\n":
            assert client.recv(1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it resets the connection
        else:
            assert client.recv(1) == b""
    (first, second) = found(caplog, 2)
    assert first[0] == "INFO" and re.search(" (ConnectionResetError|BrokenPipeError|TimeoutError) ", first[1])
    assert second[0] == "DEBUG" and "has ended its request" in second[1]
    assert all(record.exc_info is None for record in caplog.records)


def test_nothing_is_told_that_nobody_wants(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "fastserve")
    assert talk(server.server_address, b"hello\n") == b"hello\n"
    assert talk(server.server_address, b"raise\n") == b""
    assert [level for level, _ in found(caplog, 1)] == ["ERROR"]


def test_another_logger_is_told(impl: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "of.its.own")

    class Server(fastserve.LoggingMixIn, fastserve.ThreadingTCPServer):
        logger = logging.getLogger("of.its.own")

    with Server(("127.0.0.1", 0), Handler) as server, serving(server):
        assert talk(server.server_address, b"hello\n") == b"hello\n"
        wait_until(lambda: caplog.records)
    assert [record.name for record in caplog.records] == ["of.its.own"]


def test_datagrams_have_a_line_too(impl: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fastserve")

    class Server(fastserve.LoggingMixIn, fastserve.UDPServer): ...

    def handle(request: Any, client_address: Any, server: Any) -> None:
        request[1].sendto(request[0], client_address)
        if request[0] == b"reset":
            raise ConnectionResetError("of something else")

    with Server(("127.0.0.1", 0), handle) as server, serving(server):
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(LIMIT)
            for data in (b"hello", b"reset"):
                client.sendto(data, server.server_address)
                assert client.recv(100) == data
        assert [level for level, _ in found(caplog, 3)] == ["INFO", "INFO", "ERROR"]


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")
def test_clients_of_unix_sockets_that_have_gone(impl: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fastserve")

    class Server(fastserve.LoggingMixIn, fastserve.ThreadingUnixStreamServer): ...

    with Server(str(tmp_path / "socket"), Handler) as server, serving(server):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(server.server_address)
            client.sendall(b"flood\n")
            assert client.recv(1)
        (first, second) = found(caplog, 2)
    assert first[1].startswith("a client without a name ") and second[0] == "DEBUG"


def test_servers_of_the_stdlib_are_told_of_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastserve")

    class Server(fastserve.LoggingMixIn, http.server.ThreadingHTTPServer): ...

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    with Server(("127.0.0.1", 0), Quiet) as server, serving(server, 0.01):
        assert talk(server.server_address, b"GET /nothing-here HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 404")
        assert " ok " in found(caplog, 1)[0][1]


def test_logging_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, fastserve; fastserve.LoggingMixIn; sys.exit('logging' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
