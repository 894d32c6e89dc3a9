"""What clients may take, where a server limits it."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import os
import socket
import threading
import time
from typing import Any

import pytest

import fastserve
from fastserve import limits
from support import LIMIT, noting_reports, open_descriptors, serving, talk, wait_until

MODELS = ["ThreadingTCPServer", "ThreadPoolTCPServer"]
if importlib.util.find_spec("greenlet") is not None:
    MODELS.append("GreenletTCPServer")
ALL = ["TCPServer", *MODELS]


pytestmark = pytest.mark.usefixtures("deadlines_end_soon")


def answered(server: Any) -> bool:
    try:
        return talk(server.server_address, b"line\n") == b"!line\n"
    except OSError:  # reset, or no longer connected
        return False


class Handler(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"!")
        for line in self.rfile:
            self.wfile.write(line)


def make(name: str, **attributes: Any) -> Any:
    base = getattr(fastserve, name)
    attributes = {"request_queue_size": 64, "max_workers": 50, **attributes}
    return noting_reports(type("Server", (fastserve.LimitsMixIn, base), attributes)(("127.0.0.1", 0), Handler))


def connect(server: Any, host: str = "127.0.0.1") -> socket.socket:
    client = socket.socket()
    client.settimeout(LIMIT)
    client.bind((host, 0))
    client.connect(server.server_address)
    return client


@pytest.mark.parametrize("name", MODELS)
def test_no_more_connections_are_taken_than_allowed_and_those_that_wait_come_later(impl: str, name: str) -> None:
    with make(name, max_connections=2) as server, serving(server), contextlib.ExitStack() as stack:
        first, second, third, fourth = (stack.enter_context(connect(server)) for _ in range(4))
        assert first.recv(1) == second.recv(1) == b"!"
        third.settimeout(0.2)
        with pytest.raises(TimeoutError):
            third.recv(1)
        third.settimeout(LIMIT)
        first.close()
        assert third.recv(1) == b"!"
        second.close()
        assert fourth.recv(1) == b"!"
        third.close()
        fourth.close()
        assert [talk(server.server_address, b"line\n") for _ in range(10)] == [b"!line\n"] * 10


@pytest.mark.parametrize("name", ["max_connections", "max_connections_per_client", "request_timeout", "idle_timeout"])
def test_a_wrong_limit_is_an_error(name: str) -> None:
    before = open_descriptors()
    with pytest.raises(ValueError, match=f"{name} must be greater than 0"):
        make("ThreadingTCPServer", **{name: 0})
    assert open_descriptors() == before


@pytest.mark.parametrize("name", MODELS)
def test_a_client_has_its_number_of_connections_and_others_theirs(impl: str, name: str) -> None:
    with make(name, max_connections_per_client=2) as server, serving(server), contextlib.ExitStack() as stack:
        mine = [stack.enter_context(connect(server)) for _ in range(2)]
        assert [client.recv(1) for client in mine] == [b"!", b"!"]
        with connect(server) as refused:
            assert refused.recv(1) == b""
        assert server.refused_connections == 1
        theirs = stack.enter_context(connect(server, "127.0.0.2"))
        assert theirs.recv(1) == b"!"
        mine[0].close()
        wait_until(lambda: answered(server))
        assert not server.reports


@pytest.mark.parametrize("name", ALL)
def test_a_request_ends_at_its_deadline(impl: str, name: str) -> None:
    before = open_descriptors()
    with make(name, request_timeout=0.3) as server, serving(server):
        with connect(server) as client:
            received = b""
            begun = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while data := client.recv(100):  # a byte now and then is no help
                    received += data
                    client.sendall(b"x\n")
                    time.sleep(0.01)
            assert time.monotonic() - begun < LIMIT / 2
        assert received[:1] in (b"!", b"")  # on a busy machine it may be over before the handler has come to write
        wait_until(lambda: server.overdue_requests == 1)
        server.request_timeout = LIMIT
        assert talk(server.server_address, b"line\n") == b"!line\n"
    assert open_descriptors() == before
    wait_until(lambda: server.overdue_requests == 1)


@pytest.mark.parametrize("name", ALL)
def test_a_request_that_ends_in_time_is_left_alone(impl: str, name: str) -> None:
    with make(name, request_timeout=0.2) as server, serving(server):
        late = 0
        for _ in range(5):
            begun = time.monotonic()
            is_answered = answered(server)
            if time.monotonic() - begun < 0.2:
                assert is_answered
            else:
                late += 1  # the machine did something else meanwhile
        time.sleep(0.4)
        assert server.overdue_requests <= late and len(server.reports) <= late


@pytest.mark.parametrize("name", ALL)
def test_an_idle_client_is_closed_without_a_report(impl: str, name: str, capsys: pytest.CaptureFixture) -> None:
    with make(name, idle_timeout=0.2) as server, serving(server):
        with connect(server) as client:
            assert client.recv(1) == b"!"
            assert client.recv(1) == b""
        assert len(server.reports) == 1
    assert capsys.readouterr().err == ""


def test_another_timeout_is_reported(impl: str, capsys: pytest.CaptureFixture) -> None:
    def handle(request: Any, client_address: Any, server: Any) -> None:
        request.settimeout(0.05)
        request.recv(1)

    with make("ThreadingTCPServer", idle_timeout=30.0) as server:
        server.RequestHandlerClass = handle
        with serving(server), connect(server) as client:
            assert client.recv(1) == b""
    assert "TimeoutError" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_has_its_deadline(impl: str) -> None:
    with make("ForkingTCPServer", request_timeout=0.3) as server, serving(server), connect(server) as client:
        received = b""
        while data := client.recv(1):
            received += data
        assert received in (b"!", b"")  # on a busy machine it may be over before the child has come to write


def test_servers_of_the_stdlib_are_limited(impl: str) -> None:
    class Server(fastserve.LimitsMixIn, http.server.ThreadingHTTPServer):
        max_connections_per_client = 1
        idle_timeout = 0.2

    with Server(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server, serving(server, 0.01):
        with connect(server) as first, connect(server) as second:
            assert second.recv(1) == b""
            assert first.recv(1) == b""


def test_the_thread_of_the_deadlines_ends(impl: str) -> None:
    with make("ThreadingTCPServer", request_timeout=0.1) as server, serving(server):
        wait_until(lambda: answered(server))  # a busy machine may need longer than the deadline
        wait_until(lambda: not any(thread.name == "fastserve-deadlines" for thread in threading.enumerate()))
        wait_until(lambda: answered(server))
        wait_until(lambda: not any(thread.name == "fastserve-deadlines" for thread in threading.enumerate()))


def test_deadlines_of_requests_that_have_ended_are_not_kept(impl: str) -> None:
    with make("ThreadingTCPServer", request_timeout=3600.0) as server, serving(server):
        for _ in range(500):
            assert talk(server.server_address, b"line\n") == b"!line\n"
        wait_until(lambda: len(limits.deadlines._heap) <= 2 * limits.MANY)
        assert server.overdue_requests == 0


def test_a_client_that_comes_back_at_once_is_not_one_too_many(impl: str) -> None:
    for name in ("ThreadingTCPServer", "TCPServer"):
        with make(name, max_connections_per_client=1) as server, serving(server):
            for _ in range(200):
                assert talk(server.server_address, b"line\n") == b"!line\n"
            assert server.refused_connections == 0


def test_nothing_is_counted_that_has_ended(impl: str) -> None:
    with make("ThreadingTCPServer", max_connections_per_client=3, max_connections=5) as server, serving(server):
        for _ in range(50):
            assert talk(server.server_address, b"line\n") == b"!line\n"
        counted = limits._limits_of(server)
        wait_until(lambda: not counted._hosts and not counted._counts)
