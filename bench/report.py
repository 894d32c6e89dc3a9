"""What is said about a result: tables and sentences in Markdown, all made from the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.bench.measure import Ratio, Series

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NONE = "–"
MARKED = "†"
LOSSES = (
    "In brackets: how many times the other's CPU time fastserve takes, the mean of the paired rounds and their "
    "range. The best worker model on the C core is held against every server, each other one against the stdlib's of "
    "that name. The errors below belong to it: who leaves clients without an answer has less to do."
)
WHAT_IS_MARKED = (
    f"{MARKED} The load generator used over 95% of its core in most rounds: the rate may be its own, "
    "the CPU time of the server holds."
)

WHAT_ERRORS_ARE = (
    "Errors of kept connections are connections that had no answer for a whole round, errors of datagrams are losses. "
    "A server with many of them has served fewer clients than the others, which is cheaper for each request."
)


@dataclass(frozen=True)
class Row:
    """One server at one work: medians over the rounds, and paired ratios of the CPU time."""

    name: str
    family: str
    model: str
    cpu_us: float
    rate: float
    p99_us: float
    errors: int
    saturated: bool
    to_limit: Ratio | None
    to_stdlib: Ratio | None


def series_of(work: Mapping[str, Any]) -> dict[str, Series]:
    """Return the rounds of each server of a work."""
    return {server["name"]: Series(server["name"], server["rounds"]) for server in work["servers"]}


def rows(work: Mapping[str, Any]) -> list[Row]:
    """Return the servers of a work, the one with the least CPU time first."""
    series = series_of(work)
    limit, stdlib = series.get(work["limit"]), series.get(work["reference"])
    found = []
    for server in work["servers"]:
        mine = series[server["name"]]
        found.append(
            Row(
                name=server["name"],
                family=server["family"],
                model=server["model"],
                cpu_us=mine.median("cpu_us"),
                rate=mine.median("requests_per_second"),
                p99_us=mine.median("p99_us"),
                errors=mine.errors(),
                saturated=mine.saturated(),
                to_limit=mine.ratio(limit) if limit else None,
                to_stdlib=mine.ratio(stdlib) if stdlib else None,
            )
        )
    return sorted(found, key=lambda row: row.cpu_us)


def number(value: float) -> str:
    """Return a figure with three significant digits, or all digits before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(ratio: Ratio | None, spread: bool = True) -> str:
    """Return a ratio for a table, with the range over the rounds."""
    if ratio is None or ratio.mean != ratio.mean:
        return NONE
    return f"{ratio.mean:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if spread else f"{ratio.mean:.2f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are figures."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def work_table(work: Mapping[str, Any]) -> str:
    """Return the table of one work: every server, and the reasons of those that are missing."""
    head = ["server", "CPU µs per request", "ratio to the limit", f"ratio to {work['reference']}"]
    head += ["requests/s", "p99 µs", "errors"]
    lines = [
        [
            f"**{row.name}**" if row.family == "fastserve" else row.name,
            number(row.cpu_us),
            times(row.to_limit),
            times(row.to_stdlib),
            f"{row.rate:,.0f}{MARKED if row.saturated else ''}",
            number(row.p99_us),
            str(row.errors),
        ]
        for row in rows(work)
    ]
    lines += [[entry["name"], f"missing: {entry['reason']}", *[NONE] * 5] for entry in work["missing"]]
    return table(head, [[cell.replace("|", "\\|") for cell in line] for line in lines])


def tabled(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the works that are rows of the overview."""
    return [work for work in result["works"] if work["table"] and work["servers"]]


def best(found: Sequence[Row], family: str, prefix: str = "") -> Row | None:
    """Return the server of a family with the least CPU time."""
    return next((row for row in found if row.family == family and row.name.startswith(prefix)), None)


def overview(result: Mapping[str, Any]) -> str:
    """Return the table of all works: CPU µs per request of the limit, the stdlib, fastserve and the best other."""
    head = ["CPU µs per request", "limit (raw C)", "socketserver", "fastserve, C core", "fastserve, Python twin"]
    head += ["best other", "fastserve / socketserver", "fastserve / limit"]
    lines = []
    for work in tabled(result):
        found, series = rows(work), series_of(work)
        stdlib, ours = best(found, "stdlib"), best(found, "fastserve", "fastserve C")
        cells = [best(found, "limit"), stdlib, ours, best(found, "fastserve", "fastserve Python"), best(found, "other")]
        line = [work["title"], *map(cell, cells)]
        line.append(times(series[ours.name].ratio(series[stdlib.name]), False) if ours and stdlib else NONE)
        line.append(times(ours.to_limit, False) if ours else NONE)
        lines.append(line)
    return table(head, lines)


def cell(row: Row | None) -> str:
    """Return CPU time and, where it is not plain from the column, whose it is."""
    if row is None:
        return NONE
    whose = "" if row.family == "limit" else f" ({row.model or row.name})"
    return f"{number(row.cpu_us)}{whose}"


def losses(result: Mapping[str, Any]) -> list[str]:
    """Return the sentences that tell at which works fastserve uses more CPU time than which other server.

    The best model of the C core is held against every server but the limit, and each model of both cores against the
    stdlib's own of that name.
    """
    said = []
    for work in tabled(result):
        found, series = rows(work), series_of(work)
        rivals = [row for row in found if row.family in ("other", "stdlib")]
        ours = best(found, "fastserve", "fastserve C") or best(found, "fastserve")
        if ours is None:
            said.append(f"{work['title']}: fastserve is missing.")
            continue
        for mine in [ours, *(row for row in found if row.family == "fastserve" and row is not ours)]:
            against = rivals if mine is ours else [row for row in rivals if row.model == mine.model]
            lost = [f"{row.name} {phrase}" for row in against if (phrase := loss(series[mine.name], series[row.name]))]
            if lost:
                said.append(f"**{mine.name} loses at {work['title']}** to {', '.join(lost)}.")
    return said


def loss(ours: Series, other: Series) -> str:
    """Return by how much ``ours`` loses to ``other``; nothing if it does not."""
    ratio = ours.ratio(other)
    if not ratio.mean > 1:
        return ""
    return f"(×{ratio.mean:.2f}, {ratio.low:.2f} to {ratio.high:.2f}{'; not in every round' if ratio.low <= 1 else ''})"


def losses_text(result: Mapping[str, Any]) -> str:
    """Return where fastserve loses as a list, or that it does not."""
    found = losses(result)
    if not found:
        return "fastserve uses no more CPU time than any server but the limit, in any of these works."
    return "\n".join([LOSSES, "", *(f"- {sentence}" for sentence in found)])


def setting(result: Mapping[str, Any]) -> str:
    """Return the sentence that names the machine, the versions, the commit, the date and the rounds."""
    machine = result["machine"]
    versions = {"fastserve": machine["fastserve"], **machine["packages"]}
    with_version = [f"{name} {version}" for name, version in versions.items() if version]
    tools = ", ".join(filter(None, [machine["python"], *with_version, machine.get("compiler"), machine.get("go")]))
    commit = machine["commit"] or "unknown"
    changed = " with changes" if commit.endswith("+") else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}; {tools}; "
        f"commit {commit.rstrip('+')}{changed}; {machine['date']}; "
        f"medians of {result['rounds']} rounds of {result['seconds']:g} s."
    )


def peer(row: Row, work: Mapping[str, Any], found: Sequence[Row]) -> str:
    """Return the name of the server that a server is held against round by round, if there is one.

    For one of fastserve it is the stdlib's of the same worker model, or the reference of the work where the stdlib has
    no such model; for one that was slowed on purpose it is the same server as it is.
    """
    if row.family == "slowed":
        names = [one.name for one in found if one.family == "fastserve" and one.model == row.model]
        return next((name for name in names if row.name.startswith(name)), "")
    if row.family != "fastserve":
        return ""
    own = next((one.name for one in found if one.family == "stdlib" and one.model == row.model), None)
    return own or next((one.name for one in found if one.name == work["reference"]), "")


def pairs_text(work: Mapping[str, Any]) -> str:
    """Return the paired ratios of the CPU time, a line for each pair."""
    found, series = rows(work), series_of(work)
    lines = []
    for row in found:
        other = peer(row, work, found)
        if other:
            lines.append(f"- {row.name} / {other}: {times(series[row.name].ratio(series[other]))}")
    return "\n".join(["CPU time, paired by rounds:", "", *lines]) if lines else ""


def details(result: Mapping[str, Any]) -> str:
    """Return the tables of all works, one below the other, each with its paired ratios."""
    parts = []
    for work in result["works"]:
        if work["table"]:
            parts += [f"#### {work['title']}", work_table(work), pairs_text(work)]
    return "\n\n".join([*filter(None, parts), WHAT_ERRORS_ARE, WHAT_IS_MARKED])


def page(result: Mapping[str, Any], charts: Mapping[str, str], clients: str = "", crowd: str = "") -> str:
    """Return the generated part of ``docs/performance.md``.

    ``charts`` maps the texts of images to their paths; ``clients`` is the table of ``bench/clients.py`` and ``crowd``
    are those of ``bench/crowd.py``, if there are any.
    """
    with_clients = ["### With wrk, ab, redis-benchmark and dnsperf", clients.strip()] if clients else []
    with_crowd = ["### With many clients", crowd.strip()] if crowd else []
    return "\n\n".join(
        [
            setting(result),
            overview(result),
            *(f"![{text}]({path})" for text, path in charts.items()),
            "### Where fastserve loses",
            losses_text(result),
            *with_clients,
            *with_crowd,
            "### Every server",
            details(result),
        ]
    )


def readme(result: Mapping[str, Any], charts: Mapping[str, str]) -> str:
    """Return the generated part of the README."""
    images = [f"![{text}]({path})" for text, path in charts.items()]
    return "\n\n".join([overview(result), "Where fastserve loses:", losses_text(result), *images, setting(result)])


def replaced(text: str, part: str) -> str:
    """Return ``text`` with ``part`` between its two markers. Raises ``ValueError`` unless there is one of each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"there must be one {BEGIN} and, after it, one {END}")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{part.strip()}\n\n{text[text.index(END) :]}"
