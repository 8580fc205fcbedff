"""Runs in processes of their own: several ranks, and ends by signals."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tiny_runs import ROOT, TINY, metric

DDP = ["strategy=ddp"]
FSDP = ["strategy=fsdp"]

LONG = [
    "trainer.steps=100000",
    "trainer.val_every=100000",
    "trainer.checkpoint_every=100000",
    "logging.sample_tokens=0",
]
"""A run that only something else ends."""

CURVES = ("train/loss", "train/gradient_norm", "valid/loss", "train/learning_rate")


def command(*arguments, launcher=(), recipe=TINY):
    return [sys.executable, *launcher, "train.py", recipe, *arguments]


def environment(more=None):
    return os.environ | {"OMP_NUM_THREADS": "1"} | (more or {})


def start(*arguments, env=None, start_new_session=False, launcher=(), recipe=TINY):
    """A process that trains."""
    return subprocess.Popen(
        command(*arguments, launcher=launcher, recipe=recipe),
        start_new_session=start_new_session,
        cwd=ROOT,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    """(what it printed, its errors), once it has ended with `code`."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return out, err


def wait_for_step(process, step):
    for line in process.stdout:
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
            return
    raise AssertionError(process.stderr.read())


def layout(ranks, batch_size, accumulate=1):
    """Overrides that divide a step among ranks and micro-batches."""
    return [
        f"strategy.devices={ranks}",
        f"trainer.batch_size={batch_size}",
        f"trainer.accumulate={accumulate}",
    ]


def assert_same_curves(run, other, tolerance=1e-5):
    for name in CURVES:
        # It is of the size of 1, and the rounding of all that it is summed from moves it: in one process the number of
        # threads alone by 8e-6, where it moves losses by 7e-7.
        allowed = 5 * tolerance if name == "train/gradient_norm" else tolerance
        assert metric(run, name) == pytest.approx(metric(other, name), abs=allowed), name


def plugin(folder, source):
    """Options of `start` for a run that can import the plug-in `mishap` with this source."""
    (folder / "mishap.py").write_text(source)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {"env": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}


PROBE = """
import sys, torch
from mixerlab.lm.parallel.launch import launch
from mixerlab.lm.parallel.sharding import make_decoder, make_mesh
from mixerlab.lm.parallel.strategies import piece
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.checkpoint import read
recipe = load_recipe(sys.argv[1], sys.argv[3:])
world = launch(recipe.strategy, [sys.executable, *sys.argv])
world.connect(torch.device("cpu"), recipe.strategy)
decoder = make_decoder(recipe, 257, make_mesh(recipe.strategy, world, "cpu"))
if recipe.resume:
    saved = read(recipe.resume, whole=False)["state_dict"]
    saved = {name.removeprefix("decoder."): value for name, value in saved.items()}
    decoder.load_state_dict({name: piece(value, name, decoder) for name, value in saved.items()})
whole = {name: value.full_tensor() for name, value in decoder.state_dict().items()}
if world.rank == 0:
    torch.save({"whole": whole, "held": sum(p.to_local().numel() for p in decoder.parameters())}, sys.argv[2])
world.close(failed=False)
"""


def sharded(folder, *overrides):
    """The decoder of the tiny recipe on several ranks: its weights put together, and how many one rank holds.

    With `resume` they are those of a checkpoint.
    """
    script, result = folder / "probe.py", folder / "probe.pt"
    script.write_text(PROBE)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), TINY, str(result), *overrides]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return torch.load(result, weights_only=True)
