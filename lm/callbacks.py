"""What watches a run: metrics, sample text, checkpoints and the progress bar."""

from __future__ import annotations

import csv
import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from data import TextTokenizer
from lm.checkpoint import best_checkpoint, folder_of, note_validation, prune, read_meta
from lm.config import TrainerConfig
from lm.generate import stream_texts
from lm.module import Batch, LanguageModel
from lm.processes import HangWatch, World

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets."""


class CSVMetrics(Logger):
    """Appends `step,metric,value` lines to metrics.csv; a resumed run goes on below and drops what it repeats."""

    def __init__(self, run: Path, first_step: int = 0, validated: bool = True):
        super().__init__()
        self.path = run / "metrics.csv"
        kept = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
            # Of the step itself, a validation that is not in the checkpoint is repeated.
            kept = [
                (step, name, value)
                for step, name, value in rows
                if int(step) < first_step
                or (
                    int(step) == first_step
                    and (validated or name.startswith(("train/", "speed/", "memory/")))
                )
            ]
        new = self.path.with_suffix(".new")
        with new.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "metric", "value"), *kept])
        new.replace(self.path)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run folder holds the recipe."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows((step, name, repr(float(value))) for name, value in metrics.items())


class Metrics(Callback):
    """Logs what the training steps did: loss and its kin, gradient norm, speed, memory."""

    def __init__(self, every: int, flops_per_token: float):
        self.every = every
        self.flops_per_token = flops_per_token
        self.tokens_per_second = 0.0
        self._tokens = 0
        self._seconds = 0.0
        self._began = 0.0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer, pl_module: LanguageModel, outputs, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of an accumulation
        self._step = step
        if step % self.every and step != 1 and step != trainer.max_steps:
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
            logger.log_metrics(metrics, step=step)
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
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", as_markdown_block(self.latest), trainer.global_step)


def as_markdown_block(text: str) -> str:
    """Text as TensorBoard's Markdown shows it unchanged: an indented block."""
    return "\n".join("    " + line for line in text.splitlines())


class Checkpoints(Checkpoint):
    """Writes checkpoints every so many steps, at the last one, and where a validation is the best so far.

    Only at step boundaries, and after the validation of the step if there is one: written before it, a checkpoint
    would not know what the validation found. Keeps the newest few and the best.
    """

    def __init__(self, run: Path, trainer: TrainerConfig, watch: HangWatch):
        self.run, self.config, self.watch = run, trainer, watch
        self.best = math.inf
        self._step = self._saved = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self._step = self._saved = trainer.global_step
        if (best := best_checkpoint(self.run)) is not None:
            self.best = read_meta(best)["valid_loss"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LanguageModel, *args: Any) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of an accumulation
        self._step = step
        validates = step % self.config.val_every == 0 or step >= trainer.max_steps
        if step % self.config.checkpoint_every == 0 and not validates:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        step = trainer.global_step
        loss = pl_module.valid_loss
        is_best = loss is not None and loss < self.best
        if loss is not None and is_best:
            self.best = loss
        if (
            folder := folder_of(self.run, step)
        ).exists() and self._saved == step:  # the run went on from there
            if trainer.is_global_zero:
                note_validation(folder, loss, pl_module.valid_rates)
        elif is_best or step % self.config.checkpoint_every == 0 or step >= trainer.max_steps:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Writes the checkpoint of the step that is done, unless it is the one that the run went on from."""
        step = trainer.global_step
        if step == self._saved:
            return
        self._saved = step
        self.watch.moved(f"writing the checkpoint of step {step}")
        trainer.save_checkpoint(folder_of(self.run, step))
        if trainer.is_global_zero:
            prune(self.run, self.config.keep_checkpoints)


class InterruptedRun(Exception):
    """The run was asked to end, and has written a checkpoint."""

    def __init__(self, reason: str, signum: int | None):
        super().__init__(reason)
        self.signum = signum


class Interruptions(Callback):
    """Ends the run at the next step boundary, checkpoint written, when a signal or the time limit asks for it.

    A second signal ends the process at once. All ranks are asked at every step, and end together.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, checkpoints: Checkpoints, world: World, deadline: float):
        self.checkpoints, self.world, self.deadline = checkpoints, world, deadline  # of time.monotonic()
        self._received = 0
        self._when = 0.0
        self._step = 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over the signals, from now until `restore`."""
        if threading.current_thread() is threading.main_thread():
            for signum in self.SIGNALS:
                before = signal.signal(signum, self._note)
                self._before.setdefault(signum, before)

    def restore(self) -> None:
        """Gives the signals back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _note(self, signum: int, frame: Any) -> None:
        # One that follows at once is the same, by way of the process group and of the parent.
        if self._received and time.monotonic() - self._when > 1:
            os._exit(128 + signum)
        if not self._received and self.world.rank == 0:
            name = signal.Signals(signum).name
            text = f"{name}: finishing the step and writing a checkpoint; once more to end at once\n"
            os.write(2, text.encode())  # print could be interrupted in the midst of a print
        if not self._received:
            self._received, self._when = signum, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LanguageModel, *args: Any) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of an accumulation
        self._step = trainer.global_step
        if trainer.global_step < trainer.max_steps:
            self._end_if_asked(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step < trainer.max_steps:
            self._end_if_asked(trainer)  # the validation is made up for when the run goes on

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        out_of_time = time.monotonic() > self.deadline
        received, late = self.world.max(self._received, int(out_of_time))
        if received or late:
            self.checkpoints.save(trainer)
            reason = signal.Signals(received).name if received else "trainer.max_time is over"
            raise InterruptedRun(reason, received or None)


class PendingValidation(Callback):
    """Makes up for a validation that was due at the step at which the run was interrupted."""

    def __init__(self, val_every: int):
        self.val_every = val_every

    def on_train_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        step = trainer.global_step
        if step and step % self.val_every == 0 and pl_module.validated_step != step:
            trainer.validating = True
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # from its first batch, wherever it was interrupted
            validation.run()
            trainer.training = True


class Pulse(Callback):
    """Tells the watch over hanging ranks that this one moves."""

    def __init__(self, watch: HangWatch):
        self.watch = watch

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.watch.moved(f"in step {trainer.global_step + 1}")

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        self.watch.moved(f"in the backward pass of step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.watch.moved(f"after step {trainer.global_step}, reading the next batch")

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.watch.moved(f"validating after step {trainer.global_step}")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.watch.moved(f"validating after step {trainer.global_step}")


class StopAtTheEnd(Callback):
    """Makes the last step end with a validation, wherever it falls between two."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


class StepProgress(ProgressBar):
    """One line: step of all steps, loss, last validation, tokens per second, time left.

    Where the output is no terminal, a line of text at every log interval instead.
    """

    def __init__(self, metrics: Metrics, console: Console | None = None):
        super().__init__()
        self.metrics = metrics
        self.console = console or Console()
        self._progress: Progress | None = None
        self._loss = self._valid = ""
        self._printed = 0

    def disable(self) -> None:
        """Lightning calls this on all processes but the first."""
        self.console.quiet = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._printed = trainer.global_step
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=120,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            "", total=trainer.max_steps, completed=trainer.global_step, text=""
        )

    def on_train_batch_end(
        self, trainer, pl_module: LanguageModel, outputs, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._printed:
            return
        self._printed = step
        if step % self.metrics.every and step not in (1, trainer.max_steps):
            if self._progress is not None:
                self._progress.update(self._task, completed=step)
            return  # reading the loss waits for the GPU
        self._loss = f"loss {float(pl_module.step_metrics['loss']):.3f}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=self._text())
        else:
            self.console.print(
                f"step {step}/{trainer.max_steps} · {self._loss} · {self._speed()}", highlight=False
            )

    def _text(self) -> str:
        # Short enough to leave room for a bar in 80 columns.
        return f"{self._loss}{self._valid} · {self._speed()}"

    def _speed(self) -> str:
        speed = self.metrics.tokens_per_second
        return f"{speed / 1e6:.2f}M tokens/s" if speed >= 1e6 else f"{speed / 1e3:.1f}k tokens/s"

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._progress is not None:
            self._progress.update(self._task, text="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measured = trainer.callback_metrics
        name = next(
            (n for n in ("valid/bits_per_byte", "valid/accuracy", "valid/loss") if n in measured), None
        )
        if name is None:
            return
        value = f"{float(measured[name]):.3f}"
        self._valid = f" · valid {value}{' bpb' if name.endswith('byte') else ''}"
        if self._progress is not None:
            self._progress.update(self._task, text=self._text())
        else:
            step = f"step {trainer.global_step}/{trainer.max_steps}"
            what = name.replace("/", " ").replace("_", " ")
            self.console.print(f"{step} · {what} {value}", highlight=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
