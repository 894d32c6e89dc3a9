"""One measurement: start the servers of a work, see that they answer, let them take turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from contenders import LIMIT, Contender, reference
from works import Work

from fastserve.bench.measure import Load, Series, alternate
from fastserve.bench.process import ServerFailed, ServerProcess

CHECK = 0.05  # seconds of load in which a server must answer without an error
FIGURES = ("requests", "seconds", "requests_per_second", "cpu_us", "p50_us", "p90_us", "p99_us", "max_us")
ERRORS = ("refused", "broken", "wrong", "lost", "stalled")


def checked(server: ServerProcess, load: Load) -> None:
    """Raise ``ServerFailed`` if a server does not answer, or answers wrongly."""
    result = load.run(server, CHECK)
    if not result["requests"] or result["wrong"] or result["refused"]:
        said = f": {server.errors()}" if server.errors() else ""
        raise ServerFailed(
            f"{server.name} gave {result['requests']} answers, {result['wrong']} of them wrong, "
            f"and refused {result['refused']} connections{said}"
        )


def measure(
    work: Work,
    contenders: Sequence[Contender],
    core: int,
    rounds: int,
    seconds: float,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the servers at a work, and return all rounds and why which server is missing.

    A server that cannot run, answers wrongly or ends is missing from the result; the others go on.
    """
    missing: dict[str, str] = {}

    def leave_out(name: str, reason: str) -> None:
        missing[name] = " ".join(reason.split())[-400:]
        say(f"  {name} is left out: {missing[name]}")

    series: dict[str, Series] = {}
    with contextlib.ExitStack() as stack:
        servers: list[ServerProcess] = []
        for contender in contenders:
            if reason := contender.missing():
                leave_out(contender.name, reason)
                continue
            try:
                arguments = contender.arguments(work)
                server = stack.enter_context(ServerProcess(contender.name, arguments, core, contender.environment))
                checked(server, work.load)
                server.pause()
                servers.append(server)
            except ServerFailed as error:
                leave_out(contender.name, str(error))
        while servers and not series:
            try:
                series = alternate(servers, work.load, rounds, seconds)
            except ServerFailed:
                sound = list(filter(is_sound, servers))
                if len(sound) == len(servers):
                    raise
                for server in servers:
                    if server not in sound:
                        leave_out(server.name, reason_of(server))
                servers = sound
    return result_of(work, contenders, series, missing)


def reason_of(server: ServerProcess) -> str:
    """Return why a server has ended; empty if it has not."""
    try:
        server.check()
    except ServerFailed as error:
        return str(error)
    return ""


def is_sound(server: ServerProcess) -> bool:
    """Return whether a server has not ended."""
    return not reason_of(server)


def result_of(
    work: Work, contenders: Sequence[Contender], series: dict[str, Series], missing: dict[str, str]
) -> dict[str, Any]:
    """Return the result of a work as it goes into the file."""
    return {
        "name": work.name,
        "title": work.title,
        "kind": work.kind,
        "connections": work.load.connections,
        "curve": work.curve,
        "table": work.table,
        "limit": LIMIT,
        "reference": reference(work),
        "servers": [
            {
                "name": contender.name,
                "family": contender.family,
                "model": contender.model,
                "rounds": [figures(entry) for entry in series[contender.name].rounds],
            }
            for contender in contenders
            if contender.name in series
        ],
        "missing": [{"name": name, "reason": reason} for name, reason in missing.items()],
    }


def figures(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a round, rounded to what they can tell, with the kinds of error that there were."""
    found = {name: float(f"{entry[name]:.5g}") for name in FIGURES}
    found |= {"requests": entry["requests"], "errors": entry["errors"]}
    found |= {name: entry[name] for name in ERRORS if entry[name]}
    found["generator_cpu"] = round(entry["generator_cpu"], 3)
    found["generator_saturated"] = entry["generator_saturated"]
    return found
