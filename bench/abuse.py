"""Measure servers beside clients that mean no good: ``python bench/abuse.py slow|handshakes ... [--json FILE]``.

As in ``crowd.py``, a server with such clients and one without take turns in short rounds. Linux only.

slow        latency of clients that send a line, without and beside 2,000 others that send one byte a second and 2,000
            that send nothing. Then how late they are cut by ``request_timeout`` and ``idle_timeout``.
handshakes  time that a client needs to connect, do the handshake of TLS and have the answer to a line, without and
            beside clients that do not complete their handshake: half of them send nothing, half of them a piece of it.

A pool of threads serves as many clients at a time as it has threads, whoever they are. It is measured with more threads
than there are clients, and with few and a limit for each address.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from crowd import TICKS, Alone, Companion, CrowdFailed, Latency, connected, figures, load_of, raise_limit, ratio, say
from report import number, table, times
from works import short_connections

from fastserve.bench.machine import describe
from fastserve.bench.measure import Load, Ratio, Series, alternate, generator, pinned
from fastserve.bench.process import ServerFailed, ServerProcess, cores

LIMITED = Path(__file__).with_name("servers") / "limited.py"
SLOW, IDLE, ACTIVE, SHORT = 2_000, 2_000, 50, 8  # connections
LONG = 600.0  # seconds: a limit that does not take effect
REQUEST, WAIT = 6.0, 3.0  # seconds: limits that do
GRACE = 5.0  # seconds after the last limit in which all must have been cut
FEW = 32  # threads
SILENT = 200  # clients
PIECE = bytes.fromhex("16030102000100")  # the beginning of a ClientHello: RFC 8446, 4.1.2 and 5.1
TURN = 3.0  # seconds: the handshake_timeout of a server that serves one client at a time


@dataclass(frozen=True)
class Setting:
    """A server that is measured.

    :param worker: the name for ``--worker``.
    :param many: whether connections are kept; without it each request has its own.
    :param others: clients that do not complete their handshake.
    """

    worker: str
    name: str
    mix_ins: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    many: bool = True
    others: int = SILENT

    def started(self, core: int, name: str, first: str, handler: str, **attributes: Any) -> ServerProcess:
        """Start it on a processor, with one mix-in before its own."""
        chosen = json.dumps({**attributes, **self.attributes})
        command = [sys.executable, str(LIMITED), ",".join((first, *self.mix_ins)), handler, chosen]
        return Alone(name, command, core, {"FASTSERVE_NO_EXTENSIONS": "0"})


BESIDE_SLOW = [
    Setting("greenlet", "greenlets", ("GreenletMixIn",)),
    Setting("pool", f"pool of {SLOW + IDLE + 100:,} threads", ("ThreadPoolMixIn",), {"max_workers": SLOW + IDLE + 100}),
    Setting(
        "pool",
        f"pool of {FEW} threads, {FEW // 2} connections for each address",
        ("ThreadPoolMixIn",),
        {"max_workers": FEW, "max_connections_per_client": FEW // 2},
        many=False,
    ),
]

BESIDE_SILENT = [
    Setting("threads", "threads", ("ThreadingMixIn",)),
    Setting("greenlet", "greenlets", ("GreenletMixIn",)),
    Setting("pool", f"pool of {SILENT + 8} threads", ("ThreadPoolMixIn",), {"max_workers": SILENT + 8}),
    Setting("fork", f"forking, {SILENT + 8} children", ("ForkingMixIn",), {"max_children": SILENT + 8}),
    Setting("prefork", "2 processes of threads", ("PreforkMixIn", "ThreadingMixIn"), {"workers": 2}),
    Setting("prefork", "2 processes of greenlets", ("PreforkMixIn", "GreenletMixIn"), {"workers": 2}),
    Setting("sync", f"one at a time, handshake_timeout = {TURN:g}", (), {"handshake_timeout": TURN}, others=1),
]


# --- the clients that mean no good --------------------------------------------------------------------------


def be_abusive(port: int, slow: int, idle: int) -> None:
    """Hold connections that send a byte a second, and others that send nothing. ``cuts`` tells when each was cut.

    Both come in turns, so that neither of them has all threads of a server that has few.
    """
    since: dict[socket.socket, float] = {}
    slow_ones: list[socket.socket] = []
    cut: dict[str, list[float]] = {"slow": [], "idle": []}
    for place in range(slow + idle):
        client = connected(port, place)
        since[client] = time.monotonic()
        if place * slow // (slow + idle) != (place + 1) * slow // (slow + idle):
            slow_ones.append(client)
    are_slow = set(slow_ones)
    with selectors.DefaultSelector() as selector:
        for client in since:
            client.setblocking(False)
            selector.register(client, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print(slow + idle, flush=True)
        due, part = time.monotonic(), 0
        while True:
            for key, _ in selector.select(max(due - time.monotonic(), 0.0)):
                if key.fileobj is sys.stdin:
                    sys.stdin.readline()
                    print(json.dumps({"open": len(since), **cut}), flush=True)
                    continue
                client = cast(socket.socket, key.fileobj)
                cut["slow" if client in are_slow else "idle"].append(time.monotonic() - since.pop(client))
                selector.unregister(client)
                client.close()
            if time.monotonic() >= due:
                for client in slow_ones[part::TICKS]:
                    with contextlib.suppress(OSError):  # it was cut
                        client.send(b"x")
                part = (part + 1) % TICKS
                due = max(due + 1 / TICKS, time.monotonic() - 0.1)  # what was missed while stopped is not made up for


class Abusers(Companion):
    """The process of the slow and the idle clients."""

    def __init__(self, server: ServerProcess, slow: int, idle: int) -> None:
        command = [sys.executable, __file__, "--abusive", str(server.address[1]), str(slow), str(idle)]
        self.kind = "abuse"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.reply()
        except BaseException:
            self.end()
            raise

    def cuts(self) -> dict[str, Any]:
        """Return how many are open, and after how many seconds each of the others was cut."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("cuts\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


# --- what is measured ---------------------------------------------------------------------------------------


def measure_slow(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Return the latency without and beside slow and idle clients, and when these were cut."""
    load = load_of(ACTIVE) if setting.many else short_connections(SHORT)
    handler = "Lines" if setting.many else "OneLine"
    limits = {"request_timeout": LONG, "idle_timeout": LONG}
    with (
        setting.started(options.core, "without", "LimitsMixIn", handler, **limits) as without,
        setting.started(options.core, "with", "LimitsMixIn", handler, **limits) as beside,
        Abusers(beside, SLOW, IDLE) as crowd,
    ):
        with socket.create_connection(beside.address, LONG) as last:  # when it has its answer all others were taken
            last.sendall(b"hello\n")
            last.recv(100)
        held = crowd.cuts()["open"]
        crowd.pause()
        loads = cast(Mapping[str, Load], {"without": Latency(load), "with": Latency(load, crowd)})
        found = alternate([without, beside], loads, options.rounds, options.seconds)
    row: dict[str, Any] = {"name": setting.name, "held": held, "ratio": ratio(p99_ratio(found))}
    row |= {name: figures(series) for name, series in found.items()}
    limits = {"request_timeout": REQUEST, "idle_timeout": WAIT}
    with (
        setting.started(options.core, "cut", "LimitsMixIn", handler, **limits) as server,
        Abusers(server, SLOW, IDLE) as crowd,
    ):
        deadline = time.monotonic() + REQUEST + GRACE
        while (told := crowd.cuts())["open"] and time.monotonic() < deadline:
            time.sleep(0.2)
    row["left"] = told["open"]
    for name, limit in (("slow", REQUEST), ("idle", WAIT)):
        late = [seconds - limit for seconds in told[name] if seconds > limit / 2]  # others were refused
        row[f"{name}_late"] = [statistics.median(late), max(late)] if late else []
    return row


def p99_ratio(found: Mapping[str, Series]) -> Ratio:
    return found["with"].ratio(found["without"], "p99_us")


@dataclass(frozen=True)
class Handshakes:
    """One client after the other that connects, does its handshake and has its answer."""

    context: ssl.SSLContext

    def run(self, server: ServerProcess, seconds: float) -> dict[str, Any]:
        """Load the server as ``Load.run`` does."""
        taken = []
        before = server.cpu()
        end = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end or not taken:
            with (
                socket.create_connection(server.address, LONG) as plain,
                self.context.wrap_socket(plain, server_hostname="localhost") as client,
            ):
                client.sendall(b"hello\n")
                if client.recv(100) != b"hello\n":
                    raise CrowdFailed(f"{server.name} gave a wrong answer")
            taken.append((time.perf_counter() - begun) * 1e6)
        taken.sort()
        found = {"p50_us": statistics.median(taken), "p99_us": taken[int(0.99 * len(taken))], "max_us": taken[-1]}
        cpu = (server.cpu() - before) * 1e6 / len(taken)
        return {**found, "requests_per_second": len(taken) / seconds, "cpu_us": cpu, "errors": 0}


def measure_handshakes(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Return the time of others' handshakes without and beside clients that do not complete theirs."""
    import trustme

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pem = directory / "server.pem"
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
        attributes = {"tls_cert": str(pem), "handshake_timeout": LONG}
        servers = [
            stack.enter_context(setting.started(options.core, name, "TLSMixIn", "OneLine", **attributes))
            for name in ("without", "with")
        ]
        load = Handshakes(context)
        for server in servers:
            load.run(server, 0.1)  # worker processes take their time to start
        for place in range(setting.others):
            client = stack.enter_context(socket.create_connection(servers[1].address))
            if place % 2:
                client.sendall(PIECE)
        time.sleep(0.5 if setting.others > 1 else 0.0)  # of one alone the turn has begun
        loads = cast(Mapping[str, Load], {server.name: load for server in servers})
        found = alternate(servers, loads, options.rounds, options.seconds)
    row: dict[str, Any] = {"name": setting.name, "held": setting.others, "ratio": ratio(p99_ratio(found))}
    return row | {name: figures(series) for name, series in found.items()}


MEASURES = {"slow": (BESIDE_SLOW, measure_slow), "handshakes": (BESIDE_SILENT, measure_handshakes)}


# --- what is told -------------------------------------------------------------------------------------------


def cells_of(what: str, row: Mapping[str, Any]) -> list[str]:
    one, two = row["without"], row["with"]
    cells = [row["name"], f"{row['held']:,}"]
    cells += [number(side[key]) for key in ("p50_us", "p99_us") for side in (one, two)]
    cells += [times(Ratio(*row["ratio"])), f"{sum(entry['errors'] for entry in two['rounds']):.0f}"]
    if what == "handshakes":
        cells.append(number(max(entry["max_us"] for entry in two["rounds"])))
    else:
        for name in ("slow_late", "idle_late"):
            cells.append(" / ".join(f"{1000 * late:,.0f}" for late in row[name]) or "–")
        cells.append(str(row["left"]))
    return cells


def tell(what: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table."""
    head = ["server", "others held", "p50 µs without", "with", "p99 µs without", "with", "ratio of p99", "errors"]
    if what == "slow":
        yield f"{SLOW:,} clients send a byte a second, {IDLE:,} nothing; cut after {REQUEST:g} and {WAIT:g} seconds."
        head += ["slow cut late, ms: median / most", "idle cut late, ms", "never cut"]
    else:
        yield "One client after the other connects, does its handshake and has an answer, beside others that do not."
        head.append("longest µs with")
    yield ""
    yield table(head, [cells_of(what, row) for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the tables. Returns 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(MEASURES) + " (default: all)")
    parser.add_argument("--worker", action="append", metavar="NAME", help="those of this worker model alone")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--seconds", type=float, default=0.4, metavar="S", help="of each round (default: 0.4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--abusive", nargs=3, type=int, metavar=("PORT", "SLOW", "IDLE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    raise_limit()
    if options.abusive:
        be_abusive(*options.abusive)
        return 0
    if unknown := set(options.what) - set(MEASURES):
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    generator()
    result: dict[str, Any] = {"machine": describe(["greenlet"]), "rounds": options.rounds, "seconds": options.seconds}
    failed = False
    options.core, load_core = cores()
    with pinned(load_core):
        for what in options.what or MEASURES:
            settings, measure = MEASURES[what]
            rows = result[what] = []
            for setting in settings:
                if options.worker and setting.worker not in options.worker:
                    continue
                try:
                    rows.append(measure(setting, options))
                except (CrowdFailed, ServerFailed, OSError) as error:
                    say(f"bench/abuse.py: {what}, {setting.name}: {error}")
                    failed = True
            print(*tell(what, rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
