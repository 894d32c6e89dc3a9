"""A counter that all processes share, on however many machines: it is kept in Redis, and not here.

    redis-server --port 6379
    python examples/redis_counter.py --port 7000 --workers 2 --redis redis://127.0.0.1:6379/0

Then `nc 127.0.0.1 7000` from several terminals: each line is answered with the process that has read it, and with how
many lines all clients have sent, also after the server was started again. It needs redis-py: pip install redis
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import fastserve


class CountingHandler(fastserve.StreamRequestHandler):
    """Count the lines of a client."""

    server: CountingServer

    def handle(self) -> None:
        for _ in self.rfile:
            self.wfile.write(self.server.count().encode())


class CountingServer(fastserve.PreforkMixIn, fastserve.ThreadingTCPServer):
    """Several processes, each with a pool of connections that its threads share."""

    allow_reuse_address = True
    redis_url = ""
    redis: Any

    def worker_started(self, place: int) -> None:
        """Make the pool, in the worker: two processes must not write to the same connection."""
        import redis  # here, so that --help needs no redis-py

        # A server that does not answer is an error of the handler, and not the end of all threads.
        self.redis = redis.Redis.from_url(self.redis_url, socket_timeout=5, socket_connect_timeout=5)

    def count(self) -> str:
        """Count a line. INCR reads and writes in one step, whoever else counts at the same time."""
        lines = self.redis.incr("fastserve:lines")
        return f"process {os.getpid()}: {lines}\n"


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Count lines in Redis.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--redis", default="redis://127.0.0.1:6379/0", metavar="URL")
    arguments = parser.parse_args()

    with CountingServer(("127.0.0.1", arguments.port), CountingHandler) as server:
        server.workers = arguments.workers
        server.redis_url = arguments.redis
        print(f"listening on 127.0.0.1:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
