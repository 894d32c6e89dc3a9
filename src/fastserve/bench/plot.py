"""The picture of ``fastserve bench``: CPU time for each request, and requests per second. Needs matplotlib."""

from __future__ import annotations

import importlib
from typing import Any

from fastserve.bench.machine import describe
from fastserve.bench.report import Report, Row

FORMATS = (".png", ".svg")
COLOURS = {"stdlib": "#8c8c8c", "fastserve": "#1f77b4"}


def plot(report: Report, title: str, path: str) -> None:
    """Draw the servers whose figures mean something, and write the picture to ``path``, ``.png`` or ``.svg``."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    rows = [row for row in report.rows if not row.problem]
    figure, (cpu, rate) = pyplot.subplots(1, 2, figsize=(11, 2.4 + 0.45 * len(rows)), sharey=True)
    _bars(cpu, rows, "cpu_us", "{:.2f}", "server CPU, µs per request (less is better)")
    _bars(rate, rows, "requests_per_second", "{:,.0f}", "requests per second (more is better)")
    cpu.invert_yaxis()  # the first row on top, as in the table
    machine = describe()
    figure.suptitle(title, fontsize=12, parse_math=False)
    below = [f"{machine['cpu']}, {machine['kernel']}, {machine['python']}, fastserve {machine['fastserve']}"]
    below[0] += f" ({machine['implementation']}), {machine['date']}"
    if any(row.series.saturated() for row in rows):
        below.append("* the load generator was at its limit: the server could do more")
    figure.text(0.01, 0.02, "\n".join([report.work(), *below]), fontsize=7.5, color="#555555", parse_math=False)
    figure.tight_layout(rect=(0, 0.06 + 0.3 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axes: Any, rows: list[Row], figure: str, form: str, label: str) -> None:
    values = [row.series.median(figure) for row in rows]
    bars = axes.barh([row.name for row in rows], values, color=[COLOURS[row.implementation] for row in rows])
    marks = ["*" if figure == "requests_per_second" and row.series.saturated() else "" for row in rows]
    texts = [form.format(value) + mark for value, mark in zip(values, marks, strict=True)]
    axes.bar_label(bars, texts, padding=3, fontsize=9)
    axes.set_xlabel(label)
    axes.set_xlim(0, max([*values, 1e-9]) * 1.2)  # room for the figures beside the bars
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.10g}")
