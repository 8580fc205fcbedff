"""Kills runs at random moments and checks that they go on as if nothing had happened; signals them to end, too.

    python benchmarks/reliability.py [--kills 30] [--signals 10] [--strategies one ddp fsdp] [--seed 0]

A run of the tiny recipe, with accumulation, dropout, a loading process, validations and the border of an epoch, is
killed (kill -9) again and again: inside a step, in a validation, and at every stage of writing a checkpoint; with two
processes one of them at random. It continues with resume=auto. In the end every training and validation loss must be
the uninterrupted run's, bit for bit, and every step must have had the same rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mixerlab.lm.run.checkpoint import find_damage, read_meta
from mixerlab.lm.run.folder import Run

ROOT = Path(__file__).parent.parent
STEPS, VAL_EVERY, CHECKPOINT_EVERY = 60, 7, 5
RECIPE = [
    "tests/golden/tiny.yaml",
    f"trainer.steps={STEPS}",
    f"trainer.val_every={VAL_EVERY}",
    "trainer.val_batches=4",
    f"trainer.checkpoint_every={CHECKPOINT_EVERY}",
    "trainer.accumulate=2",
    "trainer.num_workers=1",
    "model.dropout=0.1",
    "logging.sample_tokens=0",
    "plugins=[fault]",
]
STRATEGIES = {
    "one": ["trainer.batch_size=2"],
    "ddp": ["trainer.batch_size=1", "strategy={name: ddp, devices: 2}"],
    "fsdp": ["trainer.batch_size=1", "strategy={name: fsdp, devices: 2}"],
}
KINDS = ("step", "validation", "checkpoint")

# Loaded by the run as a plug-in: notes the rows of every step, and kills its process at the moment it is told.
FAULT = """
import json, os, pathlib, signal, threading, time, zlib
import torch
from mixerlab import sealed
from mixerlab.lm.run import checkpoint
from mixerlab.lm.training.module import LanguageModel

fault = json.loads(os.environ.get("FAULT", "{}"))
rank = int(os.environ.get("RANK", 0))
aimed = fault.get("rank") == rank

def die(after=0.0):
    def kill():
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=kill).start() if after else kill()

step, validation = LanguageModel.training_step, LanguageModel.validation_step

def noted(self, micro_batches, i):
    done = self.trainer.global_step
    with open(os.environ["ROWS"], "a") as file:
        for n, batch in enumerate(micro_batches):
            file.write(f"{done} {n} {rank} {zlib.crc32(batch['input_ids'].numpy().tobytes())}\\n")
    if aimed and fault["kind"] == "step" and done == fault["step"]:
        die(fault["delay"])
    return step(self, micro_batches, i)

def validated(self, batch, i, *rest):
    here = self.trainer.global_step == fault.get("step") and i == fault["instant"] % 2
    if aimed and fault["kind"] == "validation" and here:
        die()
    return validation(self, batch, i, *rest)

LanguageModel.training_step, LanguageModel.validation_step = noted, validated

if aimed and fault["kind"] == "checkpoint":
    writing, passed = [False], [0]
    def stage(function):
        def wrapped(*args, **kwargs):
            if writing[0]:
                if passed[0] == fault["instant"]:
                    if function is save:
                        save(*args, **kwargs)
                        os.truncate(args[1], os.path.getsize(args[1]) // 2)  # in the middle of the file
                    os.kill(os.getpid(), signal.SIGKILL)
                passed[0] += 1
            return function(*args, **kwargs)
        return wrapped
    save, publish = torch.save, checkpoint._publish
    torch.save = stage(save)
    sealed.sync, pathlib.Path.rename = stage(sealed.sync), stage(pathlib.Path.rename)
    def published(folder, *args):
        writing[0] = int(folder.name.rpartition("-")[2]) >= fault["step"]
        publish(folder, *args)
        if writing[0] and rank:
            os.kill(os.getpid(), signal.SIGKILL)  # this rank has fewer stages
    checkpoint._publish = published
"""


@dataclass
class Trial:
    strategy: str
    kind: str
    step: int
    instant: int
    rank: int
    resumed_from: int
    went_on: bool


def command(strategy: str, folder: Path, *extra: str) -> list[str]:
    places = [f"logging.dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}"]
    return [sys.executable, "train.py", *RECIPE, *STRATEGIES[strategy], *places, *extra]


def environment(folder: Path, fault: dict | None = None) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(folder),
        "FAULT": json.dumps(fault or {}),
        "ROWS": str(folder / "rows.txt"),
        "OMP_NUM_THREADS": "1",
    }


def run(strategy: str, folder: Path, fault: dict | None = None, *extra: str) -> int:
    """Trains until the end or the fault; returns the exit code."""
    (folder / "fault.py").write_text(FAULT.replace("\\\\n", "\\n"))
    with (folder / "log.txt").open("a") as log:
        return subprocess.run(
            command(strategy, folder, *extra),
            cwd=ROOT,
            env=environment(folder, fault),
            stdout=log,
            stderr=log,
            timeout=600,
        ).returncode


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs" / "tiny").iterdir()
    return found


def curves(folder: Path) -> dict[tuple[str, str], str]:
    """(metric, step) -> value as written, of everything that must not depend on the kills."""
    with (run_folder(folder) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = {
        (r["metric"], r["step"]): r["value"] for r in rows if not r["metric"].startswith(("speed", "memory"))
    }
    assert len(kept) == sum(not r["metric"].startswith(("speed", "memory")) for r in rows), (
        "a step is logged twice"
    )
    return kept


def rows_of_steps(folder: Path) -> dict[tuple[str, ...], str]:
    """(step, micro-batch, rank) -> checksum of its rows, of the last time that the step was trained."""
    lines = [line.split() for line in (folder / "rows.txt").read_text().splitlines()]
    return {tuple(line[:3]): line[3] for line in lines}


def kill_again_and_again(
    strategy: str, folder: Path, kills: int, draw: random.Random, progress: Progress, task
) -> list[Trial]:
    """One run, killed `kills` times on its way to the end, compared with one that was left alone."""
    whole, killed = folder / "whole", folder / "killed"
    for place in (whole, killed):
        place.mkdir(parents=True)
    assert run(strategy, whole) == 0, (whole / "log.txt").read_text()
    trials = []
    for n in range(kills):
        # Spread over the run; the first after there is a checkpoint to continue from.
        low = CHECKPOINT_EVERY + 1 + n * (STEPS - CHECKPOINT_EVERY - 4) // kills
        step = low + draw.randrange(max(1, (STEPS - CHECKPOINT_EVERY - 4) // kills))
        kind = KINDS[n % len(KINDS)]
        if kind == "validation":
            step = min(-(-step // VAL_EVERY) * VAL_EVERY, STEPS - STEPS % VAL_EVERY)
        instant, delay = draw.randrange(9), draw.uniform(0.0005, 0.03)
        rank = 0 if strategy == "one" else draw.randrange(2)
        fault = {"kind": kind, "step": step, "instant": instant, "delay": delay, "rank": rank}
        code = run(strategy, killed, fault, "resume=auto")
        assert code != 0, f"{fault}: the fault did not happen\n{(killed / 'log.txt').read_text()[-3000:]}"
        checkpoints = Run(run_folder(killed)).checkpoints.all()
        damaged = [folder for folder in checkpoints if find_damage(folder)]
        last = read_meta(checkpoints[-1])["global_step"]
        trials.append(Trial(strategy, kind, step, instant, rank, last, not damaged))
        progress.advance(task)
    code = run(strategy, killed, None, "resume=auto")
    same = code == 0 and curves(killed) == curves(whole) and rows_of_steps(killed) == rows_of_steps(whole)
    for trial in trials:
        trial.went_on = trial.went_on and same
    return trials


def end_by_signal(strategy: str, folder: Path, draw: random.Random) -> tuple[str, int, bool]:
    """A signal at a random moment of training: (signal, step reached, whether checkpoint and exit code are right)."""
    folder.mkdir(parents=True)
    (folder / "fault.py").write_text(FAULT.replace("\\\\n", "\\n"))
    signum = draw.choice([signal.SIGTERM, signal.SIGUSR1])
    process = subprocess.Popen(
        command(strategy, folder, "trainer.steps=100000", "trainer.checkpoint_every=100000"),
        cwd=ROOT,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    first = draw.randrange(1, 9)
    for line in process.stdout:
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= first:
            break
    time.sleep(draw.uniform(0, 0.2))
    process.send_signal(signum)
    rest, _ = process.communicate(timeout=300)
    checkpoints = Run(run_folder(folder)).checkpoints.all()
    reached = read_meta(checkpoints[-1])["global_step"] if checkpoints else 0
    logged = max(int(step) for metric, step in curves(folder) if metric == "train/loss")
    good = process.returncode == 75 and reached == logged and find_damage(checkpoints[-1]) is None
    if not good:
        print(
            f"exit code {process.returncode}, checkpoint {reached}, logged {logged}:\n{rest}", file=sys.stderr
        )
    return signal.Signals(signum).name, reached, good


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="over all strategies (default: %(default)s)")
    parser.add_argument("--signals", type=int, default=10, help="per strategy (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args(arguments)
    draw = random.Random(args.seed)
    trials: list[Trial] = []
    ends: list[tuple[str, str, int, bool]] = []
    with tempfile.TemporaryDirectory() as scratch, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("killing", total=args.kills)
        for n, strategy in enumerate(args.strategies):
            share = args.kills // len(args.strategies) + (n < args.kills % len(args.strategies))
            if share:
                trials += kill_again_and_again(
                    strategy, Path(scratch) / strategy, share, draw, progress, task
                )
        task = progress.add_task("signalling", total=args.signals * len(args.strategies))
        for strategy in args.strategies:
            for n in range(args.signals):
                ends.append((strategy, *end_by_signal(strategy, Path(scratch) / f"{strategy}-{n}", draw)))
                progress.advance(task)
    lines = ["| processes | killed in | at step | rank | continued from step | same losses and rows |"]
    lines += ["|---|---|---|---|---|---|"]
    for t in trials:
        where = f"{t.kind} (stage {t.instant})" if t.kind == "checkpoint" else t.kind
        lines.append(
            f"| {t.strategy} | {where} | {t.step} | {t.rank} | {t.resumed_from} | {'yes' if t.went_on else 'NO'} |"
        )
    lines += [
        "",
        "| processes | signals | exit code 75 and a whole checkpoint of the last step |",
        "|---|---|---|",
    ]
    for strategy in args.strategies:
        mine = [end for end in ends if end[0] == strategy]
        counts = {name: sum(end[1] == name for end in mine) for name in ("SIGTERM", "SIGUSR1")}
        shown = ", ".join(f"{count} {name}" for name, count in counts.items())
        lines.append(f"| {strategy} | {shown} | {sum(end[3] for end in mine)} of {len(mine)} |")
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")
    return 0 if all(t.went_on for t in trials) and all(end[3] for end in ends) else 1


if __name__ == "__main__":
    sys.exit(main())
