"""The stream handler: its options, what ``rfile`` and ``wfile`` do, and clients that leave."""

from __future__ import annotations

import array
import contextlib
import io
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from support import serving, talk

ADDRESS = ("127.0.0.1", 0)


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address, timeout=60)


@contextlib.contextmanager
def handling(
    module: ModuleType, handle: Callable[[Any], Any], base: str = "ThreadingTCPServer", **options: Any
) -> Iterator[Any]:
    """Serve a stream handler with these class attributes; fail the test with what ``handle`` raises."""
    failed: list[BaseException] = []

    def guarded(self: Any) -> None:
        try:
            handle(self)
        except BaseException as error:
            failed.append(error)

    handler = type("Handler", (module.StreamRequestHandler,), {**options, "handle": guarded})
    with serving(getattr(module, base)(ADDRESS, handler), 0.01) as server:
        yield server
    if failed:
        raise failed[0]


def reset(client: socket.socket) -> None:
    """Close a connection with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# Options


@pytest.mark.parametrize(("rbufsize", "kind"), [(-1, io.BufferedReader), (0, socket.SocketIO), (4, io.BufferedReader)])
def test_rbufsize_chooses_the_file_that_is_read(module: ModuleType, rbufsize: int, kind: type) -> None:
    def handle(self: Any) -> None:
        assert type(self.rfile) is kind
        self.wfile.write(b"".join(self.rfile.readline() for _ in range(2)))

    with handling(module, handle, rbufsize=rbufsize) as server:
        assert talk(server.server_address, b"first\nsecond\n") == b"first\nsecond\n"


def test_wbufsize_buffers_until_the_end_of_the_handler(module: ModuleType) -> None:
    written, go_on = threading.Event(), threading.Event()

    def handle(self: Any) -> None:
        assert type(self.wfile) is io.BufferedWriter
        for _ in range(3):
            self.wfile.write(b"part ")
        written.set()
        assert go_on.wait(60)

    with handling(module, handle, wbufsize=-1) as server, connect(server) as client:
        assert written.wait(60)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.settimeout(60)
        go_on.set()
        assert client.recv(100) == b"part part part "


def test_wbufsize_sends_when_it_is_full_or_flushed(module: ModuleType) -> None:
    received = threading.Event()

    def handle(self: Any) -> None:
        self.wfile.write(b"12")
        self.wfile.flush()
        assert received.wait(60)
        self.wfile.write(b"345")
        self.wfile.write(b"6789abc")

    with handling(module, handle, wbufsize=8) as server, connect(server) as client:
        assert client.recv(100) == b"12"
        received.set()
        answer = b""
        while data := client.recv(100):
            answer += data
        assert answer == b"3456789abc"


@pytest.mark.parametrize("rbufsize", [-1, 0])
def test_the_timeout_of_the_handler_is_that_of_the_connection(module: ModuleType, rbufsize: int) -> None:
    def handle(self: Any) -> None:
        assert self.connection.gettimeout() == 0.03
        with pytest.raises(TimeoutError):
            self.rfile.readline()
        self.wfile.write(b"too late")

    with handling(module, handle, timeout=0.03, rbufsize=rbufsize) as server, connect(server) as client:
        assert client.recv(100) == b"too late"


def test_a_write_that_the_client_does_not_take_times_out(module: ModuleType) -> None:
    timed_out = threading.Event()

    def handle(self: Any) -> None:
        with pytest.raises(TimeoutError):
            self.wfile.write(bytes(50_000_000))
        timed_out.set()

    with handling(module, handle, timeout=0.05) as server, connect(server):
        assert timed_out.wait(60)


@pytest.mark.parametrize("disable", [False, True])
def test_disable_nagle_algorithm_sets_the_option(module: ModuleType, disable: bool) -> None:
    def handle(self: Any) -> None:
        option = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        self.wfile.write(b"%d" % bool(option))

    with handling(module, handle, disable_nagle_algorithm=disable) as server:
        assert talk(server.server_address, b"") == b"%d" % disable


def test_options_may_be_set_on_the_instance_before_setup(module: ModuleType) -> None:
    class Handler(module.StreamRequestHandler):
        def setup(self) -> None:
            self.timeout = 7
            self.wbufsize = -1
            super().setup()

        def handle(self) -> None:
            self.wfile.write(f"{self.connection.gettimeout()} {type(self.wfile).__name__}".encode())

    with serving(module.TCPServer(ADDRESS, Handler), 0.01) as server:
        assert talk(server.server_address, b"") == b"7.0 BufferedWriter"


# wfile


@pytest.mark.parametrize(
    "data",
    [
        b"bytes",
        bytearray(b"bytearray"),
        memoryview(b"-memoryview-")[1:-1],
        memoryview(bytearray(12)).cast("B", (3, 4)),
        array.array("i", [1, 2, 3]),
        b"",
    ],
    ids=["bytes", "bytearray", "memoryview", "two-dimensional", "array", "empty"],
)
def test_wfile_writes_any_buffer_and_returns_its_bytes(module: ModuleType, data: Any) -> None:
    def handle(self: Any) -> None:
        assert self.wfile.write(data) == len(memoryview(data).tobytes())

    with handling(module, handle) as server:
        assert talk(server.server_address, b"") == memoryview(data).tobytes()


@pytest.mark.parametrize("wrong", ["text", 5, None, [b"list"]])
def test_wfile_refuses_what_is_no_buffer(module: ModuleType, wrong: Any) -> None:
    def handle(self: Any) -> None:
        with pytest.raises(TypeError):
            self.wfile.write(wrong)

    with handling(module, handle) as server:
        assert talk(server.server_address, b"") == b""


def test_wfile_refuses_a_buffer_that_is_not_contiguous(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        with pytest.raises(BufferError):
            self.wfile.write(memoryview(b"abcdef")[::2])

    with handling(module, handle) as server:
        assert talk(server.server_address, b"") == b""


def test_wfile_is_a_writable_file(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        wfile = self.wfile
        assert isinstance(wfile, io.BufferedIOBase)
        assert (wfile.writable(), wfile.readable(), wfile.seekable(), wfile.isatty()) == (True, False, False, False)
        assert wfile.fileno() == self.request.fileno()
        assert not wfile.closed
        assert wfile.flush() is None
        for call in (wfile.read, wfile.tell, wfile.detach, lambda: wfile.readinto(bytearray(1))):
            with pytest.raises(io.UnsupportedOperation):
                call()
        wfile.writelines([b"one ", bytearray(b"two "), memoryview(b"three")])
        with io.TextIOWrapper(wfile, encoding="ascii", write_through=True) as text:
            text.write(" text")
        assert wfile.closed
        with pytest.raises(ValueError, match="closed"):
            wfile.flush()

    with handling(module, handle) as server:
        assert talk(server.server_address, b"") == b"one two three text"


def test_wfile_may_be_used_as_a_context_and_closes_nothing_but_itself(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        with self.wfile as entered:
            assert entered is self.wfile
        assert self.wfile.closed
        self.request.sendall(b"still open")

    with handling(module, handle) as server:
        assert talk(server.server_address, b"") == b"still open"


def test_a_big_write_arrives_whole_while_the_client_reads_slowly(module: ModuleType) -> None:
    data = bytes(range(256)) * 4_000

    def handle(self: Any) -> None:
        assert self.wfile.write(data) == len(data)

    with handling(module, handle) as server, connect(server) as client:
        received = bytearray()
        while part := client.recv(4096):
            received += part
    assert received == data


# rfile


def test_rfile_reads_in_all_ways_of_a_buffered_reader(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        rfile = self.rfile
        assert rfile.fileno() == self.request.fileno()
        assert rfile.readline() == b"line one\n"
        assert rfile.readline(4) == b"line"
        assert rfile.readline() == b" two\n"
        assert rfile.peek(1)[:1] == b"p"
        assert rfile.read(6) == b"peeked"
        buffer = bytearray(4)
        assert rfile.readinto(buffer) == 4
        assert buffer == b"into"
        assert rfile.read1(3) == b"one"
        assert rfile.read(0) == b""
        assert next(rfile) == b"\n"
        assert rfile.readlines(1) == [b"several\n"]
        assert list(rfile) == [b"lines\n", b"the end"]
        assert rfile.read() == b""
        assert rfile.readline() == b""
        with pytest.raises(io.UnsupportedOperation):
            rfile.write(b"x")

    sent = b"line one\nline two\npeekedintoone\nseveral\nlines\nthe end"
    with handling(module, handle) as server:
        assert talk(server.server_address, sent) == b""


def test_rfile_read_waits_for_all_and_read1_for_something(module: ModuleType) -> None:
    got = threading.Event()

    def handle(self: Any) -> None:
        assert self.rfile.read1(100) == b"some"
        got.set()
        assert self.rfile.read(6) == b"thing!"
        self.wfile.write(b"done")

    with handling(module, handle) as server, connect(server) as client:
        client.sendall(b"some")
        assert got.wait(60)
        client.sendall(b"thi")
        client.sendall(b"ng!")
        assert client.recv(10) == b"done"


def test_rfile_reads_a_body_larger_than_its_buffer(module: ModuleType) -> None:
    data = bytes(range(256)) * 8_000

    def handle(self: Any) -> None:
        length = int(self.rfile.readline())
        assert self.rfile.read(length) == data
        self.wfile.write(b"whole")

    with handling(module, handle) as server:
        assert talk(server.server_address, b"%d\n" % len(data) + data) == b"whole"


# Clients that leave


def test_a_half_closed_client_still_gets_its_answer(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        assert self.rfile.read() == b"all there is"
        self.wfile.write(b"answer")

    with handling(module, handle) as server:
        assert talk(server.server_address, b"all there is") == b"answer"


def test_a_reset_while_reading_raises_connection_reset_error(module: ModuleType) -> None:
    reading = threading.Event()

    def handle(self: Any) -> None:
        assert self.rfile.readline() == b"go\n"
        reading.set()
        with pytest.raises(ConnectionResetError):
            self.rfile.readline()

    with handling(module, handle) as server:
        client = connect(server)
        client.sendall(b"go\n")
        assert reading.wait(60)
        reset(client)


def test_a_write_to_a_client_that_has_gone_raises(module: ModuleType) -> None:
    gone = threading.Event()

    def handle(self: Any) -> None:
        assert gone.wait(60)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1000):
                self.wfile.write(bytes(65536))

    with handling(module, handle) as server:
        reset(connect(server))
        gone.set()


@pytest.mark.parametrize("base", ["TCPServer", "ThreadingTCPServer"])
def test_finish_passes_over_a_client_that_has_gone(
    module: ModuleType, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = threading.Event()

    def handle(self: Any) -> None:
        self.wfile.write(b"kept in the buffer")
        assert gone.wait(60)
        assert select.select([self.request], [], [], 60)[0]  # the reset, or the end of the other client, has arrived

    with handling(module, handle, base, wbufsize=-1) as server:
        client = connect(server)
        reset(client)
        gone.set()
        assert talk(server.server_address, b"") == b"kept in the buffer"
    # Closing a buffered file that cannot be flushed raises in the stdlib too, and so is reported.
    assert "Traceback" in capsys.readouterr().err


def test_finish_closes_both_files_and_leaves_the_request_to_the_server(module: ModuleType) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        handler = module.StreamRequestHandler(ours, "client", None)
        assert (handler.rfile.closed, handler.wfile.closed) == (True, True)
        assert ours.fileno() >= 0
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"


def test_finish_accepts_a_wfile_that_the_handler_closed(module: ModuleType) -> None:
    class Handler(module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.close()
            self.rfile.close()

    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Handler(ours, "client", None).wfile.closed


def test_the_handler_works_on_an_object_that_is_no_socket(module: ModuleType) -> None:
    class Connection:
        """The least that a stream handler asks of a request; tests of web servers use such objects."""

        def __init__(self, data: bytes) -> None:
            self._data = data
            self.sent = b""

        def makefile(self, mode: str, buffering: int) -> Any:
            assert (mode, buffering) == ("rb", -1)
            return io.BytesIO(self._data)

        def sendall(self, data: bytes) -> None:
            self.sent += data

    class Handler(module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read().upper())

    connection = Connection(b"stand-in")
    Handler(connection, "client", None)
    assert connection.sent == b"STAND-IN"
