"""What watches a run: metrics, sample text, checkpoints and the progress bar."""

from __future__ import annotations

import csv
import resource
import sys
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
from lm.generate import stream_texts
from lm.module import Batch, LanguageModel

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets."""


class CSVMetrics(Logger):
    """Appends `step,metric,value` lines to metrics.csv; a resumed run goes on below and drops what it repeats."""

    def __init__(self, run: Path, first_step: int = 0):
        super().__init__()
        self.path = run / "metrics.csv"
        kept = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                kept = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [("step", "metric", "value"), *(r for r in kept if int(r[0]) <= first_step)]
            )

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
        on_gpu = pl_module.device.type == "cuda"
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


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt every so many steps, at step boundaries only, and after the validation of the step if any.

    Written before it, a checkpoint would not know what the validation found, and a run that resumes from it would
    neither repeat the validation nor remember the best loss.
    """

    def __init__(self, path: Path, every: int, val_every: int):
        self.path, self.every, self.val_every = path, every, val_every
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of an accumulation
        self._step = step
        if step % self.every == 0 and step % self.val_every:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._step % self.every == 0:
            trainer.save_checkpoint(self.path)


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
