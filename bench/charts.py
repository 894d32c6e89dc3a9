"""The two charts, as SVG: CPU time by server and work, and throughput against connections. Needs matplotlib."""

from __future__ import annotations

import importlib
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import Row, number, rows, tabled

# Okabe and Ito's colours, which people with any colour vision tell apart; the others are grey, so that ours stand out.
C_CORE, PYTHON_TWIN, STDLIB, OTHER, LIMIT = "#0072B2", "#56B4E9", "#E69F00", "#C4C4C4", "#000000"
LEGEND = [
    ("fastserve, C core", C_CORE),
    ("fastserve, Python twin", PYTHON_TWIN),
    ("socketserver", STDLIB),
    ("others", OTHER),
]
LINES = {
    "raw C": (LIMIT, "", "--"),
    "fastserve C threading": (C_CORE, "o", "-"),
    "fastserve Python threading": (PYTHON_TWIN, "s", "-"),
    "stdlib threading": (STDLIB, "^", "-"),
    "uvloop Protocol": ("#D55E00", "v", "-"),
    "asyncio Protocol": ("#CC79A7", "D", "-"),
    "gevent": ("#009E73", "P", "-"),
    "Go": ("#777777", "X", "-"),
}
# Further worker models of fastserve keep its colours and differ in their dashes.
DASHES = ["-", ":", "-.", (0, (5, 1)), (0, (1, 1))]
COLUMNS = 2
BAR = 0.24  # inches for each bar
NAMES = 2.35  # inches for the names of the servers, left of each panel
CLIPPED = 4.0  # a bar of more than so many medians is cut off, so that the others can be told apart


def setup() -> tuple[Any, Any]:
    """Return matplotlib and pyplot, set to draw the same bytes for the same figures."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "svg.hashsalt": "fastserve",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": "white",
        }
    )
    return matplotlib, pyplot


def save(figure: Any, path: Path, pyplot: Any) -> None:
    """Write the figure; the suffix of ``path`` says as what."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, dpi=100)
    pyplot.close(figure)


def wrapped(text: str, characters: int) -> str:
    """Return a text in lines of at most so many characters."""
    return "\n".join(textwrap.wrap(text, characters))


def colour(row: Row) -> str:
    """Return the colour of a server's bar."""
    if row.family == "fastserve":
        return C_CORE if row.name.startswith("fastserve C") else PYTHON_TWIN
    return STDLIB if row.family == "stdlib" else OTHER


def draw_cpu(result: Mapping[str, Any], path: Path, footnote: str = "") -> None:
    """Draw one panel for each work: a bar for each server, the least CPU time on top, and the limit as a line."""
    _, pyplot = setup()
    works = [(work["title"], rows(work)) for work in tabled(result)]
    groups = [works[at : at + COLUMNS] for at in range(0, len(works), COLUMNS)]
    bars = [max(len(found) for _, found in group) for group in groups]
    panel = [BAR * count + 0.95 for count in bars]
    top, bottom = 0.95, 0.3
    height = sum(panel) + top + bottom
    width = 12.0
    figure = pyplot.figure(figsize=(width, height))
    left, gap, right = NAMES, NAMES + 0.2, 0.25
    across = (width - left - right - gap * (COLUMNS - 1)) / COLUMNS
    y = height - top
    for group, inches in zip(groups, panel, strict=True):
        for column, (title, found) in enumerate(group):
            x = left + column * (across + gap)
            # The bars of a panel with fewer servers are as thick as those beside it.
            shown = [row for row in found if row.family != "limit"]
            tall = BAR * max(len(shown), 1)
            box = (x / width, (y - 0.42 - tall) / height, across / width, tall / height)
            draw_panel(figure.add_axes(box), title, found, shown)
        y -= inches
    figure.text(0.25 / width, 1 - 0.3 / height, "Server CPU time per request", fontsize=15, weight="bold", va="center")
    subtitle = "microseconds, less is better; the dashed line is the limit, a server in C with epoll"
    figure.text(0.25 / width, 1 - 0.58 / height, subtitle, fontsize=10, color="#444444", va="center")
    patches = importlib.import_module("matplotlib.patches")
    handles = [patches.Patch(color=shade, label=label) for label, shade in LEGEND]
    handles.append(importlib.import_module("matplotlib.lines").Line2D([], [], color=LIMIT, ls="--", label="limit"))
    place = (1 - 0.25 / width, 1 - 0.1 / height)
    figure.legend(handles=handles, loc="upper right", ncol=3, frameon=False, bbox_to_anchor=place)
    figure.text(0.25 / width, 0.08 / height, wrapped(footnote, 190), fontsize=7.5, color="#444444", va="bottom")
    save(figure, path, pyplot)


def draw_panel(axes: Any, title: str, found: Sequence[Row], shown: Sequence[Row]) -> None:
    """Draw the servers of one work."""
    values = [row.cpu_us for row in shown]
    limit = next((row.cpu_us for row in found if row.family == "limit"), None)
    whole = [value for value in values if value <= CLIPPED * statistics.median(values)]
    end = 1.2 * max([*whole, limit or 0])
    for place, row in enumerate(shown):
        cut = row.cpu_us > end
        axes.barh(place, min(row.cpu_us, end), 0.78, color=colour(row), hatch="///" if cut else None, edgecolor="white")
        inside = cut or row.cpu_us > 0.87 * end
        label = f"{number(row.cpu_us)}{' (cut off)' if cut else ''}"
        dark = row.family == "fastserve" and row.name.startswith("fastserve C")
        text = axes.text(
            min(row.cpu_us, end) + (-0.012 if inside else 0.012) * end,
            place,
            label,
            va="center",
            ha="right" if inside else "left",
            fontsize=8.5,
            color="white" if inside and dark else "black",
            weight="bold" if row.family == "fastserve" else "normal",
        )
        # The line of the limit passes behind the figures.
        text.set_bbox({"facecolor": colour(row) if inside else "white", "edgecolor": "none", "pad": 0.8})
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    for label, row in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_weight("bold" if row.family == "fastserve" else "normal")
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.tick_params(axis="y", length=0)
    # A title begins where the names begin: a long one has the width of both.
    axes.annotate(
        title,
        xy=(0, 1),
        xytext=(NAMES * -72 + 18, 17),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=10.5,
        weight="bold",
    )
    axes.set_xlabel("CPU µs per request", fontsize=8, labelpad=1)
    axes.tick_params(axis="x", labelsize=8)
    if limit is not None:
        axes.axvline(limit, color=LIMIT, ls="--", lw=1.2, zorder=1.5)
        axes.text(limit, -0.62, f"limit {number(limit)}", ha="left" if limit < end / 2 else "right", fontsize=8)


def draw_throughput(result: Mapping[str, Any], path: Path, footnote: str = "") -> None:
    """Draw requests per second against the number of connections."""
    _, pyplot = setup()
    points: dict[str, list[tuple[int, float, bool]]] = {}
    for work in sorted((work for work in result["works"] if work["curve"]), key=lambda work: work["connections"]):
        for row in rows(work):
            points.setdefault(row.name, []).append((work["connections"], row.rate / 1000, row.saturated))
    most = max(len(found) for found in points.values())
    points = {name: found for name, found in points.items() if len(found) == most and most > 1}
    figure, axes = pyplot.subplots(figsize=(11, 6.4))
    figure.subplots_adjust(left=0.07, right=0.77, top=0.87, bottom=0.17)
    styles = line_styles(list(points))
    for name, found in points.items():
        shade, marker, dashes = styles[name]
        x, y, saturated = zip(*found, strict=True)
        ours = name.startswith("fastserve")
        axes.plot(x, y, color=shade, ls=dashes, lw=2.6 if ours else 1.5, zorder=3 if ours else 2)
        for at, height, mark in found:
            face = "white" if mark else shade
            axes.plot(at, height, marker or ".", color=shade, mfc=face, ms=7 if marker else 5, zorder=4)
    axes.set_xscale("log")
    ticks = sorted({at for found in points.values() for at, _, _ in found})
    axes.set_xticks(ticks, [f"{at:,}" for at in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1.08 * max(height for found in points.values() for _, height, _ in found))
    axes.set_xlabel("connections (logarithmic), each with one request of 64 bytes under way")
    axes.set_ylabel("thousand requests per second")
    axes.grid(axis="y", color="#E5E5E5")
    axes.set_axisbelow(True)
    ends = {name: found[-1][1] for name, found in points.items()}
    spread_labels(axes, ends, styles)
    figure.text(0.07, 0.955, "Throughput against connections", fontsize=15, weight="bold", va="center")
    subtitle = "echo of 64 bytes, server on one core; more is better. Hollow: the load generator was at its own limit"
    figure.text(0.07, 0.91, subtitle, fontsize=10, color="#444444", va="center")
    figure.text(0.07, 0.02, wrapped(footnote, 175), fontsize=7.5, color="#444444", va="bottom")
    save(figure, path, pyplot)


def line_styles(names: Sequence[str]) -> dict[str, tuple[str, str, Any]]:
    """Return colour, marker and dashes of each server; unknown ones get those of their family."""
    styles: dict[str, tuple[str, str, Any]] = {}
    for name in names:
        if name in LINES:
            styles[name] = LINES[name]
            continue
        shade = C_CORE if name.startswith("fastserve C") else PYTHON_TWIN if name.startswith("fastserve") else "#999999"
        alike = sum(style[0] == shade for style in styles.values())
        styles[name] = (shade, "os^vDPX<>*"[alike % 10], DASHES[alike % len(DASHES)])
    return styles


def spread_labels(axes: Any, ends: Mapping[str, float], styles: Mapping[str, Any]) -> None:
    """Write the name of each line right of its end, far enough from each other to be read."""
    low, high = axes.get_ylim()
    step = (high - low) * 0.042
    names = sorted(ends, key=lambda name: ends[name])
    places: list[float] = []
    for name in names:
        places.append(max(ends[name], places[-1] + step if places else low + step / 2))
    # What was pushed over the top comes down again, and what is in its way with it.
    for index in reversed(range(len(places))):
        ceiling = high - step / 2 if index == len(places) - 1 else places[index + 1] - step
        places[index] = min(places[index], ceiling)
    beside = axes.get_yaxis_transform()
    for name, place in zip(names, places, strict=True):
        shade = styles[name][0]
        leader = [ends[name], place, place]
        axes.plot([1.005, 1.03, 1.04], leader, color=shade, lw=0.8, transform=beside, clip_on=False)
        weight = "bold" if name.startswith("fastserve") else "normal"
        axes.text(1.047, place, name, transform=beside, va="center", color=shade, weight=weight, fontsize=9.5)
