"""The end of an interpreter with a pool: ``pool_exit VARIANT idle|queued|daemon|serving``."""

from __future__ import annotations

import socket
import sys
import threading
import time
from typing import Any

from isolated import harness
from support import wait_until

module: Any = harness.module_under_test()
[scenario] = harness.ARGUMENTS
begun = threading.Semaphore(0)


class Slow(module.StreamRequestHandler):  # type: ignore[misc]
    def handle(self) -> None:
        begun.release()
        if scenario == "daemon":
            time.sleep(60)
        elif scenario != "idle":
            time.sleep(0.1)
            sys.stdout.write("done\n")
            sys.stdout.flush()


class Server(module.ThreadPoolTCPServer):  # type: ignore[misc]
    max_workers = 2
    daemon_threads = scenario == "daemon"
    taken = 0

    def get_request(self) -> Any:
        self.taken += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        sys.stdout.write("refused\n")
        sys.stdout.flush()


server = Server(("127.0.0.1", 0), Slow)
thread = threading.Thread(target=server.serve_forever, daemon=scenario != "serving")
thread.start()
clients = [socket.create_connection(server.server_address) for _ in range(4)]
wait_until(lambda: server.taken == 4)
begun.acquire(timeout=10)
if scenario == "idle":
    wait_until(lambda: not server._fastserve_pool._under_way)
elif scenario == "serving":

    def stop() -> None:
        # The interpreter is ending by now, and a non-daemon thread goes on serving.
        threading.main_thread().join()
        wait_until(lambda: not server._fastserve_pool._count)
        last = socket.create_connection(server.server_address)
        last.settimeout(10)
        while last.recv(100):
            pass
        last.close()
        server.shutdown()

    clients.pop().close()
    threading.Thread(target=stop).start()
    sys.exit()
for connection in clients:
    connection.close()
server.socket.close()
