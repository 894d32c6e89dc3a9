"""A server in a program of its own, for tests: server_program.py CLASS ATTRIBUTES

CLASS is the class that follows ``PreforkMixIn``, ATTRIBUTES what the server's class has, as JSON; with "workers": 0 it
has no such mix-in. "mix_ins" are names of others, which come before it. The first line on standard output is the
address; a line is written for each worker that starts, and for each request to sleep that begins. A handler answers
with what it is asked for. With "again": true SIGUSR2 shuts the server down, which serves once more then.
"""

from __future__ import annotations

import http.server
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fastserve


class Handler(fastserve.BaseRequestHandler):
    """Answer requests, each of which is a line (or a datagram), until the client ends the connection."""

    def handle(self) -> None:
        if isinstance(self.request, tuple):
            data, listener = self.request
            listener.sendto(self.answer(data.decode().split()), self.client_address)
            return
        with self.request.makefile("rb") as lines:
            while line := self.next_line(lines):
                self.request.sendall(self.answer(line.decode().split()) + b"\n")

    def next_line(self, lines: Any) -> bytes:
        return lines.readline()  # type: ignore[no-any-return]

    def answer(self, words: list[str]) -> bytes:
        match words:
            case ["pid"]:
                return str(os.getpid()).encode()
            case ["sleep", seconds]:
                os.write(1, b"sleeps\n")
                fastserve.sleep(float(seconds))
            case ["block", seconds]:
                time.sleep(float(seconds))
            case ["count", name]:
                return str(getattr(self.server, name)).encode()
            case ["client"]:
                return str(self.client_address).encode()
            case ["descriptors"]:
                return str(len(os.listdir("/proc/self/fd"))).encode()
            case ["shutdown"]:
                threading.Thread(target=self.server.shutdown).start()
            case ["exit"]:
                os._exit(7)
            case ["raise"]:
                raise RuntimeError("it was asked for")
            case ["stats"]:
                return told(self.server).encode()
        return b"done"


class Kept(Handler):
    """Say that a client may be closed which has not begun a request."""

    def next_line(self, lines: Any) -> bytes:
        with fastserve.idle(self):
            lines.peek(1)
        return super().next_line(lines)


def told(server: Any) -> str:
    """Return what a server has counted, in one line."""
    stats = server.stats()
    return json.dumps(
        {
            "accepted": stats.accepted, "handled": stats.handled, "errors": stats.errors, "active": stats.active,
            "received": stats.bytes_received, "pids": stats.pids, "delay": stats.loop_delay,
            "workers": {place: worker.accepted for place, worker in stats.workers.items()},
        }
    )  # fmt: skip


class Http(fastserve.DrainHTTPMixIn, http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


class Extra:
    """What the tests look at."""

    actions = 0
    fails_while = ""  # the name of a file: a worker does not start while it exists

    def worker_started(self, place: int) -> None:
        if self.fails_while and Path(self.fails_while).exists():
            raise RuntimeError("not now")
        os.write(1, b"worker %d %d\n" % (place, os.getpid()))

    def service_actions(self) -> None:
        super().service_actions()  # type: ignore[misc]
        self.actions += 1


class Quiet:
    worker_started = Extra.worker_started
    fails_while = ""


class Deaf(Extra):
    """Its workers miss the first signal that tells them to end."""

    def worker_started(self, place: int) -> None:
        on_term = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, on_term))
        super().worker_started(place)


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    extra = Extra if options.pop("counts_actions", False) else Deaf if options.pop("deaf", False) else Quiet
    own_handlers, again = options.pop("own_handlers", False), options.pop("again", False)
    counts = options.pop("counts", False)
    drain_timeout = options.pop("drain_timeout", None)
    line_handler = Kept if options.pop("kept", False) else Handler
    address = options.pop("address", ["127.0.0.1", 0])
    mix_ins = [getattr(fastserve, mix_in) for mix_in in options.pop("mix_ins", [])]
    if log := options.pop("log", None):
        logging.basicConfig(filename=log, level=logging.INFO, format="%(levelname)s %(message)s")
    if name == "http":
        bases: Any = (fastserve.GreenletMixIn, http.server.HTTPServer)
        handler: Any = Http
    else:
        bases, handler = (getattr(fastserve, name),), line_handler
    if counts:
        bases = (fastserve.StatsMixIn, *bases)
    if options.get("workers") != 0:
        bases = (extra, *mix_ins, fastserve.PreforkMixIn, *bases)
    attributes = {"request_queue_size": 512, "daemon_threads": True, **options}
    server = type("Server", bases, attributes)(address if isinstance(address, str) else tuple(address), handler)
    if own_handlers:
        signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"own handler\n") and server._BaseServer__shutdown_request)
    if counts:
        signal.signal(signal.SIGUSR1, lambda *_: os.write(1, f"stats {told(server)}\n".encode()))

    def drain() -> None:
        os.write(1, b"drained %d\n" % server.drain(drain_timeout))

    if not counts:
        signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=drain).start())
    where = server.server_address if isinstance(server.server_address, str) else server.server_address[1]
    if again:
        signal.signal(signal.SIGUSR2, lambda *_: threading.Thread(target=server.shutdown).start())
    print(where, os.getpid(), flush=True)
    with server:
        try:
            server.serve_forever()
        finally:
            print("served", flush=True)
        if again:
            server.serve_forever()
            print("served again", flush=True)
    print("left", len(os.listdir("/proc/self/fd")), flush=True)


if __name__ == "__main__":
    main()
