"""All mix-ins at once, over each worker model, and the order in which they are named."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastserve
from support import LIMIT, in_time, serving, wait_until

pytest.importorskip("trustme")

from proxy_support import V1, V1_CLIENT  # noqa: E402
from test_prefork import ALL, Program, exchange, needs_greenlet, program  # noqa: E402
from tls_support import NAME, client_context, server_context, write_certificate  # noqa: E402

pytestmark = pytest.mark.once

# In the order of the page about deployment.
MIX_INS = ["ProxyProtocolMixIn", "TLSMixIn", "LimitsMixIn", "LoggingMixIn"]

PATIENT = {"slow_handler_seconds": 0}  # on a busy machine any handler may be slow

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what the processes are")


@contextlib.contextmanager
def everything(tmp_path: Path, impl: str, name: str, **options: Any) -> Iterator[Program]:
    """A program with all mix-ins over two processes."""
    cert, key = write_certificate(tmp_path)
    limits = {"max_connections": 50, "max_connections_per_client": 40, "request_timeout": LIMIT, "idle_timeout": LIMIT}
    own = {"tls_cert": str(cert), "tls_key": str(key), "log": str(tmp_path / "log.txt"), **PATIENT}
    with program(tmp_path, impl, name, mix_ins=MIX_INS, **{**own, **limits, **options}) as server:
        yield server


@contextlib.contextmanager
def client_of(address: Any) -> Iterator[ssl.SSLSocket]:
    """A client behind a proxy, with TLS."""
    with socket.create_connection(address, LIMIT) as plain:
        plain.sendall(V1)
        with client_context().wrap_socket(plain, server_hostname=NAME) as client:
            yield client


def ask(server: Program, line: str = "client") -> str:
    with client_of(server.address) as client:
        return exchange(client, line)


@on_linux
@pytest.mark.parametrize("name", ALL)
def test_a_request_is_served_with_everything_on(impl: str, name: str, tmp_path: Path) -> None:
    with everything(tmp_path, impl, name) as server:
        assert [ask(server) for _ in range(3)] == [str(V1_CLIENT)] * 3
        server.send(signal.SIGTERM)
        assert server.ended() == 0
        assert server.errors() == "" and "served" in server.lines and not server.workers()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("INFO 192.0.2.7:56324 ok ") for line in lines), lines


@on_linux
@pytest.mark.parametrize("name", ALL)
def test_workers_are_replaced_with_everything_on(impl: str, name: str, tmp_path: Path) -> None:
    with everything(tmp_path, impl, name) as server:
        old = server.workers()
        with client_of(server.address) as kept, kept.makefile("rb") as answers:
            for _ in range(2):
                kept.sendall(b"client\n")
                assert answers.readline() == f"{V1_CLIENT}\n".encode()
            server.send(signal.SIGHUP)
            wait_until(lambda: len(server.started()) == 4)
            kept.sendall(b"client\n")
            assert answers.readline() == f"{V1_CLIENT}\n".encode()
        wait_until(lambda: not set(old) & set(server.workers()))
        assert len(server.workers()) == 2 and ask(server) == str(V1_CLIENT)
        server.send(signal.SIGTERM)
        assert server.ended() == 0
        assert server.errors() == ""


@on_linux
@pytest.mark.parametrize("name", ALL)
def test_clients_have_their_limits_with_everything_on(impl: str, name: str, tmp_path: Path) -> None:
    with everything(tmp_path, impl, name, idle_timeout=0.5) as server:

        def idle_client() -> None:
            with client_of(server.address) as idle:
                assert exchange(idle, "client") == str(V1_CLIENT)
                with contextlib.suppress(ConnectionError):
                    assert idle.recv(1) == b""

        def busy_client() -> None:
            assert ask(server) == str(V1_CLIENT)

        in_time(idle_client, 0.5)
        in_time(busy_client, 0.5)
        server.send(signal.SIGTERM)
        assert server.ended() == 0
        assert server.errors() == ""


# The order


class Client(fastserve.StreamRequestHandler):
    """Answer a line with the client's address."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(str(self.client_address).encode())


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize(
    "name", ["ThreadingMixIn", "ThreadPoolMixIn", pytest.param("GreenletMixIn", marks=needs_greenlet)]
)
def test_in_one_process_every_order_before_the_server_serves(
    impl: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    context = server_context()
    records = Records()
    logger = logging.Logger("test", logging.DEBUG)
    logger.addHandler(records)
    orders = list(itertools.permutations(MIX_INS))
    for order in [order for mix_ins in orders for order in ((*mix_ins, name), (name, *mix_ins))]:
        bases = [getattr(fastserve, mix_in) for mix_in in order]
        attributes = {"ssl_context": context, "max_connections": 9, "idle_timeout": LIMIT, "logger": logger, **PATIENT}
        server = type("Server", (*bases, fastserve.TCPServer), attributes)(("127.0.0.1", 0), Client)
        with serving(server), client_of(server.server_address) as client:
            assert exchange(client, "hello") == str(V1_CLIENT), order
        client_is_told = order.index("ProxyProtocolMixIn") < order.index("LoggingMixIn")
        (line,) = records.lines
        assert line.startswith("192.0.2.7:56324 ok " if client_is_told else "127.0.0.1:"), order
        records.lines.clear()
    assert capsys.readouterr().err == ""


class Raises(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        raise ValueError(self.rfile.readline())


@pytest.mark.parametrize(
    ("order", "errors"),
    [
        (["StatsMixIn", *MIX_INS, "DrainMixIn"], 1),  # of the page about deployment
        (["DrainMixIn", "StatsMixIn", *MIX_INS], 1),
        (["ProxyProtocolMixIn", "TLSMixIn", "LoggingMixIn", "StatsMixIn", "LimitsMixIn", "DrainMixIn"], 0),
    ],
)
def test_what_is_logged_before_it_is_counted_is_no_counted_error(impl: str, order: list[str], errors: int) -> None:
    records = Records()
    logger = logging.Logger("test", logging.ERROR)
    logger.addHandler(records)
    bases = [getattr(fastserve, mix_in) for mix_in in order]
    attributes = {"ssl_context": server_context(), "max_connections_per_client": 9, "logger": logger}
    server = type("Server", (*bases, fastserve.ThreadingTCPServer), attributes)(("127.0.0.1", 0), Raises)
    with serving(server):
        with client_of(server.server_address) as client, contextlib.suppress(OSError):
            client.sendall(b"hello\n")
            assert client.recv(1) == b""
        with socket.create_connection(server.server_address, LIMIT) as client:
            client.sendall(b"no header\r\n")
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        assert server.drain(LIMIT) == 0
    assert records.lines == ["request of 192.0.2.7:56324"]
    stats = server.stats()
    assert (stats.accepted, stats.handled, stats.refused["proxy_header"], stats.errors) == (2, 1, 1, errors)


OURS = [*MIX_INS, "ThreadPoolMixIn", "GreenletMixIn", *(["PreforkMixIn"] if hasattr(os, "fork") else [])]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("base", [fastserve.TCPServer, socketserver.UDPServer])
def test_a_mix_in_after_the_server_is_an_error(name: str, base: Any) -> None:
    mix_in = getattr(fastserve, name)
    with pytest.raises(TypeError, match=f"^Server: name {name} before the server"):
        type("Server", (base, mix_in), {})
    derived = type("Derived", (mix_in,), {})
    with pytest.raises(TypeError, match=f"^Server: name {name} before the server"):
        type("Server", (base, derived), {})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@needs_greenlet
def test_greenlets_before_processes_are_an_error(impl: str) -> None:
    class Server(fastserve.GreenletMixIn, fastserve.PreforkMixIn, fastserve.TCPServer):
        pass

    threads = threading.active_count()
    with Server(("127.0.0.1", 0), Client) as server:
        with pytest.raises(RuntimeError, match="name PreforkMixIn before GreenletMixIn"):
            server.serve_forever()
        with pytest.raises(RuntimeError, match="name PreforkMixIn before GreenletMixIn"):
            server.serve_forever()
        server.shutdown()
    assert threading.active_count() == threads
