"""Many connections through a pool, every tenth of which raises: ``pool_stress VARIANT CONNECTIONS``."""

from __future__ import annotations

import itertools
import socket
import threading
from typing import Any

from isolated import harness
from support import open_descriptors, wait_until

CLIENTS = 32

module: Any = harness.module_under_test()
total = int(harness.ARGUMENTS[0])
numbers = itertools.count()
errors = itertools.count()
lock = threading.Lock()
answered: dict[bytes, int] = {}


class Handler(module.BaseRequestHandler):  # type: ignore[misc]
    def handle(self) -> None:
        number = int(self.request.recv(100))
        if number % 10 == 0:
            raise RuntimeError("every tenth")
        self.request.sendall(b"%d" % -number)


class Server(module.ThreadPoolTCPServer):  # type: ignore[misc]
    request_queue_size = 128
    max_workers = 4
    max_queued = 4  # fewer places than clients

    def handle_error(self, request: Any, client_address: Any) -> None:
        next(errors)


def talk(server: Any) -> None:
    while (number := next(numbers)) < total:
        with socket.create_connection(server.server_address, timeout=20) as client:
            client.sendall(b"%d" % number)
            answer = client.recv(100)
            assert answer == (b"" if number % 10 == 0 else b"%d" % -number), (number, answer)
        with lock:
            answered[answer] = answered.get(answer, 0) + 1


def main() -> None:
    before = open_descriptors(), threading.active_count()
    with Server(("127.0.0.1", 0), Handler) as server:

        def act() -> None:
            clients = [threading.Thread(target=talk, args=(server,)) for _ in range(CLIENTS)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            server.shutdown()

        harness.serve_here(server, act)
    assert sum(answered.values()) == total and answered[b""] == total // 10 == next(errors)
    wait_until(lambda: (open_descriptors(), threading.active_count()) == before)


main()
