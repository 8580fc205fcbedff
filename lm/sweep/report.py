"""The table of sweeps on the terminal, and as Markdown, CSV, a picture and a page of HTML that needs no network."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mixerlab.lm.model.cost import si, size
from mixerlab.lm.run.results import results_in
from mixerlab.lm.sweep import plots
from mixerlab.lm.sweep.folder import Sweep
from mixerlab.lm.sweep.page import page
from mixerlab.lm.sweep.table import Table, are_told_apart, in_words, interval, tabulate
from mixerlab.sealed import write_file


def report(
    sweeps: Sequence[Sweep], console: Console, metric: str | None = None, to: Path | None = None
) -> None:
    """Prints the table and writes the report's files into the folder `to`. Raises ConfigError if no run has finished.

    None: the folder is `report` in the sweep, or in the first of several one named after the others too.
    """
    table = tabulate(sweeps, metric)
    to = to or sweeps[0].path / "+".join(["report", *(sweep.name for sweep in sweeps[1:])])
    shown = [frame for frame in (results(table), by_dataset(table)) if not frame.empty]
    for frame in shown:
        print_table(frame, console)
    for line in [*table.verdicts, *table.notes]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    with results_in(to, "--to"):
        pictures = plots.pictures(table)
        for name, picture in pictures.items():
            (to / f"{name}.svg").write_bytes(picture)
        numbers(table).to_csv(to / "table.csv", index=False)
        table.runs.to_csv(to / "runs.csv", index=False)
        write_file(to / "report.md", markdown(sweeps, table, shown))
        write_file(to / "report.html", page(sweeps, table, shown, pictures))
    console.print(f"report {to / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def results(table: Table) -> pd.DataFrame:
    """The table's main columns, as people read them."""
    lines: list[dict[str, str]] = []
    best: dict[tuple[tuple[str, str], ...], int] = {}
    for row in table.rows:
        first = table.rows[best.setdefault(tuple(row.context.items()), len(lines))]
        line = {**_short(row.setting), **_short(row.tuned), "seeds": str(len(row.runs))}
        for metric in dict.fromkeys((table.metric, table.selection)):
            line[in_words(metric)] = spread(row.values(metric))
        low, high = interval(row.values(table.metric))
        is_known = not math.isnan(low)
        line["95% interval"] = f"{low:.3f} to {high:.3f}" if is_known and len(row.runs) > 1 else ""
        apart = are_told_apart(first, row, table.metric)
        behind = abs(row.mean(table.metric) - first.mean(table.metric))
        line["behind the best"] = f"{behind:.3f}" if apart else "not distinguishable"
        if row is first or not is_known:
            line["behind the best"] = ""
        line["parameters"] = f"{int(row.runs['parameters'].iloc[0]):,}"
        line["training FLOPs"] = si(row.mean("training_FLOPs"))
        line["tokens/s"] = si(row.mean("tokens_per_second"))
        line["decoding state"] = size(row.mean("state_bytes"))
        lines.append(line)
    return pd.DataFrame(lines)


def by_dataset(table: Table) -> pd.DataFrame:
    """The metric on every dataset that was validated on, where there are more than validation and test."""
    if not set(table.datasets) - {"valid", "test"}:
        return pd.DataFrame()
    rate = table.metric.rpartition("/")[2]
    return pd.DataFrame(
        _short(row.setting) | {name: spread(row.values(f"{name}/{rate}")) for name in table.datasets}
        for row in table.rows
    )


def numbers(table: Table) -> pd.DataFrame:
    """Every column unrounded, with mean, standard deviation and interval of every dataset."""
    rate = table.metric.rpartition("/")[2]
    lines: list[dict[str, Any]] = []
    for row in table.rows:
        line = {**row.setting, **row.tuned, "seeds": len(row.runs)}
        for metric in (f"{name}/{rate}" for name in table.datasets):
            values = row.values(metric)
            low, high = interval(values)
            std = values.std(ddof=1) if len(values) > 1 else None
            line |= {
                metric: values.mean(),
                f"{metric} std": std,
                f"{metric} low": low,
                f"{metric} high": high,
            }
        for name in ("parameters", "training_FLOPs", "tokens_per_second", "state_bytes"):
            line[name] = row.mean(name)
        lines.append(line)
    return pd.DataFrame(lines)


def spread(values: NDArray[np.float64]) -> str:
    """Mean and standard deviation over seeds; "" where there are no numbers."""
    if np.isnan(values).all():
        return ""
    if len(values) < 2:
        return f"{values.mean():.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def _short(setting: dict[str, str]) -> dict[str, str]:
    """With the last part of each key alone, where that is clear."""
    names = [key.rpartition(".")[2] for key in setting]
    return {n if names.count(n) == 1 else key: v for n, (key, v) in zip(names, setting.items(), strict=True)}


def print_table(frame: pd.DataFrame, console: Console) -> None:
    """Prints a table of texts."""
    table = RichTable(*map(escape, map(str, frame)), box=SIMPLE_HEAD)
    for line in frame.fillna("").to_numpy().tolist():
        table.add_row(*map(escape, line))
    if not console.is_terminal:
        console.width = 200  # a file has no width to fit into
    console.print(table)


def markdown(sweeps: Sequence[Sweep], table: Table, shown: Sequence[pd.DataFrame]) -> str:
    """The tables and what is said under them, in Markdown."""
    parts = [f"# {', '.join(sweep.name for sweep in sweeps)}"]
    for frame in shown:
        cells = [list(map(str, frame)), ["---"] * len(frame.columns), *frame.fillna("").to_numpy().tolist()]
        lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {line}" for line in [*table.verdicts, *table.notes]))
    return "\n\n".join(parts) + "\n"
