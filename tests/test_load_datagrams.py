"""Datagrams of the load generator: each of its figures is true of servers whose behaviour is known."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from load_support import (
    answering,
    ping,
)
from support import open_descriptors, wait_until

pytestmark = pytest.mark.alone


def test_datagrams_are_those_that_the_server_answered() -> None:
    before = open_descriptors()
    with answering(lambda number, data: [data]) as server:
        result = ping(server, sockets=3, window=8)
    assert result["errors"] == 0
    assert 0 < result["requests"] <= server.requests <= result["requests"] + 3 * 8
    assert len({host for host, _ in server.sources}) == 3
    assert result["p50_us"] <= result["p90_us"] <= result["p99_us"] <= result["max_us"]
    assert json.loads(json.dumps(result)) == result
    assert open_descriptors() == before


@pytest.mark.parametrize("answer", [b"pong", b"pin", b"pings"])
def test_wrong_datagrams_are_counted(answer: bytes) -> None:
    with answering(lambda number, data: [answer if number % 5 == 0 else data]) as server:
        result = ping(server)
    assert result["errors"] == result["wrong"]
    assert abs(result["wrong"] - result["requests"] / 5) <= 1 and result["requests"] > 5


def test_datagrams_that_the_server_drops_are_lost() -> None:
    with answering(lambda number, data: [] if number % 10 == 0 else [data]) as server:
        result = ping(server, window=4, seconds=1.0)
    assert result["errors"] == result["lost"]
    assert result["lost"] == server.requests // 10 > 0


def test_no_datagram_is_lost_that_a_slow_server_answers() -> None:
    # It takes longer than it takes the generator to wonder.
    with answering(lambda number, data: [data] if time.sleep(0.4) is None else []) as server:
        result = ping(server, seconds=1.0)
    assert 1 <= result["requests"] <= 3
    assert result["errors"] == 0
    assert result["max_us"] >= 400_000


def test_a_server_that_stops_for_a_while_loses_nothing() -> None:
    def answer(number: int, data: bytes) -> list[bytes]:
        if number == 50:
            time.sleep(0.5)
        return [data]

    with answering(answer) as server:
        result = ping(server, sockets=2, window=8, seconds=1.0)
    assert server.requests > 50
    assert result["errors"] == 0
    assert server.requests - result["requests"] <= 2 * 8 + 2
    assert result["max_us"] >= 500_000


def test_a_server_that_never_answers_stalls_every_socket_and_loses_nothing() -> None:
    with answering(lambda number, data: []) as server:
        result = ping(server, sockets=2, window=4)
    assert result["requests"] == 0
    assert result["stalled"] == result["errors"] == 2
    assert server.requests <= 2 * 4 + 2, "the window, and a probe for each socket"
    assert result["generator_cpu"] < 0.3


def test_datagrams_to_nobody_are_refused_and_not_hammered() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        address = closed.getsockname()
    result = ping(address, sockets=2, window=4, seconds=0.4)
    assert result["requests"] == 0
    assert result["refused"] == result["errors"]
    assert 2 * 4 <= result["refused"] <= 2 * 5 * (0.4 / 0.05 + 1)
    assert result["generator_cpu"] < 0.3


def test_answers_to_nothing_are_wrong() -> None:
    with answering(lambda number, data: [data, data]) as server:
        result = ping(server)
    assert result["wrong"] == result["errors"] > 0


def test_a_stopped_process_that_goes_on_between_two_runs_is_no_loss() -> None:
    code = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))\n"
        "print(s.getsockname()[1], flush=True)\n"
        "while True: s.sendto(*s.recvfrom(2048))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            address = ("127.0.0.1", int(process.stdout.readline()))
            for _ in range(3):
                result = ping(address, sockets=2, window=16)
                assert result["requests"] > 0 and result["errors"] == 0
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
                process.send_signal(signal.SIGCONT)
        finally:
            process.kill()


def dropped(receiver: socket.socket) -> int:
    """Return how many datagrams the kernel has dropped because the buffer of a socket was full."""
    so_meminfo, drops = 55, 8  # of Linux's asm-generic/socket.h and sock_diag.h
    figures = receiver.getsockopt(socket.SOL_SOCKET, so_meminfo, 36)
    return int(struct.unpack("9I", figures)[drops])


def test_what_the_kernel_drops_is_what_is_lost() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        seen = 0

        def serve() -> None:
            nonlocal seen
            wait_until(lambda: dropped(server))  # the window has overflown the buffer
            while (received := server.recvfrom(100))[0] != b"end":
                seen += 1
                server.sendto(*received)

        thread = threading.Thread(target=serve)
        thread.start()
        result = ping(server.getsockname(), window=64, seconds=1.2)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"end", server.getsockname())
        thread.join(60)
        assert not thread.is_alive()
    assert result["lost"] == result["errors"] > 0
    assert result["requests"] > 0 and seen >= result["requests"]
