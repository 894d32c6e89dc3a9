"""``fastserve serve``: the limits that are on unless they are switched off, under each worker model."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import ssl
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli_support import (
    NEEDS_GREENLET,
    WORKERS,
    address_of,
    assert_refused,
    cli,
    connect,
    exchange,
    started,
    stop,
)
from support import in_time
from tls_support import client_context, write_certificate

pytestmark = pytest.mark.once

STREAM_WORKERS = [worker for worker in WORKERS if worker != "sync"]  # those that take a second connection meanwhile

HANDLERS = """
import fastserve, json, socket

NAMES = "max_connections max_connections_per_client request_timeout idle_timeout max_line max_children".split()
TCP = "TCP_NODELAY TCP_KEEPIDLE TCP_KEEPINTVL TCP_KEEPCNT".split()

class Show(fastserve.StreamRequestHandler):
    def handle(self):
        shown = {name: getattr(self.server, name, None) for name in NAMES}
        shown["timeout"] = self.request.gettimeout()
        shown["keepalive"] = self.request.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if self.request.family == socket.AF_INET:
            shown |= {name: self.request.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in TCP}
        shown["backlog"] = self.server.request_queue_size
        self.wfile.write(json.dumps(shown).encode())

class Queue(fastserve.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32))
"""


@pytest.fixture
def shown(here: Path) -> Path:
    (here / "limits.py").write_text(HANDLERS)
    return here


def serve(handler: str, *options: str) -> Any:
    """Return a running server; later options take the place of earlier ones."""
    return started("serve", handler, "--bind", "127.0.0.1:0", *options)


def all_of(address: str) -> bytes:
    answer = b""
    with connect(address) as client:
        while data := client.recv(65536):
            answer += data
    return answer


def settings(server: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(all_of(address_of(server)))
    return found


ALL_OFF = [
    *("--max-connections=off", "--max-connections-per-client=off", "--request-timeout=0"),
    *("--idle-timeout=0", "--max-line=off", "--no-keepalive", "--no-nodelay"),
]
OF_ALL = {"max_connections_per_client": None, "request_timeout": None, "idle_timeout": 300, "max_line": 65536}
OF_MODEL = {
    "sync": {"max_connections": None, "max_children": None},
    "threads": {"max_connections": 1000, "max_children": None},
    "threadpool": {"max_connections": 1000, "max_children": None},
    "greenlet": {"max_connections": 10000, "max_children": None},
    "fork": {"max_connections": None, "max_children": 40},
}
OF_TCP = {"keepalive": 1, "TCP_NODELAY": 1, "TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


@pytest.fixture
def _many_descriptors() -> Any:
    """Have the programs that a test starts be allowed as many descriptors as any of the limits asks for."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] not in (resource.RLIM_INFINITY,) and before[1] < 20000:
        pytest.skip("the hard limit of descriptors is too low here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (20000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the options of TCP are those of Linux")
@pytest.mark.usefixtures("_many_descriptors")
@pytest.mark.parametrize("worker", WORKERS)
def test_limits_are_on(shown: Path, worker: str) -> None:
    with serve("limits:Show", "--worker", worker) as server:
        found = settings(server)
        assert found == {**OF_ALL, **OF_MODEL[worker], **OF_TCP, "timeout": 300, "backlog": socket.SOMAXCONN}
        stop(server)


@pytest.mark.skipif(sys.platform != "linux", reason="the options of TCP are those of Linux")
@pytest.mark.parametrize("worker", WORKERS)
def test_each_can_be_switched_off(shown: Path, worker: str) -> None:
    with serve("limits:Show", "--worker", worker, *ALL_OFF) as server:
        found = settings(server)
        assert (found["keepalive"], found["TCP_NODELAY"], found["timeout"]) == (0, 0, None)
        assert [found[name] for name in (*OF_ALL, "max_connections")] == [None] * 5
        if worker == "fork":
            assert found["max_children"] > 1_000_000
        stop(server)


@pytest.mark.parametrize("worker", WORKERS)
def test_each_can_be_set(shown: Path, worker: str) -> None:
    options = ["--max-connections=7", "--max-connections-per-client=6", "--request-timeout=50", "--idle-timeout=40"]
    with serve("limits:Show", "--worker", worker, *options, "--max-line=3", "--backlog=2") as server:
        found = settings(server)
        expected = {"max_connections_per_client": 6, "request_timeout": 50, "idle_timeout": 40, "max_line": 3}
        assert {name: found[name] for name in expected} == expected and (found["timeout"], found["backlog"]) == (40, 2)
        assert found["max_connections"] == (None if worker in ("sync", "fork") else 7)
        assert found["max_children"] == (7 if worker == "fork" else None)
        stop(server)


def test_few_descriptors_mean_few_connections(shown: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        server = serve("limits:Show")
        with server as running:
            assert settings(running)["max_connections"] == 300
        with serve("limits:Show", "--max-connections", "1000") as running:
            assert settings(running)["max_connections"] == 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="tcp(7) of Linux tells the backlog of a listener")
@pytest.mark.parametrize(("options", "asked"), [([], socket.SOMAXCONN), (["--backlog", "7"], 7)])
def test_the_kernel_has_the_backlog(shown: Path, options: list[str], asked: int) -> None:
    with serve("limits:Queue", *options) as server:
        (most,) = struct.unpack_from("I", all_of(address_of(server)), 28)  # tcpi_sacked, of a listener
        assert most == min(asked, int(Path("/proc/sys/net/core/somaxconn").read_text()))


@pytest.mark.parametrize("worker", STREAM_WORKERS)
@pytest.mark.parametrize("how", ["plain", "workers", "tls"])
def test_connections_beyond_the_limit_wait(here: Path, worker: str, how: str) -> None:
    options = ["--worker", worker, "--max-connections", "1"]
    if how == "workers":
        options += ["--workers", "1"]
    context = None
    if how == "tls":
        cert, key = write_certificate(here)
        options += ["--tls-cert", str(cert), "--tls-key", str(key)]
        context = client_context()

    def client_of(address: str) -> socket.socket:
        plain = connect(address)
        return plain if context is None else context.wrap_socket(plain, server_hostname="127.0.0.1")

    with serve("handlers:Lines", *options) as server, contextlib.ExitStack() as stack:
        address = line_of(server)
        first = stack.enter_context(client_of(address))
        assert exchange(first, b"a\n") == b"A\n"
        second = stack.enter_context(connect(address))
        second.settimeout(0.2)
        if context is None:
            second.sendall(b"b\n")
        else:
            second = stack.enter_context(
                context.wrap_socket(second, server_hostname="127.0.0.1", do_handshake_on_connect=False)
            )
        with pytest.raises(TimeoutError):
            second.recv(100) if context is None else second.do_handshake()  # type: ignore[attr-defined]
        first.close()
        if context is None:
            second.settimeout(60)
            assert second.recv(100) == b"B\n"


def line_of(server: Any) -> str:
    """Return the address in the first line, whatever else it says."""
    line: str = server.stdout.readline()
    return line.split(" on ")[1].split(" ")[0]


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("how", ["plain", "workers", "tls", "unix"])
def test_idle_clients_and_endless_lines_are_ended(here: Path, worker: str, how: str) -> None:
    options = ["--worker", worker, "--idle-timeout", "1", "--max-line", "100"]
    if how == "workers":
        options += ["--workers", "2"]
    if how == "unix":
        options += ["--bind", "unix:socket"]
    context = None
    if how == "tls":
        cert, key = write_certificate(here)
        options += ["--tls-cert", str(cert), "--tls-key", str(key)]
        context = client_context()
    with serve("handlers:Lines", *options) as server:
        address = line_of(server)
        lines = 0

        def idle_client() -> None:
            with contextlib.ExitStack() as stack:
                client = stack.enter_context(connect(address))
                if context is not None:
                    client = stack.enter_context(context.wrap_socket(client, server_hostname="127.0.0.1"))
                assert exchange(client, b"a\n") == b"A\n"
                assert client.recv(100) == b""  # idle for too long

        def endless_line() -> None:
            nonlocal lines
            lines += 1
            begun = time.monotonic()
            with contextlib.ExitStack() as stack:
                client = stack.enter_context(connect(address))
                if context is not None:
                    client = stack.enter_context(context.wrap_socket(client, server_hostname="127.0.0.1"))
                client.sendall(b"a" * 101)
                with contextlib.suppress(ConnectionResetError, ssl.SSLError):  # what it has sent need not be read
                    assert client.recv(100) == b""
            assert time.monotonic() - begun < 1  # or else it was idle for too long too

        in_time(idle_client, 1)
        in_time(endless_line, 1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        shown = server.stderr.read()
        assert 1 <= shown.count("LineTooLong: a line is longer than 100 bytes") <= lines and "Timeout" not in shown


@pytest.mark.parametrize("worker", WORKERS)
def test_datagrams_have_none_of_them_and_are_served(here: Path, worker: str) -> None:
    with serve("handlers:Packets", "--udp", "--worker", worker) as server:
        with connect(line_of(server), socket.SOCK_DGRAM) as client:
            assert exchange(client, b"a") == b"A"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--udp --max-connections 5", "--max-connections is not for --udp"),
        ("--udp --idle-timeout off", "--idle-timeout is not for --udp"),
        ("--udp --max-line 5", "--max-line is not for --udp"),
        ("--udp --backlog 5", "--backlog is for connections: not with --udp"),
        ("--udp --no-nodelay", "--keepalive and --nodelay are for TCP"),
        ("--bind unix:socket --keepalive", "--keepalive and --nodelay are for TCP"),
        ("--max-line many", "'many' is not a whole number from 1 to 2147483647, nor off"),
        ("--idle-timeout -1", "--idle-timeout"),
        ("--max-line 1.5", "'1.5' is not a whole number from 1 to 2147483647, nor off"),
        ("--backlog off", "'off' is not a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(here: Path, options: str, said: str) -> None:
    assert_refused(cli("serve", "handlers:Lines", *options.split()), "fastserve serve", said)


@NEEDS_GREENLET
def test_datagrams_in_greenlets_have_a_limit_if_they_are_given_one(here: Path) -> None:
    with serve("handlers:Packets", "--udp", "--worker", "greenlet", "--max-connections", "2") as server:
        with connect(line_of(server), socket.SOCK_DGRAM) as client:
            assert exchange(client, b"a") == b"A"
