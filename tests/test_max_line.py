"""How long a line of a client may be: ``max_line`` of ``LimitsMixIn``."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import socket
import socketserver
import threading
from collections.abc import Callable
from typing import Any

import pytest

import fastserve
from support import LIMIT, open_descriptors, serving, talk
from tls_support import client_context, server_context

MODELS = ["TCPServer", "ThreadingTCPServer", "ThreadPoolTCPServer"]
if importlib.util.find_spec("greenlet") is not None:
    MODELS.append("GreenletTCPServer")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
ALL = [*MODELS, pytest.param("ForkingTCPServer", marks=needs_fork)]

# The ways to read lines without a size, each a generator of them.
READERS: dict[str, Callable[[Any], Any]] = {
    "readline": lambda file: iter(file.readline, b""),
    "readline(None)": lambda file: iter(lambda: file.readline(None), b""),
    "readline(-1)": lambda file: iter(lambda: file.readline(-1), b""),
    "iteration": iter,
    "readlines": lambda file: file.readlines(),
}


class Tell(fastserve.StreamRequestHandler):
    """Answer each line with its length, and what is raised with its name."""

    lines = staticmethod(READERS["readline"])

    def handle(self) -> None:
        try:
            for line in self.lines(self.rfile):
                self.wfile.write(b"%d " % len(line))
        except ValueError as error:
            self.wfile.write(f"{type(error).__name__}: {error}".encode())
            raise


class TellOfStdlib(socketserver.StreamRequestHandler):
    lines = staticmethod(READERS["readline"])
    handle = Tell.handle


def make(name: str, handler: Any = Tell, **attributes: Any) -> Any:
    base = getattr(fastserve, name)
    attributes = {"request_queue_size": 64, "max_workers": 5, "max_line": 100, "reports": [], **attributes}
    server = type("Server", (fastserve.LimitsMixIn, base), attributes)(("127.0.0.1", 0), handler)
    # In a forked child nobody sees what it appends: the answers are what counts there.
    server.handle_error = lambda request, client_address: server.reports.append(request)
    return server


def ask(server: Any, *parts: bytes) -> bytes:
    """Send the parts and the end of the stream; return what is answered, up to a reset: not all of it may be read."""
    answer = b""
    with socket.create_connection(server.server_address, LIMIT) as client:
        client.sendall(b"".join(parts))
        with contextlib.suppress(OSError):  # it may be closed already
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while data := client.recv(65536):
                answer += data
    return answer


TOO_LONG = b"LineTooLong: a line is longer than 100 bytes"


@pytest.mark.parametrize("reading", READERS)
@pytest.mark.parametrize("buffer", [-1, 0, 10])
@pytest.mark.parametrize("name", MODELS)
def test_a_line_has_as_many_bytes_as_are_allowed_and_not_one_more(
    impl: str, name: str, buffer: int, reading: str
) -> None:
    handler = type("Handler", (Tell,), {"rbufsize": buffer, "lines": staticmethod(READERS[reading])})
    with make(name, handler) as server, serving(server):
        longest = b"x" * 99 + b"\n"
        assert ask(server, longest, b"a\n", longest + b"\n" + b"x" * 100) == b"100 2 100 1 100 "
        assert not server.reports
        answer = ask(server, b"a\n", b"x" * 100 + b"\n", b"b\n")
        assert answer == (TOO_LONG if reading == "readlines" else b"2 " + TOO_LONG)
        assert ask(server, b"x" * 101).endswith(TOO_LONG)
    assert len(server.reports) == 2


@pytest.mark.parametrize("name", ALL)
def test_an_endless_line_takes_no_memory_and_ends_the_connection(impl: str, name: str) -> None:
    before = open_descriptors()
    with make(name) as server, serving(server):
        ended = threading.Event()
        sent = 0
        with socket.create_connection(server.server_address, LIMIT) as client:
            with contextlib.suppress(ConnectionError):
                while sent < 2**30:  # without the limit all of it would be kept
                    sent += client.send(b"x" * 65536)
                ended.set()
        assert not ended.is_set(), "the server has read all of it"
        assert ask(server, b"a\n") == b"2 "
    assert open_descriptors() == before
    assert len(server.reports) == (0 if name == "ForkingTCPServer" else 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_line_that_comes_byte_by_byte_is_limited(impl: str, name: str) -> None:
    with make(name, max_line=5) as server, serving(server):
        with socket.create_connection(server.server_address, LIMIT) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"abcd\nabcde\n":
                client.sendall(bytes([byte]))
                if byte == 10:
                    break
            assert client.recv(100) == b"5 "
            for byte in b"abcdef":
                client.sendall(bytes([byte]))
            assert client.recv(100).startswith(b"LineTooLong")


@pytest.mark.parametrize("name", ALL)
def test_handlers_of_the_stdlib_are_limited(impl: str, name: str) -> None:
    with make(name, TellOfStdlib) as server, serving(server):
        assert ask(server, b"a\n", b"x" * 200) == b"2 " + TOO_LONG


@pytest.mark.parametrize("name", MODELS)
def test_a_file_that_a_function_makes_is_limited(impl: str, name: str) -> None:
    def handle(request: Any, client_address: Any, server: Any) -> None:
        with request.makefile("wb", 0) as answers, request.makefile("rb") as lines:
            answers.write(b"%d " % len(lines.readline()))
            lines.readline()

    with make(name, handle) as server, serving(server):
        assert ask(server, b"a\n", b"x" * 200) == b"2 "
    assert len(server.reports) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_size_that_the_handler_gives_and_other_reads_are_as_without_the_limit(impl: str, name: str) -> None:
    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            assert isinstance(self.rfile, io.BufferedIOBase)
            found = [self.rfile.readline(size) for size in (0, 3, 50, 300)]
            found += [self.rfile.readline(65537), self.rfile.read(150), self.rfile.read1(1), self.rfile.peek()[:2]]
            found += [self.rfile.read()]
            self.wfile.write(repr([len(part) for part in found]).encode())

    sent = b"x" * 250 + b"\n" + b"y" * 1000 + b"\n" + b"z" * 1000
    with make(name, Handler) as server, serving(server):
        assert ask(server, sent) == b"[0, 3, 50, 198, 1001, 150, 1, 2, 849]"
    assert not server.reports


@pytest.mark.parametrize("name", MODELS)
def test_with_the_limit_the_connection_is_what_it_is_without(impl: str, name: str) -> None:
    seen: dict[bool, Any] = {}

    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            limited = self.server.max_line is not None
            descriptor = self.rfile.fileno() == self.request.fileno()
            seen[limited] = type(self.request), type(self.rfile.raw), type(self.wfile), self.rfile.mode, descriptor
            assert isinstance(self.rfile, io.BufferedIOBase) and self.rfile.readable()

    for limit in 100, None:
        with make(name, Handler, max_line=limit) as server, serving(server):
            assert ask(server) == b""
    assert seen[True] == seen[False] and not server.reports


@pytest.mark.parametrize("name", MODELS)
def test_lines_over_tls_are_limited(impl: str, name: str) -> None:
    base = getattr(fastserve, name)
    for bases in ((fastserve.LimitsMixIn, fastserve.TLSMixIn, base), (fastserve.TLSMixIn, fastserve.LimitsMixIn, base)):
        attributes = {"ssl_context": server_context(), "max_line": 100, "reports": []}
        with type("Server", bases, attributes)(("127.0.0.1", 0), Tell) as server:
            server.handle_error = lambda *_: server.reports.append(1)  # noqa: B023
            with serving(server), socket.create_connection(server.server_address, LIMIT) as plain:
                with client_context().wrap_socket(plain, server_hostname="127.0.0.1") as client:
                    client.sendall(b"a\n")
                    assert client.recv(100) == b"2 "
                    client.sendall(b"x" * 101)
                    assert client.recv(100) == TOO_LONG
        assert server.reports == [1]


def test_servers_of_the_stdlib_are_limited(impl: str) -> None:
    class Server(fastserve.LimitsMixIn, socketserver.ThreadingTCPServer):
        max_line = 100

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # not what this is about

    with Server(("127.0.0.1", 0), TellOfStdlib) as server, serving(server, 0.01):
        assert ask(server, b"a\n", b"x" * 101) == b"2 " + TOO_LONG


def test_it_is_reported_and_the_next_client_is_served(impl: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Server(fastserve.LimitsMixIn, fastserve.ThreadingTCPServer):
        max_line = 100

    with Server(("127.0.0.1", 0), Tell) as server, serving(server):
        assert ask(server, b"x" * 101) == TOO_LONG
        assert talk(server.server_address, b"a\n") == b"2 "
    shown = capsys.readouterr().err
    assert "LineTooLong: a line is longer than 100 bytes" in shown and "127.0.0.1" in shown


def test_a_wrong_limit_is_an_error() -> None:
    before = open_descriptors()
    with pytest.raises(ValueError, match="max_line must be greater than 0"):
        make("ThreadingTCPServer", max_line=0)
    assert open_descriptors() == before


def test_the_error_is_a_value_error_as_that_of_asyncio() -> None:
    assert issubclass(fastserve.LineTooLong, ValueError)
    assert fastserve.LimitsMixIn.max_line is None
