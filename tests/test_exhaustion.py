"""More clients than there are descriptors, for each worker model and with worker processes."""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from support import LIMIT, wait_until
from test_prefork import Program, program

CLIENTS = 500
DESCRIPTORS = 64  # of the process that serves
MODELS = ["ThreadingTCPServer", "ThreadPoolTCPServer"]
if importlib.util.find_spec("greenlet") is not None:
    MODELS.append("GreenletTCPServer")

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and limits another process"),
]


def processor_seconds(pid: int) -> float:
    """Return what all threads of a process have used so far: clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def assert_rests(pid: int) -> None:
    """Assert that a process uses hardly any processor time; 2% of a processor is what it may use, and noise."""
    time.sleep(0.3)  # what could be accepted has been

    def rests() -> bool:
        before, begun = processor_seconds(pid), time.monotonic()
        time.sleep(1.0)
        return processor_seconds(pid) - before < 0.05 * (time.monotonic() - begun)

    wait_until(rests)  # on a busy machine it may still handle what it has accepted: one that spins never rests


def assert_told_once(server: Program, begun: float) -> None:
    """Assert that the want of descriptors was told once; it is again when there was none for 5 seconds."""
    assert 1 <= server.errors().count("cannot accept") <= 1 + (time.monotonic() - begun) / 5


@contextlib.contextmanager
def crowd(server: Program, count: int, line: bytes) -> Iterator[selectors.BaseSelector]:
    """Connect clients, each of which has asked for something and waits for its answer."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(count):
            client = stack.enter_context(server.connect())
            client.sendall(line)
            selector.register(client, selectors.EVENT_READ)
        yield selector


def answers(selector: selectors.BaseSelector) -> list[bytes]:
    """Return the answers to all clients, each of which ends its connection when it has its own."""
    found: list[bytes] = []
    deadline = time.monotonic() + LIMIT
    while selector.get_map():
        assert time.monotonic() < deadline, f"{len(found)} were served"
        for key, _ in selector.select(1.0):
            client = cast(socket.socket, key.fileobj)
            found.append(client.recv(100))
            selector.unregister(client)
            client.close()
    return found


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_server_rests_while_it_has_no_descriptors_and_serves_all_in_the_end(
    impl: str, name: str, workers: int, tmp_path: Path
) -> None:
    with program(tmp_path, impl, name, workers=workers, max_workers=100) as server:
        pid = server.workers()[0] if workers else server.process.pid
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        begun = time.monotonic()
        with crowd(server, CLIENTS, b"pid\n") as selector:
            wait_until(lambda: "cannot accept" in server.errors())
            assert_rests(pid)
            assert answers(selector) == [b"%d\n" % pid] * CLIENTS
        assert_told_once(server, begun)
        server.send(signal.SIGTERM)
        server.ended()


def children_of(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(len((task / "children").read_text().split()) for task in tasks)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("most", [40, 100])
def test_a_forking_server_without_descriptors_for_its_children_rests_and_serves_all(
    impl: str, most: int, workers: int, tmp_path: Path
) -> None:
    """It has a descriptor for each child, and one more for each while it waits for one of them to end."""
    with program(tmp_path, impl, "ForkingTCPServer", workers=workers, max_children=most) as server:
        pid = server.workers()[0] if workers else server.process.pid
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        with crowd(server, 2 * most, b"client\n") as selector:
            wait_until(lambda: children_of(pid) == most)
            assert_rests(pid)
            assert children_of(pid) == most
            assert all(answer.startswith(b"('127.0.0.1', ") for answer in answers(selector))
        wait_until(lambda: children_of(pid) == 0)
        server.send(signal.SIGTERM)
        server.ended()
        assert server.errors() == ""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["TCPServer", "ForkingTCPServer", *MODELS])
def test_a_server_that_may_open_nothing_rests_and_serves_all_when_it_may(
    impl: str, name: str, workers: int, tmp_path: Path
) -> None:
    with program(tmp_path, impl, name, workers=workers) as server:
        pid = server.workers()[0] if workers else server.process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        assert server.ask("client")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        begun = time.monotonic()
        with crowd(server, 100, b"client\n") as selector:
            wait_until(lambda: "cannot accept" in server.errors())
            assert_rests(pid)
            assert not selector.select(0)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
            assert all(answer.startswith(b"('127.0.0.1', ") for answer in answers(selector))
        assert_told_once(server, begun)
        server.send(signal.SIGTERM)
        server.ended()
