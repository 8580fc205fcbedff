"""The line that a user watches while a run trains."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mixerlab.lm.training.callbacks import Metrics
from mixerlab.lm.training.module import LanguageModel


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

    def disable(self) -> None:
        """Lightning calls this on all processes but the first."""
        self.console.quiet = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
        done = trainer.global_step
        self._task = self._progress.add_task("", total=trainer.max_steps, completed=done, text="")

    def on_train_batch_end(self, trainer, pl_module: LanguageModel, *args: Any) -> None:
        step = trainer.global_step
        if self.metrics.is_due(trainer):
            self._loss = f"loss {float(pl_module.step_metrics['loss']):.3f}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=self._text())
        elif self.metrics.is_due(trainer):
            self._print(trainer, f"{self._loss} · {self._speed()}")

    def _print(self, trainer: L.Trainer, text: str) -> None:
        self.console.print(f"step {trainer.global_step}/{trainer.max_steps} · {text}", highlight=False)

    def _text(self) -> str:
        # Short enough to leave room for a bar in 80 columns.
        return f"{self._loss}{self._valid} · {self._speed()}"

    def _speed(self) -> str:
        speed = self.metrics.tokens_per_second
        return f"{speed / 1e6:.2f}M tokens/s" if speed >= 1e6 else f"{speed / 1e3:.1f}k tokens/s"

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._progress is not None:
            self._progress.update(self._task, text="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        measured = pl_module.valid_rates
        wanted = ("valid/bits_per_byte", "valid/accuracy", "valid/loss")
        name = next((n for n in wanted if n in measured), None)
        if name is None:
            return
        value = f"{measured[name]:.3f}"
        self._valid = f" · valid {value}{' bpb' if name.endswith('byte') else ''}"
        if self._progress is not None:
            self._progress.update(self._task, text=self._text())
        else:
            self._print(trainer, f"{name.replace('/', ' ').replace('_', ' ')} {value}")

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
