"""What ``fastserve bench`` shows: the table, the notes below it, and the JSON."""

from __future__ import annotations

import math
import socketserver
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.bench.machine import describe as describe_machine
from fastserve.bench.measure import Load, Ratio, Series
from fastserve.bench.probe import describe
from fastserve.workers._pool import default_workers

HEADERS = ("", "requests/s", "CPU µs/request", "p50 µs", "p99 µs", "errors", "CPU ratio (range)", "to")


@dataclass(frozen=True)
class Row:
    """A server and its figures.

    :param reference: the figures that the ratio is to.
    :param problem: why the figures mean nothing; empty if they do.
    :param raised: the last line of the last traceback that it wrote under load; empty if there was none.
    """

    name: str
    implementation: str
    worker: str
    series: Series
    reference: Series
    problem: str
    raised: str

    @property
    def ratio(self) -> Ratio:
        """CPU time for each request, this server's over the reference's."""
        return self.series.ratio(self.reference)


@dataclass(frozen=True)
class Report:
    """All that was measured.

    :param load: what was sent, with what the probe has found out.
    :param seconds: of load that count, for each server.
    :param max_workers: threads of the pools; ``None`` is their default.
    """

    rows: list[Row]
    load: Load
    rounds: int
    seconds: float
    max_workers: int | None = None

    def problems(self) -> list[str]:
        """Return a line for each server whose figures mean nothing."""
        return [f"{row.name}: {row.problem}" for row in self.rows if row.problem]

    def ratio_of(self, row: Row) -> Ratio | None:
        """Return the ratio of a row, ``None`` if either side has no figures or there is nothing to compare."""
        reference = next(other for other in self.rows if other.name == row.reference.name)
        none = row is reference or row.problem or reference.problem or math.isnan(row.ratio.mean)
        return None if none else row.ratio

    def work(self) -> str:
        """Return in one line what was done."""
        load = self.load
        size = f"{len(load.payload):,} byte{'s' * (len(load.payload) != 1)}"
        if load.datagrams:
            return f"{size} a datagram, {load.connections:,} sockets, {load.pipeline:,} under way on each"
        how = "kept" if not load.reconnect else "at a time, each for one request"
        ahead = f", {load.pipeline:,} requests at once on each" if load.pipeline > 1 else ""
        plural = "s" * (load.connections != 1)
        return (
            f"{size} a request, answered up to {describe(load.answer)}; {load.connections:,} connection{plural} "
            f"{how}{ahead}"
        )

    def table(self) -> str:
        """Return the table, for any terminal."""
        lines: list[tuple[str, ...]] = [HEADERS]
        for row in self.rows:
            lines.append((row.name, row.problem) if row.problem else self._cells(row))
        columns = [max(len(line[i]) for line in lines if len(line) == len(HEADERS)) for i in range(len(HEADERS))]
        columns[0] = max(len(line[0]) for line in lines)
        shown = []
        for line in lines:
            last = len(HEADERS) - 1
            rest = [line[i].ljust(columns[i]) if i == last else line[i].rjust(columns[i]) for i in range(1, len(line))]
            if len(line) < len(HEADERS):
                rest = list(line[1:])
            shown.append("  ".join([line[0].ljust(columns[0]), *rest]).rstrip())
        return "\n".join(shown)

    def _cells(self, row: Row) -> tuple[str, ...]:
        series, ratio = row.series, self.ratio_of(row)
        return (
            row.name,
            f"{series.median('requests_per_second'):,.0f}{'*' if series.saturated() else ''}",
            f"{series.median('cpu_us'):.2f}",
            f"{series.median('p50_us'):,.0f}",
            f"{series.median('p99_us'):,.0f}",
            f"{series.errors():,}",
            "" if ratio is None else f"{ratio.mean:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
            "" if ratio is None else row.reference.name,
        )

    def notes(self) -> list[str]:
        """Return what a reader of the table must know."""
        load = self.load
        found = [
            f"Medians of {self.rounds} rounds of {self.seconds / self.rounds:.2g} s, in which the servers took turns.",
            "CPU is that of the server, all its threads and children; less is better. Its ratio is of paired rounds.",
        ]
        if load.pipeline > 1 and not load.datagrams:
            found.append(f"Latencies are those of {load.pipeline:,} requests that were sent at once.")
        if any(row.series.saturated() for row in self.rows):
            found.append(
                "* The load generator was at its limit: the rate is its own, and the server could do more. CPU per "
                "request still holds."
            )
        if load.expected is None:
            found.append("The answers are not always the same, so they were not compared under load.")
        for worker in dict.fromkeys(row.worker for row in self.rows):
            limits = {"sync": 1, "fork": socketserver.ForkingMixIn.max_children}
            at_once = (limits | {"threadpool": self.max_workers or default_workers()}).get(worker)
            if at_once and load.connections > at_once and not load.reconnect and not load.datagrams:
                found.append(
                    f"{worker} serves {at_once} connection{'s' * (at_once > 1)} at a time: the other "
                    f"{load.connections - at_once:,} waited to the end, and count as errors."
                )
        if any(row.worker == "fork" for row in self.rows) and (load.reconnect or load.datagrams):
            found.append(
                "The CPU time of children that have ended is counted in ticks of 10 ms: use a long --duration."
            )
        found += [f"{row.name}: under load the handler raised {row.raised}" for row in self.rows if row.raised]
        return found

    def as_json(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return all of it, fit for JSON."""
        return {
            "machine": describe_machine(),
            "arguments": dict(arguments),
            "connections_kept": None if self.load.datagrams else not self.load.reconnect,
            "answers_compared": self.load.expected is not None,
            "servers": {row.name: self._server(row) for row in self.rows},
        }

    def _server(self, row: Row) -> dict[str, Any]:
        ratio, figures = self.ratio_of(row), ("requests_per_second", "cpu_us", "p50_us", "p99_us")
        return {
            "implementation": row.implementation,
            "worker": row.worker,
            "problem": row.problem or None,
            **{name: None if row.problem else row.series.median(name) for name in figures},
            "errors": row.series.errors(),
            "generator_saturated": row.series.saturated(),
            "reference": row.reference.name,
            "ratio": ratio and ratio.mean,
            "ratio_low": ratio and ratio.low,
            "ratio_high": ratio and ratio.high,
            "rounds": row.series.rounds,
        }
