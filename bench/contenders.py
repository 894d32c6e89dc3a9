"""The servers that are compared, how each is started, and which works it can do."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from works import Work

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent / "build" / "bench"
HANDLERS = HERE / "handlers.py"

KEPT = frozenset({"echo", "lines"})
STREAMS = KEPT | {"oneshot"}
ALL = STREAMS | {"udp"}

LIMIT = "raw C"


@dataclass(frozen=True)
class Contender:
    """A server: its name in the tables, its family, its command line.

    :param family: limit, stdlib, fastserve or other.
    :param model: the worker model of a socketserver, which is compared with the stdlib's own of that name.
    :param command: the command line; ``{handler}`` and ``{kind}`` stand for those of the work.
    :param kinds: the kinds of work that it does.
    :param needs: the module without which it cannot run.
    :param quick: whether ``make bench-quick`` has it.
    :param curve: whether the chart of throughput against connections has it.
    """

    name: str
    family: str
    command: tuple[str, ...]
    kinds: frozenset[str]
    model: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    quick: bool = False
    curve: bool = False

    def missing(self) -> str:
        """Return why it cannot run on this machine; empty if it can."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if not shutil.which(self.command[0]):
            return f"{Path(self.command[0]).name} is not built"
        return ""

    def arguments(self, work: Work) -> list[str]:
        """Return the command line for a work."""
        target = f"{HANDLERS}:{work.handler}"
        datagrams = ["--udp"] if work.kind == "udp" and self.model else []
        return [word.format(handler=target, kind=work.kind) for word in self.command] + datagrams

    def takes(self, work: Work) -> bool:
        """Return whether it has a part in a work."""
        return work.kind in self.kinds and (work.table or self.curve)


@dataclass(frozen=True)
class Model:
    """A worker model: its name for ``--worker``, its name in the tables, what it can do, who has it, its options."""

    worker: str
    name: str
    kinds: frozenset[str]
    stdlib: bool = True
    quick: bool = True
    options: tuple[str, ...] = ()


# A sync server would never answer the second of several clients that keep their connections, and a process for
# each of 500 connections measures the kernel.
MODELS = [
    Model("sync", "sync", frozenset({"oneshot", "udp"})),
    Model("threads", "threading", STREAMS),
    # A pool serves as many kept connections at a time as it has threads.
    Model("threadpool", "threadpool", frozenset({"oneshot", "udp"}), stdlib=False, options=("--max-workers", "8")),
    Model("fork", "forking", frozenset({"oneshot"}), quick=False),
    Model("greenlet", "greenlet", STREAMS, stdlib=False),
]


def socketservers() -> list[Contender]:
    """Return the stdlib's servers and fastserve's, each core in each worker model."""
    found = []
    for family, implementation, environment in (
        ("stdlib", "stdlib", {}),
        ("fastserve C", "fastserve", {"FASTSERVE_NO_EXTENSIONS": "0"}),
        ("fastserve Python", "fastserve", {"FASTSERVE_NO_EXTENSIONS": "1"}),
    ):
        for model in MODELS:
            if implementation == "stdlib" and not model.stdlib:
                continue
            start = (sys.executable, "-m", "fastserve.bench.server")
            command = (*start, implementation, model.worker, "{handler}", *model.options)
            kept = "echo" in model.kinds
            name = f"{family} {model.name}"
            found.append(
                Contender(name, implementation, command, model.kinds, model.name, environment, "", model.quick, kept)
            )
    return found


def gathering() -> Contender:
    """Return fastserve's sync server with the attribute ``gather_replies``."""
    command = (sys.executable, "-m", "fastserve.bench.server", "fastserve", "sync", "{handler}", "--gather-replies")
    environment = {"FASTSERVE_NO_EXTENSIONS": "0"}
    return Contender("fastserve C sync, gathered", "fastserve", command, frozenset({"udp"}), "sync", environment)


def others() -> list[Contender]:
    """Return what a user could take instead."""
    found = []
    for loop in ("asyncio", "uvloop"):
        script = str(HERE / "servers" / "asyncio_server.py")
        needs = "" if loop == "asyncio" else loop
        command = (sys.executable, script, loop)
        found += [
            Contender(f"{loop} streams", "other", (*command, "streams", "{kind}"), STREAMS, needs=needs),
            Contender(
                f"{loop} Protocol",
                "other",
                (*command, "protocol", "{kind}"),
                ALL,
                needs=needs,
                quick=loop == "uvloop",
                curve=True,
            ),
        ]
    script = str(HERE / "servers" / "gevent_server.py")
    found.append(Contender("gevent", "other", (sys.executable, script, "{kind}"), STREAMS, needs="gevent", curve=True))
    found.append(Contender("Go", "other", (str(BUILT / "go"), "{kind}"), ALL, curve=True))
    return found


def slowed(microseconds: float) -> Contender:
    """Return fastserve's sync server with an accept that burns a time: the one that does the least beside it."""
    script = str(HERE / "servers" / "slow_accept.py")
    command = (sys.executable, script, str(microseconds), "fastserve", "sync", "{handler}")
    name = f"fastserve C sync, accept + {microseconds:g} µs"
    return Contender(
        name, "slowed", command, frozenset({"oneshot"}), "sync", {"FASTSERVE_NO_EXTENSIONS": "0"}, quick=True
    )


CONTENDERS = [
    Contender(LIMIT, "limit", (str(BUILT / "raw"), "{kind}"), ALL, quick=True, curve=True),
    *socketservers(),
    gathering(),
    *others(),
]


def reference(work: Work) -> str:
    """Return the name of the stdlib's server that the others are compared with in a work."""
    return "stdlib sync" if work.kind == "udp" else "stdlib threading"
