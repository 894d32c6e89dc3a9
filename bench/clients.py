"""Measure servers with the clients that people use: wrk, ab, redis-benchmark and dnsperf.

    python bench/clients.py [--only TOOL ...] [--rounds N] [--seconds S] [--json FILE] [--markdown FILE]

The same program is served by the stdlib's socketserver and by fastserve, each in a process of its own on one
processor, the client on another. The two take turns; while one is measured the other is stopped. The figures are
the server's CPU time for each request, the requests that the client counted in a second, and the medians of the
ratios of paired rounds with their range. Linux only. What has no client or no library here is skipped, and said so.

wrk, ab          http.server.SimpleHTTPRequestHandler with one small file in ThreadingHTTPServer, as `python -m
                 http.server` has them, and under `fastserve run`; HTTP/1.0 with a connection for each request, and
                 HTTP/1.1 with connections that stay. It does not log, and 128 connections may wait.
                 With "greenlets" fastserve's side has GreenletMixIn instead of ThreadingMixIn.
redis-benchmark  examples/resp_server.py, whose handler is run by the stdlib's ThreadingTCPServer and by fastserve's,
                 with "greenlets" by fastserve's GreenletTCPServer; it sets TCP_NODELAY under all of them
dnsperf          dnslib.server's UDPServer and TCPServer, put together as by its DNSServer, and under `fastserve
                 run`; it does not log. Over TCP it ends each connection after one answer: what dnsperf has sent on
                 it by then is lost under both, and shown as errors.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fastserve
from fastserve.bench.machine import describe
from fastserve.bench.measure import Load, Series, alternate, pinned
from fastserve.bench.process import ServerFailed, ServerProcess, cores

HERE = Path(__file__)
RESP = HERE.parent.parent / "examples" / "resp_server.py"
PACKAGES = {"wrk": "wrk", "ab": "apache2-utils", "redis-benchmark": "redis-tools", "dnsperf": "dnsperf"}  # Debian's
CONNECTIONS = 16
QUERIES = 16  # that dnsperf has under way, over TCP each on a connection of its own
TRIAL = 2000  # requests; how fast a server is, for a client that counts requests instead of seconds
BODY = b"x" * 1000
NAME = "www.example.com"
SLACK = 30.0  # seconds more than it was told after which a client hangs


class ClientFailed(Exception):
    """A client did not do what it was told, or did not say how it went."""


# --- the process that serves --------------------------------------------------------------------------------


def serve_http(version: str, greenlets: bool = False) -> None:
    """Serve one small file, as ``python -m http.server`` does."""
    from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = version
        # Head and body are sent one after the other: on a connection that stays, the body would wait for 40 ms.
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: to a terminal it would cost more than all the rest."""

        def end_headers(self) -> None:
            if version == "HTTP/1.1":
                self.send_header("Connection", "keep-alive")  # ab speaks HTTP/1.0, and must be told
            super().end_headers()

    class Threads(ThreadingHTTPServer):
        request_queue_size = 128

    class Greenlets(fastserve.GreenletMixIn, HTTPServer):
        request_queue_size = 128

    Server = Greenlets if greenlets else Threads
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "file.txt").write_bytes(BODY)
        serve(Server(("127.0.0.1", 0), functools.partial(Handler, directory=directory)))


def serve_dns(tcp: bool) -> None:
    """Answer queries for one name."""
    from dnslib import RR
    from dnslib.server import BaseResolver, DNSHandler, DNSLogger, TCPServer, UDPServer

    answer = RR.fromZone(f"{NAME}. 60 A 192.0.2.1")

    class Resolver(BaseResolver):
        def resolve(self, request: Any, handler: Any) -> Any:
            reply = request.reply()
            reply.add_answer(*answer)
            return reply

    class Server(TCPServer if tcp else UDPServer):  # type: ignore[misc]
        request_queue_size = 128

    # As DNSServer puts it together, but for the port, which it does not tell.
    server = Server(("127.0.0.1", 0), DNSHandler)
    server.resolver = Resolver()
    server.logger = DNSLogger("-recv,-send,-request,-reply,-truncated,-error,-data")
    serve(server)


def serve(server: Any) -> None:
    """Serve until SIGTERM."""

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    server.block_on_close = False
    with server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


SERVED: dict[str, Callable[[], None]] = {
    "http/1.0": functools.partial(serve_http, "HTTP/1.0"),
    "http/1.1": functools.partial(serve_http, "HTTP/1.1"),
    "http/1.0, greenlets": functools.partial(serve_http, "HTTP/1.0", True),
    "http/1.1, greenlets": functools.partial(serve_http, "HTTP/1.1", True),
    "dns-udp": functools.partial(serve_dns, False),
    "dns-tcp": functools.partial(serve_dns, True),
}


def command(implementation: str, what: str, greenlets: bool = False) -> list[str]:
    """Return the command that serves ``what``; the stdlib has no greenlets, and serves it with threads."""
    greenlets = greenlets and implementation == "fastserve"
    if what == "resp":
        worker = "greenlet" if greenlets else "threads"
        return [sys.executable, "-m", "fastserve.bench.server", implementation, worker, f"{RESP}:RespHandler"]
    on = [] if implementation == "stdlib" else ["-m", "fastserve", "run"]
    return [sys.executable, *on, str(HERE), "--serve", f"{what}, greenlets" if greenlets else what]


# --- the clients --------------------------------------------------------------------------------------------


def ask(seconds: float, *arguments: str) -> str:
    """Run a client and return what it prints. Raises ``ClientFailed``."""
    try:
        result = subprocess.run(
            arguments, capture_output=True, text=True, timeout=seconds + SLACK, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ClientFailed(f"{arguments[0]} did not end in {seconds + SLACK:.0f} seconds") from None
    if result.returncode:
        raise ClientFailed(f"{arguments[0]} ended with status {result.returncode}: {result.stderr.strip()[-500:]}")
    return result.stdout


def figure(pattern: str, text: str) -> float:
    """Return the number that the pattern finds in what a client printed. Raises ``ClientFailed``."""
    found = re.search(pattern, text)
    if not found:
        raise ClientFailed(f"there is no {pattern!r} in what the client printed:\n{text[-500:]}")
    return float(found[1])


def optional(pattern: str, text: str) -> float:
    """Return the sum of the numbers that the pattern finds, 0 if a client printed none because all went well."""
    found = re.search(pattern, text)
    return sum(map(float, found.groups())) if found else 0.0


def counted(requests: float, rate: float, errors: float) -> dict[str, Any]:
    return {"requests": int(requests), "requests_per_second": rate, "errors": int(errors)}


def wrk(port: int, seconds: float) -> dict[str, Any]:
    """Load with wrk, which counts whole seconds."""
    whole = max(round(seconds), 1)
    text = ask(whole, "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{whole}s", f"http://127.0.0.1:{port}/file.txt")
    errors = optional(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    errors += optional(r"Non-2xx or 3xx responses: (\d+)", text)
    return counted(figure(r"(\d+) requests in", text), figure(r"Requests/sec:\s*([\d.]+)", text), errors)


def ab(port: int, seconds: float, options: Sequence[str] = ()) -> dict[str, Any]:
    """Load with ab, which counts whole seconds."""
    whole = max(round(seconds), 1)
    limits = ["-t", str(whole), "-n", "1000000", "-c", str(CONNECTIONS)]
    text = ask(whole, "ab", "-q", *limits, *options, f"http://127.0.0.1:{port}/file.txt")
    errors = figure(r"Failed requests:\s*(\d+)", text) + optional(r"Non-2xx responses:\s*(\d+)", text)
    requests = figure(r"Complete requests:\s*(\d+)", text)
    if "-k" in options and figure(r"Keep-Alive requests:\s*(\d+)", text) < requests - CONNECTIONS:
        raise ClientFailed("the connections of ab did not stay")
    return counted(requests, figure(r"Requests per second:\s*([\d.]+)", text), errors)


def redis_benchmark(port: int, seconds: float, test: str, pipeline: int) -> dict[str, Any]:
    """Load with redis-benchmark, which counts requests: as many as take about the time in a trial."""

    def run(requests: int) -> float:
        counts = ["-n", str(requests), "-c", str(CONNECTIONS), "-P", str(pipeline)]
        text = ask(seconds, "redis-benchmark", "-h", "127.0.0.1", "-p", str(port), "-t", test, "--csv", *counts)
        rows = list(csv.DictReader(text.splitlines()))
        if len(rows) != 1:
            raise ClientFailed(f"redis-benchmark printed {text!r}")
        return float(rows[0]["rps"])

    # It ends itself with a status when an answer is an error.
    requests = max(int(run(TRIAL * pipeline) * seconds), TRIAL)
    return {**counted(requests, run(requests), 0), "trial": TRIAL * pipeline}


def dnsperf(port: int, seconds: float, mode: str) -> dict[str, Any]:
    """Load with dnsperf, which counts whole seconds."""
    whole = max(round(seconds), 1)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as queries:
        queries.write(f"{NAME} A\n")
        queries.flush()
        how = ["-m", mode, "-c", str(CONNECTIONS), "-q", str(QUERIES), "-l", str(whole)]
        text = ask(whole, "dnsperf", "-s", "127.0.0.1", "-p", str(port), "-d", queries.name, *how)
    requests = figure(r"Queries completed:\s*(\d+)", text)
    errors = figure(r"Queries lost:\s*(\d+)", text) + requests - optional(r"NOERROR (\d+)", text)
    return counted(requests, figure(r"Queries per second:\s*([\d.]+)", text), errors)


@dataclass(frozen=True)
class Work:
    """What one client asks of one server."""

    tool: str
    name: str
    served: str
    client: Callable[[int, float], dict[str, Any]]
    greenlets: bool = False

    def run(self, server: ServerProcess, seconds: float) -> dict[str, Any]:
        """Load the server; return what the client counted, and the server's CPU time for each request.

        Raises ``ClientFailed`` and ``ServerFailed``.
        """
        before = server.cpu()
        result = self.client(server.address[1], seconds)
        used = server.cpu() - before
        server.check()
        if not result["requests"]:
            raise ClientFailed(f"{self.name}: {server.name} answered nothing")
        result["cpu_us"] = used * 1e6 / (result["requests"] + result.pop("trial", 0))
        return result

    def missing(self) -> str | None:
        """Return what there is not, and is needed."""
        if shutil.which(self.tool) is None:
            return f"{self.tool} is not installed (Debian: {PACKAGES[self.tool]})"
        if self.served.startswith("dns") and importlib.util.find_spec("dnslib") is None:
            return "dnslib is not installed"
        if self.greenlets and importlib.util.find_spec("greenlet") is None:
            return "greenlet is not installed"
        return None


WORKS = [
    *(
        Work(tool, f"{name}{', greenlets' if greenlets else ''}", served, client, greenlets)
        for greenlets in (False, True)
        for tool, name, served, client in (
            ("wrk", "wrk, http.server, HTTP/1.0", "http/1.0", wrk),
            ("wrk", "wrk, http.server, HTTP/1.1", "http/1.1", wrk),
            ("ab", "ab, http.server, HTTP/1.0", "http/1.0", ab),
            ("ab", "ab -k, http.server, HTTP/1.1", "http/1.1", functools.partial(ab, options=("-k",))),
        )
    ),
    *(
        Work(
            "redis-benchmark",
            f"redis-benchmark, {test.upper()}{f', -P {pipeline}' if pipeline > 1 else ''}"
            f"{', greenlets' if greenlets else ''}",
            "resp",
            functools.partial(redis_benchmark, test={"ping": "ping_mbulk"}.get(test, test), pipeline=pipeline),
            greenlets,
        )
        for greenlets in (False, True)
        for pipeline in (1, 16)
        for test in ("ping", "set", "get")
    ),
    Work("dnsperf", "dnsperf, dnslib, UDP", "dns-udp", functools.partial(dnsperf, mode="udp")),
    Work("dnsperf", "dnsperf, dnslib, TCP", "dns-tcp", functools.partial(dnsperf, mode="tcp")),
]


# --- the measurement ----------------------------------------------------------------------------------------


def measure(work: Work, rounds: int, seconds: float) -> dict[str, Any]:
    """Return the figures of the stdlib and of fastserve, and their ratios. Raises as :meth:`Work.run` does."""
    core, load_core = cores()
    with (
        ServerProcess("stdlib", command("stdlib", work.served), core) as stdlib,
        ServerProcess("fastserve", command("fastserve", work.served, work.greenlets), core) as ours,
        pinned(load_core),
    ):
        # A client is to these rounds what the generator is to others.
        loads = cast(Mapping[str, Load], {"stdlib": work, "fastserve": work})
        found = alternate([stdlib, ours], loads, rounds, seconds)
    result: dict[str, Any] = {"work": work.name}
    result |= {name: summary(series) for name, series in found.items()}
    for figure in ("cpu_us", "requests_per_second"):
        ratio = found["fastserve"].ratio(found["stdlib"], figure)
        result[f"{figure}_ratio"] = [ratio.mean, ratio.low, ratio.high]
    return result


def summary(series: Series) -> dict[str, Any]:
    """Return the medians and the rounds of one server."""
    return {
        "cpu_us": series.median("cpu_us"),
        "requests_per_second": series.median("requests_per_second"),
        "errors": series.errors(),
        "rounds": series.rounds,
    }


def version(tool: str) -> str | None:
    """Return what a client says about its version."""
    if shutil.which(tool) is None:
        return None
    option = {"wrk": "-v", "ab": "-V", "redis-benchmark": "--version", "dnsperf": "-h"}[tool]
    result = subprocess.run([tool, option], capture_output=True, text=True, timeout=SLACK, stdin=subprocess.DEVNULL)
    found = re.search(r"(?:[Vv]ersion|wrk|redis-benchmark)\s+(\S*\d\S*)", result.stdout + result.stderr)
    return found[1].strip(",") if found else "unknown"


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a table, under a line that says on what it was measured."""
    machine = result["machine"]
    tools = ", ".join(f"{name} {found}" for name, found in machine["tools"].items() if found)
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['python']}, "
        f"fastserve {machine['fastserve']} ({machine['implementation']}, commit {machine['commit']}), "
        f"{machine['date']}; {tools}; "
        f"{result['rounds']} rounds of {result['seconds']:g} s, {CONNECTIONS} connections.",
        "",
        "| client and server | stdlib, CPU µs/request | fastserve, CPU µs/request | ratio (range) "
        "| stdlib, requests/s | fastserve, requests/s | ratio (range) | errors |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["works"]:
        cells = [row["work"]]
        for figure, digits in (("cpu_us", 1), ("requests_per_second", 0)):
            cells += [f"{row[name][figure]:,.{digits}f}" for name in ("stdlib", "fastserve")]
            cells.append("{:.2f} ({:.2f}–{:.2f})".format(*row[f"{figure}_ratio"]))
        cells.append(f"{row['stdlib']['errors']} / {row['fastserve']['errors']}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nskipped: {name}: {why}" for name, why in result["skipped"].items()]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table. Returns 1 if something could not be measured though everything is there."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(PACKAGES), metavar="TOOL", help=", ".join(PACKAGES))
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of each round (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--serve", choices=SERVED, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        SERVED[options.serve]()
        return 0
    if options.rounds < 1 or not 0.1 <= options.seconds <= 60:
        parser.error("there must be at least one round, of 0.1 to 60 seconds")
    skipped: dict[str, str] = {}
    chosen: list[Work] = []
    for work in WORKS:
        why = work.missing()
        if options.only and work.tool not in options.only:
            continue
        if why:
            say(f"skipped: {work.name}: {why}")
            skipped[work.name] = why
        else:
            chosen.append(work)
    say(f"about {math.ceil(len(chosen) * (2 * options.rounds * (options.seconds + 0.3) + 2))} seconds")
    machine = describe(["dnslib"]) | {"tools": {tool: version(tool) for tool in PACKAGES}}
    works, failed = [], False
    for work in chosen:
        try:
            works.append(measure(work, options.rounds, options.seconds))
        except (ClientFailed, ServerFailed) as error:
            say(f"failed: {work.name}: {error}")
            skipped[work.name] = str(error)
            failed = True
        else:
            ratio = works[-1]["cpu_us_ratio"][0]
            say(f"{work.name}: {ratio:.2f} of the stdlib's CPU time for each request")
    result = {
        "machine": machine,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "connections": CONNECTIONS,
        "works": works,
        "skipped": skipped,
    }
    table = markdown(result)
    print(table, end="")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
