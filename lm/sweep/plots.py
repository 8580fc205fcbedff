"""The pictures of a report: results with their intervals, learning curves, and every dataset beside the others."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixerlab.lm.sweep.table import Row, Table, in_words, interval

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Those of Okabe and Ito, which colour-blind people tell apart."""
CAPTIONS = {
    "results": "Results: each seed, the mean over seeds and its 95% interval",
    "curves": "Learning curves: the mean over seeds, and from the smallest to the largest",
    "datasets": "Each dataset: the mean over seeds and its 95% interval",
}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.hashsalt": "mixerlab",  # the same names inside, whenever it is drawn
}


def pictures(table: Table) -> dict[str, bytes]:
    """Name -> picture, as SVG."""
    drawn: dict[str, Callable[[Axes, Table, list[Row]], None]] = {"results": _results}
    if any(len(curve) > 1 for curve in table.curves.values()):
        drawn["curves"] = _curves
    if set(table.datasets) - {"valid", "test"}:
        drawn["datasets"] = _datasets
    contexts: dict[str, list[Row]] = {}
    for row in table.rows:
        contexts.setdefault(", ".join(row.context.values()), []).append(row)
    return {name: _picture(draw, table, contexts) for name, draw in drawn.items()}


def _picture(draw: Callable, table: Table, contexts: dict[str, list[Row]]) -> bytes:
    """One panel for each context: rows are compared within it alone."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.4 * len(contexts)), layout="constrained")
        panels = figure.subplots(len(contexts), squeeze=False)[:, 0]
        for panel, (context, rows) in zip(panels, contexts.items(), strict=True):
            draw(panel, table, rows)
            panel.set_title(_plain(context), loc="left", fontsize=9)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _plain(text: str) -> str:
    """As it is: matplotlib takes what is between dollars for mathematics."""
    return text.replace("$", r"\$")


def _coloured(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """By name, so that a colour does not change with who is best."""
    names = sorted({row.name for row in rows})
    return [(row, COLOURS[names.index(row.name) % len(COLOURS)]) for row in rows]


def _results(panel: Axes, table: Table, rows: list[Row]) -> None:
    """Every seed, the mean, and its interval."""
    for y, (row, colour) in enumerate(_coloured(rows)):
        values = row.values(table.metric)
        panel.plot(values, np.full(len(values), y), "o", color=colour, alpha=0.35, markersize=5)
        panel.plot(interval(values), (y, y), color=colour, linewidth=2)
        panel.plot(values.mean(), y, "D", color=colour, markersize=7)
    panel.set_yticks(range(len(rows)), [row.name for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)  # the best on top
    panel.set_xlabel(in_words(table.metric))


def _curves(panel: Axes, table: Table, rows: list[Row]) -> None:
    """The mean over seeds by step, and from the smallest to the largest."""
    for row, colour in _coloured(rows):
        curves = [table.curves[i] for i in row.runs.index if i in table.curves]
        together = pd.concat(curves, axis=1).dropna() if curves else pd.DataFrame()
        if together.empty:
            continue
        panel.plot(together.index, together.mean(axis=1), color=colour, label=_plain(row.name))
        panel.fill_between(
            together.index, together.min(axis=1), together.max(axis=1), color=colour, alpha=0.15
        )
    panel.set_xlabel("step")
    panel.set_ylabel(in_words(table.selection))
    if panel.lines:
        panel.legend()


def _datasets(panel: Axes, table: Table, rows: list[Row]) -> None:
    """The metric by difficulty, which is the number at the end of a dataset's name."""
    rate = table.metric.rpartition("/")[2]
    names = [name for name in table.datasets if re.search(r"\d$", name)] or table.datasets
    for i, (row, colour) in enumerate(_coloured(rows)):
        values = [row.values(f"{name}/{rate}") for name in names]
        means = np.array([v.mean() for v in values])
        ends = np.array([interval(v) for v in values]).T
        errors = np.abs(ends - means)
        x = np.arange(len(names)) + 0.04 * (i - (len(rows) - 1) / 2)  # or intervals would hide each other
        panel.errorbar(x, means, errors, color=colour, label=_plain(row.name), marker="o", capsize=3)
    panel.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    panel.set_ylabel(in_words(rate))
    panel.legend()
