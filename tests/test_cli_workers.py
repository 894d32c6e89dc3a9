"""``fastserve serve --workers``: a server of several processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from cli_support import address_of, connect, started
from support import wait_until

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what the processes are"),
]


def children_of(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def answers(address: object) -> bytes:
    with connect(address) as client:
        client.sendall(b"hello\n")
        return client.recv(100)


@pytest.mark.parametrize("worker", ["sync", "threads", "threadpool", "fork"])
def test_processes_serve_and_sigterm_ends_them(here: Path, worker: str) -> None:
    arguments = ["handlers:Lines", "--bind", "127.0.0.1:0", "--worker", worker, "--workers", "2"]
    with started("serve", *arguments) as server:
        address = address_of(server)
        wait_until(lambda: len(children_of(server.pid)) == 2)
        first = children_of(server.pid)
        assert answers(address)
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: len(children_of(server.pid)) == 2 and not children_of(server.pid) & first)
        assert answers(address)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert server.stderr is not None and server.stderr.read() == ""


def test_sigint_ends_all_at_once_and_the_file_of_a_unix_socket_is_removed(here: Path) -> None:
    arguments = ["handlers:Lines", "--bind", "unix:socket", "--workers", "2"]
    with started("serve", *arguments) as server:
        address = address_of(server)
        wait_until(lambda: len(children_of(server.pid)) == 2)
        assert answers(address)
        with connect(address) as client:
            client.sendall(b"hello\n")
            assert client.recv(100)
            os.kill(next(iter(children_of(server.pid))), signal.SIGKILL)
            wait_until(lambda: len(children_of(server.pid)) == 2)
            assert (here / "socket").exists()
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
        assert not (here / "socket").exists()


def test_grace_is_how_long_requests_may_take(here: Path) -> None:
    arguments = ["handlers:Lines", "--bind", "127.0.0.1:0", "--workers", "1", "--grace", "1"]
    with started("serve", *arguments) as server, contextlib.closing(connect(address_of(server))) as client:
        client.sendall(b"hello\n")
        assert client.recv(100)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert server.stderr is not None and "has not ended in time, and is killed" in server.stderr.read()


def test_limits_are_those_of_the_options(here: Path) -> None:
    options = ["--max-connections-per-client", "1", "--idle-timeout", "1", "--request-timeout", "30"]
    with started("serve", "handlers:Lines", "--bind", "127.0.0.1:0", *options) as server:
        address = address_of(server)
        with connect(address) as first, connect(address) as second:
            assert second.recv(1) == b""  # refused
            assert first.recv(1) == b""  # idle for too long


def test_log_level_tells_of_requests(here: Path) -> None:
    with started("serve", "handlers:Lines", "--bind", "127.0.0.1:0", "--workers", "1", "--log-level", "info") as server:
        assert answers(address_of(server))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert server.stderr is not None
        (line,) = server.stderr.read().splitlines()
        assert re.fullmatch(r"[-0-9]+ [0-9:,]+ \d+ INFO 127\.0\.0\.1:\d+ ok \d+\.\d{6} s", line)
