"""mixerlab report: what the runs of sweeps say together."""

import argparse
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """
examples:
  mixerlab report runs/quickstart-sweep
  mixerlab report runs/quickstart-sweep --metric valid/loss
  mixerlab report runs/mqar-sweep runs/diffuse-mqar-sweep --to comparison
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab report",
        description="Compare the runs of sweeps, at their end or before: on the terminal, and as Markdown, CSV, "
        "pictures and a page of HTML.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP", help="the folder of a sweep")
    parser.add_argument(
        "--metric", help="what to compare, such as valid/loss (default: of the test split, or of validation)"
    )
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where to write (default: report in the sweep)"
    )
    args = parser.parse_args(arguments)

    from rich.console import Console

    from mixerlab.lm.sweep.folder import Sweep
    from mixerlab.lm.sweep.report import report

    sweeps = [Sweep.open(path) for path in dict.fromkeys(args.sweeps)]
    report(sweeps, Console(emoji=False), args.metric, args.to)
    return 0
