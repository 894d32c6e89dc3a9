"""The method: a load, rounds in which servers take turns, medians and paired ratios."""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fastserve.bench.process import ServerFailed, ServerProcess

WARM_UP = 0.1  # seconds of load before each round counts


def generator() -> ModuleType:
    """Return the load generator. Raises ``ServerFailed`` where it was not built."""
    try:
        return importlib.import_module("fastserve._load")
    except ModuleNotFoundError:
        raise ServerFailed("the load generator is part of the builds with extensions for Linux, and not here") from None


@dataclass(frozen=True)
class Load:
    """What is sent to a server, and what must come back.

    :param payload: the bytes of one request.
    :param answer: how the end of an answer is known: its size, a delimiter, or ``None`` for the end of the
        connection. Not used for datagrams.
    :param expected: the answer to one request, ``None`` if it is not to be compared.
    :param connections: connections or, for datagrams, sockets at a time.
    :param pipeline: requests that each of them has under way.
    :param reconnect: whether each request has a connection of its own.
    :param datagrams: whether to send datagrams over UDP.
    """

    payload: bytes
    answer: int | bytes | None = None
    expected: bytes | None = None
    connections: int = 1
    pipeline: int = 1
    reconnect: bool = False
    datagrams: bool = False

    def run(self, server: ServerProcess, seconds: float) -> dict[str, Any]:
        """Load ``server`` for a time and return the generator's figures, with ``cpu_us`` for each request."""
        load = generator()
        common = {"expected": self.expected, "seconds": seconds, "warmup": WARM_UP, "sample": server.cpu}
        if self.datagrams:
            result = load.datagrams(
                server.address, self.payload, sockets=self.connections, window=self.pipeline, **common
            )
        else:
            result = load.streams(
                server.address,
                self.payload,
                answer=self.answer,
                connections=self.connections,
                pipeline=self.pipeline,
                reconnect=self.reconnect,
                # One of threads that all ask for the GIL would accept some, and be measured with fewer than asked for.
                together=not self.reconnect and self.answer is not None,
                **common,
            )
        before, after = result.pop("samples")
        result["cpu_us"] = (after - before) * 1e6 / max(result["requests"], 1)
        server.check()
        return dict(result)


@dataclass(frozen=True)
class Ratio:
    """The ratios of paired rounds: their trimmed geometric mean, and their range.

    The mean of what is left without the highest and lowest tenth is as sturdy against single bad rounds as the
    median, and repeats itself better from run to run.
    """

    mean: float
    low: float
    high: float


@dataclass
class Series:
    """The figures of one server, one entry for each round."""

    name: str
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def median(self, figure: str) -> float:
        """Return the median of a figure over the rounds."""
        return statistics.median(float(entry[figure]) for entry in self.rounds)

    def errors(self) -> int:
        """Return the errors of all rounds."""
        return sum(int(entry["errors"]) for entry in self.rounds)

    def saturated(self) -> bool:
        """Return whether the generator was the limit in most rounds: the rate may then be its own."""
        return 2 * sum(bool(entry["generator_saturated"]) for entry in self.rounds) > len(self.rounds)

    def ratio(self, other: Series, figure: str = "cpu_us") -> Ratio:
        """Return this server's figure over the other's, round by round."""
        ratios = [
            mine[figure] / theirs[figure]
            for mine, theirs in zip(self.rounds, other.rounds, strict=True)
            if theirs[figure]
        ]
        if not ratios:
            return Ratio(float("nan"), float("nan"), float("nan"))
        ratios.sort()
        cut = max(len(ratios) // 10, 1) if len(ratios) >= 5 else 0
        return Ratio(statistics.geometric_mean(ratios[cut : len(ratios) - cut]), ratios[0], ratios[-1])

    def summary(self, reference: Series) -> dict[str, Any]:
        """Return the medians, the errors and the ratio to ``reference``, for a table or a file."""
        ratio = self.ratio(reference)
        return {
            "requests_per_second": self.median("requests_per_second"),
            "cpu_us": self.median("cpu_us"),
            "p50_us": self.median("p50_us"),
            "p99_us": self.median("p99_us"),
            "errors": self.errors(),
            "generator_cpu": self.median("generator_cpu"),
            "generator_saturated": self.saturated(),
            "ratio": ratio.mean,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
        }


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run the block, the load that is, on one processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def alternate(
    servers: Sequence[ServerProcess],
    load: Load | Mapping[str, Load],
    rounds: int,
    seconds: float,
    on_round: Callable[[str], None] = lambda name: None,
) -> dict[str, Series]:
    """Load the servers in turn, ``rounds`` times for ``seconds`` each, while the others are stopped.

    ``load`` may be another for each server, by name. ``on_round`` is told the name of the server whose turn is over.
    Raises ``ServerFailed`` if a server ends.
    """
    found = {server.name: Series(server.name) for server in servers}
    for server in servers:
        server.pause()
    for turn in range(rounds):
        # Each round begins with another server: none always follows the same one.
        for server in [*servers[turn % len(servers) :], *servers[: turn % len(servers)]]:
            server.resume()
            try:
                one = load if isinstance(load, Load) else load[server.name]
                found[server.name].rounds.append(one.run(server, seconds))
            finally:
                server.pause()
            on_round(server.name)
    return found
