"""Forks beside a pool: ``pool_fork VARIANT SCENARIO``."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

from isolated import harness
from support import open_descriptors, wait_until

module: Any = harness.module_under_test()
gate = threading.Event()


class Handler(module.StreamRequestHandler):  # type: ignore[misc]
    def handle(self) -> None:
        line = self.rfile.readline().decode().strip()
        getattr(self, line)()

    def wait(self) -> None:
        assert gate.wait(10)
        self.wfile.write(b"%d" % os.getpid())

    def pid(self) -> None:
        self.wfile.write(b"%d" % os.getpid())

    def fork(self) -> None:
        if not os.fork():
            self.wfile.write(b"child")
            os._exit(0)
        os.wait()

    def fork_and_return(self) -> None:
        pid = os.fork()
        if pid:
            assert os.waitpid(pid, 0) == (pid, 0)
            self.wfile.write(b" parent")
        else:
            self.wfile.write(b"child")


class Server(module.ThreadPoolTCPServer):  # type: ignore[misc]
    request_queue_size = 32
    max_workers = 2
    max_queued = 1
    daemon_threads = False


def ask(server: Any, what: str) -> socket.socket:
    client = socket.create_connection(server.server_address, timeout=10)
    client.sendall(what.encode() + b"\n")
    return client


def answer(client: socket.socket) -> str:
    with client, client.makefile("rb") as file:
        return file.read().decode()


def child_serves() -> None:
    """A child of a full server, with two busy workers and a queued request, serves with workers of its own."""
    server = Server(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    clients = [ask(server, "wait") for _ in range(3)]
    pool = server._fastserve_pool if "_fastserve_pool" in vars(server) else None
    wait_until(lambda: len(getattr(vars(server).get("_fastserve_pool"), "_under_way", ())) == 3)
    pool = server._fastserve_pool
    queued = pool._queue.qsize()
    assert queued == 1
    before = open_descriptors()
    child = os.fork()
    if not child:
        status = 1
        try:
            assert not pool._under_way and not pool._count and open_descriptors() == before - queued
            assert threading.active_count() == 1
            mine, theirs = socket.socketpair()
            theirs.settimeout(10)
            theirs.sendall(b"pid\n")
            server.process_request(mine, "nobody")
            assert int(theirs.recv(100)) == os.getpid()
            server.server_close()
            assert threading.active_count() == 1
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0) == (child, 0)
    gate.set()
    assert [answer(client) for client in clients] == [str(os.getpid())] * 3
    server.shutdown()
    serving.join()
    server.server_close()


def handler_forks() -> None:
    """A handler that forks, and a child that leaves by os._exit(), leave the pool as it was."""
    with Server(("127.0.0.1", 0), Handler) as server:

        def act() -> None:
            for _ in range(5):
                assert answer(ask(server, "fork")) == "child"
                assert answer(ask(server, "pid")) == str(os.getpid())
            server.shutdown()

        harness.serve_here(server, act)


def handler_returns_in_the_child() -> None:
    """A child that returns from its handler ends, as it does where each request has a thread."""
    with Server(("127.0.0.1", 0), Handler) as server:

        def act() -> None:
            assert answer(ask(server, "fork_and_return")) in ("child parent", "child")
            assert answer(ask(server, "pid")) == str(os.getpid())
            server.shutdown()

        harness.serve_here(server, act)


globals()[harness.ARGUMENTS[0]]()
time.sleep(0)
assert harness.no_child_is_left()
