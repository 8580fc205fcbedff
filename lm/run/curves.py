"""metrics.csv: lines of step, metric, value, of which those that are damaged are skipped."""

import csv
from collections.abc import Iterator
from pathlib import Path


def lines_of(path: Path) -> Iterator[tuple[int, str, str]]:
    """(step, metric, value) of every whole line, the value as it was written. Raises OSError."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                # Each by itself: a quotation mark out of place would swallow the lines behind it.
                step, metric, value = next(csv.reader([line.rstrip("\r\n")]))
                float(value)
                yield int(step), metric, value
            except (csv.Error, ValueError, StopIteration):
                continue
