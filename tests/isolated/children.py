"""A forking server and its children, in the main thread of a process: ``children VARIANT SCENARIO``."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

from isolated import harness
from support import context_switches, settle, wait_until

module = harness.module_under_test()
POLL = 60.0  # seconds; nothing here waits for it
QUICK = 20.0  # seconds; a bound for a busy machine


class Handler(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
    """Do what the client says, line by line."""

    def handle(self) -> None:
        # Not until the end of the stream: later children have inherited the client's end of it.
        while (line := self.rfile.readline()) not in (b"end\n", b""):
            getattr(self, line.decode().strip())()

    def say(self, what: object) -> None:
        self.wfile.write(f"{what}\n".encode())

    def pid(self) -> None:
        self.say(os.getpid())

    def wakeup_descriptor(self) -> None:
        self.say(signal.set_wakeup_fd(-1))

    def disturb(self) -> None:
        """Do in a child what would wake the parent's loop if they shared a wake-up."""
        signal.signal(signal.SIGUSR1, lambda signum, frame: None)
        for _ in range(10):
            signal.raise_signal(signal.SIGUSR1)
        self.server._BaseServer__shutdown_request = True
        self.server.shutdown()
        self.say("done")

    def shutdown(self) -> None:
        self.server.shutdown()
        self.say("done")


class Server(module.ForkingTCPServer):  # type: ignore[misc, name-defined]
    request_queue_size = 32


class Client:
    """A connection to a child."""

    def __init__(self, server: Any) -> None:
        self._socket = socket.create_connection(server.server_address, timeout=60)
        self._lines = self._socket.makefile("rb")

    def ask(self, what: str) -> str:
        self._socket.sendall(what.encode() + b"\n")
        return self._lines.readline().decode().strip()

    def has_answer(self, seconds: float) -> bool:
        self._socket.settimeout(seconds)
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except TimeoutError:
            return False
        finally:
            self._socket.settimeout(60)

    def send(self, what: str) -> None:
        self._socket.sendall(what.encode() + b"\n")

    def read(self) -> str:
        return self._lines.readline().decode().strip()

    def close(self) -> None:
        self._socket.sendall(b"end\n")
        self._lines.close()
        self._socket.close()


def collected_at_once(server: Any) -> None:
    """An ended child is collected while the server is idle, and long before the poll_interval is over."""
    clients = [Client(server) for _ in range(5)]
    pids = {int(client.ask("pid")) for client in clients}
    assert len(pids) == 5 and os.getpid() not in pids
    wait_until(lambda: server.active_children == pids)
    clients.pop().close()
    wait_until(lambda: len(server.active_children) == 4, QUICK)
    for client in clients:
        client.close()
    wait_until(lambda: not server.active_children, QUICK)
    assert harness.no_child_is_left()


def collected_by_ticks(server: Any) -> None:
    """Where the kernel has no pidfds the loop ticks while there are children, and only then."""
    collected_at_once(server)
    assert harness.fewest_switches(threading.main_thread().native_id or 0, 0.5) == 0


def max_children(server: Any) -> None:
    """At the limit the next request waits until a child ends."""
    server.max_children = 2
    clients = [Client(server) for _ in range(2)]
    for client in clients:
        client.ask("pid")
    third = Client(server)
    third.send("pid")
    assert not third.has_answer(0.2)
    assert len(server.active_children) <= 2
    clients[0].close()
    assert third.read().isdigit()
    for client in [clients[1], third]:
        client.close()


def children_do_not_wake_the_parent(server: Any) -> None:
    """Neither a signal nor the flag of a child reaches its parent's loop."""
    client = Client(server)
    assert client.ask("wakeup_descriptor") == "-1"
    main = threading.main_thread().native_id or 0
    settle(main)
    before = context_switches(main)
    assert client.ask("disturb") == "done"
    time.sleep(0.2)
    assert context_switches(main) == before
    client.close()
    second = Client(server)
    assert second.ask("pid").isdigit()
    second.close()


def shutdown_in_a_child(server: Any) -> None:
    """shutdown() in a child's handler returns, and leaves the parent serving."""
    for _ in range(3):
        client = Client(server)
        assert client.ask("shutdown") == "done"
        client.close()


def main(scenario: str) -> None:
    poll_interval = POLL
    if scenario == "collected_by_ticks":
        del os.pidfd_open
        poll_interval = 0.05

    def act() -> None:
        globals()[scenario](server)
        server.shutdown()

    with Server(("127.0.0.1", 0), Handler) as server:
        harness.serve_here(server, act, poll_interval)
    assert harness.no_child_is_left()


main(*harness.ARGUMENTS)
