"""What happens between steps: metrics, sample text, checkpoints, validations, signs of life.

Lightning's batch is an optimiser step here, so every `on_train_batch_end` is the end of a step.
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.strategies import Strategy

from mixerlab.data import TextTokenizer
from mixerlab.lm.model.generation import stream_texts
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import TrainerConfig
from mixerlab.lm.run.checkpoint import note_validation, read_meta
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.writer import CheckpointError, Writer
from mixerlab.lm.training.loggers import Board
from mixerlab.lm.training.module import Batch, LanguageModel

log = logging.getLogger("mixerlab")

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets."""


class Metrics(Callback):
    """Logs what the training steps did: loss and its kin, gradient norm, speed, memory."""

    def __init__(self, every: int, flops_per_token: float):
        self.every = every
        self.flops_per_token = flops_per_token
        self.tokens_per_second = 0.0
        self._tokens = 0
        self._seconds = 0.0
        self._began = 0.0

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether the step that ends is reported: reading its loss waits for the GPU."""
        step = trainer.global_step
        return step % self.every == 0 or step in (1, trainer.max_steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer, pl_module: LanguageModel, outputs, batch: list[Batch], batch_idx: int
    ) -> None:
        self._tokens += sum(part["input_ids"].numel() for part in batch) * trainer.world_size
        if not self.is_due(trainer):
            return
        on_gpu = trainer.strategy.root_device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._began
        self.tokens_per_second = self._tokens / self._seconds
        metrics = {f"train/{name}": float(value) for name, value in pl_module.step_metrics.items()}
        metrics["speed/tokens_per_second"] = self.tokens_per_second
        if on_gpu:
            metrics["memory/peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
            name = torch.cuda.get_device_name()
            peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
            if peak is not None:
                used = self.flops_per_token * self.tokens_per_second / trainer.world_size
                metrics["speed/MFU"] = used / peak
        else:
            unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss: bytes there, KiB on Linux
            metrics["memory/peak_GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._tokens, self._seconds, self._began = 0, 0.0, time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds += time.perf_counter() - self._began

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()


class SampleText(Callback):
    """Writes a sample of the model's text at each validation."""

    def __init__(self, tokenizer: TextTokenizer, prompt: str, tokens: int):
        self.tokenizer, self.prompt, self.tokens = tokenizer, prompt, tokens
        self.latest = ""

    def on_validation_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        pieces = stream_texts(
            pl_module.decoder,
            self.tokenizer,
            [self.prompt],
            max_new_tokens=self.tokens,
            temperature=0.8,
            top_p=0.95,
        )
        self.latest = self.prompt + "".join(text for _, text in pieces)
        for logger in trainer.loggers:
            if isinstance(logger, Board):
                logger.log_text("sample", self.latest, trainer.global_step)


class Checkpoints(Checkpoint):
    """Writes checkpoints every so many steps, at the last one, and where a validation is the best so far.

    After the validation of a step if there is one, but before that of the last, which may be long: what it finds is
    noted in the checkpoint. Keeps the newest few and the best.
    """

    def __init__(self, run: Run, trainer: TrainerConfig, world: World):
        self.checkpoints, self.config, self.world = run.checkpoints, trainer, world
        self.writer = Writer(
            world.rank,
            world.size,
            world.channel("checkpoints").gather,
            background=trainer.async_checkpoint,
            after=self._prune,
            report=world.is_at,
        )
        self.best = math.inf
        self._saved = self._started_at = 0

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a checkpoint could not be written; `wait` raises it."""
        return self.writer.failed

    def wait(self) -> None:
        """Returns when nothing is being written. Raises CheckpointError, on all ranks, where a write has failed."""
        self.world.moved("waiting for a checkpoint to be written")
        with self._raised_by_all():
            self.writer.wait()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Before a validation that is made up for, which comes when training starts, or alone.
        self._saved = self._started_at = trainer.global_step
        self.best = self.world.ask_main(self._best_loss)  # a disk may look otherwise to another machine

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LanguageModel, *args: Any) -> None:
        step = trainer.global_step
        if step == self._started_at + 1:  # the optimiser has its state now
            self.writer.make_room(_large_parts(trainer.strategy))
        due = step % self.config.checkpoint_every == 0 and step % self.config.val_every != 0
        if due or step >= trainer.max_steps:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        step, loss = trainer.global_step, pl_module.valid_loss
        is_best = loss is not None and loss < self.best
        if loss is not None and is_best:
            self.best = loss
        if self._saved == step:  # the last, or the one that the run went on from
            self.wait()
            self.world.ask_main(lambda: self._note(step, loss, pl_module.valid_rates))
        elif is_best or step % self.config.checkpoint_every == 0:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Writes the checkpoint of the step that is done, unless it is the one that the run went on from.

        It may not be there yet when this returns: see `wait`, and `async_checkpoint`.
        """
        step = trainer.global_step
        if step == self._saved:
            return
        self.wait()
        self._saved = step
        self.world.moved(f"writing the checkpoint of step {step}")
        with self._raised_by_all():
            trainer.save_checkpoint(self.checkpoints.at(step), storage_options=self.writer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wait()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.writer.let_finish()

    @contextmanager
    def _raised_by_all(self) -> Iterator[None]:
        """Lets rank 0 alone say what a writer raises on all ranks."""
        try:
            yield
        except CheckpointError:
            self.world.all_raised = True
            raise

    def _note(self, step: int, loss: float | None, rates: dict[str, float]) -> None:
        folder = self.checkpoints.at(step)
        try:
            note_validation(folder, loss, rates)
        except OSError as error:
            raise CheckpointError(f"{folder}: its validation cannot be noted: {error.strerror}") from None
        self._prune()

    def _best_loss(self) -> float:
        best = self.checkpoints.best()
        return math.inf if best is None else read_meta(best)["valid_loss"]

    def _prune(self) -> None:
        try:
            self.checkpoints.prune(self.config.keep_checkpoints)
        except OSError as error:
            log.warning("old checkpoints cannot be deleted: %s", error)


def _large_parts(strategy: Strategy) -> dict[str, Any]:
    """What takes the memory of a checkpoint, where it stands there."""
    return {
        "state_dict": strategy.lightning_module_state_dict(),
        "optimizer_states": [strategy.optimizer_state(optimizer) for optimizer in strategy.optimizers],
    }


class PendingValidation(Callback):
    """Makes up for a validation that was due at the step at which the run was interrupted."""

    def __init__(self, val_every: int):
        self.val_every = val_every

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        step = trainer.global_step
        if step and step % self.val_every == 0 and pl_module.validated_step != step:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True


class StopAtTheEnd(Callback):
    """Makes the last step end with a validation, wherever it falls between two."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


class SignsOfLife(Callback):
    """Tells the hang watch that this rank moves, and what it does."""

    def __init__(self, world: World):
        self.world = world

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.world.moved(f"in step {trainer.global_step + 1}")

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        self.world.moved(f"in the backward pass of step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.world.moved(f"after step {trainer.global_step}, reading the next batch")

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.world.moved(f"validating after step {trainer.global_step}")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.world.moved(f"validating after step {trainer.global_step}")
