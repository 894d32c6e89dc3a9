"""A forking server and its children, in the main thread of a process: ``children VARIANT SCENARIO``."""

from __future__ import annotations

import os
import signal
import socket
import sys
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
    calls = 0

    def collect_children(self, *, blocking: bool = False) -> None:
        self.calls += 1
        super().collect_children(blocking=blocking)


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
    if getattr(sys, "_is_gil_enabled", lambda: True)():  # else every loop ticks
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


def another_child(server: Any) -> None:
    """At the limit a child that the program itself has started is left to it."""
    other = os.fork()
    if not other:
        os._exit(7)
    os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)
    max_children(server)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7


def max_children_without_pidfds(server: Any) -> None:
    """The same where the kernel does not tell of ended children."""
    another_child(server)


def asked_for_the_ended(server: Any) -> None:
    """The loop asks for each child once, when it has ended, however many requests there are beside it."""
    asked: list[int] = []
    waitpid = os.waitpid

    def noting(pid: int, options: int) -> tuple[int, int]:
        asked.append(pid)
        return waitpid(pid, options)

    os.waitpid = noting
    first = Client(server)
    pids = [int(first.ask("pid"))]
    for _ in range(5):
        client = Client(server)
        pids.append(int(client.ask("pid")))
        client.close()
        wait_until(lambda: server.active_children == {pids[0]})
    first.close()
    wait_until(lambda: not server.active_children)
    os.waitpid = waitpid
    assert sorted(asked) == sorted(pids), (asked, pids)


def collected_elsewhere(server: Any) -> None:
    """What another part of the program has collected is forgotten, at the limit too."""
    server.max_children = 1
    for _ in range(3):
        client = Client(server)
        pid = int(client.ask("pid"))
        collector = threading.Thread(target=os.waitpid, args=(pid, 0))
        collector.start()
        client.close()
        collector.join()
    last = Client(server)
    assert last.ask("pid").isdigit()
    last.close()
    wait_until(lambda: not server.active_children)


def sigchld_ignored(server: Any) -> None:
    """Where the system collects children by itself there is nothing to wait for."""
    max_children(server)
    wait_until(lambda: not server.active_children)


def overridden(server: Any) -> None:
    """An override of collect_children() is called by the loop, and may collect nothing."""
    client = Client(server)
    client.ask("pid")
    before = server.calls
    second = Client(server)
    second.ask("pid")
    wait_until(lambda: server.calls > before)
    for one in (client, second):
        one.close()
    wait_until(lambda: not server.active_children)


def main(scenario: str) -> None:
    poll_interval = POLL
    if scenario in ("collected_by_ticks", "max_children_without_pidfds"):
        del os.pidfd_open
        poll_interval = 0.05
    if scenario == "sigchld_ignored":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    def act() -> None:
        globals()[scenario](server)
        server.shutdown()

    with Server(("127.0.0.1", 0), Handler) as server:
        harness.serve_here(server, act, poll_interval)
    assert harness.no_child_is_left()


main(*harness.ARGUMENTS)
