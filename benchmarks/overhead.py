"""What the trainer costs over a bare PyTorch loop with the same model, batches and optimiser.

    python benchmarks/overhead.py [RECIPE] [key=value ...] [--steps 40] [--rounds 7]

Both train in turn in this process; the time of a step is that from its start to the start of the next, the median over
all steps but the first ten of each round; the ratio is the median of the rounds', since a machine has better and worse
minutes. Validation and checkpoints are left out; logging is not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from unittest import mock

import torch
from rich.console import Console
from torch import nn

from mixerlab.data import build_data
from mixerlab.lm.parallel.launch import device_kind
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.parallel.sharding import keep_freed_memory, make_decoder
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.training.batches import Loaders
from mixerlab.lm.training.fit import train
from mixerlab.lm.training.module import LanguageModel
from mixerlab.lm.training.optim import build_optimizer, lr_factor

WARM_UP = 10


def time_trainer(recipe: Recipe) -> list[float]:
    """Seconds of each step of `train`."""
    starts: list[float] = []
    step = LanguageModel.training_step

    def note(self: LanguageModel, *args) -> None:
        starts.append(time.perf_counter())
        step(self, *args)

    with mock.patch.object(LanguageModel, "training_step", note):
        train(recipe, console=Console(quiet=True))
    return differences(starts)


def time_bare_loop(recipe: Recipe) -> list[float]:
    """Seconds of each step of the shortest loop that does the same."""
    device = torch.device("cuda" if device_kind(recipe.strategy) == "gpu" else "cpu")
    data = build_data(recipe.data, recipe.seed)
    data.prepare()
    data.setup()
    decoder = make_decoder(recipe, data.vocab_size).to(device).train()
    optimizer = build_optimizer(decoder, recipe.optim)
    loader = Loaders(data, recipe.trainer, recipe.seed, 0, World()).train_dataloader()
    low = recipe.trainer.precision != "32"
    starts = []
    for step, (batch,) in enumerate(loader):
        if step == recipe.trainer.steps:
            break
        starts.append(time.perf_counter())
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            nll, _ = decoder(batch["input_ids"], batch["labels"], batch.get("segment_ids"))
        (nll.sum() / (batch["labels"] != -100).sum()).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), recipe.optim.grad_clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = recipe.optim.lr * lr_factor(step, recipe.trainer.steps or 1, recipe.optim)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return differences(starts)


def differences(starts: list[float]) -> list[float]:
    return [b - a for a, b in zip(starts[WARM_UP:], starts[WARM_UP + 1 :], strict=False)]


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=40, help="per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        fixed = [f"trainer.steps={args.steps}", "trainer.val_batches=1", f"logging.dir={scratch}"]
        far = [f"trainer.{key}={10**6}" for key in ("val_every", "checkpoint_every")]
        recipe = load_recipe(
            args.recipe, [*args.overrides, *fixed, *far, "logging.sample_tokens=0", "trainer.accumulate=1"]
        )
        keep_freed_memory()  # as the trainer does on a CPU
        rounds = [(time_trainer(recipe), time_bare_loop(recipe)) for _ in range(args.rounds)]
    ours, bare = (
        statistics.median(step for steps in side for step in steps) for side in zip(*rounds, strict=True)
    )
    ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in rounds)
    print(f"trainer   {1e3 * ours:8.2f} ms a step\nbare loop {1e3 * bare:8.2f} ms a step")
    print(
        f"ratio     {statistics.median(ratios):8.3f} (median of the rounds; {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
