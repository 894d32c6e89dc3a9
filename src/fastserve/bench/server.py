"""The process that serves a handler for a measurement: ``python -m fastserve.bench.server``.

    python -m fastserve.bench.server stdlib|fastserve sync|threads|threadpool|fork|greenlet MODULE:HANDLER
        [--udp [--gather-replies]] [--max-workers N]

It prints the port that it serves on 127.0.0.1, and nothing else: what the handler prints is dropped. Under
``stdlib`` the handler gets the stdlib's classes even if its module imports fastserve; under ``fastserve`` it gets
ours even if its module imports socketserver. So the handler's source is the same for both.
"""

from __future__ import annotations

import argparse
import os
import signal
import socketserver
import sys
from types import FrameType
from typing import Any

import fastserve
from fastserve.cli.arguments import UsageError, positive
from fastserve.cli.targets import find_handler
from fastserve.workers._names import WORKERS, predefined

BACKLOG = 4096  # connections; none is refused while a server is behind


def main(argv: list[str] | None = None) -> None:
    """Serve until SIGTERM. Exits with status 2 and one line on standard error if there is no such handler."""
    parser = argparse.ArgumentParser(prog="fastserve.bench.server")
    parser.add_argument("implementation", choices=["stdlib", "fastserve"])
    parser.add_argument("worker", choices=WORKERS)
    parser.add_argument("target")
    parser.add_argument("--udp", action="store_true")
    parser.add_argument("--max-workers", type=positive)
    parser.add_argument("--gather-replies", action="store_true", help="set the attribute of the datagram servers")
    options = parser.parse_args(argv)
    told = _keep_standard_output()
    module: Any = fastserve
    if options.implementation == "stdlib":
        module = sys.modules["fastserve"] = socketserver
    else:
        fastserve.patch()
    try:
        handler = find_handler(options.target)
    except UsageError as error:
        parser.exit(2, f"{error}\n")

    class Server(predefined(module, options.worker, udp=options.udp)):  # type: ignore[misc]
        request_queue_size = BACKLOG
        daemon_threads = True
        block_on_close = False
        max_workers = options.max_workers
        gather_replies = options.gather_replies

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    with Server(("127.0.0.1", 0), handler) as server:
        os.write(told, b"%d\n" % server.server_address[1])
        os.close(told)
        server.serve_forever()


def _keep_standard_output() -> int:
    """Return a descriptor of standard output, and drop what is written to it from now on.

    Nobody reads it after the port: a handler that prints would stand still when the pipe is full.
    """
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return kept


if __name__ == "__main__":
    main()
