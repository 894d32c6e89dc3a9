"""A server of greenlets with many clients at a time, and with clients that do not behave."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from typing import Any

import pytest

import fastserve
from support import LIMIT, serving, wait_until

pytest.importorskip("greenlet", reason="greenlets need the package greenlet")

pytestmark = pytest.mark.usefixtures("impl")


class Server(fastserve.GreenletTCPServer):
    request_queue_size = 1024
    slow_handler_seconds = 0  # what the tests hold up is held up on purpose


@pytest.mark.parametrize("read", ["readline", "read", "read1", "readinto"])
def test_who_sends_much_at_a_time_does_not_hold_up_others(read: str) -> None:
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
        assert begun.wait(LIMIT)
        time.sleep(0.2)  # in which the sleep ends, or the thread has ended
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
