"""From a recipe to a trained model in a run folder."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault(
    "POSSIBLE_USER_WARNINGS", "off"
)  # Lightning's "possibly unintended" hints; before its import

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from data import DataModule
from lm.batches import Loaders
from lm.callbacks import (
    CSVMetrics,
    LastCheckpoint,
    Metrics,
    SampleText,
    StepProgress,
    StopAtTheEnd,
    as_markdown_block,
)
from lm.config import ConfigError, Recipe, differing_keys, to_dict, to_yaml
from lm.decoder import Decoder
from lm.module import LanguageModel
from lm.parallel import keep_freed_memory, parallelize
from lm.precision import BF16Weights
from lm.run import (
    BEST,
    DATA,
    LAST,
    build_decoder,
    create_run,
    find_resumable,
    load_run_recipe,
    lock_run,
    make_data,
    save_recipe,
    unreadable,
)


@dataclass
class Result:
    run: Path
    steps: int
    metrics: dict[str, float]
    sample: str


def make_decoder(recipe: Recipe, vocab_size: int) -> Decoder:
    """The recipe's decoder, initialised, with checkpointing and compilation as the recipe says."""
    decoder = build_decoder(recipe, vocab_size)
    decoder.initialize(recipe.seed)
    parallelize(decoder, recipe.trainer)
    return decoder


def count_steps(recipe: Recipe, n_rows: int, seq_len: int) -> int:
    """Optimiser steps of the run: the recipe's steps, epochs or tokens, rounded up."""
    trainer = recipe.trainer
    rows_per_step = trainer.batch_size * trainer.accumulate
    if trainer.steps is not None:
        return trainer.steps
    if trainer.epochs is not None:
        return math.ceil(trainer.epochs * n_rows / rows_per_step)
    assert trainer.tokens is not None
    return math.ceil(trainer.tokens / (rows_per_step * seq_len))


def accelerator(recipe: Recipe) -> str:
    """What to train on, "gpu" or "cpu". Raises ConfigError for a GPU that is not there."""
    wanted = recipe.strategy.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "strategy.accelerator = 'gpu': no CUDA device is available here; expected auto or cpu"
        )
    return "gpu" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def train(recipe: Recipe, console: Console) -> Result:
    """Trains, or continues where `resume` says; returns what was reached.

    Raises ConfigError and DataError before training, NonFiniteError in it.
    """
    quiet_libraries()
    kind = accelerator(recipe)
    if kind == "cpu":
        keep_freed_memory()
    resumed = find_resumable(recipe)
    if resumed is None and recipe.resume == "auto":
        console.print(
            f"resume=auto: no unfinished run of {recipe.name} with this recipe; starting a new one",
            soft_wrap=True,
        )
    checkpoint = resumed / "checkpoints" / LAST if resumed else None
    first_step = _step_of(checkpoint) if checkpoint else 0
    data = make_data(recipe)
    data.prepare()
    data.setup()
    steps = count_steps(recipe, len(data.train_dataset()), data.seq_len)
    if resumed is None:
        run = create_run(recipe)
    else:
        run = resumed
        _check_continuation(run, data, first_step, steps)
        _say_what_differs(run, recipe, first_step, console)
        (run / "result.json").unlink(missing_ok=True)
        save_recipe(run, recipe)
    lock = lock_run(run)
    data.save_tokenizer(run)
    (run / DATA).write_text(data.fingerprint + "\n")

    decoder = make_decoder(recipe, data.vocab_size)
    module = LanguageModel(recipe, decoder, steps, data.token_bytes, tuple(data.val_datasets()))
    watchers = _watchers(recipe, run, data, decoder, console)
    tensorboard = TensorBoardLogger(
        run, name="", version="", default_hp_metric=False, purge_step=first_step + 1 if first_step else None
    )
    trainer = L.Trainer(
        accelerator=kind,
        devices=recipe.strategy.devices,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=recipe.trainer.accumulate,
        val_check_interval=recipe.trainer.val_every * recipe.trainer.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=recipe.trainer.val_batches,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        logger=[tensorboard, CSVMetrics(run, first_step)],
        callbacks=watchers,
        **_precision(recipe, kind),
    )
    millions = sum(p.numel() for p in decoder.parameters()) / 1e6
    rows = recipe.trainer.batch_size * recipe.trainer.accumulate
    console.print(
        f"{recipe.name}: {millions:.2f}M parameters, {steps:,} steps of {rows} x {data.seq_len} tokens on {kind}\n"
        f"run folder {run}",
        highlight=False,
        soft_wrap=True,
    )
    tensorboard.experiment.add_text("recipe", as_markdown_block(to_yaml(recipe)), first_step)
    loaders = Loaders(data, recipe.trainer.batch_size, recipe.trainer.num_workers, recipe.seed)
    try:
        trainer.fit(module, datamodule=loaders, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    trainer.save_checkpoint(run / "checkpoints" / LAST)
    final = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if not name.startswith("watch/")
    }
    # Under a name of its own: TensorBoard writes these metrics as points too.
    last = {name.replace("valid/", "final/", 1): value for name, value in final.items()}
    tensorboard.log_hyperparams(_flat(to_dict(recipe)), last, step=trainer.global_step)
    tensorboard.finalize("success")
    (run / "result.json").write_text(json.dumps({"steps": trainer.global_step, **final}, indent=2) + "\n")
    lock.release()
    sample = next((watcher.latest for watcher in watchers if isinstance(watcher, SampleText)), "")
    return Result(run, trainer.global_step, final, sample)


def report(result: Result, recipe: Recipe, console: Console) -> None:
    """Prints what a run reached, where it lies, and what can be done with it."""
    if result.sample:
        console.print("\n[bold]sample[/bold]")
        print(result.sample, end="\n\n")
    rates = [f"{name.replace('/', ' ').replace('_', ' ')} {v:.4f}" for name, v in result.metrics.items()]
    prompt = json.dumps(recipe.logging.sample_prompt)
    for what, text in {
        "reached    ": f"after {result.steps} steps: {' · '.join(rates)}",
        "run folder ": str(result.run),
        "watch      ": f"tensorboard --logdir {result.run.parent}",
        "generate   ": f"python -m lm.generate {result.run} --prompt {prompt}",
    }.items():
        console.print(f"[bold]{what}[/bold]", text, highlight=False, soft_wrap=True)


def _watchers(
    recipe: Recipe, run: Path, data: DataModule, decoder: Decoder, console: Console
) -> list[Callback]:
    metrics = Metrics(recipe.logging.every, 3 * decoder.flops(data.seq_len) / data.seq_len)
    watchers: list[Callback] = [metrics, StopAtTheEnd()]
    if data.tokenizer is not None and recipe.logging.sample_tokens:
        watchers.append(
            SampleText(data.tokenizer, recipe.logging.sample_prompt, recipe.logging.sample_tokens)
        )
    folder, every = run / "checkpoints", recipe.trainer.checkpoint_every
    return [
        *watchers,
        ModelCheckpoint(folder, Path(BEST).stem, monitor="valid/loss", enable_version_counter=False),
        LastCheckpoint(folder / LAST, every, recipe.trainer.val_every),
        StepProgress(metrics, console),
    ]


def _check_continuation(run: Path, data: DataModule, first_step: int, steps: int) -> None:
    """Raises ConfigError where going on with `run` would do nothing, or something else than before."""
    if first_step >= steps:
        raise ConfigError(
            f"resume = {str(run)!r}: that run has done {first_step} steps, and this recipe ends after {steps}; "
            f"expected a horizon of more, such as trainer.steps={2 * first_step}"
        )
    if (run / DATA).is_file() and (run / DATA).read_text().strip() != data.fingerprint:
        raise ConfigError(
            f"resume = {str(run)!r}: the data are not what that run was trained on; the documents must have changed "
            "since. Restore them, or start a new run"
        )


def _precision(recipe: Recipe, kind: str) -> dict:
    if recipe.trainer.precision == "bf16-true":
        return {"plugins": [BF16Weights("cuda" if kind == "gpu" else "cpu")]}
    return {"precision": {"32": "32-true", "bf16-mixed": "bf16-mixed"}[recipe.trainer.precision]}


def _say_what_differs(run: Path, recipe: Recipe, first_step: int, console: Console) -> None:
    before = to_dict(load_run_recipe(run))
    console.print(f"continuing {run} after step {first_step}", highlight=False, soft_wrap=True)
    for key, old, new in differing_keys(before, to_dict(recipe)):
        if key != "resume":
            console.print(f"  {key}: was {old!r}, now {new!r}", highlight=False)


def _step_of(checkpoint: Path) -> int:
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise unreadable(checkpoint, error) from error


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Nested mappings -> {"model.d_model": 256, ...}, what is set, as values that TensorBoard can show."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value not in (None, [], ""):
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def quiet_libraries() -> None:
    """Silences Lightning's device report, tips and the warnings that do not apply here; others still show."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
        r".*does not have many workers which may be a bottleneck",  # rows come from a memory map
        r".*Checkpoint directory .* exists and is not empty",  # a resumed run's own
        r".*Found .* module\(s\) in eval mode at the start of training",
        r".*The `srun` command is available on your system but is not used",
    ):
        warnings.filterwarnings("ignore", message=message)
