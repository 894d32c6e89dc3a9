"""The descriptors of the greenlet hub: those that its root polls, and those of connections."""

from __future__ import annotations

import _socket
import contextlib
import os
import socket
import threading
import time
from typing import Any

import pytest

greenlet = pytest.importorskip("greenlet")

from fastserve import _backend  # noqa: E402
from hub_support import finish  # noqa: E402
from support import LIMIT, wait_until  # noqa: E402

# The root's descriptors


def test_the_root_polls(hub: Any) -> None:
    a, b = socket.socketpair()
    with a, b:
        with pytest.raises(ValueError):
            hub.register(-1)
        hub.unregister(a.fileno())
        hub.register(a.fileno())
        with pytest.raises(OSError):
            hub.register(a.fileno())
        assert hub.wait(0) == []
        assert hub.wait(0.01) == []
        b.sendall(b"x")
        assert hub.wait(LIMIT) == [a.fileno()]
        assert hub.wait() == [a.fileno()]  # until it is read
        a.recv(1)
        assert hub.wait(0) == []
        b.close()
        assert hub.wait(LIMIT) == [a.fileno()]
        hub.unregister(a.fileno())
        assert hub.wait(0) == []
        hub.register(a.fileno())
        hub.close()
        assert hub.wait(0) == []


def test_what_became_ready_while_the_root_did_something_else_is_told_then_and_costs_nothing_until_then(
    hub: Any,
) -> None:
    a, b = socket.socketpair()
    with a, b:
        hub.register(a.fileno())
        b.sendall(b"x")
        hub.start(hub.park, 0.1)
        before = hub.progress
        finish(hub)
        assert hub.progress - before < 30, "the hub has spun"
        assert hub.wait(LIMIT) == [a.fileno()]
        hub.unregister(a.fileno())


def test_a_descriptor_that_was_ready_is_not_told_after_it_is_watched_no_more(hub: Any) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    fds = [a.fileno() for a, _ in pairs]

    def unregister() -> None:
        hub.unregister(fds[1])
        hub.unregister(fds[1])

    for (_, b), fd in zip(pairs, fds, strict=True):
        hub.register(fd)
        b.sendall(b"x")
    found = hub.wait(LIMIT)
    assert set(found) <= set(fds)
    hub.spawn(unregister)
    for _ in range(3):
        assert fds[0] in hub.wait(LIMIT) or hub.active
    assert hub.wait(LIMIT) == [fds[0]]
    hub.unregister(fds[0])
    for a, b in pairs:
        a.close()
        b.close()


# Descriptors of connections


def test_all_who_wait_for_one_connection_go_on(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    received: list[bytes] = []

    def read() -> None:
        while data := connection.recv(1):
            received.append(data)
            if len(received) == 30:
                break

    for _ in range(5):
        hub.start(read)
    for _ in range(30):
        peer.sendall(b"x")
        hub.park(0.0001)
    peer.shutdown(socket.SHUT_WR)
    finish(hub)
    assert len(received) == 30


def test_who_does_not_wait_for_a_connection_any_more_is_not_woken_by_it(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    tasks: list[Any] = []
    parked: list[Any] = []

    def reads() -> None:
        with contextlib.suppress(TimeoutError):
            hub.wait_io(connection, connection.fileno(), False, None)

    def other(deadline: float | None) -> None:
        tasks.append(hub.this())
        with contextlib.suppress(TimeoutError):
            hub.wait_io(connection, connection.fileno(), False, deadline)
        parked.append("parks")
        parked.append(hub.park(0.05))

    hub.start(reads)
    hub.start(other, None)
    hub.start(other, time.monotonic() + 0.001)
    hub.wake(tasks[0])
    while len(parked) < 2:
        hub.park(0.001)
    peer.sendall(b"x")
    finish(hub)
    assert parked == ["parks", "parks", False, False]


@pytest.mark.parametrize("by", ["a task", "a thread"])
@pytest.mark.parametrize("waiters", [1, 3])
def test_closing_ends_the_waits(hub: Any, pair: tuple[Any, Any], by: str, waiters: int) -> None:
    connection, _ = pair
    errors: list[Any] = []

    def read() -> None:
        try:
            connection.recv(10)
        except OSError as error:
            errors.append(error.errno)

    for _ in range(waiters):
        hub.start(read)
    if by == "a task":
        hub.start(connection.close)
        finish(hub)
    else:
        thread = threading.Thread(target=lambda: (wait_until(lambda: hub.idle), connection.close()))
        thread.start()
        finish(hub)
        thread.join()
    assert errors == [9] * waiters


def test_a_descriptor_that_is_used_again_is_another_one(hub: Any, impl: str) -> None:
    connections = _backend.green().Connection
    seen: list[Any] = []

    def new() -> tuple[Any, socket.socket]:
        other, peer = socket.socketpair()  # the first has the lowest free number
        return connections(other.family, other.type, other.proto, other.detach()), peer

    def read(connection: Any, name: str) -> None:
        try:
            seen.append((name, connection.recv(10)))
        except OSError as error:
            seen.append((name, error.errno))

    first, first_peer = new()
    number = socket.socket.fileno(first)
    kept = first.dup()  # the kernel goes on to report the first, under its number
    hub.start(read, first, "first")
    first.close()
    spare = []
    second, second_peer = new()
    while socket.socket.fileno(second) != number:
        spare.append((second, second_peer))
        second, second_peer = new()
        assert len(spare) < 100
    hub.start(read, second, "second")
    first_peer.sendall(b"for the first")
    hub.park(0.01)
    assert seen == [("first", 9)]
    second_peer.sendall(b"data")
    finish(hub)
    assert seen == [("first", 9), ("second", b"data")]
    for sock in (kept, first_peer, second, second_peer, *(s for two in spare for s in two)):
        sock.close()


def test_a_connection_that_was_never_closed_leaves_nothing_to_the_next_of_its_number(hub: Any, impl: str) -> None:
    for i in range(20):
        peer, other = socket.socketpair()
        plain = socket.socket(other.family, other.type, other.proto, other.detach())
        _backend.green().adopt(plain)
        received: list[bytes] = []
        hub.start(lambda found, into: into.append(found.recv(10)), plain, received)
        peer.sendall(b"%d" % i)
        finish(hub)
        assert received == [b"%d" % i]
        peer.close()
        os.close(_socket.socket.detach(plain))  # as a socket that is collected does


def test_the_number_of_a_closed_descriptor_of_the_root_may_be_a_connections(hub: Any) -> None:
    a, b = socket.socketpair()
    number = a.fileno()
    hub.register(number)
    a.close()
    other, peer = socket.socketpair()
    fd = other.detach()
    if fd != number:
        os.dup2(fd, number)
        os.close(fd)
    connection = _backend.green().Connection(socket.AF_UNIX, socket.SOCK_STREAM, 0, number)
    seen: list[bytes] = []

    def read() -> None:
        while data := connection.recv(10):
            seen.append(data)

    hub.start(read)
    hub.unregister(number)
    peer.sendall(b"data")
    wait_for = time.monotonic() + LIMIT
    while not seen and time.monotonic() < wait_for:
        hub.wait(0.01)
    assert seen == [b"data"]
    peer.close()
    finish(hub)
    connection.close()
    b.close()


# Greenlets that handlers make themselves


def test_greenlets_of_a_handler_wait_too(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    seen: list[Any] = []

    def inner() -> str:
        seen.append("inner")
        hub.park(0.01)
        seen.append(connection.recv(10))
        return "result"

    def task() -> None:
        seen.append(greenlet.greenlet(inner).switch())
        hub.park(0.001)
        seen.append("end")

    hub.start(task)
    peer.sendall(b"data")
    finish(hub)
    assert seen == ["inner", b"data", "result", "end"]


def test_a_handler_that_waits_in_a_greenlet_of_its_own_is_not_woken_there(hub: Any) -> None:
    seen: list[Any] = []
    tasks: list[Any] = []
    inners: list[Any] = []

    def inner() -> str:
        inners.append(hub.this())
        hub.park(LIMIT)
        return "result"

    def task() -> None:
        tasks.append(hub.this())
        seen.append(greenlet.greenlet(inner).switch())
        try:
            hub.park()
        except greenlet.GreenletExit:
            seen.append("killed")

    hub.start(task)
    hub.wake(tasks[0])
    hub.park(0.001)
    assert seen == []
    hub.kill()
    hub.wake(inners[0])
    finish(hub)
    assert seen == ["result", "killed"]
