"""Batches of datagrams: when there are any, and what becomes of them."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastserve
from conftest import TWINS
from fastserve import _backend
from support import open_descriptors, serving, wait_until
from test_datagrams import ADDRESS, client_of, is_waiting, logging_handler, send_numbers, stop_after


def waiting_in_handlers(server: Any, count: int = 3) -> list[bool]:
    """Serve ``count`` datagrams; return for each whether another was still in the kernel when it was handled."""
    seen: list[bool] = []

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(is_waiting(self.server))
            stop_after(count, seen)(self)

    server.RequestHandlerClass = Handler
    with server, client_of(server) as client:
        send_numbers(client, count)
        server.serve_forever(0.01)
    return seen


IN_BATCHES, ONE_BY_ONE = [False, False, False], [True, True, False]


def test_datagrams_that_have_arrived_are_taken_together(impl: str) -> None:
    assert waiting_in_handlers(fastserve.UDPServer(ADDRESS, None)) == IN_BATCHES


@pytest.mark.parametrize(
    ("max_batch", "expected"), [(0, ONE_BY_ONE), (1, ONE_BY_ONE), (2, [True, True, False]), (3, IN_BATCHES)]
)
def test_max_batch_limits_a_batch(impl: str, max_batch: int, expected: list[bool]) -> None:
    server = fastserve.UDPServer(ADDRESS, None)
    server.max_batch = max_batch
    assert waiting_in_handlers(server) == expected


def test_a_large_max_packet_size_makes_smaller_batches(impl: str) -> None:
    server = fastserve.UDPServer(ADDRESS, None)
    server.max_packet_size = 3 * 1024 * 1024  # two of them are more than 4 MiB
    assert waiting_in_handlers(server) == ONE_BY_ONE


def test_a_max_packet_size_beyond_all_buffers_is_received_by_the_socket(impl: str) -> None:
    server = fastserve.UDPServer(ADDRESS, None)
    server.max_packet_size = 16 * 1024 * 1024
    assert waiting_in_handlers(server) == ONE_BY_ONE


@pytest.mark.parametrize("where", ["class", "instance", "mixin"])
def test_there_are_no_batches_where_get_request_is_overridden(impl: str, where: str) -> None:
    class Mixin:
        def get_request(self) -> Any:
            return super().get_request()  # type: ignore[misc]

    class Server(*([Mixin] if where == "mixin" else []), fastserve.UDPServer):  # type: ignore[misc]
        if where == "class":

            def get_request(self) -> Any:
                return super().get_request()

    server = Server(ADDRESS, None)
    if where == "instance":
        server.get_request = lambda: fastserve.UDPServer.get_request(server)
    assert waiting_in_handlers(server) == ONE_BY_ONE


def test_there_are_no_batches_where_the_socket_is_not_a_plain_one(impl: str) -> None:
    class Wrapped:
        def __init__(self, wrapped: socket.socket) -> None:
            self.wrapped = wrapped

        def __getattr__(self, name: str) -> Any:
            return getattr(self.wrapped, name)

    server = fastserve.UDPServer(ADDRESS, None)
    server.socket = Wrapped(server.socket)  # type: ignore[assignment]
    assert waiting_in_handlers(server) == ONE_BY_ONE

    class Subclass(socket.socket):
        pass

    server = fastserve.UDPServer(ADDRESS, None)
    server.socket = Subclass(fileno=server.socket.detach())
    assert waiting_in_handlers(server) == ONE_BY_ONE


def test_there_are_no_batches_where_recvfrom_was_replaced(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = socket.socket.recvfrom
    monkeypatch.setattr(
        socket.socket, "recvfrom", lambda self, size: calls.append(size) or original(self, size), raising=True
    )
    assert waiting_in_handlers(fastserve.UDPServer(ADDRESS, None)) == ONE_BY_ONE
    assert calls == [8192] * 3


def test_there_are_no_batches_for_a_forking_server(impl: str) -> None:
    class Server(fastserve.ForkingMixIn, fastserve.UDPServer):
        process_request = fastserve.UDPServer.process_request  # so that the test sees the handlers

    assert waiting_in_handlers(Server(ADDRESS, None)) == ONE_BY_ONE


def test_there_are_no_batches_while_several_loops_serve(impl: str) -> None:
    from fastserve._loop import State

    server = fastserve.UDPServer(ADDRESS, None)
    another: Any = type("AnotherLoop", (), {"owner": 0, "wake": lambda self: None})()
    State.of(server).loops.append(another)
    assert waiting_in_handlers(server) == ONE_BY_ONE


# Truncated datagrams


@pytest.mark.parametrize("how", ["serve_forever", "handle_request", "overridden"])
def test_truncated_datagrams_are_counted_and_reported_once(
    impl: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[bytes] = []

    class Server(fastserve.UDPServer):
        max_packet_size = 4
        if how == "overridden":

            def get_request(self) -> Any:
                return super().get_request()

    with Server(ADDRESS, logging_handler(fastserve, log, stop_after(5, log))) as server, client_of(server) as client:
        for data in (b"1234", b"12345", b"1", b"123456", b""):
            client.send(data)
        if how == "handle_request":
            for _ in range(5):
                server.handle_request()
        else:
            server.serve_forever(0.01)
        address = server.server_address
        assert server.truncated_datagrams == 2
    assert log == [b"1234", b"1234", b"1", b"1234", b""]
    assert capsys.readouterr().err.splitlines() == [
        f"fastserve: a datagram on {address!r} was longer than max_packet_size, 4 bytes, and has lost its end; "
        "truncated_datagrams counts them"
    ]


# Errors


def failing_receiver(monkeypatch: pytest.MonkeyPatch, errors: list[OSError]) -> None:
    """Have the first calls of ``receive`` raise."""
    real = _backend.datagrams.Receiver

    class Receiver:
        truncated = 0
        failed = None

        def __init__(self) -> None:
            self.real = real()

        def receive(self, *arguments: Any) -> Any:
            if errors:
                raise errors.pop(0)
            return self.real.receive(*arguments)

        def close(self) -> None:
            self.real.close()

    monkeypatch.setattr(_backend.datagrams, "Receiver", Receiver)


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM])
def test_receiving_without_memory_rests_and_goes_on(
    impl: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [OSError(code, os.strerror(code)) for _ in range(3)]
    failing_receiver(monkeypatch, errors)
    log: list[bytes] = []
    with fastserve.UDPServer(ADDRESS, logging_handler(fastserve, log, stop_after(2, log))) as server:
        with client_of(server) as client:
            sent = send_numbers(client, 2)
            begun = time.monotonic()
            server.serve_forever(30)
            assert time.monotonic() - begun > 0.06  # 10 + 20 + 40 ms
    assert log == sent
    assert capsys.readouterr().err.count("fastserve: cannot accept on") == 1


def test_other_errors_of_receiving_are_dropped_at_once(
    impl: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [OSError(code, os.strerror(code)) for code in (errno.ECONNREFUSED, errno.EMSGSIZE, errno.EHOSTUNREACH)]
    failing_receiver(monkeypatch, errors)
    log: list[bytes] = []
    with fastserve.UDPServer(ADDRESS, logging_handler(fastserve, log, stop_after(2, log))) as server:
        with client_of(server) as client:
            sent = send_numbers(client, 2)
            server.serve_forever(30)
    assert log == sent
    assert capsys.readouterr().err == ""


def test_an_icmp_error_of_a_connected_listener_is_dropped(module: ModuleType) -> None:
    log: list[bytes] = []
    with (
        module.UDPServer(ADDRESS, logging_handler(module, log)) as server,
        socket.socket(type=socket.SOCK_DGRAM) as gone,
    ):
        gone.bind(ADDRESS)
        name = gone.getsockname()
        gone.close()
        server.socket.connect(name)
        server.socket.send(b"to nobody")
        with serving(server, 0.01), socket.socket(type=socket.SOCK_DGRAM) as client:
            client.bind(name)
            client.sendto(b"after the error", server.server_address)
            wait_until(lambda: log)
    assert log == [b"after the error"]


def test_an_error_behind_datagrams_comes_from_the_next_get_request(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _backend.datagrams.Receiver

    class Receiver:
        """Fails after the first datagrams, as where there is no recvmmsg(2)."""

        truncated = 0
        failed: OSError | None = None

        def __init__(self) -> None:
            self.real = real()
            self.first = True

        def receive(self, *arguments: Any) -> Any:
            if self.first:
                self.failed = OSError(errno.ECONNREFUSED, "behind the datagrams")
            self.first = False
            return self.real.receive(*arguments)

        def close(self) -> None:
            self.real.close()

    monkeypatch.setattr(_backend.datagrams, "Receiver", Receiver)
    log: list[Any] = []

    with fastserve.UDPServer(ADDRESS, logging_handler(fastserve, log, stop_after(2, log))) as server:
        with client_of(server) as client:
            send_numbers(client, 2)
            server.serve_forever(30)
            with pytest.raises(ConnectionRefusedError, match="behind the datagrams"):
                server.get_request()
            send_numbers(client, 1, 2)
            assert server.get_request()[0][0] == b"2"
    assert log == [b"0", b"1"]


# Descriptors and processes


def test_batches_leave_no_descriptor(impl: str) -> None:
    log: list[bytes] = []
    with fastserve.UDPServer(ADDRESS, logging_handler(fastserve, log, stop_after(5, log))) as server:
        with client_of(server) as client:
            before = open_descriptors()
            for _ in range(5):
                del log[:]
                send_numbers(client, 5)
                server.serve_forever(30)
            assert open_descriptors() == before


def run_script(impl: str, script: str) -> list[str]:
    """Run a program that forks, in a process without threads; return the lines that it prints."""
    environment = dict(os.environ, FASTSERVE_NO_EXTENSIONS=str(int(impl == "py")))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


FORKS_IN_A_HANDLER = """
import fastserve, os, socket
class Handler(fastserve.BaseRequestHandler):
    def handle(self):
        os.write(1, b"%s %s\\n" % (b"parent" if os.getpid() == first else b"child", self.request[0]))
        if self.request[0] == b"0":
            if os.fork() == 0:
                return                      # and goes on in serve_forever, as a worker would
        if self.request[0] == b"4":
            client.send(b"end")             # the child may take it, or the parent
        if self.request[0] == b"end":
            client.send(b"end")
            self.server._BaseServer__shutdown_request = True
first = os.getpid()
server = fastserve.UDPServer(("127.0.0.1", 0), Handler)
client = socket.socket(type=socket.SOCK_DGRAM)
client.connect(server.server_address)
for number in range(5):
    client.send(b"%d" % number)
server.serve_forever()
if os.getpid() == first:
    os.wait()
os._exit(0)
"""


def test_a_child_that_a_handler_forks_leaves_the_batch_to_its_parent(impl: str) -> None:
    lines = [line for line in run_script(impl, FORKS_IN_A_HANDLER) if not line.endswith("end")]
    assert lines == [f"parent {number}" for number in range(5)]


PREFORK = """
import fastserve, os, socket, sys
class Handler(fastserve.BaseRequestHandler):
    def handle(self):
        try:
            self.server.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            waiting = b"waiting"
        except BlockingIOError:
            waiting = b"empty"
        os.write(1, waiting + b"\\n")
        if self.request[0] == b"2":
            self.server._BaseServer__shutdown_request = True
def serve(server):
    client = socket.socket(type=socket.SOCK_DGRAM)
    client.connect(server.server_address)
    for number in range(3):
        client.send(b"%d" % number)
    server.serve_forever()
server = fastserve.UDPServer(("127.0.0.1", 0), Handler)
pid = os.fork()
if pid == 0:
    serve(server)                                               # made by the parent: shared
    serve(fastserve.UDPServer(("127.0.0.1", 0), Handler))       # made by the child: its own
    os._exit(0)
os.waitpid(pid, 0)
serve(server)                                                   # the parent's own
"""


def test_a_forked_child_takes_one_datagram_at_a_time_from_a_socket_of_its_parent(impl: str) -> None:
    shared, own = ["waiting", "waiting", "empty"], ["empty"] * 3
    assert run_script(impl, PREFORK) == [*shared, *own, *own]


FORKING = """
import fastserve, os, socket
class Handler(fastserve.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.packet + b" %d" % os.getpid())
class Server(fastserve.ForkingUDPServer):
    gather_replies = GATHER
    def service_actions(self):
        super().service_actions()
        self.turns = getattr(self, "turns", 0) + 1
        if self.turns == 20:
            self._BaseServer__shutdown_request = True
with Server(("127.0.0.1", 0), Handler) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
    client.settimeout(60)
    client.connect(server.server_address)
    for number in range(20):
        client.send(b"%d" % number)
    server.serve_forever()
    answers = [client.recv(100).split() for _ in range(20)]
    print(sorted(int(number) for number, _ in answers) == list(range(20)), len({pid for _, pid in answers}))
"""


@pytest.mark.parametrize("gather", [False, True])
def test_a_forking_server_answers_every_datagram_once(impl: str, gather: bool) -> None:
    assert run_script(impl, FORKING.replace("GATHER", str(gather))) == ["True 20"]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("options", [[], ["--gather-replies"], ["--window", "1000000"]], ids=["", "gather", "flood"])
def test_a_short_soak_adds_up(impl: str, options: list[str]) -> None:
    soak = Path(__file__).parent.parent / "bench" / "soak.py"
    environment = dict(os.environ, FASTSERVE_NO_EXTENSIONS=str(int(impl == "py")))
    command = [sys.executable, str(soak), "datagrams", "--requests", "5000", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "5,000 sent" in done.stdout


# The twins


def loopback() -> tuple[socket.socket, socket.socket]:
    receiver = socket.socket(type=socket.SOCK_DGRAM)
    receiver.bind(ADDRESS)
    sender = socket.socket(type=socket.SOCK_DGRAM)
    sender.connect(receiver.getsockname())
    return receiver, sender


@pytest.mark.parametrize("timeout", [0.0, 60.0])
def test_a_listener_with_a_timeout_does_not_wait_for_more_datagrams(impl: str, timeout: float) -> None:
    log: list[bytes] = []
    begun = time.monotonic()
    with fastserve.UDPServer(ADDRESS, logging_handler(fastserve, log, stop_after(3, log))) as server:
        server.socket.settimeout(timeout)
        with client_of(server) as client:
            sent = send_numbers(client, 3)
            server.serve_forever(30)
    assert log == sent
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("twin", sorted(TWINS))
def test_receive_takes_what_is_there_and_no_more_than_asked_for(twin: str) -> None:
    datagrams: Any = TWINS[twin]["datagrams"]
    listener, sender = loopback()
    with listener, sender:
        receiver = datagrams.Receiver()
        assert receiver.receive(listener, listener, 5, 100) == []
        for number in range(7):
            sender.send(b"%d" % number)
        address = sender.getsockname()
        assert receiver.receive(listener, sender, 5, 100) == [((b"%d" % n, sender), address) for n in range(5)]
        assert receiver.receive(listener, sender, 50, 3) == [((b"%d" % n, sender), address) for n in (5, 6)]
        assert receiver.receive(listener, sender, 50, 3) == []
        receiver.close()
        sender.send(b"after close()")
        assert receiver.receive(listener, listener, 1, 5) == [((b"after", listener), address)]
        assert (receiver.truncated, receiver.failed) == (1, None)
        receiver.close()
        receiver.close()
    with pytest.raises(OSError) as raised:
        receiver.receive(listener, listener, 1, 5)
    assert raised.value.errno == errno.EBADF
