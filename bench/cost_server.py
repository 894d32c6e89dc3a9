"""The server whose costs bench/costs.py measures: it serves, and answers what only its own process can measure.

python bench/cost_server.py stdlib|py|c sync|threads|fork COST
"""

from __future__ import annotations

import _thread
import contextlib
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

WORKERS = {"sync": "TCPServer", "threads": "ThreadingTCPServer", "fork": "ForkingTCPServer"}
DESCRIPTOR_LIMIT = 64  # descriptors of the process that is to run out of them


def serve(implementation: str, worker: str, cost: str) -> None:
    """Serve until told otherwise on standard input, and answer there what only this process can measure."""
    if implementation == "stdlib":
        import socketserver as module
    else:
        import fastserve as module  # type: ignore[no-redef]

        assert module.implementation == implementation  # type: ignore[attr-defined]

    class Handler(module.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline()
            if line == b"raise\n":
                raise RuntimeError("asked for")
            self.wfile.write(line.upper())
            if line.lower() == b"hold\n":
                self.rfile.readline()

    class Server(getattr(module, WORKERS[worker])):  # type: ignore[misc]
        request_queue_size = 128
        daemon_threads = True
        # For the bench only: ten thousand tracebacks tell nothing.
        handle_error = staticmethod(lambda request, client_address: None)

    if cost == "exhaustion":
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTOR_LIMIT, DESCRIPTOR_LIMIT))
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    if cost == "shutdown":
        time_shutdowns(server, int(sys.stdin.readline()))
    elif cost == "stop":
        time_stop(server, sys.stdin.readline().strip())
    elif cost == "sigterm":
        signal.signal(signal.SIGTERM, lambda signum, frame: stop_serving(server))
        server.serve_forever()
        server.server_close()
    else:
        threading.Thread(target=obey, args=(server,)).start()
        server.serve_forever()
        server.server_close()


def stop_serving(server: Any) -> None:
    """Stop the server from a signal handler, as a program has to do it that knows the stdlib.

    There shutdown() would wait for the loop that the handler interrupts: it takes another thread.
    """
    threading.Thread(target=server.shutdown).start()


def obey(server: Any) -> None:
    """Answer "count" with the descriptors, threads and children of this process; stop at the end of input."""
    for _ in sys.stdin:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        print(len(os.listdir("/proc/self/fd")), threading.active_count(), len(children), flush=True)
    server.shutdown()


def time_shutdowns(server: Any, rounds: int) -> None:
    """Print the milliseconds of each of ``rounds`` calls of shutdown()."""
    chance = random.Random(1)
    for _ in range(rounds):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"hello\n")
            assert client.recv(100) == b"HELLO\n"
        time.sleep(chance.uniform(0.02, 0.52))
        begin = time.perf_counter()
        server.shutdown()
        print((time.perf_counter() - begin) * 1000, flush=True)
        thread.join()
    server.server_close()


def time_stop(server: Any, how: str) -> None:
    """Print the milliseconds until serve_forever(), in this main thread, has ended for the reason ``how``."""
    begin = 0.0

    def stop() -> None:
        nonlocal begin
        time.sleep(0.6)
        begin = time.perf_counter()
        if how == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        elif how == "interrupt_main":
            _thread.interrupt_main()
        elif how == "thread_signal":
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        else:
            server._BaseServer__shutdown_request = True

    threading.Thread(target=stop).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    print((time.perf_counter() - begin) * 1000, flush=True)
    server.server_close()


if __name__ == "__main__":
    serve(*sys.argv[1:])
