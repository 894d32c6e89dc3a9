"""What several processes bring a handler that computes: ``python bench/processes.py [--workers N]``.

Two servers with ``PreforkMixIn``, one of a single worker and one of several, take turns in short rounds. The handler
computes for some milliseconds for each line; eight clients for each worker send line after line. The figure is the
ratio of the requests per second. No process is bound to a processor.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import fastserve

LOOPS = 60_000  # of the handler


class Computing(fastserve.StreamRequestHandler):
    """Compute for each line, and answer with it."""

    def handle(self) -> None:
        for line in self.rfile:
            total = 0
            for number in range(LOOPS):
                total += number
            self.wfile.write(line)


def start(workers: int) -> tuple[subprocess.Popen[str], tuple[str, int]]:
    """Start a server in processes of its own; return it and its address."""
    command = [sys.executable, "-m", "fastserve", "serve", f"{__file__}:Computing", "--bind", "127.0.0.1:0"]
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    host, _, port = process.stdout.readline().split()[3].rpartition(":")
    return process, (host, int(port))


def rate(address: tuple[str, int], clients: int, seconds: float) -> float:
    """Return how many lines per second are answered."""
    deadline = time.monotonic() + seconds
    counts = [0] * clients

    def ask(place: int) -> None:
        with socket.create_connection(address, timeout=30) as client, client.makefile("rb") as answers:
            while time.monotonic() < deadline:
                client.sendall(b"line\n")
                if not answers.readline():
                    raise ConnectionError("the server has closed the connection")
                counts[place] += 1

    begun = time.monotonic()
    threads = [threading.Thread(target=ask, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - begun)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/processes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=usable, metavar="N", help="(default here: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a round (default: %(default)s)")
    options = parser.parse_args(argv)
    servers = [start(workers) for workers in (1, options.workers)]
    try:
        # A connection stays with its worker: so many that it matters little how the kernel spreads them.
        clients = 8 * options.workers
        rounds = [[rate(address, clients, options.seconds) for _, address in servers] for _ in range(options.rounds)]
    finally:
        for process, _ in servers:
            process.send_signal(signal.SIGINT)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    one, several = (statistics.median(found) for found in zip(*rounds, strict=True))
    ratios = sorted(found[1] / found[0] for found in rounds)
    print(
        f"1 worker: {one:.0f} requests/s, {options.workers} workers: {several:.0f} requests/s; "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); {fastserve.implementation}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
