"""Two results side by side: whether their paired ratios agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from report import rows


@dataclass(frozen=True)
class Pair:
    """A paired ratio in two results: at which work, of which server to which."""

    work: str
    server: str
    reference: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """The second less the first, in per cent of the first."""
        return (self.second / self.first - 1) * 100


def ratios(result: Mapping[str, Any]) -> dict[tuple[str, str, str], float]:
    """Return the mean paired ratios to the limit and to the stdlib, by work, server and reference."""
    found = {}
    for work in result["works"]:
        for row in rows(work):
            for reference, ratio in ((work["limit"], row.to_limit), (work["reference"], row.to_stdlib)):
                if ratio is not None and row.name != reference:
                    found[work["title"], row.name, reference] = ratio.mean
    return found


def pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Pair]:
    """Return the ratios that both results have."""
    ours, theirs = ratios(first), ratios(second)
    return [Pair(*key, ours[key], theirs[key]) for key in ours if key in theirs]


def comparison(first: Mapping[str, Any], second: Mapping[str, Any], within: float) -> tuple[str, bool]:
    """Return the text of the comparison, and whether every ratio agrees within so many per cent."""
    found = pairs(first, second)
    width = max((len(pair.server) + len(pair.reference) for pair in found), default=0) + 3
    lines = []
    for title in dict.fromkeys(pair.work for pair in found):
        lines.append(title)
        for pair in (pair for pair in found if pair.work == title):
            name = f"{pair.server} / {pair.reference}"
            mark = "  <" if abs(pair.difference) > within else ""
            lines.append(f"  {name:{width}}  {pair.first:8.3f} {pair.second:8.3f} {pair.difference:+7.1f}%{mark}")
    apart = sum(abs(pair.difference) > within for pair in found)
    most = max((abs(pair.difference) for pair in found), default=0.0)
    lines.append(
        f"{len(found)} paired ratios, {len(found) - apart} within {within:g}% of each other; "
        f"the largest difference is {most:.1f}%"
        if found
        else "the two results have no ratio in common"
    )
    return "\n".join(lines), bool(found) and not apart
