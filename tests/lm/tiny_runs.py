"""The tiny recipe, and what its runs leave behind, for the tests that train it."""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = "tests/golden/tiny.yaml"


def run_dirs(tmp_path, name="tiny"):
    """The run folders under `tmp_path`, oldest first."""
    return sorted((tmp_path / "runs" / name).iterdir())


def metric(run, name):
    """step -> value of a metric."""
    with (run / "metrics.csv").open() as file:
        return {
            int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["metric"] == name
        }
