"""What busy cores beside it cost feedback attention and the quickstart on a CPU, by how waiting threads wait.

    python benchmarks/busy.py [--rounds 3]

GNU OpenMP reads how its threads wait when torch is loaded, so each way is measured in processes of its own: in every
round each way once alone, and once beside processes that do nothing but count. Within a process the backends of the
operator take turns, and steps of the quickstart are timed with one and then the other. A figure is the median of the
rounds' medians, a ratio the median of the rounds' ratios. Measure on a machine that does nothing else.

Letters: B batch, T time, D width of queries, keys and values.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

WAYS = {
    "spin 300000, GNU OpenMP's own": {"GOMP_SPINCOUNT": "300000"},
    "spin 2000, mixerlab's": {"GOMP_SPINCOUNT": "2000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
COUNT = """
import os
parent = os.getppid()
while os.getppid() == parent:  # not longer than it
    pass
"""
TASKS = ("operator", "quickstart")
BACKENDS = ("reference", "chunked")


def beside(script: str) -> dict[str, Any]:
    """What another benchmark defines."""
    return runpy.run_path(str(Path(__file__).with_name(script)))


def operator(args: argparse.Namespace) -> list[float]:
    """Milliseconds forward and backward of each backend."""
    result = beside("feedback.py")["times"](args.batch, args.length, args.width, args.seconds)
    return [result[backend][1] for backend in BACKENDS]


def quickstart(args: argparse.Namespace) -> list[float]:
    """Milliseconds of a step with each backend."""
    from mixerlab.lm.recipe.load import load_recipe  # here: the process that starts the others needs no torch

    time_trainer = beside("overhead.py")["time_trainer"]
    milliseconds = []
    with tempfile.TemporaryDirectory() as scratch:
        fixed = [f"trainer.steps={args.steps}", "trainer.val_batches=1", "logging.sample_tokens=0"]
        far = [f"trainer.{key}={10**6}" for key in ("val_every", "checkpoint_every")]
        for backend in BACKENDS:
            mixer = f"model.mixer={{name: sessa, backend: {backend}}}"
            recipe = load_recipe("quickstart", [*fixed, *far, mixer, f"logging.dir={scratch}/{backend}"])
            milliseconds.append(1e3 * statistics.median(time_trainer(recipe)))
    return milliseconds


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Beside that many processes that each keep a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(task: str, variables: dict[str, str]) -> list[float]:
    """What the task says in a process with these environment variables, and no others for OpenMP."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, *sys.argv, "--task", task]
    done = subprocess.run(command, env=environment | variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(title: str, rounds: dict[tuple[str, int], list[list[float]]], count: int) -> None:
    print(f"\n{title}")
    print(f"{'':30} | {'alone':^28} | {f'beside {count} busy':^28} |")
    print(f"{'':30} |" + f"{'reference':>10} {'chunked':>9} {'ratio':>8}  |" * 2)
    for way in WAYS:
        line = f"{way:30} |"
        for load in (0, count):
            measured = rounds[way, load]
            reference, chunked = (statistics.median(side) for side in zip(*measured, strict=True))
            ratio = statistics.median(a / b for a, b in measured)
            line += f"{reference:>10.1f} {chunked:>9.1f} {ratio:>7.2f}x  |"
        print(line, flush=True)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    integer = partial(parser.add_argument, type=int)
    integer("--busy", default=1, help="busy processes beside it (default: %(default)s)")
    integer("--rounds", default=3, help="default: %(default)s")
    integer("--batch", default=2, help="B of the operator (default: %(default)s)")
    integer("--length", default=2048, help="T of the operator (default: %(default)s)")
    integer("--width", default=256, help="D of the operator (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement (default: %(default)s)")
    integer("--steps", default=40, help="of the quickstart, a measurement (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)  # measure it here, once
    args = parser.parse_args()
    if args.task is not None:
        print(json.dumps({"operator": operator, "quickstart": quickstart}[args.task](args)))
        return

    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, {args.rounds} rounds")
    titles = {
        "operator": f"forward + backward, ms: B = {args.batch}, T = {args.length}, D = {args.width}, one head, float32",
        "quickstart": "the quickstart, ms a step",
    }
    for task in args.tasks:
        rounds: dict[tuple[str, int], list[list[float]]] = {}
        for number in range(args.rounds):
            for way, variables in WAYS.items():
                for load in (0, args.busy):
                    print(f"\r\033[K{task}, round {number + 1}, {way}", end="", file=sys.stderr, flush=True)
                    with busy(load):
                        rounds.setdefault((way, load), []).append(measure(task, variables))
        print("\r\033[K", end="", file=sys.stderr)
        table(titles[task], rounds, args.busy)


if __name__ == "__main__":
    main()
