"""The unbuffered ``wfile``: stdlib, py and c, held side by side; and what a signal does to a read and a write."""

from __future__ import annotations

import array
import contextlib
import errno
import io
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TWINS
from core_support import Handled, interrupted, outcome
from fastserve.streams import writer_class
from support import LIMIT, wait_until
from test_streams import KINDS, connected

_std: Any = socketserver


def writer_of(kind: str, connection: Any) -> Any:
    cls = _std._SocketWriter if kind == "stdlib" else TWINS[kind]["streams"]._SocketWriter
    return cls(connection)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ends(kind: str) -> Iterator[tuple[Any, socket.socket, socket.socket]]:
    """The writer, its connection, and the other end."""
    with connected(kind) as (connection, other), contextlib.closing(writer_of(kind, connection)) as writer:
        yield writer, connection, other


Ends = tuple[Any, socket.socket, socket.socket]

BUFFERS: list[Any] = [
    b"bytes", bytearray(b"bytearray"), memoryview(b"memoryview"), memoryview(b"every second")[::2], b"", bytearray(),
    array.array("i", [1, 2, 3]), memoryview(b"abcdef").cast("B", (2, 3)), memoryview(array.array("d", [1.5])),
    "text", None, 7, [b"list"],
]  # fmt: skip


@pytest.mark.parametrize("data", BUFFERS, ids=repr)
def test_write_takes_what_sendall_takes(kind: str, data: Any) -> None:
    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, other):
            with contextlib.closing(writer_of(each, connection)) as writer:
                result = outcome(writer.write, data)
            connection.close()
            found.append((result, other.recv(100)))
    assert found[0] == found[1]


def test_a_writer_is_a_buffered_file_that_writes_only(ends: Ends) -> None:
    writer, connection, _ = ends
    assert isinstance(writer, io.BufferedIOBase) and isinstance(writer, _std._SocketWriter)
    assert writer.writable() and not writer.readable() and not writer.seekable() and not writer.isatty()
    assert writer.fileno() == connection.fileno()
    assert writer._sock is connection
    assert outcome(writer.read, 1)[0] is io.UnsupportedOperation
    assert connection._io_refs == 0
    writer.flush()
    writer.extra = "a writer has a dict"
    writer.writelines([b"a", b"b"])
    writer.close()
    assert writer.closed
    assert writer.write(b"c") == 1  # of the stdlib's, too, a close is remembered and not asked for
    assert connection.fileno() >= 0


def test_the_connection_of_a_writer_may_be_replaced_and_removed(ends: Ends) -> None:
    writer, connection, other = ends
    writer._sock = stand_in = mock.Mock()
    assert writer.write(b"a") == 1
    stand_in.sendall.assert_called_once_with(b"a")
    del writer._sock
    for _ in range(2):
        with pytest.raises(AttributeError, match="has no attribute '_sock'"):
            writer.write(b"b")
    writer._sock = connection
    assert writer.write(b"c") == 1
    assert other.recv(10) == b"c"


def test_a_derived_writer_may_find_its_connection_in_its_own_way(kind: str) -> None:
    with connected(kind) as (connection, other), connected(kind) as (another, _):

        class Writer(type(writer_of(kind, connection))):  # type: ignore[misc]
            @property
            def _sock(self) -> Any:
                return connection

            @_sock.setter
            def _sock(self, sock: Any) -> None:
                assert sock is another

        with contextlib.closing(Writer(another)) as writer:
            assert writer.write(b"hello") == 5
        assert other.recv(10) == b"hello"


def test_vars_of_a_writer_does_not_tell_its_connection_in_c(ends: Ends, kind: str) -> None:
    writer, connection, _ = ends
    assert vars(writer) == ({} if kind == "c" else {"_sock": connection})
    writer.extra = 1
    assert vars(writer) == ({} if kind == "c" else {"_sock": connection}) | {"extra": 1}


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_large_write_waits_until_all_is_sent(ends: Ends, timeout: float | None) -> None:
    writer, connection, other = ends
    connection.settimeout(timeout)
    data = os.urandom(1 << 16) * 48
    received = bytearray()

    def receive() -> None:
        while len(received) < len(data):
            received.extend(other.recv(100_000))

    reader = threading.Thread(target=receive)
    reader.start()
    assert writer.write(data) == len(data)
    reader.join(LIMIT)
    assert received == data


def test_a_write_that_is_not_taken_in_time_raises(kind: str) -> None:
    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, _), contextlib.closing(writer_of(each, connection)) as writer:
            connection.settimeout(0.02)
            found.append([outcome(writer.write, bytes(1 << 23)), outcome(writer.write, b"x" * 100_000)])
    assert found[0] == found[1]
    assert found[0][0] == (TimeoutError, None, "timed out")


def test_a_timeout_holds_although_another_object_made_the_descriptor_blocking(ends: Ends) -> None:
    writer, connection, other = ends
    connection.settimeout(0.02)
    with contextlib.suppress(BlockingIOError), connection.dup() as full:
        full.setblocking(False)
        while full.send(bytes(10_000)):
            pass
    os.set_blocking(connection.fileno(), True)
    with pytest.raises(TimeoutError):
        writer.write(b"x" * 100_000)


@pytest.mark.parametrize("timeout", [0.0, None])
def test_a_write_that_would_block_raises(kind: str, timeout: float | None) -> None:
    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, other), contextlib.closing(writer_of(each, connection)) as writer:
            connection.settimeout(timeout)
            os.set_blocking(connection.fileno(), False)
            found.append([outcome(writer.write, bytes(1 << 23)), outcome(writer.write, b"x" * 100_000)])
    assert found[0] == found[1]
    assert found[0][0][:2] == (BlockingIOError, errno.EAGAIN)


def test_a_write_to_what_is_gone_raises(kind: str) -> None:
    found = []
    for each in ("stdlib", kind):
        for timeout in (None, 5.0, 0.0):
            with connected(each) as (connection, other), contextlib.closing(writer_of(each, connection)) as writer:
                connection.settimeout(timeout)
                other.close()
                results = [outcome(writer.write, b"to nobody"), outcome(writer.write, b"")]
                connection.close()
                found.append([*results, outcome(writer.write, b"closed"), outcome(writer.fileno)])
    assert found[:3] == found[3:]
    assert found[0][0][0] is BrokenPipeError
    assert found[0][2][:2] == (OSError, errno.EBADF)


SIZES = st.sampled_from([0, 1, 100, 5000, 300_000]) | st.integers(0, 70_000)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), SIZES), max_size=20))
@pytest.mark.parametrize("kind", sorted(TWINS))
def test_any_sequence_of_writes_sends_what_the_stdlib_sends(kind: str, steps: list[tuple[bool, int]]) -> None:
    def performed(each: str) -> list[Any]:
        seen: list[Any] = []
        with connected(each) as (connection, other), contextlib.closing(writer_of(each, connection)) as writer:
            connection.settimeout(0.0)
            for is_write, size in steps:
                if is_write:
                    seen.append(outcome(writer.write, bytes([size % 251]) * size))
                else:
                    other.settimeout(0.0)
                    seen.append(outcome(other.recv, size + 1))
        return seen

    assert performed(kind) == performed("stdlib")


def test_a_replaced_sendall_is_called(kind: str) -> None:
    calls: list[bytes] = []
    with connected(kind) as (connection, _), contextlib.closing(writer_of(kind, connection)) as writer:
        with mock.patch.object(socket.socket, "sendall", lambda self, data: calls.append(data), create=True):
            assert writer.write(b"seen") == 4
    assert calls == [b"seen"]


def test_the_sendall_of_another_class_is_called(kind: str) -> None:
    class Own(socket.socket):
        def sendall(self, data: Any, flags: int = 0) -> None:
            super().sendall(bytes(data).upper(), flags)

    made, other = socket.socketpair()
    with other, Own(fileno=made.detach()) as connection, contextlib.closing(writer_of(kind, connection)) as writer:
        assert writer.write(bytearray(b"own")) == 3
        assert other.recv(10) == b"OWN"
    stand_in = mock.Mock()
    writer = writer_of(kind, stand_in)
    assert writer.write(b"stand-in") == 8 and writer.fileno() is stand_in.fileno.return_value
    stand_in.sendall.assert_called_once_with(b"stand-in")
    writer.close()


def test_the_class_of_the_writer_is_that_of_the_twin_unless_somebody_replaced_it(impl: str) -> None:
    assert writer_class() is TWINS[impl]["streams"]._SocketWriter
    assert writer_class().__module__ == "fastserve.streams"
    with mock.patch.object(socketserver, "_SocketWriter", io.BytesIO):
        assert writer_class() is io.BytesIO


def test_a_method_that_was_replaced_in_the_stdlibs_writer_is_called(module: ModuleType) -> None:
    class Handler(module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"hello")

    ours, theirs = socket.socketpair()
    with ours, theirs, mock.patch.object(_std._SocketWriter, "write", autospec=True) as write:
        Handler(ours, "client", None)
    assert write.call_args.args[1:] == (b"hello",)


# Signals: PEP 475


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("what", ["read", "write"])
def test_what_a_signal_handler_raises_comes_out(ends: Ends, what: str, timeout: float | None) -> None:
    writer, connection, _ = ends
    connection.settimeout(timeout)

    def raise_it(signum: int, frame: FrameType | None) -> None:
        if not raised:
            raised.append(signum)
            raise Handled

    raised: list[int] = []
    with connection.makefile("rb") as rfile, pytest.raises(Handled), interrupted(raise_it):
        if what == "read":
            rfile.readline()
        else:
            writer.write(bytes(1 << 24))


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_read_goes_on_after_a_signal(ends: Ends, timeout: float | None) -> None:
    _, connection, other = ends
    connection.settimeout(timeout)

    def answer_at_the_third(signum: int, frame: FrameType | None) -> None:
        calls.append(signum)
        if len(calls) == 3:
            other.sendall(b"answer\n")

    calls: list[int] = []
    with connection.makefile("rb") as rfile, interrupted(answer_at_the_third):
        assert rfile.readline() == b"answer\n"
    assert len(calls) >= 3


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_write_goes_on_after_a_signal(ends: Ends, timeout: float | None) -> None:
    writer, connection, other = ends
    connection.settimeout(timeout)
    data = os.urandom(1 << 16) * 32
    calls: list[int] = []
    received = bytearray()

    def receive_after_three() -> None:
        wait_until(lambda: len(calls) >= 3)
        while len(received) < len(data):
            received.extend(other.recv(100_000))

    reader = threading.Thread(target=receive_after_three)
    reader.start()
    with interrupted(lambda signum, frame: calls.append(signum)):
        assert writer.write(data) == len(data)
    reader.join(LIMIT)
    assert received == data


def test_a_read_does_not_use_the_number_of_a_descriptor_that_a_signal_handler_closed(ends: Ends) -> None:
    _, connection, _ = ends

    def close_and_reuse(signum: int, frame: FrameType | None) -> None:
        if not reused:
            reused.append(connection.detach())
            os.dup2(readable.fileno(), reused[0], inheritable=False)

    reused: list[int] = []
    readable, feeder = socket.socketpair()
    with readable, feeder, connection.makefile("rb") as rfile:
        feeder.sendall(b"not for the reader\n")
        with interrupted(close_and_reuse), pytest.raises(OSError) as caught:
            rfile.readline()
        os.close(reused[0])
        assert caught.value.errno == errno.EBADF
        assert readable.recv(100) == b"not for the reader\n"
