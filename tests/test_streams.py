"""The connection of a stream server and the file that reads from it: stdlib, py and c, held side by side."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import multiprocessing.reduction
import multiprocessing.resource_sharer
import os
import pickle
import selectors
import socket
import ssl
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastserve.streams
from conftest import TWINS
from core_support import outcome
from support import LIMIT, open_descriptors, serving, talk, wait_until

KINDS = ["stdlib", *sorted(TWINS)]


def connection_class(kind: str) -> Any:
    return socket.socket if kind == "stdlib" else TWINS[kind]["streams"].Connection


@contextlib.contextmanager
def connected(kind: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Make a connection of that kind, and its other end."""
    made, other = socket.socketpair()
    connection = connection_class(kind)(made.family, made.type, made.proto, made.detach())
    with connection, other:
        other.settimeout(LIMIT)
        yield connection, other


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    with connected(kind) as both:
        yield both


def raw_file(connection: socket.socket) -> Any:
    """Return the file beneath the buffer of ``makefile("rb")``."""
    return connection.makefile("rb").detach()


Pair = tuple[socket.socket, socket.socket]

# The connection itself


def test_a_connection_is_a_socket_without_a_dict(pair: Pair) -> None:
    connection, other = pair
    assert isinstance(connection, socket.socket)
    assert (connection.family, connection.type, connection.proto) == (other.family, other.type, other.proto)
    assert connection.gettimeout() is None and connection.getblocking()
    with pytest.raises(AttributeError):
        connection.anything = 1
    with pytest.raises(AttributeError):
        connection.recv = None
    assert weakref.ref(connection)() is connection


def test_a_connection_is_made_by_all_that_makes_a_socket(kind: str) -> None:
    cls = connection_class(kind)
    with cls() as plain:
        assert (plain.family, plain.type, plain.proto) == (socket.AF_INET, socket.SOCK_STREAM, 0)
    with cls(socket.AF_INET, type=socket.SOCK_DGRAM) as datagrams, cls(fileno=os.dup(datagrams.fileno())) as again:
        assert (again.family, again.type) == (socket.AF_INET, socket.SOCK_DGRAM)
    assert outcome(cls, socket.AF_INET, socket.SOCK_STREAM, 0, -7) == outcome(
        socket.socket, socket.AF_INET, socket.SOCK_STREAM, 0, -7
    )
    assert outcome(lambda: cls(fileno="no"))[0] is TypeError
    socket.setdefaulttimeout(3)
    try:
        ends = socket.socketpair()
        with ends[0], cls(fileno=ends[1].detach()) as connection:
            assert connection.gettimeout() == 3
    finally:
        socket.setdefaulttimeout(None)


def test_a_connection_says_what_it_is() -> None:
    for kind in TWINS:
        with connected(kind) as (connection, _):
            assert type(connection) is not socket.socket
            assert repr(connection).startswith(f"<fastserve.streams.Connection fd={connection.fileno()}, family=")
            connection.close()
            assert repr(connection).startswith("<fastserve.streams.Connection [closed] fd=-1, family=")
            with pytest.raises(TypeError, match="cannot pickle 'Connection' object"):
                pickle.dumps(connection)


def test_dup_and_detach(pair: Pair) -> None:
    connection, other = pair
    connection.settimeout(5)
    with connection.dup() as again:
        assert type(again) is type(connection)
        assert again.gettimeout() == 5 and again.fileno() != connection.fileno()
        again.sendall(b"again")
        assert other.recv(10) == b"again"
    fd = connection.detach()
    assert connection.fileno() == -1
    connection.close()
    with socket.socket(fileno=fd) as plain:
        plain.sendall(b"detached")
    assert other.recv(10) == b"detached"


def test_a_connection_cannot_be_pickled_or_copied(pair: Pair) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot pickle" if protocol > 1 else "object"):
            pickle.dumps(pair[0], protocol)
    with pytest.raises(TypeError, match="cannot pickle"):
        copy.copy(pair[0])


def test_multiprocessing_hands_a_connection_on(pair: Pair, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(multiprocessing.resource_sharer.stop)  # its thread
    connection, other = pair
    for wrap in (lambda one: one, lambda one: [{"request": one}]):
        written = multiprocessing.reduction.ForkingPickler.dumps(wrap(connection))
        read = pickle.loads(written)
        handed_on = read[0]["request"] if isinstance(read, list) else read
        with handed_on:
            assert type(handed_on) is socket.socket
            handed_on.sendall(b"from another process")
            assert other.recv(30) == b"from another process"


def test_an_unclosed_connection_warns(kind: str) -> None:
    made, other = socket.socketpair()
    connection = connection_class(kind)(made.family, made.type, made.proto, made.detach())
    with other, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del connection
        gc.collect()
    assert [one.category for one in caught] == [ResourceWarning]
    assert str(caught[0].message).startswith("unclosed <") and " fd=" in str(caught[0].message)


def test_an_unclosed_file_of_a_closed_connection_lets_go_of_the_descriptor(kind: str) -> None:
    before = open_descriptors()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with connected(kind) as (connection, _):
            connection.makefile("rb")
        gc.collect()
    assert not caught
    assert open_descriptors() == before


def test_a_connection_works_in_select(pair: Pair) -> None:
    connection, other = pair
    with selectors.DefaultSelector() as selector, connection.makefile("rb") as rfile:
        selector.register(connection, selectors.EVENT_READ)
        assert not selector.select(0)
        other.sendall(b"x")
        assert [key.fileobj for key, _ in selector.select(10)] == [connection]
        assert rfile.fileno() == connection.fileno()


def test_sendfile(pair: Pair) -> None:
    connection, other = pair
    with tempfile.TemporaryFile() as file:
        file.write(b"content")
        file.seek(0)
        assert connection.sendfile(file) == 7
    assert other.recv(10) == b"content"


def test_tls_takes_the_connection_over(pair: Pair) -> None:
    connection, other = pair
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as wrapped:
        assert isinstance(wrapped, ssl.SSLSocket)
        assert connection.fileno() == -1 and wrapped.fileno() >= 0
        with wrapped.makefile("rb") as rfile:
            other.sendall(b"no handshake at all\n")
            with pytest.raises(ssl.SSLError):
                rfile.readline()


# The files

FORMS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("rb",), {}),
    (("rb", -1), {}),
    (("rb", None), {}),
    (("rb", 0), {}),
    (("rb", 1), {}),
    (("rb", 70000), {}),
    (("rb", -5), {}),
    (("rb", True), {}),
    (("rb", "x"), {}),
    (("rb", 1.5), {}),
    (("br",), {}),
    (("wb", 0), {}),
    (("wb",), {}),
    (("b",), {}),
    ((), {}),
    (("r",), {"encoding": "ascii", "errors": "replace", "newline": "\n"}),
    (("r", 0), {}),
    (("w",), {"encoding": "utf-8"}),
    (("rw",), {"encoding": "utf-8"}),
    (("rwb",), {}),
    (("rwb", 0), {}),
    (("a",), {}),
    ((None,), {}),
    (("rb",), {"buffering": 0}),
    ((), {"mode": "rb", "buffering": 3, "encoding": "utf-8"}),
]


def described(made: Any) -> Any:
    """Tell all that can be asked of a file without reading."""
    if not isinstance(made, io.IOBase):
        return made
    asked = [(name, getattr(made, name, "absent")) for name in ("mode", "encoding", "errors", "newlines", "closed")]
    calls = [(name, outcome(getattr(made, name))) for name in ("readable", "writable", "seekable", "isatty", "tell")]
    raw = getattr(getattr(made, "buffer", made), "raw", made)
    return (
        type(made) if raw is not made else isinstance(made, socket.SocketIO),
        isinstance(raw, socket.SocketIO), getattr(raw, "mode", None), asked, calls,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_makefile_takes_every_form(kind: str, form: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, other):
            made = outcome(lambda it: it.makefile(*form[0], **form[1]), connection)
            wait_until(lambda it=connection, one=made: it._io_refs == isinstance(one, io.IOBase))
            try:
                if isinstance(made, io.IOBase) and not isinstance(made, io.BufferedRWPair | io.TextIOWrapper):
                    assert made.fileno() == made.name == connection.fileno()
                answer = None
                if isinstance(made, io.IOBase) and made.readable():
                    other.sendall(b"line\n")
                    answer = made.readline()
                found.append((described(made), answer))
            finally:
                if isinstance(made, io.IOBase):
                    made.close()
            assert connection._io_refs == 0
    assert found[0] == found[1]


def test_every_method_of_a_closed_file_raises_what_it_raises(kind: str) -> None:
    def tried(raw: Any) -> list[Any]:
        methods: dict[str, tuple[Any, ...]] = {
            "readinto": (bytearray(3),), "read": (1,), "readall": (), "readline": (), "write": (b"x",), "fileno": (),
            "readable": (), "writable": (), "seekable": (), "tell": (), "seek": (0,), "truncate": (), "flush": (),
            "isatty": (), "__enter__": (), "close": (), "__next__": (),
        }  # fmt: skip
        results = [(name, outcome(getattr(raw, name), *arguments)) for name, arguments in methods.items()]
        return [*results, raw.closed, raw.name, raw.mode]

    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, _):
            raw = raw_file(connection)
            raw.close()
            written = outcome(raw_file(connection).write, b"x")
            marked = raw_file(connection)
            io.RawIOBase.close(marked)  # the mark alone: it still has its socket
            found.append((tried(raw), outcome(marked.readinto, bytearray(1)), written))
            connection._decref_socketios()
    assert found[0] == found[1]


def test_closing_order_and_reference_counts(pair: Pair) -> None:
    connection, other = pair
    first, second, raw = (connection.makefile("rb", size) for size in (-1, 100, 0))  # the last is a raw file
    assert connection._io_refs == 3
    fd = connection.fileno()
    other.sendall(b"one\ntwo\n")
    connection.close()
    assert connection.fileno() == fd and first.readline() == b"one\n"
    first.close()
    first.close()
    assert connection._io_refs == 2
    del second
    wait_until(lambda: connection._io_refs == 1)
    assert connection.fileno() == fd
    raw.close()
    assert connection.fileno() == -1
    with pytest.raises(OSError):
        os.fstat(fd)


def test_detach_of_the_buffer_gives_the_raw_file(pair: Pair) -> None:
    connection, other = pair
    rfile = connection.makefile("rb")
    raw: Any = rfile.detach()
    other.sendall(b"raw")
    room = bytearray(10)
    assert raw.readinto(room) == 3 and room[:3] == b"raw"
    raw.close()
    with pytest.raises(ValueError, match="raw stream has been detached"):
        rfile.read(1)


def test_reading_from_a_detached_or_closed_descriptor(kind: str) -> None:
    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, _):
            for timeout in (None, 5.0, 0.0):
                with connection.dup() as other_end:
                    other_end.settimeout(timeout)
                    rfile = other_end.makefile("rb")
                    os.close(other_end.detach())
                    found.append((outcome(rfile.read, 1), outcome(rfile.fileno), rfile.closed))
                    rfile.close()
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert found[0][0][:2] == (OSError, 9)


def test_a_read_after_a_timeout_is_refused(kind: str) -> None:
    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, other):
            connection.settimeout(0.02)
            rfile = connection.makefile("rb")
            results = [outcome(rfile.readline)]
            other.sendall(b"late\n")
            results += [outcome(rfile.readline), outcome(rfile.read, 1), rfile.raw._timeout_occurred]
            again = connection.makefile("rb")
            results += [again.readline(), rfile.closed, outcome(rfile.close)]
            found.append(results)
    assert found[0] == found[1]
    assert found[0][0] == (TimeoutError, None, "timed out")
    assert found[0][1] == (OSError, None, "cannot read from timed out object")


def test_a_read_with_a_timeout_waits_for_what_comes(pair: Pair) -> None:
    connection, other = pair
    connection.settimeout(20)
    with connection.makefile("rb") as rfile:
        for count in range(3):
            later = threading.Timer(0.02, other.sendall, [b"line %d\n" % count])
            later.start()
            assert rfile.readline() == b"line %d\n" % count
            later.join()
        other.sendall(b"at once\n")
        assert rfile.readline() == b"at once\n"


def test_a_timeout_holds_although_another_object_made_the_descriptor_blocking(pair: Pair) -> None:
    connection, _ = pair
    connection.settimeout(0.02)
    os.set_blocking(connection.fileno(), True)
    with connection.makefile("rb") as rfile, pytest.raises(TimeoutError):
        rfile.readline()


@pytest.mark.parametrize("timeout", [0.0, None])
def test_a_read_that_would_block_returns_none(pair: Pair, timeout: float | None) -> None:
    connection, other = pair
    connection.settimeout(timeout)
    os.set_blocking(connection.fileno(), False)
    raw = raw_file(connection)
    rfile = connection.makefile("rb")
    with raw, rfile:
        assert raw.readinto(bytearray(3)) is None
        assert raw.read(3) is None
        assert rfile.read(3) is None
        assert rfile.readline() == b""
        other.sendall(b"part")
        assert rfile.readline() == b"part"
        other.sendall(b"more")
        assert raw.readinto(bytearray(3)) == 3
        assert rfile.read1(10) == b"e"


def test_a_half_closed_connection_ends_the_file_and_can_be_written(pair: Pair) -> None:
    connection, other = pair
    other.sendall(b"a\nb")
    other.shutdown(socket.SHUT_WR)
    with connection.makefile("rb") as rfile:
        assert list(rfile) == [b"a\n", b"b"]
        assert rfile.read() == rfile.readline() == rfile.read1(5) == b""
        connection.sendall(b"still there")
        assert other.recv(20) == b"still there"


def test_a_reset_connection_raises(kind: str) -> None:
    for each in ("stdlib", kind):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
            connection = connection_class(each)(accepted.family, accepted.type, accepted.proto, accepted.detach())
            with connection, connection.makefile("rb") as rfile:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
                raised = outcome(rfile.readline)
                assert raised[0] is ConnectionResetError and raised[2] == "[Errno 104] Connection reset by peer"


@pytest.mark.parametrize("room", [b"read-only", "text", None, 7, memoryview(b"read-only"), bytearray()], ids=repr)
def test_readinto_takes_what_recv_into_takes(kind: str, room: Any) -> None:
    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, other), raw_file(connection) as raw:
            other.sendall(b"abc")
            found.append((outcome(raw.readinto, room), raw.read(3)))
    assert found[0] == found[1]


def test_readinto_fills_only_contiguous_memory(kind: str) -> None:
    found = []
    for each in ("stdlib", kind):
        with connected(each) as (connection, other), raw_file(connection) as raw:
            other.sendall(b"abcdef")
            room = bytearray(6)
            strided = outcome(raw.readinto, memoryview(room)[::2])
            squared = memoryview(room).cast("B", (2, 3))
            found.append((strided, outcome(raw.readinto, squared), bytes(room)))
    assert found[0] == found[1]
    assert found[0][1:] == (6, b"abcdef")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.binary(max_size=60).map(lambda data: data.replace(b"\1", b"\n"))),
        st.tuples(st.just("send many"), st.integers(8000, 12000)),
        st.tuples(st.sampled_from(["read", "readline", "read1"]), st.integers(0, 400)),
        st.tuples(st.sampled_from(["readline", "read1"]), st.just(-1)),
        st.tuples(st.just("readinto"), st.integers(0, 9000)),
        st.tuples(st.just("readinto1"), st.integers(0, 9000)),
        st.tuples(st.just("peek"), st.integers(0, 20)),
        st.tuples(st.sampled_from(["next", "end", "new file"]), st.just(0)),
        st.tuples(st.just("timeout"), st.sampled_from([0.0, 0.001])),
    ),
    max_size=25,
)


def performed(kind: str, steps: list[tuple[str, Any]], size: int) -> list[Any]:
    """Run the steps on a connection that never blocks for long, and return all that comes of them."""
    seen: list[Any] = []
    ended = False
    with connected(kind) as (connection, other):
        connection.settimeout(0.0)
        other.settimeout(0.0)
        rfile: Any = connection.makefile("rb", size)
        for name, value in steps:
            if name in ("send", "send many"):
                if not ended:
                    with contextlib.suppress(BlockingIOError):  # full, and equally full for all kinds
                        other.send(value if name == "send" else b"x" * value)
            elif name == "end":
                ended = True
                other.shutdown(socket.SHUT_WR)
            elif name == "timeout":
                connection.settimeout(value)
            elif name == "new file":
                rfile.close()
                rfile = connection.makefile("rb", size)
            elif name in ("readinto", "readinto1"):
                room = bytearray(value)
                seen.append((name, outcome(getattr(rfile, name, rfile.readinto), room), bytes(room)))
            elif name == "next":
                seen.append((name, outcome(next, rfile)))
            elif hasattr(rfile, name):
                seen.append((name, outcome(getattr(rfile, name), value)))
        seen.append((connection._io_refs, rfile.closed))
        rfile.close()
    return seen


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, size=st.sampled_from([-1, 0, 1, 16, 4096]))
@pytest.mark.parametrize("kind", sorted(TWINS))
def test_any_sequence_of_reads_gives_what_the_stdlib_gives(kind: str, steps: list[tuple[str, Any]], size: int) -> None:
    assert performed(kind, steps, size) == performed("stdlib", steps, size)


@pytest.mark.parametrize("size", [-1, 1, 1000])
def test_a_stream_arrives_as_it_was_sent_however_it_is_cut(pair: Pair, size: int) -> None:
    connection, other = pair
    lines = [b"%d" % count * (count % 50) + b"\n" for count in range(2000)]
    sender = threading.Thread(target=lambda: [other.sendall(line) for line in lines])
    sender.start()
    with connection.makefile("rb", size) as rfile:
        assert [rfile.readline() for _ in lines] == lines
    sender.join()


def test_closing_the_connection_while_another_thread_reads(pair: Pair) -> None:
    connection, other = pair
    raw = raw_file(connection)
    results: list[Any] = []
    reader = threading.Thread(target=lambda: results.append(outcome(raw.readinto, bytearray(10))))
    reader.start()
    connection.close()  # the file still holds the descriptor
    assert connection.fileno() >= 0
    other.sendall(b"later")
    reader.join(LIMIT)
    assert results == [5]
    raw.close()
    assert connection.fileno() == -1


# What replaces a method is obeyed

REPLACED: list[tuple[Any, str]] = [
    (socket.socket, "makefile"),
    (socket.socket, "recv_into"),
    (socket.socket, "close"),
    (socket.socket, "_decref_socketios"),
    (socket.SocketIO, "readinto"),
    (socket, "SocketIO"),
]


@pytest.mark.parametrize(("owner", "name"), REPLACED, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_a_replaced_method_is_called(kind: str, owner: Any, name: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[str] = []

    def spy(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        return original(*arguments, **keywords)

    with mock.patch.object(owner, name, spy, create=name == "recv_into"), connected(kind) as (connection, other):
        other.sendall(b"line\n")
        with connection.makefile("rb") as rfile:
            assert rfile.readline() == b"line\n"
    assert calls == [name] * len(calls) and calls


def test_a_method_of_a_subclass_is_called(kind: str) -> None:
    class Own(connection_class(kind)):
        def recv_into(self, buffer: Any, *arguments: Any) -> int:
            buffer[:3] = b"own"
            return 3

    made, other = socket.socketpair()
    with other, Own(fileno=made.detach()) as connection, connection.makefile("rb") as rfile:
        assert rfile.read(6) == b"ownown"
        assert isinstance(rfile.raw, socket.SocketIO)


def test_the_default_size_of_buffers_is_asked_for_at_the_time(pair: Pair) -> None:
    connection, other = pair
    with mock.patch.object(io, "DEFAULT_BUFFER_SIZE", 3), connection.makefile("rb") as rfile:
        other.sendall(b"abcdef")
        assert rfile.peek() == b"abc"


# Under a server


def test_get_request_gives_a_connection(impl: str) -> None:
    requests: list[Any] = []

    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            requests.append((type(self.request), type(self.rfile), type(self.rfile.raw)))
            self.wfile.write(self.rfile.readline())

    with serving(fastserve.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as server:
        assert talk(server.server_address, b"hello\n") == b"hello\n"
    cls, buffer, raw = requests[0]
    assert cls is connection_class(impl) and issubclass(cls, socket.socket)
    assert buffer is io.BufferedReader and issubclass(raw, socket.SocketIO)
    assert (raw is socket.SocketIO) == (impl == "py")


def test_another_listener_gives_what_its_accept_gives(module: ModuleType) -> None:
    class Listener(socket.socket):
        pass

    types: list[type] = []

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            types.append(type(self.request))

    with module.TCPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = Listener(fileno=server.socket.detach())
        with serving(server):
            assert talk(server.server_address, b"") == b""
    assert types == [socket.socket]


def test_the_connection_of_the_module_is_that_of_the_twin_in_use() -> None:
    assert fastserve.streams.Connection is fastserve._backend.streams.Connection
    for kind in TWINS:
        assert connection_class(kind).__module__ == "fastserve.streams"
        assert connection_class(kind).__qualname__ == "Connection"
