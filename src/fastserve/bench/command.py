"""``fastserve bench``: a handler of the user's, under the stdlib's servers and under ours."""

from __future__ import annotations

import signal
import socketserver
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from fastserve.bench.measure import WARM_UP, Load, Series, alternate, pinned
from fastserve.bench.probe import Answers, ProbeFailed, difference, last_line, probe, show
from fastserve.bench.process import ServerProcess
from fastserve.bench.report import Report, Row
from fastserve.workers._names import WORKERS

ROUNDS = 5
BETWEEN_PROBES = 1.05  # seconds: what has the time of day in it, as an answer of HTTP, has changed by then
START = 0.3  # seconds that the start of a server takes, for the announcement
REFERENCE = "threads"  # the worker model of the stdlib's server that those without a counterpart are compared with
Tell = Callable[[str], None]


class Stopped(BaseException):
    """A signal asked for the end.

    :ivar status: the exit status that tells so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


@dataclass(frozen=True)
class Entry:
    """A server to measure, and the name of the one that it is compared with."""

    implementation: str
    worker: str
    reference: str

    @property
    def name(self) -> str:
        """The name in the table."""
        return f"{self.implementation} {self.worker}"


def entries(workers: Sequence[str]) -> list[Entry]:
    """Return the servers to measure for worker models: the stdlib's, where it has the model, and ours."""
    common = {worker: hasattr(socketserver, f"{WORKERS[worker]}TCPServer") for worker in workers}
    stdlib = [worker for worker in workers if common[worker]]
    if not all(common.values()) and REFERENCE not in stdlib:
        stdlib.insert(0, REFERENCE)
    found = [Entry("stdlib", worker, f"stdlib {worker}") for worker in stdlib]
    return found + [Entry("fastserve", name, f"stdlib {name if common[name] else REFERENCE}") for name in workers]


@contextmanager
def signals_stop() -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP raise ``Stopped``, once: what ends the servers is not to be interrupted."""
    heeded = [
        signum
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(signum) is not signal.SIG_IGN
    ]

    def stop(signum: int, frame: FrameType | None) -> None:
        for other in heeded:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in heeded}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def started(
    target: str, chosen: Sequence[Entry], udp: bool, core: int, max_workers: int | None = None
) -> Iterator[dict[str, ServerProcess]]:
    """Start the servers for the time of the block. Raises ``ServerFailed``."""
    with ExitStack() as stack:
        servers = {}
        for entry in chosen:
            command = [sys.executable, "-m", "fastserve.bench.server", entry.implementation, entry.worker, target]
            command += ["--udp"] * udp
            if max_workers and entry.worker == "threadpool":
                command += ["--max-workers", str(max_workers)]
            server = ServerProcess(entry.name, command, core)
            servers[entry.name] = stack.enter_context(server)
        yield servers


def announcement(chosen: Sequence[Entry], load: Load, seconds: float) -> str:
    """Return what is going to be done, and how long it takes."""
    one = seconds / ROUNDS
    probing = BETWEEN_PROBES + START * len(chosen)
    total = probing + len(chosen) * ROUNDS * (one + WARM_UP + 0.05)
    return (
        f"This takes about {total:.0f} s: each of {len(chosen)} servers is probed (about {probing:.0f} s in all); then "
        f"they take turns in {ROUNDS} rounds of {one:.2g} s each, after {WARM_UP:g} s of warm-up."
    )


def measure(
    servers: Mapping[str, ServerProcess],
    chosen: Sequence[Entry],
    load: Load,
    seconds: float,
    core: int,
    on_round: Tell,
    max_workers: int | None = None,
) -> Report:
    """Probe the servers, load them in turn and return what was found.

    :param load: without what the probe finds out: the expected answer, and whether connections are kept.
    :param on_round: told the name of a server whose turn is over.
    :raises ProbeFailed: if a server does not answer, or another answer than the stdlib's; nothing was timed then.
    :raises ServerFailed: if a server ends.
    """
    found = probe_all(servers, load)
    compare(found, chosen)
    loads = {
        name: replace(load, expected=_stable(answers), reconnect=not answers.keeps) for name, answers in found.items()
    }
    with pinned(core):
        series = alternate(list(servers.values()), loads, ROUNDS, seconds / ROUNDS, on_round)
    rows = [row(entry, series, last_line(servers[entry.name].errors())) for entry in chosen]
    return Report(rows, loads[chosen[0].name], ROUNDS, seconds, max_workers)


def probe_all(servers: Mapping[str, ServerProcess], load: Load) -> dict[str, Answers]:
    """Probe each server twice, at different times, and return all its answers."""
    first: dict[str, Answers] = {}
    answered = {}
    for name, server in servers.items():
        first[name] = probe(server, load)
        answered[name] = time.monotonic()
    found = {}
    for name, server in servers.items():
        time.sleep(max(answered[name] + BETWEEN_PROBES - time.monotonic(), 0))
        second = probe(server, replace(load, pipeline=1))
        found[name] = Answers(first[name].texts + second.texts, first[name].keeps and second.keeps)
    return found


def _stable(answers: Answers) -> bytes | None:
    """Return the answer if it was always the same."""
    return answers.texts[0] if len(set(answers.texts)) == 1 else None


def compare(found: Mapping[str, Answers], chosen: Sequence[Entry]) -> None:
    """Raise ``ProbeFailed`` if a server answers otherwise than the one that it is compared with."""
    for entry in chosen:
        ours, theirs = found[entry.name], found[entry.reference]
        if ours.keeps != theirs.keeps:
            does = "keeps its connection after an answer" if ours.keeps else "ends its connection after an answer"
            raise ProbeFailed(f"{entry.name} answers wrongly: it {does}, and {entry.reference} does not")
        expected = _stable(theirs)
        other = next((text for text in ours.texts if text != expected), None)
        if expected is not None and other is not None:
            where = difference(other, expected)
            raise ProbeFailed(
                f"{entry.name} answers wrongly: it differs from {entry.reference}\n"
                f"{show(other, where)} instead of {show(expected, where)}"
            )


def row(entry: Entry, series: Mapping[str, Series], raised: str) -> Row:
    """Return the line of the table for a server."""
    mine = series[entry.name]
    wrong = sum(int(one["wrong"]) for one in mine.rounds)
    requests = sum(int(one["requests"]) for one in mine.rounds)
    problem = ""
    if wrong:
        problem = f"wrong answers: {wrong:,} of {requests:,}"
    elif not requests:
        problem = "no answers"
    elif silent := sum(not one["requests"] for one in mine.rounds):
        problem = f"no answers in {silent} of {len(mine.rounds)} rounds; a longer --duration may help"
    return Row(entry.name, entry.implementation, entry.worker, mine, series[entry.reference], problem, raised)
