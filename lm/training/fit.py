"""From a recipe to a trained run."""

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("POSSIBLE_USER_WARNINGS", "off")  # Lightning's hints; before its import

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.markup import escape

from mixerlab.data import DataModule
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.model.match import sized
from mixerlab.lm.model.precision import precision_plugin
from mixerlab.lm.parallel.launch import device_kind, local_devices
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.parallel.sharding import keep_freed_memory, make_decoder, make_mesh
from mixerlab.lm.parallel.strategies import lightning_strategy
from mixerlab.lm.recipe.check import for_cpu, for_devices
from mixerlab.lm.recipe.load import Overrides, load_recipe, to_yaml
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.start import Start
from mixerlab.lm.training.batches import ROW_ORDER, Loaders
from mixerlab.lm.training.callbacks import (
    Checkpoints,
    Metrics,
    PendingValidation,
    SampleText,
    SignsOfLife,
    StopAtTheEnd,
)
from mixerlab.lm.training.diagnosis import OutOfMemoryError, is_out_of_memory, memory_advice
from mixerlab.lm.training.difficulty_plot import DifficultyPlot
from mixerlab.lm.training.endings import Interruptions
from mixerlab.lm.training.loggers import Board, check_installed, compared, make_loggers
from mixerlab.lm.training.memory_plot import MemoryPlot
from mixerlab.lm.training.module import LanguageModel
from mixerlab.lm.training.prepare import find_start, prepare_data
from mixerlab.lm.training.progress import StepProgress
from mixerlab.lm.training.weights import find_weights, load_weights
from mixerlab.options import ConfigError


def train(
    source: str | Path | Recipe, overrides: Overrides = (), *, console: Console | None = None, **sections: Any
) -> Run:
    """Trains a recipe in this process; returns the run, finished.

        run = train("quickstart", model={"mixer": "attention"}, trainer={"steps": 50})

    Args:
        source: a YAML file, the name of a recipe that comes with mixerlab, or a Recipe.
        overrides: `key=value` texts, as on the command line.
        console: what to print on; None: the standard output.
        sections: the overrides as values: `seed=1, optim={"lr": 1e-3}`.

    Raises:
        ConfigError, DataError: the recipe or the data are wrong; nothing was trained.
        NonFiniteError, OutOfMemoryError, InterruptedRun, CheckpointError: the run goes on with `resume="auto"`.
    """
    recipe = sized(load_recipe(source, overrides, **sections))
    if recipe.strategy.devices == "auto":
        recipe = replace(recipe, strategy=replace(recipe.strategy, devices=1))
    if dist.is_torchelastic_launched():
        raise ConfigError("train() is one process; under torchrun start `-m mixerlab train` instead")
    if recipe.strategy.num_nodes > 1 or local_devices(recipe.strategy) > 1:
        raise ConfigError(
            f"strategy.devices = {recipe.strategy.devices!r}: from Python one process trains; expected "
            "strategy.devices=1, or the command `mixerlab train`, which starts the others"
        )
    return train_with(recipe, console or Console(), World())


@dataclass
class Training:
    """What a run is made of, once it is known that it can start."""

    recipe: Recipe
    run: Run
    start: Start
    steps: int
    data: DataModule
    world: World
    device: torch.device
    decoder: Decoder
    console: Console
    deadline: float
    """When trainer.max_time is over, by time.monotonic()."""


def train_with(recipe: Recipe, console: Console, world: World) -> Run:
    """As `train`, on all processes of `world`, which call this alike; rank 0 prints what came of it."""
    quiet_libraries()
    deadline = time.monotonic() + recipe.trainer.max_seconds()
    device = _device(recipe, world)
    world.ask_main(lambda: for_devices(recipe, world.size).trainer.accumulate)  # said once if it cannot be
    world.ask_main(lambda: check_installed(recipe))
    recipe = for_devices(recipe, world.size)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    start, is_done = find_start(recipe, world, say)
    if is_done:
        assert start.run is not None
        if world.rank == 0:
            report(start.run, "", console)
        return start.run
    weights = None
    if recipe.init_from is not None and start.checkpoint is None:
        weights = world.ask_main(lambda: str(find_weights(str(recipe.init_from))))
    data = prepare_data(recipe, world, device)
    steps = count_steps(recipe, len(data.train_dataset()), data.seq_len, world.size)
    if world.ask_main(lambda: start.finish(steps)):
        assert start.run is not None
        if world.rank == 0:
            report(start.run, "", console)
        return start.run
    # Made before anything is written: it may fail, and the run that goes on stays as it was.
    world.moved("making the model")
    decoder = make_decoder(recipe, data.vocab_size, make_mesh(recipe.strategy, world, device.type))
    if weights is not None:
        load_weights(Path(weights), decoder, data, world, say)
    run = Run(world.ask_main(lambda: str(start.open(recipe, data, steps, world.size, say).path)))
    if world.rank == 0:
        world.note_run(str(run.path.resolve()))
    try:
        _fit(Training(recipe, run, start, steps, data, world, device, decoder, console, deadline))
    finally:
        if world.rank == 0:
            run.release()
    return run


def _device(recipe: Recipe, world: World) -> torch.device:
    """This rank's device, made ready. Raises ConfigError."""
    if world.ask_main(lambda: device_kind(recipe.strategy)) == "cpu":
        world.ask_main(lambda: for_cpu(recipe))
        keep_freed_memory()
        if world.devices > 1 and "OMP_NUM_THREADS" not in os.environ:
            # More threads than cores stand in each other's way.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.devices))
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {world.rank}: it should train on GPU {world.local_rank} of its machine, but sees "
            f"{torch.cuda.device_count()}; start as many processes a machine as it has GPUs, all visible to each"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def count_steps(recipe: Recipe, n_rows: int, seq_len: int, n_devices: int = 1) -> int:
    """Optimiser steps of the run: the recipe's steps, epochs or tokens, rounded up."""
    trainer = recipe.trainer
    rows = trainer.step_rows(n_devices)
    if trainer.steps is not None:
        return trainer.steps
    if trainer.epochs is not None:
        return math.ceil(trainer.epochs * n_rows / rows)
    assert trainer.tokens is not None
    return math.ceil(trainer.tokens / (rows * seq_len))


def _fit(t: Training) -> None:
    """Trains from the start to the last step, and writes the result."""
    recipe, data, world, decoder = t.recipe, t.data, t.world, t.decoder
    token_bytes = None if data.token_bytes is None else data.token_bytes.to(t.device)
    names = tuple(data.val_datasets())
    module = LanguageModel(recipe, decoder, t.steps, token_bytes, names, world, t.run)
    checkpoints = Checkpoints(t.run, recipe.trainer, world)
    interruptions = Interruptions(checkpoints, world, t.deadline)
    callbacks = _callbacks(t, decoder, checkpoints, interruptions)
    loggers: list[Logger] = []
    world.moved("beginning to log")
    world.ask_main(lambda: loggers.extend(make_loggers(recipe, t.run, t.start)))
    trainer = L.Trainer(
        accelerator="gpu" if t.device.type == "cuda" else "cpu",
        devices=world.devices,
        num_nodes=world.nodes,
        strategy=lightning_strategy(recipe.strategy, world, t.device),
        max_steps=t.steps,
        max_epochs=-1,
        val_check_interval=recipe.trainer.val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        logger=loggers,
        callbacks=callbacks,
        plugins=[
            precision_plugin(recipe.trainer.precision, t.device.type),
            *([world.environment] if world.environment else []),
        ],
    )
    _count_from(trainer, t.start.step)
    _announce(t, decoder, module, loggers)
    order = t.start.row_order or ROW_ORDER
    loaders = Loaders(data, recipe.trainer, recipe.seed, t.start.step, world, order)
    # Lightning's handlers would end the run without a checkpoint, or wait for ranks that got no signal.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    world.moved("reading the checkpoint")
    with interruptions:
        try:
            if t.start.step < t.steps:
                trainer.fit(module, datamodule=loaders, ckpt_path=t.start.checkpoint, weights_only=True)
            else:  # it was interrupted in its last validation
                trainer.validate(
                    module, datamodule=loaders, ckpt_path=t.start.checkpoint, verbose=False, weights_only=True
                )
        except SystemExit:  # what Lightning makes of KeyboardInterrupt
            raise KeyboardInterrupt from None
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(memory_advice(recipe, trainer.global_step + 1, error)) from error
            raise
    if world.rank == 0:
        t.run.finish(trainer.global_step, module.valid_rates)
        sample = next((c.latest for c in callbacks if isinstance(c, SampleText)), "")
        report(t.run, sample, t.console)


def _count_from(trainer: L.Trainer, step: int) -> None:
    """Makes the trainer begin after `step` steps; the checkpoint keeps no other progress of its."""
    loop = trainer.fit_loop.epoch_loop
    loop.manual_optimization.optim_step_progress.total.completed = step
    loop.batch_progress.total.ready = step


def _callbacks(
    t: Training, decoder: Decoder, checkpoints: Checkpoints, interruptions: Interruptions
) -> list[Callback]:
    """In the order in which they are called, but that Lightning calls `Checkpoints` last."""
    logging_config = t.recipe.logging
    metrics = Metrics(logging_config.every, 3 * decoder.flops(t.data.seq_len) / t.data.seq_len)
    callbacks: list[Callback] = [SignsOfLife(t.world), metrics, StopAtTheEnd()]
    # With cpu_offload generating would have to know where the states of a decoder's layers belong.
    if t.data.tokenizer is not None and logging_config.sample_tokens and not t.recipe.strategy.cpu_offload:
        callbacks.append(
            SampleText(t.data.tokenizer, logging_config.sample_prompt, logging_config.sample_tokens)
        )
    if logging_config.memory_every:
        callbacks.append(MemoryPlot(t.recipe, t.data))
    callbacks.append(DifficultyPlot(list(t.data.val_datasets())))
    progress = StepProgress(metrics, t.console)
    return [*callbacks, progress, PendingValidation(t.recipe.trainer.val_every), interruptions, checkpoints]


def _announce(t: Training, decoder: Decoder, module: LanguageModel, loggers: Sequence[Logger]) -> None:
    """Says what is about to be trained, on the console and to the loggers."""
    recipe, world, rows = t.recipe, t.world, t.recipe.trainer.step_rows(t.world.size)
    parameters = sum(p.numel() for p in decoder.parameters())
    on = {"cuda": "gpu"}.get(t.device.type, "cpu")
    if world.size > 1:
        on = f"{world.size} {t.device.type} processes"
    if world.size > 1 or recipe.strategy.name == "fsdp":
        on += f" ({'fsdp' if recipe.strategy.name == 'fsdp' else 'ddp'})"
    t.console.print(
        f"{recipe.name}: {parameters / 1e6:.2f}M parameters, {t.steps:,} steps of {rows} x {t.data.seq_len} tokens on "
        f"{on}\nrun folder {t.run.path}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for logger in loggers:
        if isinstance(logger, Board):
            logger.log_text("recipe", to_yaml(recipe), t.start.step)
            rates = [f"{name}/{rate}" for name in module.valid_names for rate in module.rate_names]
            logger.log_comparison(compared(recipe, parameters, t.steps * rows * t.data.seq_len), rates)


def report(run: Run, sample: str, console: Console) -> None:
    """Prints what a run reached, where it lies, and what can be done with it."""
    if sample:
        console.print("\n[bold]sample[/bold]")
        console.print(sample, end="\n\n", markup=False, highlight=False, soft_wrap=True)
    metrics = run.result
    steps = metrics.pop("steps")
    rates = [f"{name.replace('/', ' ').replace('_', ' ')} {v:.4f}" for name, v in metrics.items()]
    lines = {
        "reached    ": f"after {steps} steps: {' · '.join(rates)}",
        "run folder ": str(run.path),
    }
    if "tensorboard" in [logger.name for logger in run.recipe.logging.loggers]:
        lines["curves     "] = f"tensorboard --logdir {run.path.parent}"
    if run.has_tokenizer:
        prompt = json.dumps(run.recipe.logging.sample_prompt)
        lines["generate   "] = f"mixerlab generate {run.path} --prompt {prompt}"
    for what, text in lines.items():
        console.print(f"[bold]{what}[/bold]", escape(text), highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Silences Lightning's device report, tips and the warnings that do not apply here; others still show."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
        r".*does not have many workers which may be a bottleneck",  # rows are read from the page cache
        r".*Checkpoint directory .* exists and is not empty",  # a resumed run's own
        r".*Found .* module\(s\) in eval mode at the start of training",
        r"FSDP2-wrapped module .* returned a view tensor",  # nobody writes into it
        r".*The `srun` command is available on your system but is not used",
    ):
        warnings.filterwarnings("ignore", message=message)
