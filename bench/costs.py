"""Measure what a server costs beside its requests: stopping it, idling, running out of descriptors, leaks.

    python bench/costs.py [--only COST ...] [--rounds N] [--connections N] [--json FILE]

Each figure is taken from the stdlib's socketserver, from fastserve's Python twin and from its C core, each in a
process of its own that serves on 127.0.0.1. Linux only: it reads /proc.

shutdown     milliseconds that shutdown() takes from another thread, on an idle server that serves with the default
             poll_interval; each round waits for a random part of half a second first, so that the stdlib's ticks
             are met at any phase.
idle         context switches of the whole process in five seconds, one second after its last request.
stop         milliseconds until serve_forever() in the main thread has ended, after Ctrl-C, interrupt_main(), a
             signal delivered to another thread, and the private flag being set.
exhaustion   per cent of a core that the process uses for five seconds while all its descriptors are taken and
             clients wait, and the milliseconds until a waiting client is served once a connection has ended.
idle_memory  bytes of resident memory for each of 1,000 and of 10,000 connections that are open and send nothing, each
             with a thread of its own.
sigterm      milliseconds from SIGTERM to the end of the process, whose handler calls shutdown() in a thread.
start        milliseconds that "import" takes beyond the start of the interpreter, and until a server accepts, both
             for the whole process; kilobytes of the extension modules.
fork         microseconds of CPU time of a forking server and its children for each connection, in a process that has
             loaded nothing else, and how many times that of the stdlib, the median of paired rounds: fork(2) copies the
             page tables of all that is loaded.
leaks        descriptors, threads and child processes more than before, after N connections of which every tenth
             raises in its handler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cost_server import DESCRIPTOR_LIMIT, WORKERS

SERVER = Path(__file__).with_name("cost_server.py")
IMPLEMENTATIONS = ["stdlib", "py", "c"]
STOPS = ["ctrl-c", "interrupt_main", "thread_signal", "flag"]
IDLE_SECONDS = 5.0
IDLE_CONNECTIONS = [1_000, 10_000]


def environment(implementation: str) -> dict[str, str]:
    """Return the environment in which a process uses this implementation."""
    return dict(os.environ, FASTSERVE_NO_EXTENSIONS="1" if implementation == "py" else "")


class Child:
    """A process that serves."""

    def __init__(self, implementation: str, worker: str, cost: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), implementation, worker, cost],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if cost == "exhaustion" else None,
            text=True,
            env=environment(implementation),
        )
        self.port = int(self.read())

    def read(self) -> str:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the server process ended")
        return line

    def tell(self, line: str) -> None:
        """Give it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def talk(self, line: bytes) -> bytes:
        """Send one line as a client, and return the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            client.sendall(line)
            return client.recv(100)

    def rss(self) -> int:
        """Return its resident memory in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def count(self) -> list[int]:
        """Return the descriptors, threads and children that it counts."""
        self.tell("count")
        return [int(word) for word in self.read().split()]

    def switches(self) -> int:
        """Return the context switches of all its threads so far."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if "ctxt_switches" in line:
                    total += int(line.split()[1])
        return total

    def cpu(self) -> float:
        """Return the seconds of CPU time of all its threads so far."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def end(self) -> str:
        """Stop it, and return what it wrote to standard error, if that is kept."""
        _, errors = self.process.communicate(timeout=60)
        return errors or ""


@contextlib.contextmanager
def child(implementation: str, worker: str, cost: str) -> Iterator[Child]:
    """Start a process that serves, and kill it if it is still there at the end of the block."""
    started = Child(implementation, worker, cost)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


def measure_shutdown(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the median, least and greatest latency of shutdown(), in milliseconds."""
    with child(implementation, "threads", "shutdown") as server:
        server.tell(str(options.rounds))
        times = [float(server.read()) for _ in range(options.rounds)]
        server.end()
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def measure_idle(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the context switches of an idle server of each worker model."""
    found = {}
    for worker in WORKERS:
        with child(implementation, worker, "idle") as server:
            for _ in range(10):
                assert server.talk(b"hello\n") == b"HELLO\n"
            time.sleep(1.0)
            before = server.switches()
            time.sleep(IDLE_SECONDS)
            found[f"{worker}_switches"] = server.switches() - before
            server.end()
    return found


def measure_stop(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the milliseconds until a server in the main thread has stopped, for each way of stopping it."""
    found = {}
    for how in STOPS:
        with child(implementation, "sync", "stop") as server:
            server.tell(how)
            found[f"{how}_ms"] = float(server.read())
            server.end()
    return found


def measure_exhaustion(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the CPU share of a server without descriptors, and how soon it serves again."""
    with child(implementation, "threads", "exhaustion") as server, contextlib.ExitStack() as clients:

        def connect() -> socket.socket:
            client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            client.sendall(b"hold\n")
            return client

        held = [connect() for _ in range(DESCRIPTOR_LIMIT)]
        served = []
        for client in held:
            client.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                client.recv(100)
                served.append(client)
        waiting = next(client for client in held if client not in served)
        time.sleep(1.0)
        before = server.cpu()
        time.sleep(IDLE_SECONDS)
        share = (server.cpu() - before) / IDLE_SECONDS * 100
        waiting.settimeout(30)
        begin = time.perf_counter()
        served[0].close()
        assert waiting.recv(100) == b"HOLD\n"
        resumed = (time.perf_counter() - begin) * 1000
        for client in held:
            client.close()
        errors = server.end()
    return {"cpu_percent": share, "resumed_ms": resumed, "reports": len(errors.splitlines())}


def measure_leaks(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is left after many connections with each worker model."""
    found = {}
    for worker in WORKERS:
        with child(implementation, worker, "leaks") as server:
            server.talk(b"hello\n")
            time.sleep(0.6)
            before = server.count()
            for number in range(options.connections):
                answer = server.talk(b"raise\n" if number % 10 == 0 else b"hello\n")
                assert answer == (b"" if number % 10 == 0 else b"HELLO\n"), answer
            deadline = time.monotonic() + 5.0
            while (after := server.count()) != before and time.monotonic() < deadline:
                time.sleep(0.1)
            names = ("descriptors", "threads", "children")
            for name, first, last in zip(names, before, after, strict=True):
                found[f"{worker}_{name}"] = last - first
            server.end()
    return found


def measure_idle_memory(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the resident bytes of an idle connection, with few and with many of them."""
    from fastserve._load import Idle

    found = {}
    for count in IDLE_CONNECTIONS:
        with child(implementation, "threads", "idle_memory") as server:
            server.talk(b"hello\n")
            before = server.rss()
            # What is echoed shows that the thread of each connection runs, and waits for the next line.
            with Idle(("127.0.0.1", server.port), count, b"HOLD\n"):
                found[f"of_{count}_bytes"] = round((server.rss() - before) / count)
            server.end()
    return found


def measure_sigterm(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the milliseconds from SIGTERM to the end of the process."""
    times = []
    for number in range(10):
        with child(implementation, "threads", "sigterm") as server:
            server.talk(b"hello\n")
            time.sleep(0.05 * number)  # the stdlib's ticks are met at any phase
            begin = time.perf_counter()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(30)
            times.append((time.perf_counter() - begin) * 1000)
    return {"median_ms": statistics.median(times), "max_ms": max(times)}


def measure_start(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what it costs to begin: the import, the start of a server, the size of the extension modules."""
    module = "socketserver" if implementation == "stdlib" else "fastserve"

    def run(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], env=environment(implementation), check=True)
        return (time.perf_counter() - begin) * 1000

    serve = f"import {module} as m; m.ThreadingTCPServer(('127.0.0.1', 0), m.BaseRequestHandler).server_close()"
    bare, imported, served = (
        statistics.median(run(code) for _ in range(15)) for code in ("pass", f"import {module}", serve)
    )
    size = 0
    if implementation == "c":
        import fastserve

        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        size = sum(path.stat().st_size for path in Path(fastserve.__file__).parent.glob(f"_*{suffix}"))
    return {"import_ms": imported - bare, "serving_ms": served - bare, "extensions_kb": round(size / 1024)}


FORKING = """
import resource, sys, threading
import {module} as module
class Handler(module.BaseRequestHandler):
    def handle(self):
        self.request.sendall(self.request.recv(64))
class Server(module.ForkingTCPServer):
    request_queue_size = 128
def stop():
    sys.stdin.read()
    server.shutdown()
with Server(("127.0.0.1", 0), Handler) as server:
    print(server.server_address[1], flush=True)
    threading.Thread(target=stop).start()
    server.serve_forever()
usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(sum(usage.ru_utime + usage.ru_stime for usage in usages))
"""
FORK_ROUNDS = 9
FORK_CLIENTS = 8
FORK_CONNECTIONS = 50  # of each client


def fork_cpu(implementation: str) -> float:
    """Return the microseconds of CPU time that a forking server takes for a connection."""
    module = "socketserver" if implementation == "stdlib" else "fastserve"
    program = [sys.executable, "-c", FORKING.format(module=module)]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(implementation)
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        address = ("127.0.0.1", int(server.stdout.readline()))

        def talk() -> None:
            for _ in range(FORK_CONNECTIONS):
                with socket.create_connection(address, timeout=30) as client:
                    client.sendall(b"hello")
                    assert client.recv(64) == b"hello"
                    assert client.recv(1) == b""

        try:
            with ThreadPoolExecutor(FORK_CLIENTS) as clients:
                for done in [clients.submit(talk) for _ in range(FORK_CLIENTS)]:
                    done.result()
            server.stdin.close()
            return float(server.stdout.read()) * 1e6 / (FORK_CLIENTS * FORK_CONNECTIONS)
        except BaseException:
            server.kill()
            raise


def measure_fork(implementation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a connection costs a forking server, and the stdlib's in turns with it."""
    pairs = [(fork_cpu("stdlib"), fork_cpu(implementation)) for _ in range(FORK_ROUNDS)]
    return {
        "cpu_us": statistics.median(own for _, own in pairs),
        "times_stdlib": statistics.median(own / stdlib for stdlib, own in pairs),
    }


COSTS = {
    "shutdown": measure_shutdown,
    "idle": measure_idle,
    "stop": measure_stop,
    "exhaustion": measure_exhaustion,
    "idle_memory": measure_idle_memory,
    "sigterm": measure_sigterm,
    "start": measure_start,
    "fork": measure_fork,
    "leaks": measure_leaks,
}


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COSTS, default=list(COSTS), metavar="COST", help="the costs")
    parser.add_argument("--rounds", type=int, default=30, help="calls of shutdown() (default 30)")
    parser.add_argument("--connections", type=int, default=10_000, help="connections of leaks (default 10000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error("it reads /proc and needs Linux")
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    print(f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores")
    for cost in options.only:
        figures[cost] = {name: COSTS[cost](name, options) for name in IMPLEMENTATIONS}
        rows = list(figures[cost][IMPLEMENTATIONS[0]])
        print(f"\n{cost:24}" + "".join(f"{name:>12}" for name in IMPLEMENTATIONS))
        for row in rows:
            values = (figures[cost][name][row] for name in IMPLEMENTATIONS)
            print(
                f"{row:24}"
                + "".join(f"{value:12.3f}" if isinstance(value, float) else f"{value:12}" for value in values)
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
