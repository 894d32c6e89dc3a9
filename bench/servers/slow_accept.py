"""A fastserve server whose accept is too slow: ``slow_accept.py MICROSECONDS`` and what fastserve.bench.server takes.

It shows that the tables see such a thing. The time is burnt in a busy loop around ``get_request``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import fastserve
from fastserve.bench import server


def main() -> None:
    """Serve until SIGTERM."""
    nanoseconds = int(float(sys.argv[1]) * 1000)
    get_request = fastserve.TCPServer.get_request

    def slow(self: Any) -> Any:
        until = time.perf_counter_ns() + nanoseconds
        while time.perf_counter_ns() < until:
            pass
        return get_request(self)

    fastserve.TCPServer.get_request = slow  # type: ignore[method-assign]
    server.main(sys.argv[2:])


if __name__ == "__main__":
    main()
