"""Measure fastserve beside other servers and beside the limit: ``python bench/run.py --help``; see bench/README.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clients
import crowd
import report
from compare import comparison
from contenders import CONTENDERS, HERE, Contender, slowed
from session import measure
from works import WORKS, Work

from fastserve.bench.machine import describe
from fastserve.bench.measure import WARM_UP, generator, pinned
from fastserve.bench.process import ServerFailed, cores

ROOT = HERE.parent
RESULTS = HERE / "results"
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PERFORMANCE = DOCS / "performance.md"
CLIENTS = RESULTS / "clients.json"  # what bench/clients.py has measured
CROWD = RESULTS / "crowd.json"  # what bench/crowd.py has measured
CHARTS = {
    "CPU time per request, by server and work": "images/cpu-per-request.svg",
    "Throughput against connections": "images/throughput.svg",
}

# Many short rounds make steadier ratios than a few long ones: what is compared lies closer together in time.
FULL_ROUNDS, FULL_SECONDS = 9, 0.4
QUICK_ROUNDS, QUICK_SECONDS = 24, 0.12
START, BETWEEN = 0.35, 0.05  # seconds for each server and for each round, for the estimate
DESCRIPTORS = 8192


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="compare the ratios of two results")
    what.add_argument(
        "--render", type=Path, metavar="FILE", help="write the documents from a result, without measuring"
    )
    what.add_argument("--quick", action="store_true", help="the works and servers of make bench-quick; no documents")
    what.add_argument("--list", action="store_true", help="list works and servers")
    parser.add_argument("--within", type=float, default=10, metavar="PERCENT", help="with --compare (default: 10)")
    parser.add_argument("--works", nargs="+", metavar="WORK", help="only these works")
    parser.add_argument("--servers", nargs="+", metavar="SERVER", help="only these servers")
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each round")
    parser.add_argument("--slow-accept", type=float, metavar="MICROSECONDS", help="add a fastserve that wastes these")
    parser.add_argument("--unpinned", action="store_true", help="let servers and load run on any processor")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: bench/results/full.json or quick.json)")
    parser.add_argument("--documents", action="store_true", help="write docs/performance.md, the charts, the README")
    options = parser.parse_args(argv)
    partly = options.quick or options.works or options.servers or options.slow_accept or options.unpinned
    if options.documents and partly:
        parser.error("the documents are made from all works and servers")
    for names, known in ((options.works, WORKS), (options.servers, CONTENDERS)):
        if unknown := set(names or ()) - {one.name for one in known}:
            parser.error(f"not known, see --list: {', '.join(sorted(unknown))}")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else FULL_ROUNDS)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS)
    options.output = options.output or RESULTS / ("quick.json" if options.quick else "full.json")
    return options


def chosen(options: argparse.Namespace) -> list[tuple[Work, list[Contender]]]:
    """Return the works to measure, each with its servers."""
    contenders = [*CONTENDERS, *([slowed(options.slow_accept)] if options.slow_accept else [])]
    found = []
    for work in WORKS:
        if (options.quick and not work.quick) or (options.works and work.name not in options.works):
            continue
        servers = [
            contender
            for contender in contenders
            if contender.takes(work)
            and (contender.quick or not options.quick)
            and (not options.servers or contender.name in options.servers or contender.family == "slowed")
        ]
        if servers:
            found.append((work, servers))
    return found


def say(line: str) -> None:
    """Tell how far the run is; standard output is for the tables."""
    print(line, file=sys.stderr, flush=True)


def estimate(plan: Sequence[tuple[Work, Sequence[Contender]]], rounds: int, seconds: float) -> float:
    """Return the seconds that a run takes, about."""
    servers = sum(len(contenders) for _, contenders in plan)
    return servers * (START + rounds * (seconds + WARM_UP + BETWEEN))


def first_line(*command: str) -> str:
    """Return the first line that a command prints, nothing where there is no such command."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().partition("\n")[0]


def run(
    plan: Sequence[tuple[Work, Sequence[Contender]]], rounds: int, seconds: float, unpinned: bool = False
) -> dict[str, Any]:
    """Measure, and return the result as it is stored. Raises ``ServerFailed`` where nothing can be measured."""
    generator()
    server_core: int | None
    server_core, load_core = cores()
    if unpinned:
        server_core = None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    machine = describe(["uvloop", "gevent", "greenlet"])
    machine |= {"compiler": first_line("cc", "--version"), "go": first_line("go", "version")}
    say(f"{len(plan)} works, about {estimate(plan, rounds, seconds) / 60:.1f} minutes")
    begun = time.monotonic()
    works = []
    with contextlib.nullcontext() if unpinned else pinned(load_core):
        for number, (work, contenders) in enumerate(plan, 1):
            since = time.monotonic() - begun
            say(f"[{number}/{len(plan)}, {since:.0f} s] {work.title}: {len(contenders)} servers")
            works.append(measure(work, contenders, server_core, rounds, seconds, say))
    took = time.monotonic() - begun
    say(f"took {took / 60:.1f} minutes")
    return {"machine": machine, "rounds": rounds, "seconds": seconds, "took": round(took), "works": works}


def stored(result: dict[str, Any]) -> str:
    """Return a result as JSON, one round a line, so that two files can be compared line by line."""
    head = {key: value for key, value in result.items() if key != "works"}
    works = []
    for work in result["works"]:
        servers = []
        for server in work["servers"]:
            rounds = ",\n".join(f"     {json.dumps(entry)}" for entry in server["rounds"])
            start = json.dumps({key: value for key, value in server.items() if key != "rounds"})[:-1]
            servers.append(f'   {start}, "rounds": [\n{rounds}]}}')
        start = json.dumps({key: value for key, value in work.items() if key != "servers"}, ensure_ascii=False)[:-1]
        works.append(f'  {start}, "servers": [\n' + ",\n".join(servers) + "]}")
    return json.dumps(head, indent=1)[:-2] + ',\n "works": [\n' + ",\n".join(works) + "\n ]\n}\n"


def write_documents(result: dict[str, Any]) -> None:
    """Draw the charts and write the generated parts of the page Performance and of the README."""
    import charts

    note = report.setting(result)
    cpu, throughput = (DOCS / path for path in CHARTS.values())
    charts.draw_cpu(result, cpu, note)
    charts.draw_throughput(result, throughput, note)
    from_root = {text: f"docs/{path}" for text, path in CHARTS.items()}
    measured = clients.markdown(json.loads(CLIENTS.read_text("utf-8"))) if CLIENTS.exists() else ""
    crowded = crowd.markdown(json.loads(CROWD.read_text("utf-8"))) if CROWD.exists() else ""
    performance = report.page(result, CHARTS, measured, crowded)
    for page, part in ((PERFORMANCE, performance), (README, report.readme(result, from_root))):
        page.write_text(report.replaced(page.read_text("utf-8"), part), "utf-8")
        say(f"wrote {page.relative_to(ROOT)}")


def tables(result: dict[str, Any]) -> str:
    """Return what is printed at the end of a run."""
    parts = [report.setting(result), report.details(result), report.overview(result), report.losses_text(result)]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; return the exit status."""
    options = arguments(argv)
    if options.list:
        for one in [*WORKS, *CONTENDERS]:
            print(f"{one.name}: {one.title}" if isinstance(one, Work) else one.name)
        return 0
    if options.compare:
        text, agree = comparison(*(json.loads(path.read_text("utf-8")) for path in options.compare), options.within)
        print(text)
        return 0 if agree else 1
    if options.render:
        write_documents(json.loads(options.render.read_text("utf-8")))
        return 0
    try:
        result = run(chosen(options), options.rounds, options.seconds, options.unpinned)
    except ServerFailed as error:
        print(f"bench/run.py: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(stored(result), "utf-8")
    say(f"wrote {options.output}")
    print(tables(result))
    if options.documents:
        write_documents(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
