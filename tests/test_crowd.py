"""A server of greenlets with many clients at a time, and with clients that do not behave."""

from __future__ import annotations

import errno
import gc
import os
import resource
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import fastserve
from support import LIMIT, open_descriptors, serving, wait_until

pytest.importorskip("greenlet", reason="greenlets need the package greenlet")

pytestmark = pytest.mark.usefixtures("impl")


RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() ends the connection with RST


class Server(fastserve.GreenletTCPServer):
    request_queue_size = 1024
    slow_handler_seconds = 0  # what the tests hold up is held up on purpose

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.errors: list[BaseException | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.errors.append(sys.exception())


class Lines(socketserver.StreamRequestHandler):
    """Send back line after line."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line)


class TimedLines(Lines):
    timeout = 0.3


@pytest.fixture
def many_descriptors() -> Iterator[int]:
    """Raise the limit of descriptors as far as it goes, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def tasks_alive() -> int:
    """Return how many greenlets there are."""
    greenlet = sys.modules["greenlet"].greenlet
    gc.collect()
    return sum(isinstance(found, greenlet) for found in gc.get_objects())


# Clients in a process of their own: they need as many descriptors as the server.
CROWD = """
import resource, socket, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
clients = []
for number in range(count):
    client = socket.socket()
    client.settimeout(60)
    client.bind((f"127.0.0.{number // 5000 + 2}", 0))  # an address has no more than 65,535 ports
    client.connect(("127.0.0.1", port))
    clients.append(client)
print(len(clients), flush=True)
for line in sys.stdin:
    for number, client in enumerate(clients):
        client.sendall(b"%d\\n" % number)
    print(sum(client.recv(100) == b"%d\\n" % number for number, client in enumerate(clients)), flush=True)
"""


@pytest.mark.alone
def test_ten_thousand_connections_are_served(many_descriptors: int) -> None:
    count = min(10_000, many_descriptors - open_descriptors() - 200)
    if count < 2_000:
        pytest.skip(f"a process may have only {many_descriptors} descriptors, too few for a crowd")
    before, tasks = open_descriptors(), tasks_alive()
    with serving(Server(("127.0.0.1", 0), Lines)) as server:
        arguments = [sys.executable, "-c", CROWD, str(server.server_address[1]), str(count)]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as crowd:
            assert crowd.stdin is not None
            assert crowd.stdout is not None
            assert int(crowd.stdout.readline()) == count
            wait_until(lambda: open_descriptors() >= count + before)
            for _ in range(2):
                crowd.stdin.write(b"again\n")
                crowd.stdin.flush()
                assert int(crowd.stdout.readline()) == count
            crowd.stdin.close()
        wait_until(lambda: open_descriptors() < before + 30)
        wait_until(lambda: tasks_alive() < tasks + 600)  # 512 of them wait for the next requests
    assert server.errors == []
    assert open_descriptors() == before
    wait_until(lambda: tasks_alive() <= tasks)


def test_short_connections_leave_nothing_behind() -> None:
    class Handler(Lines):
        def handle(self) -> None:
            line = self.rfile.readline()
            self.wfile.write(line)
            if line.endswith(b"0\n"):
                raise ValueError(line)

    before, tasks = open_descriptors(), tasks_alive()
    with serving(Server(("127.0.0.1", 0), Handler)) as server:
        for number in range(1_000):
            with socket.create_connection(server.server_address, LIMIT) as client:
                client.sendall(b"%d\n" % number)
                with client.makefile("rb") as answer:
                    assert answer.read() == b"%d\n" % number
        wait_until(lambda: len(server.errors) == 100)
        assert tasks_alive() < tasks + 10  # they come one after the other: hardly two at a time
        assert all(isinstance(error, ValueError) for error in server.errors)
    server.errors.clear()
    assert open_descriptors() == before
    wait_until(lambda: tasks_alive() <= tasks)


def test_clients_that_reset_their_connections_are_forgotten() -> None:
    before = open_descriptors()
    with (
        serving(Server(("127.0.0.1", 0), Lines)) as server,
        socket.create_connection(server.server_address, LIMIT) as other,
    ):
        other.sendall(b"hello\n")
        assert other.recv(100) == b"hello\n"
        idle = open_descriptors()
        for number in range(300):
            client = socket.create_connection(server.server_address, LIMIT)
            client.sendall(b"a line\nhalf a line"[: number % 18])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.close()
            if number % 50 == 0:
                other.sendall(b"%d\n" % number)
                assert other.recv(100) == b"%d\n" % number
        wait_until(lambda: open_descriptors() == idle)
    assert all(isinstance(error, ConnectionError) for error in server.errors)
    assert open_descriptors() == before


def test_a_thousand_timeouts_at_the_same_instant(many_descriptors: int) -> None:
    count = min(1_000, (many_descriptors - open_descriptors() - 100) // 2)
    before = open_descriptors()
    with serving(Server(("127.0.0.1", 0), TimedLines)) as server:
        clients = [socket.create_connection(server.server_address, LIMIT) for _ in range(count)]
        for client in clients:
            assert client.recv(1) == b""  # the server has waited long enough
            client.close()
        wait_until(lambda: len(server.errors) == count)
        assert all(isinstance(error, TimeoutError) for error in server.errors)
        server.RequestHandlerClass = Lines  # on a busy machine this client would not be in time
        with socket.create_connection(server.server_address, LIMIT) as client:
            client.sendall(b"still there?\n")
            assert client.recv(100) == b"still there?\n"
    assert open_descriptors() == before


def test_a_descriptor_that_is_used_again_is_not_taken_for_the_one_before() -> None:
    """The server closes a connection, and gives its number to the next, of which events of the first must not tell."""

    class Handler(Lines):
        def handle(self) -> None:
            while (line := self.rfile.readline()) and line != b"bye\n":
                self.wfile.write(line)

    with serving(Server(("127.0.0.1", 0), Handler)) as server:
        for number in range(500):
            one = socket.create_connection(server.server_address, LIMIT)
            one.sendall(b"first\n")
            assert one.recv(100) == b"first\n"
            one.sendall(b"bye\nand more, which nobody reads\n" if number % 2 else b"bye\n")
            with socket.create_connection(server.server_address, LIMIT) as two:
                one.close()
                two.sendall(b"%d\n" % number)
                assert two.recv(100) == b"%d\n" % number
                two.sendall(b"again\n")
                assert two.recv(100) == b"again\n"
    assert server.errors == []


def test_without_descriptors_clients_wait_until_a_request_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    clients = [socket.socket() for _ in range(8)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers: list[int] = []
    with serving(Server(("127.0.0.1", 0), Lines)) as server:
        try:
            with socket.create_connection(server.server_address, LIMIT) as first:
                first.sendall(b"all is there\n")
                assert first.recv(100) == b"all is there\n"
                idle = open_descriptors() - 2
            wait_until(lambda: open_descriptors() == idle)
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (min(soft, max(map(int, os.listdir("/proc/self/fd"))) + 20), hard)
            )
            while True:
                try:
                    fillers.append(os.dup(0))
                except OSError as error:
                    assert error.errno == errno.EMFILE
                    break
            for _ in range(3):
                os.close(fillers.pop())
            for number, client in enumerate(clients):
                client.settimeout(LIMIT)
                client.connect(server.server_address)
                client.sendall(b"%d\n" % number)
            wait_until(lambda: "cannot accept on" in capsys.readouterr().err)
            for number, client in enumerate(clients):  # they come in order; each that ends lets in the next
                assert client.recv(100) == b"%d\n" % number
                if number >= 2:
                    clients[number - 2].close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in fillers:
                os.close(descriptor)
            for client in clients:
                client.close()
    assert server.errors == []


@pytest.mark.parametrize("read", ["readline", "read", "read1", "readinto"])
def test_who_sends_much_at_a_time_does_not_hold_up_others(read: str, impl: str) -> None:
    if impl == "py":
        pytest.skip("the buffer of the Python twin's rfile is io.BufferedReader, which tells nobody of its reads")
    gate = threading.Event()
    done = 0
    done_when_answered: list[int] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            nonlocal done
            word = self.request.recv(1)
            if word == b"g":  # holds up all, until both clients have sent what they have to say
                assert gate.wait(LIMIT)
            elif word == b"f":
                buffer = bytearray(2)
                while {
                    "readline": lambda: self.rfile.readline(),
                    "read": lambda: self.rfile.read(2),
                    "read1": lambda: self.rfile.read1(2),  # type: ignore[attr-defined]
                    "readinto": lambda: self.rfile.readinto(buffer),  # type: ignore[attr-defined]
                }[read]():
                    done += 1
            else:
                self.rfile.readline()
                done_when_answered.append(done)

    with (
        serving(Server(("127.0.0.1", 0), Handler)) as server,
        socket.create_connection(server.server_address, LIMIT) as flood,
        socket.create_connection(server.server_address, LIMIT) as other,
        socket.create_connection(server.server_address, LIMIT) as holder,
    ):
        flood.sendall(b"f")
        other.sendall(b"o")
        holder.sendall(b"g")
        flood.setblocking(False)
        sent = 0
        while sent < 200_000:
            try:
                sent += flood.send(b"x\n" * 50_000)
            except BlockingIOError:
                break
        flood.setblocking(True)
        other.sendall(b"x\n")
        gate.set()
        assert other.recv(1) == b""
        flood.shutdown(socket.SHUT_WR)
        wait_until(lambda: done >= sent // 2)
    assert sent >= 50_000
    assert done_when_answered[0] <= 5_000


@pytest.mark.parametrize("pause", ["sleep", "to_thread", "spawn"])
def test_a_wait_goes_on_though_gathered_replies_had_to_wait_first(pause: str) -> None:
    """What was written while a line was left to read is sent before a wait; the client may take its time to read."""
    begun = threading.Event()

    def elsewhere() -> None:
        begun.set()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            self.rfile.readline()
            self.wfile.write(b"x" * 60_000)
            if pause == "sleep":
                begun.set()
                fastserve.sleep(0.05)
            elif pause == "to_thread":
                fastserve.to_thread(elsewhere)
            else:
                fastserve.spawn(elsewhere).join()
            self.wfile.write(b"awake " + self.rfile.readline())

    with serving(Server(("127.0.0.1", 0), Handler)) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(LIMIT)
        client.connect(server.server_address)
        client.sendall(b"one\ntwo\n")
        # In this time the pause would be over. Where replies are not gathered, the handler waits before it.
        begun.wait(0.3)
        time.sleep(0.1)
        with client.makefile("rb") as answer:
            assert answer.read() == b"x" * 60_000 + b"awake two\n"


def test_who_floods_and_reads_late_gets_every_answer() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                self.wfile.write(line)

    lines = b"".join(b"%d\n" % number for number in range(200_000))
    with serving(Server(("127.0.0.1", 0), Handler)) as server:
        with socket.create_connection(server.server_address, LIMIT) as client:
            sender = threading.Thread(target=lambda: (client.sendall(lines), client.shutdown(socket.SHUT_WR)))
            sender.start()
            sender.join(0.3)  # by now the server can send no more, and waits
            received = bytearray()
            while data := client.recv(1 << 16):
                received += data
            sender.join(LIMIT)
    assert received == lines
