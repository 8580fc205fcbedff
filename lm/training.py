"""From a recipe to a trained model in a run folder."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault(
    "POSSIBLE_USER_WARNINGS", "off"
)  # Lightning's "possibly unintended" hints; before its import

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from data import DataError, DataModule
from kernels.backend import BackendError
from lm.batches import Loaders
from lm.callbacks import (
    Checkpoints,
    CSVMetrics,
    InterruptedRun,
    Interruptions,
    Metrics,
    PendingValidation,
    Pulse,
    SampleText,
    StepProgress,
    StopAtTheEnd,
    as_markdown_block,
)
from lm.checkpoint import last_checkpoint, read_meta, set_aside_after
from lm.config import ConfigError, Recipe, differing_keys, to_dict, to_yaml
from lm.decoder import Decoder
from lm.diagnosis import GO_ON, LOST, OutOfMemoryError, explain, is_out_of_memory, memory_advice
from lm.module import LanguageModel
from lm.parallel import keep_freed_memory, lightning_strategy, make_mesh, parallelize
from lm.precision import BF16Weights
from lm.processes import INTERRUPTED, HangWatch, World, start
from lm.run import (
    DATA,
    build_decoder,
    check_recipe_of,
    create_run,
    find_resumable,
    load_run_recipe,
    lock_run,
    make_data,
    save_recipe,
)


@dataclass
class Result:
    run: Path
    steps: int
    metrics: dict[str, float]
    sample: str


def make_decoder(recipe: Recipe, vocab_size: int, mesh: DeviceMesh | None = None) -> Decoder:
    """The recipe's decoder, initialised, and checkpointed, compiled and sharded as the recipe says."""
    with torch.device("meta") if mesh is not None else nullcontext():
        decoder = build_decoder(recipe, vocab_size)
    parallelize(decoder, mesh, recipe.strategy, recipe.seed)
    return decoder


def rows_per_step(recipe: Recipe, n_devices: int) -> int:
    """Rows of an optimiser step, over all devices and micro-batches."""
    return recipe.trainer.batch_size * recipe.trainer.accumulate * n_devices


def count_steps(recipe: Recipe, n_rows: int, seq_len: int, n_devices: int = 1) -> int:
    """Optimiser steps of the run: the recipe's steps, epochs or tokens, rounded up."""
    trainer, rows = recipe.trainer, rows_per_step(recipe, n_devices)
    if trainer.steps is not None:
        return trainer.steps
    if trainer.epochs is not None:
        return math.ceil(trainer.epochs * n_rows / rows)
    assert trainer.tokens is not None
    return math.ceil(trainer.tokens / (rows * seq_len))


def accelerator(recipe: Recipe) -> str:
    """What to train on, "gpu" or "cpu". Raises ConfigError for a GPU that is not there."""
    wanted = recipe.strategy.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "strategy.accelerator = 'gpu': no CUDA device is available here; expected auto or cpu"
        )
    return "gpu" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def run_recipe(recipe: Recipe, console: Console, command: Sequence[str]) -> int:
    """Trains on all devices of the recipe and prints what came of it; returns the exit code.

    `command` is the command line that started this process, for further ones. Raises ConfigError and DataError, once
    for all processes, for what the user should mend before training.
    """
    world = start(recipe.strategy, command)
    if world.rank:
        console.quiet = True
        logging.getLogger("mixerlab").setLevel(logging.ERROR)
    code = 1
    try:
        result = train(recipe, console, world)
        if world.rank == 0:
            report(result, recipe, console)
        code = 0
    except InterruptedRun as stop:
        console.print(
            f"stopped: {stop}; a checkpoint is written, continue with the same command and resume=auto"
        )
        code = INTERRUPTED[stop.signum == signal.SIGINT]
    except KeyboardInterrupt:
        print("interrupted; continue with the same command and resume=auto", file=sys.stderr)
        code = INTERRUPTED[1]
    except Exception as error:
        known = explain(error)
        if known is not None and known.startswith(LOST) and (culprit := world.killed()):
            known = f"{culprit}. {GO_ON}"
        code = 2 if isinstance(error, (BackendError, ConfigError, DataError)) else 1
        if world.rank and not world.all_raised:
            print(f"rank {world.rank}: {known or traceback.format_exc()}", file=sys.stderr)
        elif not world.rank and known is None:
            raise
        elif not world.rank:
            print(f"{'error' if code == 2 else 'stopped'}: {known}", file=sys.stderr)
    finally:
        world.close(failed=code not in (0, *INTERRUPTED))
    return code


def train(recipe: Recipe, console: Console, world: World | None = None) -> Result:
    """Trains, or continues where `resume` says; returns what was reached.

    `world` is this process among all that train, which call this alike. Raises ConfigError and DataError before
    training, and in it NonFiniteError, OutOfMemoryError, InterruptedRun and CheckpointError.
    """
    quiet_libraries()
    world = world or World()
    started = time.monotonic()
    kind = world.ask_main(lambda: accelerator(recipe))
    if kind == "gpu" and world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {world.rank}: it should train on GPU {world.local_rank} of its machine, but sees "
            f"{torch.cuda.device_count()}; start as many processes a machine as it has GPUs, all visible to each"
        )
    device = torch.device("cuda", world.local_rank) if kind == "gpu" else torch.device("cpu")
    if kind == "cpu":
        keep_freed_memory()
        if world.devices > 1 and "OMP_NUM_THREADS" not in os.environ:
            # More threads than cores stand in each other's way.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.devices))
    else:
        torch.cuda.set_device(device)
    resumed, checkpoint = world.ask_main(lambda: _find_start(recipe, console))
    first_step = read_meta(checkpoint)["global_step"] if checkpoint else 0
    data = make_data(recipe)
    world.ask_main(lambda: _prepare(data))
    if world.rank and world.local_rank == 0:
        data.prepare()  # on this machine, unless the cache's folder is shared
    world.wait_for_all()
    world.connect(device, recipe.strategy)
    if world.rank:
        data.setup()
    steps = count_steps(recipe, len(data.train_dataset()), data.seq_len, world.size)
    if finished := world.ask_main(lambda: _finish(resumed, checkpoint, first_step, steps)):
        return finished
    run = world.ask_main(
        lambda: _open_run(recipe, resumed, checkpoint, data, first_step, steps, world, console)
    )
    lock = lock_run(run) if world.rank == 0 else None
    try:
        result = _fit(recipe, run, checkpoint, data, first_step, steps, world, device, console, started)
    finally:
        if lock is not None:
            lock.release()
    return result


def _prepare(data: DataModule) -> None:
    """All that can go wrong with the data, on one rank, so that it is said once."""
    data.prepare()
    data.setup()
    data.train_dataset()
    data.val_datasets()


def _find_start(recipe: Recipe, console: Console) -> tuple[Path | None, Path | None]:
    """The run to continue and its checkpoint; None where a new run starts."""
    resumed = find_resumable(recipe)
    if resumed is None and recipe.resume == "auto":
        console.print(
            f"resume=auto: no unfinished run of {recipe.name} with this recipe; starting a new one",
            soft_wrap=True,
        )
    checkpoint = last_checkpoint(resumed) if resumed else None
    if checkpoint is not None:
        check_recipe_of(checkpoint, recipe)
    return resumed, checkpoint


def _finish(resumed: Path | None, checkpoint: Path | None, first_step: int, steps: int) -> Result | None:
    """The result of a run that was killed between its last checkpoint and writing its result; None for others."""
    if resumed is None or checkpoint is None or first_step != steps or (resumed / "result.json").exists():
        return None
    metrics = read_meta(checkpoint)["metrics"]
    if metrics is None:
        return None
    lock_run(resumed).release()  # raises if another process trains it
    write_result(resumed, steps, metrics)
    return Result(resumed, steps, metrics, "")


def _open_run(
    recipe: Recipe,
    resumed: Path | None,
    checkpoint: Path | None,
    data: DataModule,
    first_step: int,
    steps: int,
    world: World,
    console: Console,
) -> Path:
    """The run folder, made or checked, with the recipe and the tokenizer in it."""
    if resumed is None:
        run = create_run(recipe)
    else:
        run = resumed
        lock_run(run).release()  # raises if another process trains it
        assert checkpoint is not None
        _check_continuation(run, data, first_step, steps)
        _check_rows(run, read_meta(checkpoint).get("rows_per_step"), recipe, world)
        _say_what_differs(run, recipe, first_step, console)
        (run / "result.json").unlink(missing_ok=True)
        set_aside_after(run, first_step)
        save_recipe(run, recipe)
    data.save_tokenizer(run)
    (run / DATA).write_text(data.fingerprint + "\n")
    return run


def _fit(
    recipe: Recipe,
    run: Path,
    checkpoint: Path | None,
    data: DataModule,
    first_step: int,
    steps: int,
    world: World,
    device: torch.device,
    console: Console,
    started: float,
) -> Result:
    mesh = make_mesh(recipe.strategy, world, device.type)
    decoder = make_decoder(recipe, data.vocab_size, mesh)
    module = LanguageModel(recipe, decoder, steps, data.token_bytes, tuple(data.val_datasets()), world, run)
    watch = HangWatch(world, recipe.strategy.timeout)
    watchers = _watchers(recipe, run, data, decoder, console, world, watch, started)
    loggers: list[Logger] = []
    if world.rank == 0:
        purge = first_step + 1 if first_step else None
        loggers = [
            TensorBoardLogger(run, name="", version="", default_hp_metric=False, purge_step=purge),
            CSVMetrics(run, first_step, checkpoint is None or read_meta(checkpoint)["metrics"] is not None),
        ]
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=world.devices,
        num_nodes=world.nodes,
        strategy=lightning_strategy(recipe.strategy, world, device),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=recipe.trainer.accumulate,
        val_check_interval=recipe.trainer.val_every * recipe.trainer.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        logger=loggers,
        callbacks=watchers,
        plugins=[*_precision(recipe, device), *([world.environment] if world.environment else [])],
    )
    millions = sum(p.numel() for p in decoder.parameters()) / 1e6
    on = (
        f"{world.size} {device.type} processes" if world.size > 1 else {"cuda": "gpu"}.get(device.type, "cpu")
    )
    if recipe.strategy.name == "fsdp" or world.size > 1:
        on += f" ({'fsdp' if mesh is not None else 'ddp'})"
    console.print(
        f"{recipe.name}: {millions:.2f}M parameters, {steps:,} steps of {rows_per_step(recipe, world.size)} x "
        f"{data.seq_len} tokens on {on}\nrun folder {run}",
        highlight=False,
        soft_wrap=True,
    )
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("recipe", as_markdown_block(to_yaml(recipe)), first_step)
    loaders = Loaders(data, recipe.trainer, recipe.seed, first_step, world)
    interruptions = next(watcher for watcher in watchers if isinstance(watcher, Interruptions))
    # Lightning's handlers would end the run without a checkpoint, or wait for ranks that got no signal.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    interruptions.install()
    try:
        trainer.fit(module, datamodule=loaders, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(memory_advice(recipe, trainer.global_step + 1, error)) from error
        raise
    finally:
        interruptions.restore()
        end_loading_processes()
    final = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if not name.startswith("watch/")
    }
    sample = next((watcher.latest for watcher in watchers if isinstance(watcher, SampleText)), "")
    if world.rank == 0:
        write_result(run, trainer.global_step, final)
        # Under a name of its own: TensorBoard writes these metrics as points too.
        last = {name.replace("valid/", "final/", 1): value for name, value in final.items()}
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(_flat(to_dict(recipe)), last, step=trainer.global_step)
                logger.finalize("success")
    return Result(run, trainer.global_step, final, sample)


def end_loading_processes() -> None:
    """Ends those that an error left behind: they ignore SIGTERM, and Python would wait for them at its end."""
    left = multiprocessing.active_children()
    if left and threading.current_thread() is threading.main_thread():
        heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each
        for process in left:
            process.kill()
            process.join()
        signal.signal(signal.SIGCHLD, heard)


def write_result(run: Path, steps: int, metrics: dict[str, float]) -> None:
    """Marks a run as finished."""
    new = run / "result.json.new"
    new.write_text(json.dumps({"steps": steps, **metrics}, indent=2) + "\n")
    new.replace(run / "result.json")


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
    recipe: Recipe,
    run: Path,
    data: DataModule,
    decoder: Decoder,
    console: Console,
    world: World,
    watch: HangWatch,
    started: float,
) -> list[Callback]:
    """The callbacks, in the order in which they are called, but that Lightning calls `Checkpoints` last."""
    metrics = Metrics(recipe.logging.every, 3 * decoder.flops(data.seq_len) / data.seq_len)
    checkpoints = Checkpoints(run, recipe.trainer, watch)
    watchers: list[Callback] = [Pulse(watch), metrics, StopAtTheEnd()]
    # With cpu_offload generating would have to know where the states of a decoder's layers belong.
    if data.tokenizer is not None and recipe.logging.sample_tokens and not recipe.strategy.cpu_offload:
        watchers.append(
            SampleText(data.tokenizer, recipe.logging.sample_prompt, recipe.logging.sample_tokens)
        )
    return [
        *watchers,
        StepProgress(metrics, console),
        PendingValidation(recipe.trainer.val_every),
        Interruptions(checkpoints, world, started + recipe.trainer.max_seconds()),
        checkpoints,
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


def _check_rows(run: Path, before: int | None, recipe: Recipe, world: World) -> None:
    """Raises ConfigError where a step would have other rows than before."""
    now = rows_per_step(recipe, world.size)
    if before not in (None, now):
        per_device = recipe.trainer.batch_size * world.size
        fitting = (
            f"trainer.accumulate={before // per_device}"
            if before % per_device == 0
            else f"a trainer.batch_size that divides {before // world.size}"
            if before % world.size == 0
            else f"a number of devices that divides {before}"
        )
        raise ConfigError(
            f"resume = {str(run)!r}: a step of that run has {before} rows, and here {now} (trainer.batch_size = "
            f"{recipe.trainer.batch_size} x trainer.accumulate = {recipe.trainer.accumulate} x {world.size} devices); "
            f"expected {fitting}, for as many"
        )


def _precision(recipe: Recipe, device: torch.device) -> list[Precision]:
    if recipe.trainer.precision == "bf16-true":
        return [BF16Weights(device.type)]
    return [MixedPrecision("bf16-mixed", device.type)] if recipe.trainer.precision == "bf16-mixed" else []


def _say_what_differs(run: Path, recipe: Recipe, first_step: int, console: Console) -> None:
    before = to_dict(load_run_recipe(run))
    console.print(f"continuing {run} after step {first_step}", highlight=False, soft_wrap=True)
    for key, old, new in differing_keys(before, to_dict(recipe)):
        if key != "resume":
            console.print(f"  {key}: was {old!r}, now {new!r}", highlight=False)


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
        r".*It is recommended to use `self.log\(.*sync_dist=True",  # what is logged is summed over ranks already
        r"FSDP2-wrapped module .* returned a view tensor",  # nobody writes into it
        r".*The `srun` command is available on your system but is not used",
    ):
        warnings.filterwarnings("ignore", message=message)
