"""Measure what a second core is worth to servers with threads whose handlers compute: nothing, where there is a GIL.

    python bench/cores.py [--servers NAME ...] [--rounds N] [--seconds S] [--clients N] [--work N]

Run it with a free-threaded Python. Each figure is the rate of a server in a process of its own that may run on one
processor, and then on two, in alternating rounds; each request is a connection of its own, and its handler adds up
squares in Python, some milliseconds of one core. The clients run in this process; what they cost is a few per cent.
Linux only: it sets affinities.
"""

from __future__ import annotations

import argparse
import os
import socket
import socketserver
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import fastserve
from fastserve import _backend

SERVERS: dict[str, Any] = {
    "stdlib threading": socketserver.ThreadingTCPServer,
    "fastserve threads": fastserve.ThreadingTCPServer,
    "fastserve pool": fastserve.ThreadPoolTCPServer,
}
TIMEOUT = 30.0  # seconds that a client waits at most


class Squares(socketserver.BaseRequestHandler):
    """Add up as many squares as are asked for."""

    def handle(self) -> None:
        """Answer with the sum."""
        count = int(self.request.recv(100))
        self.request.sendall(b"%d\n" % sum(number * number for number in range(count)))


def serve(name: str, processors: list[int]) -> None:
    """Be the process of a server: print the port, serve until standard input ends, and tell whether there is a GIL."""
    os.sched_setaffinity(0, processors)
    with SERVERS[name](("127.0.0.1", 0), Squares) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()
        server.shutdown()
    print("with the GIL" if _backend.has_gil() else "without a GIL", flush=True)


def client(port: int, work: int, until: float, done: list[int]) -> None:
    """Ask for sums until then, at least for one, and note how many were answered."""
    answered = 0
    expected = b"%d\n" % sum(number * number for number in range(work))
    while not answered or time.monotonic() < until:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
            connection.sendall(b"%d" % work)
            answer = b""
            while part := connection.recv(100):
                answer += part
            assert answer == expected, answer
        answered += 1
    done.append(answered)


def rate(name: str, processors: list[int], args: argparse.Namespace) -> tuple[float, str]:
    """Return the requests per second of a server that may run on these processors, and what it says of the GIL."""
    command = [sys.executable, __file__, "--serve", name, "--processors", *map(str, processors)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        port = int(process.stdout.readline())
        done: list[int] = []
        begun = time.monotonic()
        until = begun + args.seconds
        clients = [threading.Thread(target=client, args=(port, args.work, until, done)) for _ in range(args.clients)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        seconds = time.monotonic() - begun
        process.stdin.close()
        gil = process.stdout.readline().strip()
    if process.returncode != 0 or len(done) != len(clients):
        sys.exit(f"{name}: a client failed, or the server: exit status {process.returncode}")
    return sum(done) / seconds, gil


def main() -> None:
    """Measure, and print a line for each server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--work", type=int, default=50_000, help="squares for each request")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--processors", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.processors)
        return
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        sys.exit("two processors are needed")
    print(f"Python {sys.version.split()[0]}, {args.rounds} rounds of {args.seconds:g} s, {args.clients} clients")
    for name in args.servers:
        pairs = []
        for _ in range(args.rounds):
            one, gil = rate(name, available[:1], args)
            two, gil = rate(name, available[:2], args)
            pairs.append((one, two))
        ratios = [two / one for one, two in pairs]
        one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{name:18} {gil}: {one:.0f} requests/s on one core, {two:.0f} on two: "
            f"{statistics.median(ratios):.2f} times ({min(ratios):.2f}-{max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
