"""Kills runs at random moments, restarts them, fills their disk and takes away their output, and checks what is left.

    python benchmarks/reliability.py [--kills 30] [--restarts 20] [--ends 30] [--full-disks 10]
                                     [--strategies one ddp fsdp] [--seed 0]

A run of the tiny recipe, with accumulation, dropout, a loading process, validations and the border of an epoch, is
killed (kill -9) again and again: inside a step, in a validation, while a checkpoint is written, while the run folder
and the tokenised text are, and at any moment before the first step; with two processes one of them at random. It
continues with resume=auto. Restarts: torchrun starts it again each time a process has killed itself. Full disks: the
runs are on a disk of a few megabytes which another writer fills at a random moment (needs the right to mount one). In
the end every training and validation loss must be the uninterrupted run's, bit for bit, and every step must have had
the same rows. Ends: signals, readers and terminals that go; the exit code must be as documented, and a checkpoint of
the last step be there.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mixerlab.lm.run.checkpoint import find_damage, read_meta
from mixerlab.lm.run.folder import Run

ROOT = Path(__file__).parent.parent
STEPS, VAL_EVERY, CHECKPOINT_EVERY = 60, 7, 5
RECIPE = [
    "tests/golden/tiny.yaml",
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
KILLS = {
    "step": "in a step",
    "validation": "in a validation",
    "checkpoint": "while a checkpoint is written",
    "files": "while tokenised text or the run folder is written, on resuming",
    "start": "at any moment between the start and the first step, on resuming",
}
ENDS = {
    "SIGTERM": "SIGTERM or SIGUSR1 to the first process, in training",
    "start": "SIGTERM or SIGUSR1 to the first process, while the data are prepared",
    "head": "the reader of the output ends, as with `2>&1 | head`",
    "tee": "Ctrl-C to run and reader, as with `2>&1 | tee log`",
    "terminal": "the terminal hangs up",
}

# Loaded by the run as a plug-in: notes the rows of every step, and kills its process at the moment it is told.
FAULT = """
import json, os, signal, threading, time, zlib
import torch
from mixerlab.data.text import TextData
from mixerlab.lm.training.module import LanguageModel

fault = json.loads(os.environ.get("FAULT", "{}"))
if "restarts" in fault:  # one for each attempt
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    fault = fault["restarts"][attempt] if attempt < len(fault["restarts"]) else {}
rank = int(os.environ.get("RANK", 0))
aimed = fault.get("rank") == rank
kind = fault.get("kind") if aimed else None

def die(after=0.0):
    def kill():
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=kill).start() if after else kill()

step, validation, prepare = LanguageModel.training_step, LanguageModel.validation_step, TextData.prepare
done = [0]

def noted(self, micro_batches, i):
    done[0] = self.trainer.global_step
    with open(os.environ["ROWS"], "a") as file:
        for n, batch in enumerate(micro_batches):
            file.write(f"{done[0]} {n} {rank} {zlib.crc32(batch['input_ids'].numpy().tobytes())}\\n")
    if kind == "step" and done[0] == fault["step"]:
        die(fault["delay"])
    if kind in ("checkpoint", "files") and done[0] >= fault["step"] + 6:
        die()  # it had fewer stages
    return step(self, micro_batches, i)

def validated(self, batch, i, *rest):
    if kind == "validation" and self.trainer.global_step == fault["step"] and i == fault["stage"] % 2:
        die()
    return validation(self, batch, i, *rest)

def waited(self):
    if os.environ.get("WAIT"):
        print("preparing", flush=True)
        time.sleep(600)
    prepare(self)

LanguageModel.training_step, LanguageModel.validation_step, TextData.prepare = noted, validated, waited

if kind in ("checkpoint", "files"):
    passed = [0]
    def stage(function):
        def wrapped(*args, **kwargs):
            if kind == "files" or done[0] + 1 >= fault["step"]:
                passed[0] += 1
                if passed[0] > fault["stage"]:
                    die(fault["delay"] if function is save else 0)  # within the file
            return function(*args, **kwargs)
        return wrapped
    save = torch.save
    torch.save = stage(save)
    for name in ("fsync", "rename", "replace"):
        setattr(os, name, stage(getattr(os, name)))
"""


@dataclass
class Trial:
    """Something that was done to a run, and whether the run was in the end as if nothing had happened."""

    strategy: str
    what: str
    good: bool


def command(strategy: str, folder: Path, *extra: str, launcher: Sequence[str] = ()) -> list[str]:
    places = [f"logging.dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}"]
    return [sys.executable, *launcher, "train.py", *RECIPE, *STRATEGIES[strategy], *places, *extra]


def environment(folder: Path, fault: dict | None = None) -> dict[str, str]:
    (folder / "fault.py").write_text(FAULT)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "FAULT": json.dumps(fault or {}),
        "ROWS": str(folder / "rows.txt"),
        "OMP_NUM_THREADS": "1",
    }


def begin(strategy: str, folder: Path, fault: dict | None, *extra: str, **options) -> subprocess.Popen:
    """A run that trains in the background; what it says goes to log.txt."""
    with (folder / "log.txt").open("a") as log:
        line = command(strategy, folder, f"trainer.steps={STEPS}", *extra, **options)
        print("$", shlex.join(line), json.dumps(fault), file=log, flush=True)
        return subprocess.Popen(line, cwd=ROOT, env=environment(folder, fault), stdout=log, stderr=log)


def run(
    strategy: str, folder: Path, fault: dict | None = None, *extra: str, seconds: float = 900, **options
) -> int:
    """Trains until the end or the fault; returns the exit code."""
    return begin(strategy, folder, fault, *extra, **options).wait(timeout=seconds)


def run_folder(folder: Path) -> Path:
    """The run's folder; those without a checkpoint are of starts that were killed."""
    (found,) = (path for path in (folder / "runs" / "tiny").iterdir() if Run(path).checkpoints.all())
    return found


def curves(folder: Path) -> dict[tuple[str, str], str]:
    """(metric, step) -> value as written, of everything that must not depend on what was done to the run."""
    with (run_folder(folder) / "metrics.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if not r["metric"].startswith(("speed", "memory"))]
    kept = {(r["metric"], r["step"]): r["value"] for r in rows}
    assert len(kept) == len(rows), "a step is logged twice"
    return kept


def rows_of_steps(folder: Path) -> dict[tuple[str, ...], str]:
    """(step, micro-batch, rank) -> checksum of its rows, of the last time that the step was trained."""
    lines = [line.split() for line in (folder / "rows.txt").read_text().splitlines()]
    return {
        tuple(line[:3]): line[3] for line in lines if len(line) == 4
    }  # a killed rank may leave half a line


def same(folder: Path, other: Path) -> bool:
    """Whether two runs had the same losses, as text, from the same rows."""
    return curves(folder) == curves(other) and rows_of_steps(folder) == rows_of_steps(other)


def whole_run(strategy: str, folder: Path) -> Path:
    """A run that is left alone."""
    folder.mkdir(parents=True)
    assert run(strategy, folder) == 0, (folder / "log.txt").read_text()
    return folder


def kill_again_and_again(
    strategy: str, folder: Path, whole: Path, kills: int, draw: random.Random, advance: Callable[[], None]
) -> list[Trial]:
    """One run, killed `kills` times on its way to the end."""
    folder.mkdir(parents=True)
    kinds, sound = [], True
    span = STEPS - CHECKPOINT_EVERY - 4
    for n in range(kills):
        # Spread over the run; the first after there is a checkpoint to continue from.
        step = CHECKPOINT_EVERY + 1 + n * span // kills + draw.randrange(max(1, span // kills))
        kind = list(KILLS)[n % len(KILLS)]
        if kind == "validation":
            step = min(-(-step // VAL_EVERY) * VAL_EVERY, STEPS - STEPS % VAL_EVERY)
        rank = 0 if strategy == "one" else draw.randrange(2)
        fault = {"kind": kind, "step": step, "stage": draw.randrange(24 if kind == "files" else 9)}
        fault |= {"delay": draw.uniform(0.0005, 0.03), "rank": rank}
        if kind in ("files", "start"):
            shutil.rmtree(folder / "cache")
        if kind == "start":
            code = kill_at_the_start(strategy, folder, rank, draw)
        else:
            code = run(strategy, folder, fault, "resume=auto")
        assert code not in (0, 2), f"{fault}: {code}\n{(folder / 'log.txt').read_text()[-3000:]}"
        sound = sound and not any(map(find_damage, Run(run_folder(folder)).checkpoints.all()))
        kinds.append(kind)
        advance()
    sound = sound and run(strategy, folder, None, "resume=auto") == 0 and same(folder, whole)
    return [Trial(strategy, f"killed {KILLS[kind]}", sound) for kind in kinds]


def kill_at_the_start(strategy: str, folder: Path, rank: int, draw: random.Random) -> int:
    """Kills a rank at a random moment before the first step."""
    rows = (folder / "rows.txt").stat().st_size
    moment = draw.uniform(0.1, 10)
    process = begin(strategy, folder, None, "resume=auto")
    began = time.monotonic()
    while time.monotonic() - began < moment and (folder / "rows.txt").stat().st_size == rows:
        time.sleep(0.01)
    further = [int(pid) for pid in children_of(process.pid)]
    os.kill(further[0] if rank and further else process.pid, signal.SIGKILL)
    return process.wait(timeout=120)


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def restart_again_and_again(
    strategy: str, folder: Path, whole: Path, restarts: int, draw: random.Random
) -> list[Trial]:
    """One run that torchrun restarts each time one of its processes has been killed."""
    folder.mkdir(parents=True)
    faults = []
    for n in range(restarts):
        step = 2 + n * (STEPS - 4) // restarts + draw.randrange(max(1, (STEPS - 4) // restarts))
        faults.append(
            {"kind": "step", "step": step, "delay": draw.uniform(0, 0.03), "rank": draw.randrange(2)}
        )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code = run(
        strategy,
        folder,
        {"restarts": faults},
        launcher=[*launcher, "--max-restarts", str(restarts)],
        seconds=300 * (restarts + 1),
    )
    sound = code == 0 and same(folder, whole)
    return [Trial(strategy, "killed in a step, restarted by torchrun", sound)] * restarts


def fill_the_disk(folder: Path, whole: Path, draw: random.Random) -> Trial | None:
    """A run whose disk another writer fills, once it has started and once more when it resumes."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]).returncode:
        print("full disks are left out: this user cannot mount one", file=sys.stderr)
        return None
    ends = []
    try:
        for _ in range(2):
            process = begin("one", folder, None, "resume=auto")
            time.sleep(draw.uniform(1, 9))
            with (folder / "other").open("wb", buffering=0) as file:
                while process.poll() is None:
                    try:
                        file.write(b"x" * 4096)
                    except OSError:  # full; it takes what the run makes free, too
                        time.sleep(0.01)
            ends.append(process.wait(timeout=600))
            (folder / "other").unlink()
        ends.append(run("one", folder, None, "resume=auto"))
        good = ends[2] == 0 and set(ends) <= {0, 1, 2} and same(folder, whole)
        shutil.copy(folder / "log.txt", folder.with_suffix(".log"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    print(f"full disk: exit codes {ends}", file=sys.stderr)
    return Trial("one", "another writer filled the disk, at any moment, twice", good)


def end_by(what: str, strategy: str, folder: Path, draw: random.Random) -> Trial:
    """A run that is asked to end, in one of several ways."""
    folder.mkdir(parents=True)
    line = command(strategy, folder, "trainer.steps=100000", "trainer.checkpoint_every=100000")
    step, expected = draw.randrange(1, 9), 75
    env = environment(folder) | ({"WAIT": "1"} if what == "start" else {})
    options: dict[str, Any] = {"cwd": ROOT, "env": env, "start_new_session": True}
    if what == "terminal":
        read, write = pty.openpty()
        options |= {
            "stdin": write,
            "preexec_fn": take_terminal,
        }  # so it hangs up
    else:
        read, write = os.pipe()
    process = subprocess.Popen(line, stdout=write, stderr=write, **options)
    os.close(write)
    if what == "tee":
        log = folder / "tee.txt"
        tee = subprocess.Popen(["tee", str(log)], stdin=read, stdout=subprocess.DEVNULL)
        while f"step {step}/" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.05)
        tee.send_signal(signal.SIGINT)  # as a terminal does, to both at once
        os.killpg(process.pid, signal.SIGINT)
        expected = 130
    else:
        shown = {"start": "preparing", "terminal": r"\b[1-9]\d*/100000"}  # a terminal is not shown every step
        read_until(read, shown.get(what, rf"step {step}/"))
    if what in ("SIGTERM", "start"):
        time.sleep(draw.uniform(0, 0.2))
        process.send_signal(draw.choice([signal.SIGTERM, signal.SIGUSR1]))
        process.wait(timeout=120)
    os.close(read)
    code = process.wait(timeout=120)
    good = code == expected and (what == "start" or last_step_is_saved(folder))
    if not good:
        print(f"{what}, {strategy}, step {step}: exit code {code}", file=sys.stderr)
    return Trial(strategy, ENDS[what], good)


def take_terminal() -> None:
    """Makes the standard input this process's terminal, which hangs up when it goes: nohup has that ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def read_until(descriptor: int, pattern: str) -> None:
    text = ""
    while not re.search(pattern, text):
        piece = os.read(descriptor, 1 << 16)
        assert piece, text
        text += piece.decode(errors="replace")


def last_step_is_saved(folder: Path) -> bool:
    """Whether there is a whole checkpoint of the last step that was logged."""
    checkpoints = Run(run_folder(folder)).checkpoints.all()
    logged = max(int(step) for metric, step in curves(folder) if metric == "train/loss")
    return read_meta(checkpoints[-1])["global_step"] == logged and find_damage(checkpoints[-1]) is None


@contextmanager
def scratch_folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="over all strategies (default: %(default)s)")
    parser.add_argument(
        "--restarts", type=int, default=20, help="of ddp and of fsdp, each (default: %(default)s)"
    )
    parser.add_argument("--ends", type=int, default=30, help="over all strategies (default: %(default)s)")
    parser.add_argument("--full-disks", type=int, default=10, help="of one process (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--keep", type=Path, help="leave runs and logs in this new folder")
    args = parser.parse_args(arguments)
    if args.keep is not None and args.keep.exists():
        parser.error(f"--keep {args.keep}: it exists already; expected a folder to make")
    draw = random.Random(args.seed)
    trials: list[Trial] = []
    chosen = args.strategies
    try:
        with scratch_folder(args.keep) as scratch, Progress(console=Console(stderr=True)) as progress:
            wholes = {}
            if args.kills or args.restarts or args.full_disks:
                task = progress.add_task("runs that are left alone", total=len(chosen))
                for strategy in chosen:
                    wholes[strategy] = whole_run(strategy, scratch / f"{strategy}-whole")
                    progress.advance(task)
            if args.kills:
                task = progress.add_task("kills", total=args.kills)
                for n, strategy in enumerate(chosen):
                    share = args.kills // len(chosen) + (n < args.kills % len(chosen))
                    folder = scratch / f"{strategy}-killed"
                    trials += kill_again_and_again(
                        strategy, folder, wholes[strategy], share, draw, lambda: progress.advance(task)
                    )
            several = [strategy for strategy in chosen if strategy != "one"]
            if args.restarts and several:
                task = progress.add_task("restarts", total=len(several))
                for strategy in several:
                    folder = scratch / f"{strategy}-restarted"
                    trials += restart_again_and_again(strategy, folder, wholes[strategy], args.restarts, draw)
                    progress.advance(task)
            if args.full_disks and "one" in chosen:
                task = progress.add_task("full disks", total=args.full_disks)
                for n in range(args.full_disks):
                    if trial := fill_the_disk(scratch / f"full-{n}", wholes["one"], draw):
                        trials.append(trial)
                    progress.advance(task)
            task = progress.add_task("ends", total=args.ends)
            for n in range(args.ends):
                what, strategy = list(ENDS)[n % len(ENDS)], chosen[n // len(ENDS) % len(chosen)]
                trials.append(end_by(what, strategy, scratch / f"end-{n}", draw))
                progress.advance(task)
    finally:  # what was found before a trial broke off
        table = "\n".join(lines_of(trials))
        print(table)
        if args.markdown:
            args.markdown.write_text(table + "\n")
    return 0 if all(trial.good for trial in trials) else 1


def lines_of(trials: list[Trial]) -> Iterator[str]:
    yield "| what | processes | as it should be |"
    yield "|---|---|---|"
    for what, strategy in dict.fromkeys((trial.what, trial.strategy) for trial in trials):
        mine = [trial.good for trial in trials if (trial.what, trial.strategy) == (what, strategy)]
        yield f"| {what} | {strategy} | {sum(mine)} of {len(mine)} |"


if __name__ == "__main__":
    sys.exit(main())
