"""Sweeps whose runs were not trained: folders with what training would have left in them."""

import csv
import json
import subprocess
import sys
import time

from mixerlab.lm.sweep.folder import ENDED, Sweep
from mixerlab.lm.sweep.plan import Point, plan

RECIPE = """
data: {name: mqar, seq_len: 32, n_pairs: 2, vocab_size: 32, n_train: 64, n_valid: 16}
model: {d_model: 32, n_layers: 1, mixer: {name: attention, n_heads: 2}}
trainer: {steps: 6, batch_size: 4, val_every: 3, checkpoint_every: 2}
logging: {every: 1}
"""
"""A run of seconds."""


def recipe_file(folder, more="", name="compare.yaml"):
    """The path of that recipe, with a section more."""
    path = folder / name
    path.write_text(RECIPE + more)
    return str(path)


def begun(folder, *overrides, more=""):
    """A sweep that has begun: nothing was trained yet."""
    command = [recipe_file(folder, more), f"logging.dir={folder / 'runs'}", *overrides]
    planned = plan(command[0], command[1:])
    sweep = Sweep.of(planned, command)
    with sweep.lock():
        sweep.begin(planned)
    return sweep


def finish(sweep, label, steps=6, curve=(), speeds=(), **result):
    """Gives a point a finished run. Keys of `result` have __ for the slash."""
    final = {name.replace("__", "/"): value for name, value in result.items()}
    run = sweep.path / f"20260101-0000-{label}"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(sweep.recipe_file(label).read_text())
    (run / "result.json").write_text(json.dumps({"steps": steps, **final}))
    with (run / "metrics.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("step", "metric", "value"))
        lines.writerows((step, "speed/tokens_per_second", speed) for step, speed in enumerate(speeds, 1))
        for name, values in curve:
            lines.writerows((step, name, value) for step, value in values.items())


def fail(sweep, label, said="error: it broke", code=1):
    sweep.log_file(label).write_text(
        f"=== begun\nstep 2/6 · loss 3.500 · 1.0k tokens/s\n{said}\n{ENDED}{code}\n"
    )


def made_up(folder, settings, name="made-up"):
    """A finished sweep of points with these values and final metrics: a list of (values, result)."""
    sweep = Sweep(folder / name, ["compare", "seed=0,1"], [])
    (sweep.path / "points").mkdir(parents=True)
    for i, (values, _) in enumerate(settings):
        label = f"p{i}"
        sweep.points[label] = Point(label, values, 1000 + i, 4, 10.0, 256, 6)
        sweep.recipe_file(label).write_text("x: 1\n")
    (sweep.path / "sweep.json").write_text(
        json.dumps({"command": sweep.command, "points": [vars(point) for point in sweep.points.values()]})
    )
    for label, (_, result) in zip(sweep.points, settings, strict=True):
        if result is not None:
            finish(sweep, label, **result)
    return sweep


def start(source, folder, *more, how=("--jobs", "2")):
    """A sweep of two mixers and two seeds in a process of its own."""
    command = [sys.executable, "-m", "mixerlab", "sweep", source, "model.mixer=attention,mamba2", "seed=0,1"]
    return subprocess.Popen(
        [*command, f"logging.dir={folder}", *how, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended_with(process, code):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def wait_until(true, seconds=120):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
