"""What the runs of sweeps say together: means, spreads and intervals over seeds, and which differences they show.

A row of the table is a setting of all that the sweeps vary, but for the seed, over which it is averaged, and the
optimiser's options, of which the best are chosen on validation alone.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mixerlab.lm.run.scores import scores_of
from mixerlab.lm.sweep.folder import Sweep
from mixerlab.options import ConfigError, one_of

RATES = ("bits_per_byte", "accuracy", "loss")
"""Which rate a table is about unless it is told: the first that there is."""
SEED, TUNED = "seed", "optim."
SPEED = "speed/tokens_per_second"
RESAMPLES, TAIL = 10_000, 0.025


@dataclass
class Row:
    """The runs of one setting that differ in their seed alone, finished ones."""

    setting: dict[str, str]
    """Key -> value of what the sweeps vary; with several sweeps their names too, under "sweep"."""
    tuned: dict[str, str]
    """The optimiser's options that were chosen."""
    runs: pd.DataFrame
    """Their lines of `Table.runs`."""

    @property
    def context(self) -> dict[str, str]:
        """The part of the setting within which rows are compared: a sweep, and data."""
        return {k: v for k, v in self.setting.items() if k in ("sweep", "data") or k.startswith("data.")}

    @property
    def name(self) -> str:
        return ", ".join(v for k, v in self.setting.items() if k not in self.context) or "all runs"

    def values(self, metric: str) -> NDArray[np.float64]:
        """One for each seed."""
        return self.runs[metric].to_numpy(dtype=np.float64)

    def mean(self, metric: str) -> float:
        return float(self.values(metric).mean())


@dataclass
class Table:
    """Rows, those of the same data together, best first; and what is said under them."""

    metric: str
    runs: pd.DataFrame
    """A line for each run, finished or not: its values, state, metrics and costs."""
    rows: list[Row]
    curves: dict[int, "pd.Series[float]"]
    """Of a line of `runs`: the validation metric by step."""
    verdicts: list[str]
    notes: list[str]
    selection: str
    """The validation metric by which the optimiser's options are chosen."""

    @property
    def datasets(self) -> list[str]:
        """What was validated on, in order."""
        rate = "/" + self.metric.rpartition("/")[2]
        return [name.removesuffix(rate) for name in map(str, self.runs) if name.endswith(rate)]


def tabulate(sweeps: Sequence[Sweep], metric: str | None = None) -> Table:
    """The table of some sweeps by a metric, such as test/accuracy.

    None: that of the test split where there is one, else of validation. Raises ConfigError if no run has finished, or
    none has the metric.
    """
    runs, curves, metrics, increasing = _read(sweeps)
    finished = runs[runs["state"] == "finished"]
    if finished.empty:
        raise ConfigError(
            f"sweep {', '.join(str(sweep.path) for sweep in sweeps)}: no run has finished, so there is no table yet; "
            f"{counted(runs)}"
        )
    shared = [name for name, number in metrics.items() if number == len(finished)]

    def rate_of(*datasets: str) -> str:
        """The first rate of a dataset that all runs have, or the loss of validation."""
        return next((f"{d}/{r}" for r in RATES for d in datasets if f"{d}/{r}" in shared), "valid/loss")

    metric = rate_of("test", "valid") if metric is None else metric
    if metric not in metrics:
        raise ConfigError(f"--metric {metric}: no run has it; {one_of(metric, metrics)}")
    selection = f"valid/{metric.rpartition('/')[2]}"
    if metric.startswith("eval/"):  # of `mixerlab evaluate`, whose rates validation has not
        selection = rate_of("valid")
    table = Table(metric, runs, [], {}, [], [], selection)
    table.curves = {
        i: curve[table.selection].dropna() for i, curve in curves.items() if table.selection in curve
    }
    keys = ["sweep", *_keys(sweeps)]
    tuned = [key for key in keys if key.startswith(TUNED)]
    varied = [key for key in keys if key not in (SEED, *tuned) and runs[key].nunique() > 1]
    for tried in [group for _, group in finished.groupby(varied, sort=False)] if varied else [finished]:
        chosen = choose(tried, tuned, table.selection, table.selection in increasing)
        first = chosen.iloc[0]
        table.rows.append(
            Row({key: first[key] for key in varied}, {key: first[key] for key in tuned}, chosen)
        )
    contexts = list(dict.fromkeys(tuple(row.context.items()) for row in table.rows))
    table.rows.sort(
        key=lambda row: (
            contexts.index(tuple(row.context.items())),
            -np.nan_to_num(gain(row.mean(metric), metric in increasing), nan=-math.inf),
        )
    )
    for context in contexts:
        rows = [
            row
            for row in table.rows
            if tuple(row.context.items()) == context and not math.isnan(row.mean(metric))
        ]
        if len(rows) > 1:
            where = ", ".join(value for _, value in context)
            table.verdicts.append((f"{where}: " if where else "") + verdict(rows, metric))
    table.notes = list(_notes(table, tuned))
    return table


def _keys(sweeps: Sequence[Sweep]) -> list[str]:
    """What the sweeps have lists for, in order."""
    return list(
        dict.fromkeys(key for sweep in sweeps for point in sweep.points.values() for key in point.values)
    )


def _read(
    sweeps: Sequence[Sweep],
) -> tuple[pd.DataFrame, dict[int, pd.DataFrame], Counter[str], set[str]]:
    """A line for each point of the sweeps; the logged metrics of those that have finished, how many have each final
    one, scores of `mixerlab evaluate` included, and of which of these more is better.
    """
    lines: list[dict[str, Any]] = []
    curves: dict[int, pd.DataFrame] = {}
    metrics: Counter[str] = Counter()
    increasing: set[str] = set()
    names = [sweep.name for sweep in sweeps]
    for sweep in sweeps:
        for label, point in sweep.points.items():
            status = sweep.status(label)
            line: dict[str, Any] = {
                "sweep": sweep.name if names.count(sweep.name) == 1 else str(sweep.path),
                "run": label,
                "state": status.state,
                "step": status.step,
                "reason": status.reason,
                "log": str(sweep.log_file(label)),
                "parameters": point.parameters,
                "state_bytes": point.state_bytes,
                **point.values,
            }
            run = sweep.run_of(label)
            if status.state == "finished" and run is not None:
                curve, final = run.metrics(), {k: v for k, v in run.result.items() if k != "steps"}
                line |= {"training_FLOPs": point.row_flops * point.step_rows * status.step}
                line["tokens_per_second"] = curve[SPEED].dropna()[1:].median() if SPEED in curve else math.nan
                curves[len(lines)] = curve
                increasing |= {name for name in final if name.endswith("accuracy")}
                for name, score in scores_of(run).items():
                    final[name] = score.value
                    increasing |= {name} if score.higher_is_better else set()
                line |= final
                metrics.update(final.keys())
            lines.append(line)
    runs = pd.DataFrame(lines)
    runs[_keys(sweeps)] = runs[_keys(sweeps)].fillna("")
    return runs, curves, metrics, increasing


def choose(tried: pd.DataFrame, tuned: list[str], selection: str, more_is_better: bool) -> pd.DataFrame:
    """The runs with the optimiser's options whose mean validation metric is best.

    Only options with the most finished seeds are looked at: those with fewer may have lost the bad ones.
    """
    if not tuned:
        return tried
    settings = [runs for _, runs in tried.groupby(tuned, sort=False)]
    most = max(map(len, settings))
    return max(
        (runs for runs in settings if len(runs) == most),
        key=lambda runs: np.nan_to_num(
            gain(runs[selection].mean(skipna=False), more_is_better), nan=-math.inf
        ),
    )


def gain(value: float, more_is_better: bool) -> float:
    """`value` so that more is better."""
    return value if more_is_better else -value


def interval(*samples: NDArray[np.float64]) -> tuple[float, float]:
    """Of the mean of a sample, or of the difference between the means of two: 95%, by bootstrap over their values."""
    draws = np.random.default_rng(0)
    means = [
        values[draws.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1) for values in samples
    ]
    low, high = np.quantile(means[0] - sum(means[1:]), [TAIL, 1 - TAIL])
    return float(low), float(high)


def are_told_apart(a: Row, b: Row, metric: str) -> bool:
    """Whether the interval of their difference excludes 0. One seed tells nothing."""
    if min(len(a.runs), len(b.runs)) < 2:
        return False
    low, high = interval(a.values(metric), b.values(metric))
    return low > 0 or high < 0


def verdict(rows: Sequence[Row], metric: str) -> str:
    """What may be said of rows, the best first."""
    best, *others = rows
    said = f"{best.name} has the best mean {in_words(metric)}"
    if min(len(row.runs) for row in rows) < 2:
        return f"{said}, but one seed shows no difference"
    alike = [row.name for row in others if not are_told_apart(best, row, metric)]
    if not alike:
        return f"{said}, and the intervals of its differences from the others exclude 0"
    return f"{said}, but is not distinguishable from {' and '.join(alike)}"


def in_words(metric: str) -> str:
    return metric.replace("/", " ").replace("_", " ")


def counted(runs: pd.DataFrame) -> str:
    """How many runs are in which state, in words."""
    return ", ".join(f"{number} {state}" for state, number in Counter(runs["state"]).items())


def _notes(table: Table, tuned: list[str]) -> Iterator[str]:
    runs = table.runs
    if tuned:
        names = " and ".join(key.removeprefix(TUNED) for key in tuned)
        yield (
            f"Selection: for each row the {names} with the best mean {in_words(table.selection)} over its seeds, among "
            "those with the most finished runs; no other dataset is looked at"
        )
        if table.metric == table.selection:
            yield (
                "The same numbers choose and are shown, so they flatter every row a little: no test split has "
                f"{in_words(table.metric).partition(' ')[2]}"
            )
    yield f"Runs: {counted(runs)}"
    for _, line in runs[runs["state"] != "finished"].iterrows():
        how = (
            f": {line['reason']} (log: {line['log']})"
            if line["reason"]
            else f", step {line['step']}" * (line["step"] > 0)
        )
        name = f"{line['sweep']}/{line['run']}" if runs["sweep"].nunique() > 1 else line["run"]
        yield f"Missing: {name} is {line['state']}{how}"
    for key in tuned:
        edges = _edges(runs[key])
        if at_edge := [f"{row.name} ({row.tuned[key]})" for row in table.rows if row.tuned[key] in edges]:
            yield f"At the edge of the values tried for {key}: {', '.join(at_edge)}; the best may lie beyond"
    yield (
        "± is the standard deviation over seeds; intervals are of 95%, bootstrapped over seeds. A difference counts "
        "where its interval excludes 0"
    )
    fewest = min(len(row.runs) for row in table.rows)
    if fewest in FALSE_ALARMS and len(table.rows) > 1:
        yield (
            f"With {fewest} seeds this is weak: two equal settings would be told apart by chance in "
            f"{FALSE_ALARMS[fewest]:.0%} of comparisons"
        )


FALSE_ALARMS = {2: 0.33, 3: 0.2, 4: 0.14, 5: 0.12}
"""Seeds -> how often `are_told_apart` calls normal values of one distribution different."""


def _edges(values: "pd.Series[str]") -> set[str]:
    """The smallest and the largest of the numbers tried; none where there is no choice, or they are no numbers."""
    values = values[values != ""]  # of a sweep that has no list for this key
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any() or numbers.nunique() < 2:
        return set()
    return set(values[numbers.isin([numbers.min(), numbers.max()])])
