"""Clients that take what others need: slow ones, idle ones, those that do not complete their handshake."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

import fastserve
from fastserve import limits
from support import LIMIT, in_time, open_descriptors, serving, talk, wait_until

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("deadlines_end_soon")]

SLOW, IDLE = 60, 60  # clients
MODELS = ["ThreadingTCPServer", "ThreadPoolTCPServer"]
if importlib.util.find_spec("greenlet") is not None:
    MODELS.append("GreenletTCPServer")


class Lines(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


def make(name: str, *mix_ins: type, **attributes: Any) -> Any:
    # On a busy machine any handler may be slow.
    attributes = {"request_queue_size": 512, "max_workers": SLOW + IDLE + 10, "slow_handler_seconds": 0, **attributes}
    bases = (*(mix_ins or (fastserve.LimitsMixIn,)), getattr(fastserve, name))
    return type("Server", bases, attributes)(("127.0.0.1", 0), Lines)


def ask_for_a_line(server: Any, limit: float, asked: list[float]) -> None:
    """Have a line answered; note in ``asked`` how long it has taken, and each request that was cut off before."""

    def ask() -> None:
        begun = time.monotonic()
        try:
            assert talk(server.server_address, b"line\n") == b"LINE\n"
        finally:
            asked.append(time.monotonic() - begun)

    in_time(ask, limit)


class Crowd(threading.Thread):
    """Clients that send a byte now and then of a line without an end, and others that send nothing.

    ``cuts`` has for each one that was cut the seconds since it came.
    """

    def __init__(self, address: Any, slow: int, idle: int, host: str = "127.0.0.1") -> None:
        super().__init__(name="crowd")
        self.cuts: list[float] = []
        self._enough = False
        self._clients: dict[socket.socket, tuple[float, bool]] = {}
        for place in range(slow + idle):
            client = socket.socket()
            client.bind((host, 0))
            began = time.monotonic()
            client.connect(address)
            self._clients[client] = began, place < slow

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for client in self._clients:
                selector.register(client, selectors.EVENT_READ)
            while not self._enough:
                for key, _ in selector.select(0.05):
                    client = cast(socket.socket, key.fileobj)
                    selector.unregister(client)
                    began, _ = self._clients.pop(client)
                    self.cuts.append(time.monotonic() - began)
                    client.close()
                for client, (_, is_slow) in self._clients.items():
                    if is_slow:
                        with contextlib.suppress(ConnectionError):  # it is cut, as will be seen next
                            client.send(b"x")

    def __enter__(self) -> Crowd:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._enough = True
        self.join()
        for client in self._clients:
            client.close()


@pytest.mark.parametrize("name", MODELS)
def test_slow_and_idle_clients_are_cut_when_their_request_has_taken_its_time(
    impl: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_descriptors()
    asked: list[float] = []
    with make(name, request_timeout=1.0) as server, serving(server):
        with Crowd(server.server_address, SLOW, IDLE) as crowd:
            for _ in range(20):
                ask_for_a_line(server, 1.0, asked)
            wait_until(lambda: len(crowd.cuts) == SLOW + IDLE)
        assert min(crowd.cuts) >= 1.0
        assert max(crowd.cuts) < LIMIT / 2
        wait_until(lambda: server.overdue_requests >= SLOW + IDLE)
        ask_for_a_line(server, 1.0, asked)
        # Beside them, only what has taken as long may have been cut.
        assert server.overdue_requests <= SLOW + IDLE + sum(seconds >= 1.0 for seconds in asked)
    assert open_descriptors() == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", MODELS)
def test_idle_clients_are_cut_when_they_have_been_idle(
    impl: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with make(name, idle_timeout=1.0) as server, serving(server):
        with Crowd(server.server_address, 0, IDLE) as crowd:
            for _ in range(20):
                ask_for_a_line(server, 1.0, [])
            wait_until(lambda: len(crowd.cuts) == IDLE)
        assert min(crowd.cuts) >= 1.0
        assert max(crowd.cuts) < LIMIT / 2
        assert server.overdue_requests == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_only_what_the_cut_itself_has_caused_is_not_reported(
    impl: str, error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def handle(request: Any, client_address: Any, server: Any) -> None:
        request.recv(1)
        raise error("something else")

    with make("ThreadingTCPServer", request_timeout=0.05) as server:
        server.RequestHandlerClass = handle
        with serving(server), socket.create_connection(server.server_address) as client:
            assert client.recv(1) == b""
    wait_until(lambda: server.overdue_requests == 1)
    assert f"{error.__name__}: something else" in capsys.readouterr().err


def test_a_connection_that_breaks_in_time_is_reported(impl: str, capsys: pytest.CaptureFixture[str]) -> None:
    def handle(request: Any, client_address: Any, server: Any) -> None:
        raise ConnectionResetError("by the client")

    with make("ThreadingTCPServer", request_timeout=LIMIT) as server:
        server.RequestHandlerClass = handle
        with serving(server), socket.create_connection(server.server_address) as client:
            assert client.recv(1) == b""
    assert server.overdue_requests == 0
    assert "by the client" in capsys.readouterr().err


def test_one_address_does_not_have_all_threads_of_a_pool(impl: str) -> None:
    with (
        make("ThreadPoolTCPServer", max_workers=4, max_connections_per_client=2) as server,
        serving(server),
        Crowd(server.server_address, SLOW, IDLE, "127.0.0.2") as crowd,
    ):
        for _ in range(20):
            assert talk(server.server_address, b"line\n") == b"LINE\n"
            # A connection counts until the server has closed it, a moment after the client has seen its end.
            wait_until(lambda: "127.0.0.1" not in limits._limits_of(server)._counts)
        wait_until(lambda: len(crowd.cuts) == SLOW + IDLE - 2)
        assert server.refused_connections == SLOW + IDLE - 2


@pytest.mark.parametrize("limit", ["request_timeout", "idle_timeout"])
def test_a_client_of_a_pool_waits_for_those_that_came_first_and_they_for_their_limit(impl: str, limit: str) -> None:
    """What the pages say of it: 12 clients that do nothing have 4 threads, for three times as long as each may."""
    begun = time.monotonic()
    with (
        make("ThreadPoolTCPServer", max_workers=4, max_queued=2, **{limit: 0.2}) as server,
        serving(server),
        Crowd(server.server_address, 0, 12) as crowd,
    ):
        ask_for_a_line(server, 0.2, [])
        assert 0.6 <= time.monotonic() - begun < LIMIT / 2
        wait_until(lambda: len(crowd.cuts) == 12)


def test_a_new_thread_of_a_pool_costs_the_same_whatever_their_number(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    is_alive = threading.Thread.is_alive

    def counted(thread: threading.Thread) -> bool:
        nonlocal looks
        looks += 1
        return is_alive(thread)

    with make("ThreadPoolTCPServer", max_workers=300) as server, serving(server):
        with contextlib.ExitStack() as stack, monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "is_alive", counted)
            clients = [stack.enter_context(socket.create_connection(server.server_address)) for _ in range(300)]
            clients[-1].sendall(b"last\n")
            assert clients[-1].recv(10) == b"LAST\n"
        assert len(server._fastserve_pool._threads) == 300
    assert looks < 900


# Handshakes


PIECE = bytes.fromhex("16030102000100")  # the beginning of a ClientHello: RFC 8446, 4.1.2 and 5.1


@contextlib.contextmanager
def silent(server: Any, count: int) -> Iterator[None]:
    """Clients that do not complete their handshake."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(server.server_address)) for _ in range(count)]
        for client in clients[::2]:
            client.sendall(PIECE)
        try:
            yield
        finally:
            for client in clients:
                # A child that was forked meanwhile may hold it too.
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("name", [*MODELS, *(["ForkingTCPServer"] if hasattr(os, "fork") else [])])
def test_clients_that_do_not_complete_their_handshake_hold_up_nobody(impl: str, name: str) -> None:
    pytest.importorskip("trustme")
    from tls_support import ask, server_context

    with (
        make(name, fastserve.TLSMixIn, ssl_context=server_context(), handshake_timeout=None) as server,
        serving(server),
        silent(server, 30),
    ):
        assert [ask(server) for _ in range(5)] == [b"HELLO\n"] * 5


@pytest.mark.parametrize("name", ["TCPServer", "ThreadPoolTCPServer"])
def test_where_nobody_else_is_left_to_serve_a_handshake_takes_its_time_at_most(impl: str, name: str) -> None:
    """A server without worker model serves one client at a time, and a pool as many as it has threads."""
    pytest.importorskip("trustme")
    from tls_support import ask, server_context

    limits = {"handshake_timeout": 0.3, "max_workers": 1}
    with make(name, fastserve.TLSMixIn, ssl_context=server_context(), **limits) as server, serving(server):
        begun = time.monotonic()
        with silent(server, 2):
            assert in_time(lambda: ask(server), 0.3) == b"HELLO\n"
        assert 0.3 <= time.monotonic() - begun < LIMIT / 2
