"""Replies that are gathered while requests are left to read."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

greenlet = pytest.importorskip("greenlet")

import fastserve  # noqa: E402
from fastserve import _backend  # noqa: E402
from green_support import attempt, read_all, tcp_pair  # noqa: E402
from hub_support import running  # noqa: E402
from support import LIMIT, serving, talk  # noqa: E402


class Lines(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([b"a\n", b"bcd\n", b"\n", b"e" * 3000 + b"\n"]), max_size=200))
def test_pipelined_lines_are_answered_in_order(lines: list[bytes]) -> None:
    with serving(fastserve.GreenletTCPServer(("127.0.0.1", 0), Lines)) as server:
        assert talk(server.server_address, b"".join(lines)) == b"".join(lines).upper()


def with_unread_lines(act: Callable[[Any, Any, Any], Any], impl: str) -> list[Any]:
    """Have a handler answer one of two lines, and then do something; return what the client has meanwhile."""
    seen: list[Any] = []
    ours, theirs = tcp_pair()
    with running() as hub, theirs:
        _backend.green().adopt(ours)
        theirs.sendall(b"one\ntwo\n")

        def handle() -> None:
            with ours, ours.makefile("rb") as file:
                ours.sendall(file.readline().upper())
                act(hub, ours, file)
                theirs.setblocking(False)
                seen.append(attempt(theirs.recv, 100))
                hub.park(0)
                seen.append(attempt(theirs.recv, 100))

        hub.start(handle)
        assert hub.drain(LIMIT)
    return seen


AFTERWARDS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "waiting": lambda hub, c, file: hub.park(0),
    "fileno": lambda hub, c, file: c.fileno(),
    "fileno of the file": lambda hub, c, file: file.fileno(),
    "shutdown": lambda hub, c, file: c.shutdown(socket.SHUT_WR),
    "detach": lambda hub, c, file: os.close(c.detach()),
    "settimeout": lambda hub, c, file: c.settimeout(5),
    "setblocking": lambda hub, c, file: c.setblocking(False),
    "send": lambda hub, c, file: c.send(b"|"),
    "recv": lambda hub, c, file: attempt(c.recv, 1, socket.MSG_DONTWAIT),
    "close": lambda hub, c, file: (file.close(), c.close()),
    "dup": lambda hub, c, file: c.dup().close(),
    "a subprocess": lambda hub, c, file: subprocess.run([sys.executable, "-c", ""], stdout=c, check=True),
    "fork": lambda hub, c, file: os.waitpid(os.fork() or os._exit(0), 0),  # type: ignore[func-returns-value]
    "a file that is closed": lambda hub, c, file: (file.close(), c.sendall(b"")),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_a_reply_is_out_before(impl: str, name: str) -> None:
    found = with_unread_lines(AFTERWARDS[name], impl)
    assert found[0][:4] == b"ONE\n", found


def test_a_reply_is_gathered_while_lines_are_left(impl: str) -> None:
    found = with_unread_lines(lambda hub, c, file: None, impl)
    expected: dict[str, list[Any]] = {
        "c": [(BlockingIOError, 11), b"ONE\n"],
        "py": [b"ONE\n", (BlockingIOError, 11)],
    }
    assert found == expected[impl]


def test_replies_to_two_clients_are_not_mixed(impl: str) -> None:
    first, first_peer = tcp_pair()
    second, second_peer = tcp_pair()
    with running() as hub, first_peer, second_peer, first, second:
        for ours in (first, second):
            _backend.green().adopt(ours)

        def handle() -> None:
            with first.makefile("rb") as a, second.makefile("rb") as b:
                for _ in range(3):
                    first.sendall(a.readline())
                    second.sendall(b.readline())
                first.sendall(bytes(100_000))

        first_peer.sendall(b"1\n2\n3\n4\n")
        second_peer.sendall(b"a\nb\nc\nd\n")
        hub.start(handle)
        assert hub.drain(LIMIT)
        first_peer.settimeout(LIMIT)
        assert first_peer.recv(6, socket.MSG_WAITALL) == b"1\n2\n3\n"
        assert second_peer.recv(6, socket.MSG_WAITALL) == b"a\nb\nc\n"
        assert first_peer.recv(100_000, socket.MSG_WAITALL) == bytes(100_000)


def test_who_has_the_descriptor_writes_in_order(impl: str) -> None:
    ours, theirs = tcp_pair()
    with running() as hub, theirs, ours:
        _backend.green().adopt(ours)
        theirs.sendall(b"one\ntwo\nthree\n")

        def handle() -> None:
            fd = ours.fileno()
            with ours.makefile("rb") as file:
                for _ in range(2):
                    ours.sendall(b"connection " + file.readline())
                    os.write(fd, b"descriptor\n")

        hub.start(handle)
        assert hub.drain(LIMIT)
        ours.close()
        assert read_all(theirs) == b"connection one\ndescriptor\nconnection two\ndescriptor\n"


def test_a_client_that_has_gone_is_told_when_the_replies_are_sent(impl: str) -> None:
    ours, theirs = tcp_pair()
    seen: list[Any] = []
    with running() as hub, ours:
        _backend.green().adopt(ours)
        theirs.sendall(b"one\ntwo\nthree\n")

        def handle() -> None:
            with ours.makefile("rb") as file:
                for _ in range(2):
                    line = file.readline()
                    if not seen:
                        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        theirs.close()
                        seen.append(line)
                    for _ in range(100):
                        found = attempt(ours.sendall, line * 1000)
                        if found is not None:
                            break
                    seen.append(found[0])

        hub.start(handle)
        assert hub.drain(LIMIT)
    assert seen[0] == b"one\n" and set(seen[1:]) <= {BrokenPipeError, ConnectionResetError} and len(seen) == 3


def test_a_task_that_ends_with_replies_unsent_sends_them(impl: str) -> None:
    ours, theirs = tcp_pair()
    with running() as hub, theirs, ours:
        _backend.green().adopt(ours)
        theirs.sendall(b"one\ntwo\n")
        file = ours.makefile("rb")

        def handle() -> None:
            ours.sendall(file.readline())
            raise greenlet.GreenletExit

        hub.start(handle)
        theirs.settimeout(LIMIT)
        assert theirs.recv(10) == b"one\n"
        file.close()
