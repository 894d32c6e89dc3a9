"""Measure servers with many clients at a time: ``python bench/crowd.py memory|flood|slow|timeouts ... [--json FILE]``.

Each server is a process of its own on one processor, the clients are on another. Two processes of the same server, one
with the crowd and one without, take turns in short rounds, and the other one is stopped meanwhile. Linux only.

memory    bytes of resident memory (RSS), and of its share of what several processes share (PSS), for each of 10,000
          connections that have had the answer to one line and wait for the next. 100 others come first: what a server
          takes for its first clients is not counted. With a thread for each connection, the kernel's stacks come on
          top, which no process's figure has; they are told beside it, from /proc/meminfo. A server that does not take
          so many is measured at as many as it takes: the table says how many.
flood     latency of 100 clients that send a line and wait for the answer, without and with two others: one that sends
          without pause and reads all answers, and one that sends without pause and reads nothing.
slow      latency of 50 such clients without and with 5,000 others, each of which sends one byte a second of a line
          that does not end.
timeouts  CPU time of the server for each line of 50 clients beside 9,950 that wait, where ``timeout = 600`` on the
          handler class lets every wait end by itself, and where nothing does. A second server without it shows what
          two equal ones differ by.

The clients whose latency is taken are those of the load generator. Those
that send are processes of the lowest priority, so that the generator does not wait for them on the processor that
they share; they are stopped with their server. The
limit of descriptors is raised as far as the system allows, and fewer connections are made where it is too low.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from contenders import CONTENDERS, Contender
from report import number, table, times
from works import Work, lines

from fastserve.bench.machine import describe
from fastserve.bench.measure import Load, Ratio, Series, alternate, generator, pinned
from fastserve.bench.process import ServerFailed, ServerProcess, cores

OURS = "fastserve C greenlet"
IN_MEMORY = [OURS, "fastserve Python greenlet", "stdlib threading", "fastserve C threading", "gevent"]
IN_MEMORY += ["asyncio streams", "uvloop streams", "uvloop Protocol"]
IN_CROWDS = [OURS, "stdlib threading", "gevent", "asyncio streams", "uvloop Protocol"]

IDLE, FIRST = 10_000, 100  # connections
FLOODED, SLOW, UNSLOWED, ACTIVE = 100, 5_000, 50, 50
DESCRIPTORS = 16_384  # wanted
SPARE = 200  # descriptors for all else
PER_ADDRESS = 5_000  # connections from one address of 127/8: an address has no more than 65,535 ports
# ip(7): the port is chosen at connect(), where one that a connection to another server has had lately will do.
IP_BIND_ADDRESS_NO_PORT = 24
PATIENCE = 30.0  # seconds that a client waits for its first answer before the server counts as full
READY = 300.0  # seconds in which a crowd must have come together
SETTLE = 0.5  # seconds before memory is looked at
CHUNK = 65536  # bytes that a flood sends and receives at a time
TICKS = 100  # in which slow clients divide a second
GOALS = {
    "memory": f"at most 9,000 bytes of RSS for {OURS}",
    "flood": f"a p99 under 5 ms beside the flood for {OURS}",
    "slow": f"a p99 at most doubled by the slow clients for {OURS}",
    "timeouts": "nothing measurable: a ratio within the range of two equal servers",
}


class CrowdFailed(Exception):
    """The clients did not come together, or did not stay."""


class Alone(ServerProcess):
    """A server of one process.

    The generator asks for its CPU time while clients wait for their answers. To look for children in each of thousands
    of threads takes a third of a second, which would be their latency.
    """

    def cpu(self) -> float:
        """Return the seconds of CPU time of all threads so far: clock_getcpuclockid(3)."""
        return time.clock_gettime((~self.pid << 3) | 2)


# --- the processes of the other clients ---------------------------------------------------------------------


def connected(port: int, count: int) -> socket.socket:
    """Return a connection from the address whose turn it is."""
    client = socket.socket()
    try:
        client.settimeout(PATIENCE)
        client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        client.bind((f"127.0.1.{count // PER_ADDRESS + 1}", 0))
        client.connect(("127.0.0.1", port))
    except OSError:
        client.close()
        raise
    return client


def answered(client: socket.socket) -> bool:
    """Exchange one line; return whether it came back."""
    line = b"is anybody there?\n"
    try:
        client.sendall(line)
        return client.recv(len(line), socket.MSG_WAITALL) == line
    except OSError:
        return False


def be_idle(port: int, count: int) -> None:
    """Hold connections that wait. ``connect N`` on standard input makes more, ``check`` asks all for an answer."""
    held: list[socket.socket] = []
    print(0, flush=True)
    for words in map(str.split, sys.stdin):
        if words[0] == "connect":
            for _ in range(int(words[1])):
                try:
                    held.append(connected(port, len(held)))
                except OSError as error:  # the server is full, or this process is: the number tells
                    print(f"connection {len(held) + 1}: {error}", file=sys.stderr, flush=True)
                    break
                if not answered(held[-1]):
                    print(f"connection {len(held)} had no answer", file=sys.stderr, flush=True)
                    held.pop().close()
                    break
            print(len(held), flush=True)
        else:
            print(sum(map(answered, held)), flush=True)


def be_flood(port: int, count: int) -> None:
    """Send lines without pause over two connections; read what comes back on the first of them only."""
    chunk = (b"x" * 63 + b"\n") * (CHUNK // 64)
    both, deaf = (connected(port, 0) for _ in range(2))
    room = bytearray(CHUNK)
    with selectors.DefaultSelector() as selector:
        selector.register(both, selectors.EVENT_READ | selectors.EVENT_WRITE)
        selector.register(deaf, selectors.EVENT_WRITE)
        for client in (both, deaf):
            client.setblocking(False)
        print(2, flush=True)
        while True:
            for key, events in selector.select():
                client = cast(socket.socket, key.fileobj)
                if events & selectors.EVENT_READ:
                    client.recv_into(room)
                if events & selectors.EVENT_WRITE:
                    with contextlib.suppress(BlockingIOError):  # there was room for less than the kernel likes
                        client.send(chunk)


def be_slow(port: int, count: int) -> None:
    """Send one byte a second on each of ``count`` connections."""
    clients = [connected(port, number) for number in range(count)]
    for client in clients:
        client.sendall(b"x")
    print(count, flush=True)
    due = time.monotonic()
    while True:
        for part in range(TICKS):
            for client in clients[part::TICKS]:
                client.send(b"x")
            due = max(due + 1 / TICKS, time.monotonic() - 0.1)  # what was missed while stopped is not made up for
            time.sleep(max(due - time.monotonic(), 0.0))


COMPANIONS: dict[str, Callable[[int, int], None]] = {"idle": be_idle, "flood": be_flood, "slow": be_slow}


class Companion:
    """A process with the clients that are not measured."""

    def __init__(self, kind: str, server: ServerProcess, count: int) -> None:
        command = [sys.executable, __file__, "--companion", kind, str(server.address[1]), str(count)]
        self.kind = kind
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.reply()
        except BaseException:
            self.end()
            raise

    def reply(self) -> int:
        """Return the next number that it prints. Raises ``CrowdFailed`` if there is none in time."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(READY) else ""
        if not line.strip().isdigit():
            raise CrowdFailed(f"the clients of {self.kind} did not come together")
        return int(line)

    def ask(self, words: str) -> int:
        """Give it a command, and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return self.reply()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Companion:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()


@dataclass(frozen=True)
class Latency:
    """A load whose latency is taken while other clients are there, who are stopped when it is over.

    A connection that had no answer in the whole round counts as one that waited for the round's length.
    """

    load: Load
    companion: Companion | None = None

    def run(self, server: ServerProcess, seconds: float) -> dict[str, Any]:
        """Load the server as ``Load.run`` does."""
        if self.companion is not None:
            self.companion.resume()
        try:
            result = self.load.run(server, seconds)
        finally:
            if self.companion is not None:
                self.companion.pause()
        for name, share in (("p50_us", 0.5), ("p99_us", 0.01), ("max_us", 0.0)):
            if result["stalled"] > share * self.load.connections or not result["requests"]:
                result[name] = max(result[name], seconds * 1e6)
        return result


# --- what is measured ---------------------------------------------------------------------------------------


def load_of(connections: int) -> Load:
    """Return the load of clients that send a line and wait for the answer."""
    return replace(lines(1).load, connections=connections)


def chosen(names: Sequence[str]) -> Iterator[tuple[Contender, str]]:
    """Yield the servers of these names, and why one cannot run."""
    for contender in CONTENDERS:
        if contender.name in names:
            yield contender, contender.missing()


def started(contender: Contender, core: int, name: str, work: Work) -> ServerProcess:
    """Start a server on a processor."""
    return Alone(name, contender.arguments(work), core, contender.environment)


def memory_of(pid: int) -> dict[str, int]:
    """Return the bytes of memory of a process, and of the stacks that the kernel has for all threads."""
    found = {}
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    for name in ("Rss", "Pss"):
        (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB$", rollup, re.MULTILINE)
        found[name.lower()] = int(kilobytes) * 1024
    (kilobytes,) = re.findall(r"^KernelStack:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    found["kernel_stacks"] = int(kilobytes) * 1024
    return found


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Return the memory for each connection that waits, by server."""
    count = min(options.connections or IDLE, room())
    rows: list[dict[str, Any]] = []
    for contender, missing in chosen(IN_MEMORY):
        if missing:
            rows.append({"name": contender.name, "missing": missing})
            continue
        with (
            started(contender, options.core, contender.name, lines(1)) as server,
            Companion("idle", server, 0) as crowd,
        ):
            first = crowd.ask(f"connect {FIRST}")
            time.sleep(SETTLE)
            before = memory_of(server.pid)
            reached = crowd.ask(f"connect {count}") - first
            time.sleep(SETTLE)
            after = memory_of(server.pid)
            alive = crowd.ask("check")
            server.check()
            if reached <= 0 or alive != first + reached:
                raise CrowdFailed(
                    f"{contender.name}: {alive} of {first + reached} connections had an answer at the end"
                )
        row = {"name": contender.name, "connections": reached, "asked": count}
        rows.append(row | {key: round((after[key] - before[key]) / reached) for key in before})
        say(f"{contender.name}: {rows[-1]['rss']:,} bytes for each of {reached:,} connections")
    ours = next((row["rss"] for row in rows if row["name"] == OURS and "rss" in row), math.inf)
    return {"rows": rows, "met": ours <= 9_000}


def measure_beside(
    kind: str, connections: int, count: int, options: argparse.Namespace, good: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return the latency of clients without and with others, by server."""
    rows: list[dict[str, Any]] = []
    load = load_of(connections)
    for contender, missing in chosen(IN_CROWDS):
        if missing:
            rows.append({"name": contender.name, "missing": missing})
            continue
        try:
            with (
                started(contender, options.core, "without", lines(1)) as without,
                started(contender, options.core, "with", lines(1)) as beside,
                Companion(kind, beside, count) as crowd,
            ):
                crowd.pause()
                loads = cast(Mapping[str, Load], {"without": Latency(load), "with": Latency(load, crowd)})
                found = alternate([without, beside], loads, options.rounds, options.seconds)
        except CrowdFailed as error:
            rows.append({"name": contender.name, "missing": str(error)})
            continue
        row: dict[str, Any] = {"name": contender.name, "connections": connections, "others": count}
        row |= {name: figures(series) for name, series in found.items()}
        row |= {"ratio": ratio(found["with"].ratio(found["without"], "p99_us"))}
        rows.append(row)
        say(f"{contender.name}: p99 {row['without']['p99_us']:,.0f} µs without, {row['with']['p99_us']:,.0f} µs with")
    met = any(row["name"] == OURS and "with" in row and good(row) for row in rows)
    return {"rows": rows, "met": met}


def measure_flood(options: argparse.Namespace) -> dict[str, Any]:
    """Return the latency beside a flood."""
    return measure_beside("flood", FLOODED, 2, options, lambda row: row["with"]["p99_us"] < 5_000)


def measure_slow(options: argparse.Namespace) -> dict[str, Any]:
    """Return the latency beside slow clients."""
    count = min(options.connections or SLOW, room())
    return measure_beside("slow", UNSLOWED, count, options, lambda row: row["ratio"][0] <= 2.0)


def measure_timeouts(options: argparse.Namespace) -> dict[str, Any]:
    """Return the CPU time for each request with and without a deadline of every wait."""
    count = min(options.connections or IDLE, room()) - ACTIVE
    load = load_of(ACTIVE)
    contender, missing = next(chosen([OURS]))
    if missing:
        raise CrowdFailed(f"{OURS}: {missing}")
    plain = lines(1)
    works = {"without": plain, "without, again": plain, "timeout = 600": replace(plain, handler="TimedLines")}
    with contextlib.ExitStack() as stack:
        servers, crowds = [], []
        for name, work in works.items():
            servers.append(stack.enter_context(started(contender, options.core, name, work)))
            crowds.append(stack.enter_context(Companion("idle", servers[-1], 0)))
            if (reached := crowds[-1].ask(f"connect {count}")) != count:
                raise CrowdFailed(f"{reached} of {count} connections had an answer")
            servers[-1].pause()
        found = alternate(servers, load, options.rounds, options.seconds)
        for server, crowd in zip(servers, crowds, strict=True):
            server.resume()
            if (alive := crowd.ask("check")) != count:
                raise CrowdFailed(f"{server.name}: {alive} of {count} connections had an answer at the end")
            server.pause()
    base = found["without"]
    rows = [
        {"name": name, "connections": ACTIVE, "others": count, "figures": figures(series)}
        | {"ratio": ratio(series.ratio(base))}
        for name, series in found.items()
    ]
    _, low, high = rows[1]["ratio"]
    for row in rows[1:]:
        say(f"{row['name']}: {times(Ratio(*row['ratio']))} of the CPU time without")
    return {"rows": rows, "met": low <= rows[2]["ratio"][0] <= high or rows[2]["ratio"][0] <= 1.0}


def figures(series: Series) -> dict[str, Any]:
    """Return the medians of one server, and its rounds."""
    kept = ("requests_per_second", "cpu_us", "p50_us", "p99_us", "max_us", "errors")
    found = {name: float(f"{series.median(name):.5g}") for name in kept}
    return found | {"rounds": [{name: float(f"{entry[name]:.5g}") for name in kept} for entry in series.rounds]}


def ratio(found: Ratio) -> list[float]:
    """Return a ratio as it is stored: mean, lowest, highest."""
    return [float(f"{value:.5g}") for value in (found.mean, found.low, found.high)]


MEASURES = {"memory": measure_memory, "flood": measure_flood, "slow": measure_slow, "timeouts": measure_timeouts}


# --- what is told -------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result, under a line that says on what it was measured."""
    machine = result["machine"]
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items() if found)
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['python']}, fastserve "
        f"{machine['fastserve']} ({machine['implementation']}, commit {machine['commit']}), {packages}, "
        f"{machine['date']}; medians of {result['rounds']} rounds of {result['seconds']:g} s; ratios are of paired "
        f"rounds, with their range."
    ]
    for name, tell in (
        ("memory", tell_memory),
        ("flood", tell_latency),
        ("slow", tell_latency),
        ("timeouts", tell_cpu),
    ):
        if name in result["crowds"]:
            crowd = result["crowds"][name]
            goal = f"The goal is {GOALS[name]}: {'met' if crowd['met'] else 'missed'}."
            parts += [f"#### {TITLES[name]}", WHATS[name], tell(crowd["rows"]), goal]
    return "\n\n".join(parts) + "\n"


TITLES = {
    "memory": "Connections that wait",
    "flood": "Beside a flood",
    "slow": "Beside slow clients",
    "timeouts": "Timeouts on all connections",
}
WHATS = {
    "memory": "Each has had the answer to one line and waits for the next. The kernel's stacks, for servers with a "
    "thread for each connection, are no part of a process's memory and come on top.",
    "flood": f"{FLOODED} clients send a line and wait for the answer, without and with two others: one sends lines "
    "without pause and reads all answers, one sends without pause and reads nothing. A connection without an answer in "
    "a whole round is an error, and counts as one that waited so long.",
    "slow": f"{UNSLOWED} clients send a line and wait for the answer, without and with others that send one byte a "
    "second each.",
    "timeouts": f"{ACTIVE} clients send a line and wait for the answer, beside others that wait for their next line; "
    f"all by {OURS}, with and without `timeout = 600` on the handler class.",
}


def bold(name: str) -> str:
    return f"**{name}**" if name.startswith("fastserve") else name


def absent(row: Mapping[str, Any], columns: int) -> list[str] | None:
    """Return the line of a server that is missing."""
    return [row["name"], f"missing: {row['missing']}", *["–"] * (columns - 2)] if "missing" in row else None


def tell_memory(rows: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "server",
        "connections",
        "RSS, bytes each",
        "PSS, bytes each",
        "kernel's stacks, bytes each",
        "RSS of 10,000",
    ]
    cells = []
    for row in sorted(rows, key=lambda row: row.get("rss", math.inf)):
        if line := absent(row, len(head)):
            cells.append(line)
            continue
        whole = f"{row['rss'] * IDLE / 1e6:,.0f} MB" + ("" if row["connections"] >= IDLE else ", extrapolated")
        figures = [f"{row[key]:,}" for key in ("connections", "rss", "pss", "kernel_stacks")]
        cells.append([bold(row["name"]), *figures, whole])
    return table(head, cells)


def tell_latency(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["server", "others", "p50 µs without", "with", "p99 µs without", "with", "ratio of p99", "longest µs with"]
    head += ["requests/s without", "with", "errors"]
    cells = []
    for row in rows:
        if line := absent(row, len(head)):
            cells.append(line)
            continue
        one, two = row["without"], row["with"]
        line = [bold(row["name"]), f"{row['others']:,}"]
        line += [number(side[key]) for key in ("p50_us", "p99_us") for side in (one, two)]
        line += [times(Ratio(*row["ratio"])), number(two["max_us"])]
        line += [f"{side['requests_per_second']:,.0f}" for side in (one, two)]
        cells.append([*line, f"{sum(entry['errors'] for side in (one, two) for entry in side['rounds']):.0f}"])
    return table(head, cells)


def tell_cpu(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["handler", "others", "CPU µs per request", "ratio to the first", "requests/s", "p99 µs"]
    return table(
        head,
        [
            [
                row["name"],
                f"{row['others']:,}",
                number(row["figures"]["cpu_us"]),
                times(Ratio(*row["ratio"])),
                f"{row['figures']['requests_per_second']:,.0f}",
                number(row["figures"]["p99_us"]),
            ]
            for row in rows
        ],
    )


# --- the command --------------------------------------------------------------------------------------------


def room() -> int:
    """Return how many connections a process can have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE


def raise_limit() -> None:
    """Allow this process, and those that it starts, as many descriptors as are wanted, or as many as may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the tables. Returns 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(MEASURES) + " (default: all)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--seconds", type=float, default=0.4, metavar="S", help="of each round (default: 0.4)")
    parser.add_argument("--connections", type=int, metavar="N", help="instead of 10,000, or of 5,000 slow ones")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--companion", nargs=3, metavar=("KIND", "PORT", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.companion:
        kind, port, count = options.companion
        if kind != "idle":  # which has nothing to do while the latency is taken
            os.nice(19)
        COMPANIONS[kind](int(port), int(count))
        return 0
    if options.rounds < 1 or not 0.1 <= options.seconds <= 60:
        parser.error("there must be at least one round, of 0.1 to 60 seconds")
    if unknown := set(options.what) - set(MEASURES):
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    raise_limit()
    generator()
    result = {"machine": describe(["gevent", "greenlet", "uvloop"])}
    result |= {"rounds": options.rounds, "seconds": options.seconds, "crowds": {}}
    failed = False
    options.core, load_core = cores()
    with pinned(load_core):
        for name in options.what or MEASURES:
            begun = time.monotonic()
            try:
                result["crowds"][name] = MEASURES[name](options)
            except (CrowdFailed, ServerFailed) as error:
                say(f"bench/crowd.py: {name}: {error}")
                failed = True
            say(f"{name} took {time.monotonic() - begun:.0f} s")
    print(markdown(result), end="")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
