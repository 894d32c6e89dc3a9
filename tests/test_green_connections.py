"""The connections that wait in a hub, beside plain sockets in threads as their model."""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

greenlet = pytest.importorskip("greenlet")

from fastserve import _backend  # noqa: E402
from green_support import BIG, PAIRS, attempt, exchange, read_all  # noqa: E402
from hub_support import running  # noqa: E402
from support import LIMIT  # noqa: E402

# Handlers and clients. Each exchange has the same outcome in a hub and in a thread.

CASES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {}


def case(client: Callable[[Any], Any]) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def note(handle: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CASES[handle.__name__] = handle, client
        return handle

    return note


def slowly(*parts: bytes, pause: float = 0.01) -> Callable[[Any], Any]:
    """Return a client that sends parts with pauses, and then reads to the end."""

    def client(sock: Any) -> Any:
        for part in parts:
            time.sleep(pause)
            sock.sendall(part)
        return read_all(sock)

    return client


def silent(sock: Any) -> Any:
    return read_all(sock)


def in_turns(sock: Any) -> Any:
    """A client whose second part comes when the first has been read."""
    time.sleep(0.01)
    sock.sendall(b"one")
    assert sock.recv(1) == b"!"
    sock.sendall(b"two")
    return read_all(sock)


@case(in_turns)
def recv(c: Any) -> Any:
    found = [c.recv(2), c.recv(100)]
    c.sendall(b"!")
    return [*found, c.recv(100), c.recv(0)]


@case(slowly(b"onetwothree"))
def recv_into(c: Any) -> Any:
    buffer = bytearray(6)
    found = [c.recv_into(buffer), bytes(buffer), c.recv_into(buffer, 2), bytes(buffer)]
    return [*found, attempt(c.recv_into, buffer, 7), attempt(c.recv_into, b"const"), c.recv_into(bytearray())]


@case(slowly(b"onetwothree"))
def recvfrom(c: Any) -> Any:
    buffer = bytearray(4)
    return [c.recvfrom(3)[0], c.recvfrom_into(buffer)[0], bytes(buffer), c.recvfrom(100)[0]]


@case(slowly(b"onetwothree"))
def recvmsg(c: Any) -> Any:
    a, b = bytearray(2), bytearray(2)
    return [c.recvmsg(3)[:3], c.recvmsg_into([a, b])[:3], bytes(a + b), c.recvmsg(100)[:3]]


@case(slowly(b"onetwothree"))
def peek(c: Any) -> Any:
    return [c.recv(3, socket.MSG_PEEK), c.recv(3, socket.MSG_PEEK), c.recv(3), c.recv(100)]


@case(slowly(b"one", b"two", b"three", b"four"))
def wait_for_all(c: Any) -> Any:
    buffer = bytearray(5)
    return [
        c.recv(4, socket.MSG_WAITALL),
        c.recv_into(buffer, 0, socket.MSG_WAITALL),
        bytes(buffer),
        c.recvfrom(6, socket.MSG_WAITALL)[0],
    ]


@case(lambda c: (c.sendall(b"abc"), c.shutdown(socket.SHUT_WR), read_all(c))[2])
def wait_for_all_until_the_end(c: Any) -> Any:
    return [c.recv(10, socket.MSG_WAITALL), c.recv(10, socket.MSG_WAITALL)]


@case(silent)
def not_waiting(c: Any) -> Any:
    return [
        attempt(c.recv, 10, socket.MSG_DONTWAIT),
        attempt(c.recv_into, bytearray(1), 0, socket.MSG_DONTWAIT),
        attempt(c.recvfrom, 10, socket.MSG_DONTWAIT),
        attempt(c.recvmsg, 10, 0, socket.MSG_DONTWAIT),
        c.gettimeout(),
        c.getblocking(),
    ]


# Who reads before sendall() has failed may make room for all of it: a machine may be busy with something else.
has_failed = threading.Event()


def reads_late(c: Any) -> bool:
    assert has_failed.wait(LIMIT)
    has_failed.clear()
    return len(read_all(c)) > 0


@case(reads_late)
def non_blocking(c: Any) -> Any:
    c.setblocking(False)
    found = [attempt(c.recv, 10), attempt(c.recv_into, bytearray(1)), attempt(c.accept), c.gettimeout()]
    found.append(attempt(c.sendall, bytes(50_000_000)))
    has_failed.set()
    found.append(c.makefile("rb").read(1))
    c.setblocking(True)
    return [*found, c.gettimeout()]


@case(lambda c: (time.sleep(0.05), len(read_all(c)))[1])
def sendall(c: Any) -> Any:
    return [c.sendall(b""), c.sendall(bytearray(b"x")), c.sendall(memoryview(bytes(BIG))), attempt(c.sendall, "text")]


@case(lambda c: (time.sleep(0.05), len(read_all(c)))[1])
def send(c: Any) -> Any:
    return [c.send(b""), c.send(b"x"), c.send(bytes(BIG)), attempt(c.send, "text")]


@case(lambda c: (time.sleep(0.05), len(read_all(c)))[1])
def sendmsg(c: Any) -> Any:
    return [c.sendmsg([b"one", bytearray(b"two")]), c.sendmsg([bytes(BIG), b"x"]), attempt(c.sendmsg, [5])]


@case(silent)
def sendall_of_other_buffers(c: Any) -> Any:
    import array
    import ctypes

    c.sendall(array.array("i", [1, 2]))
    c.sendall((ctypes.c_int32 * 2)(3, 4))
    return c.send((ctypes.c_int32 * 1)(5))


@case(silent)
def timeouts(c: Any) -> Any:
    c.settimeout(0.02)
    found = [c.gettimeout(), attempt(c.recv, 10), attempt(c.recv_into, bytearray(2)), attempt(c.recvfrom, 1)]
    return [*found, attempt(c.recvmsg, 1), attempt(c.recv, 1, socket.MSG_PEEK), c.sendall(b"x")]


@case(reads_late)
def timeout_of_sendall(c: Any) -> Any:
    c.settimeout(0.05)
    found = attempt(c.sendall, bytes(50_000_000))
    has_failed.set()
    return found


@case(slowly(b"half a li", pause=0.0))
def timeout_in_a_line(c: Any) -> Any:
    c.recv(1, socket.MSG_PEEK)  # the beginning of the line has come: the client may take longer than the timeout
    c.settimeout(0.3)
    with c.makefile("rb") as file:
        return [attempt(file.readline), attempt(file.readline), attempt(file.read, 1)]


@case(lambda c: (c.sendall(b"data"), c.shutdown(socket.SHUT_WR), read_all(c))[2])
def the_end_behind_data(c: Any) -> Any:
    time.sleep(0.01)
    found = [c.recv(100), c.recv(100), c.recv(100)]
    c.sendall(b"still there")
    return found


@case(lambda c: (c.recv(1), c.sendall(b"data"), c.shutdown(socket.SHUT_WR), read_all(c))[3])
def the_end_behind_data_while_waiting(c: Any) -> Any:
    c.sendall(b"x")
    return [c.recv(100), c.recv(100)]


def reset(c: Any) -> None:
    c.recv(1)
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    c.close()


@case(reset)
def reset_while_reading(c: Any) -> Any:
    c.sendall(b"x")
    return [attempt(c.recv, 100) in (b"", (ConnectionResetError, 104))]


@case(reset)
def reset_while_writing(c: Any) -> Any:
    c.sendall(b"x")
    return attempt(c.sendall, bytes(50_000_000))[0] in (ConnectionResetError, BrokenPipeError)


@case(lambda c: (c.recv(1), c.shutdown(socket.SHUT_RDWR), None)[2])
def shutdown(c: Any) -> Any:
    c.sendall(b"x")
    found = [c.recv(1), c.shutdown(socket.SHUT_RD), attempt(c.recv, 1)]
    return [*found, attempt(c.shutdown, 77), c.fileno() >= 0]


@case(silent)
def closed(c: Any) -> Any:
    c.close()
    calls = [(c.recv, 1), (c.recv_into, bytearray(1)), (c.sendall, b"x"), (c.send, b"x"), (c.recvmsg, 1)]
    return [*(attempt(*call) for call in calls), c.fileno(), c.close(), attempt(c.getpeername), repr(c)[-10:]]


@case(slowly(b"data"))
def detach(c: Any) -> Any:
    with socket.socket(fileno=c.detach()) as other:
        return [other.recv(100), os.get_blocking(other.fileno()), c.fileno(), attempt(c.recv, 1), c.detach()]


@case(slowly(b"one", b"two"))
def duplicate(c: Any) -> Any:
    found = [c.recv(3)]
    with c.dup() as other:
        found += [type(other) is type(c), other.gettimeout(), other.recv(10)]
        other.sendall(b"x")
    c.sendall(b"y")
    return found


@case(slowly(b"one\ntwo\r\nthree\nfour\nfive\nsix"))
def files(c: Any) -> Any:
    found: list[Any] = []
    with c.makefile("r", newline="") as file:
        found += [file.readline(), file.readline()]
        found.append(type(file))
    with c.makefile("wb") as file:
        found += [file.write(b"buffered"), type(file)]
    with c.makefile("w") as file:
        found.append(file.write("text"))
    with c.makefile("rwb") as file:
        found += [file.write(b"both"), file.flush(), type(file)]
    with c.makefile("wb", 0) as file:
        found += [file.write(b"raw"), type(file)]
    return found


@case(slowly(b"one\ntwo\n", b"three\n"))
def unbuffered_file(c: Any) -> Any:
    with c.makefile("rb", 0) as file:
        return [file.readline(), file.read(4), file.readinto(bytearray(3)), type(file)]


@case(slowly(b"line\n"))
def closing_with_an_open_file(c: Any) -> Any:
    file = c.makefile("rb")
    c.close()
    found = [c.fileno() >= 0, file.readline(), file.closed]
    file.close()
    return [*found, c.fileno(), file.closed, attempt(file.read), attempt(file.readline), attempt(file.__enter__)]


@case(slowly(b"line\n"))
def raw_file(c: Any) -> Any:
    file = c.makefile("rb")
    raw = file.raw
    found = [type(raw), raw.readable(), file.mode, file.name == c.fileno(), file.fileno() == c.fileno()]
    found.append(raw.read(5))
    file.close()
    c.close()
    return [*found, raw.closed, c.fileno()]


@case(slowly(b"line\n"))
def detached_raw_file(c: Any) -> Any:
    raw = c.makefile("rb").detach()
    c.close()
    found = [c.fileno() >= 0, raw.read(5)]
    raw.close()
    return [*found, c.fileno()]


@case(silent)
def blocking_descriptor(c: Any) -> Any:
    return [os.get_blocking(c.fileno()), c.settimeout(5), os.get_blocking(c.fileno()), c.settimeout(None)]


@case(slowly(b"for the program"))
def a_program_that_has_the_connection(c: Any) -> Any:
    code = "import sys; data = sys.stdin.buffer.raw.read(100); sys.stdout.buffer.write(data.upper())"
    subprocess.run([sys.executable, "-c", code], stdin=c.fileno(), stdout=c.fileno(), check=True, timeout=60)


def send_file(c: Any, file: Any, *arguments: Any) -> Any:
    return [attempt(c.sendfile, file, *arguments), file.tell()]


@case(lambda c: (time.sleep(0.03), len(read_all(c)))[1])
def sendfile(c: Any) -> Any:
    import tempfile

    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as empty, open("/proc/self/stat", "rb") as proc:
        file.write(bytes(BIG))
        file.seek(0)
        found = [send_file(c, file), send_file(c, file, 10), send_file(c, file, 5, 100), send_file(c, file, BIG + 1)]
        found += [send_file(c, empty), send_file(c, proc), send_file(c, io.BytesIO(b"in memory"), 3)]
        found += [
            attempt(c.sendfile, file, -1),
            attempt(c.sendfile, file, 0, -1),
            attempt(c.sendfile, io.StringIO("x")),
        ]
        c.settimeout(LIMIT)
        found.append(send_file(c, file))
        c.setblocking(False)
        found.append(attempt(c.sendfile, file))
    return found


# Small after large, a little more and a little less than before, and more than is received at a time.
SIZES = (5, 20_000, 20_000, 8_191, 30_000, 30_001, 8_192, 300_000, 1, 9_000, 70_000, 9_000, 0)


def messages_of_many_sizes(sock: Any) -> Any:
    same = []
    for number, size in enumerate(SIZES):
        message = random.Random(number).randbytes(size)
        sock.sendall(message)
        answer = b""
        while len(answer) < size:
            answer += sock.recv(size - len(answer))
        same.append(answer == message)
    sock.shutdown(socket.SHUT_WR)
    return same, read_all(sock)


@case(messages_of_many_sizes)
def echo_whatever_comes(c: Any) -> Any:
    sizes = 0
    while data := c.recv(400_000):
        sizes += len(data)
        c.sendall(data)
    return sizes


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_a_handler_finds_a_connection_as_a_thread_does(impl: str, pair: str, name: str) -> None:
    handle, client = CASES[name]
    model = exchange(pair, handle, client, green=False)
    assert exchange(pair, handle, client, green=True) == model


@pytest.mark.parametrize("pair", PAIRS)
def test_who_waits_after_much_was_received_keeps_no_room_for_more(impl: str, pair: str) -> None:
    count, size = 20, 60_000

    def handle(connection: Any) -> None:
        with connection:
            while connection.recv(400_000):
                pass

    ends = [PAIRS[pair]() for _ in range(count)]
    with running() as hub:
        for ours, theirs in ends:
            _backend.green().adopt(ours)
            hub.start(handle, ours)
            theirs.sendall(bytes(size))
        tracemalloc.start()
        try:
            assert not hub.drain(0.3)  # all of them wait
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            for _, theirs in ends:
                theirs.close()
        assert hub.drain(LIMIT)
    assert kept < count * size / 2


def test_an_urgent_mark_holds_nothing_up(impl: str) -> None:
    def client(c: Any) -> Any:
        c.sendall(b"abc")
        c.send(b"!", socket.MSG_OOB)
        c.sendall(b"def")
        return read_all(c)

    def handle(c: Any) -> Any:
        received = b""
        while not received.endswith(b"f"):
            received += c.recv(100)
        c.settimeout(0.02)
        return [received, attempt(c.recv, 10)]

    model = exchange("tcp", handle, client, green=False)
    assert model == ([b"abcdef", (TimeoutError, None)], b"")
    assert exchange("tcp", handle, client, green=True) == model


def test_descriptors_are_handed_over(impl: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    def client(c: Any) -> Any:
        with open(tmp_path / "file", "rb") as file:
            c.sendall(b"before")
            socket.send_fds(c, [b"with"], [file.fileno()])
            c.sendall(b"after")
            return read_all(c)

    def handle(c: Any) -> Any:
        time.sleep(0.02)
        received, content = b"", b""
        while len(received) < 15:
            if received == b"before":
                data, fds, _, _ = socket.recv_fds(c, 100, 4)
                received += data
                for fd in fds:
                    with open(fd, "rb") as file:
                        content += file.read()
            else:
                received += c.recv(6 if not received else 100)
        return received, content

    model = exchange("unix", handle, client, green=False)
    assert model[0] == (b"beforewithafter", b"content")
    assert exchange("unix", handle, client, green=True) == model


def test_datagrams_are_received_one_by_one(impl: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, running() as hub:
        connection = _backend.green().Connection(socket.AF_INET, socket.SOCK_DGRAM)
        connection.bind(("127.0.0.1", 0))
        received: list[bytes] = []

        def receive() -> None:
            while len(received) < 6:
                received.append(connection.recv(100))
                received.append(connection.recvfrom(100)[0])

        for i in range(3):
            sender.sendto(b"%d" % i, connection.getsockname())
        hub.start(receive)
        for i in range(3, 6):
            sender.sendto(b"%d" % i, connection.getsockname())
        assert hub.drain(LIMIT)
        connection.sendto(b"back", sender.getsockname()) if sender.getsockname()[1] else None
        connection.close()
    assert received == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_connections_are_made_and_accepted(impl: str, tmp_path: Path) -> None:
    green = _backend.green().Connection
    with running() as hub:
        for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, str(tmp_path / "socket"))):
            listener, seen = green(family), []
            listener.bind(address)
            listener.listen()
            free = socket.socket()  # it does not listen, and keeps others from the port
            free.bind(("127.0.0.1", 0))
            refused = free.getsockname() if family == socket.AF_INET else str(tmp_path / "nothing")

            def serve(listener: Any = listener, seen: list[Any] = seen) -> None:
                connection, _ = listener.accept()
                with connection:
                    seen.append((type(connection) is green, connection.gettimeout(), connection.recv(10)))

            def connect(family: int = family, listener: Any = listener, timeout: float | None = None) -> None:
                with green(family) as client:
                    client.settimeout(timeout)
                    client.connect(listener.getsockname())
                    client.sendall(b"data")

            def fail(family: int = family, refused: Any = refused, seen: list[Any] = seen) -> None:
                for timeout in (None, LIMIT):
                    with green(family) as client, socket.socket(family) as model:
                        client.settimeout(timeout)
                        seen.append(attempt(client.connect, refused) == attempt(model.connect, refused))
                    with green(family) as client, socket.socket(family) as model:
                        client.settimeout(timeout)
                        seen.append(client.connect_ex(refused) == model.connect_ex(refused))

            for timeout in (None, LIMIT):
                hub.start(serve)
                hub.start(connect, family, listener, timeout)
                assert hub.drain(LIMIT)
            hub.start(fail)
            assert hub.drain(LIMIT)
            assert seen == [(True, None, b"data")] * 2 + [True] * 4
            listener.close()
            free.close()


def test_a_full_backlog_of_a_unix_socket_is_waited_for(impl: str, tmp_path: Path) -> None:
    green = _backend.green().Connection
    path = str(tmp_path / "socket")
    seen: list[Any] = []
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as opened, running() as hub:
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                filler = opened.enter_context(socket.socket(socket.AF_UNIX))
                filler.setblocking(False)
                filler.connect(path)
        clients = [opened.enter_context(green(socket.AF_UNIX)) for _ in range(3)]
        clients[0].settimeout(0.03)
        hub.start(lambda: seen.append((attempt(clients[0].connect, path), clients[0].connect_ex(path))))
        assert hub.drain(LIMIT)
        assert seen == [((TimeoutError, None), 11)]
        hub.start(lambda: seen.append(clients[1].connect(path)))
        while len(seen) < 2:
            listener.accept()[0].close()
            hub.drain(0.02)
        assert seen[1:] == [None]


def test_a_connection_serves_a_thread_without_a_hub(impl: str) -> None:
    """What a handler hands to a thread works there as any socket."""
    for name in ("recv", "sendall", "wait_for_all", "timeouts", "files", "sendfile", "timeout_in_a_line"):
        handle, client = CASES[name]
        model = exchange("tcp", handle, client, green=False)
        green = _backend.green()

        def adopted(c: Any, handle: Any = handle, green: Any = green) -> Any:
            green.adopt(c)
            return handle(c)

        assert exchange("tcp", adopted, client, green=False) == model
