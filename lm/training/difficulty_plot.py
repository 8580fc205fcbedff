"""Accuracy against difficulty while a run trains, for validation datasets whose names differ in a number."""

import re
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback

from mixerlab.lm.training.loggers import Board
from mixerlab.lm.training.module import LanguageModel


def difficulties(names: Sequence[str]) -> dict[str, dict[int, str]]:
    """What datasets differ in -> its numbers, in order, and the datasets: {"lag": {512: "lag_512", ...}}."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := re.fullmatch(r"(.+)_(\d+)", name):
            found.setdefault(match[1], {})[int(match[2])] = name
    return {what: dict(sorted(of.items())) for what, of in found.items() if len(of) > 1}


class DifficultyPlot(Callback):
    """Adds a picture for each kind of difficulty to the loggers after each validation."""

    def __init__(self, names: Sequence[str]):
        self.difficulties = difficulties(names)

    def on_validation_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, Board)]  # of rank 0 alone
        if not boards or not self.difficulties:
            return
        from matplotlib.figure import Figure  # which other runs need not load

        from mixerlab.lm.memory.plots import png

        for what, datasets in self.difficulties.items():
            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = figure.subplots()
            accuracy = [pl_module.valid_rates[f"{name}/accuracy"] for name in datasets.values()]
            axes.plot(range(len(datasets)), accuracy, "o-")
            axes.set_xticks(range(len(datasets)), [f"{number:,}" for number in datasets])
            axes.set(
                xlabel=what, ylabel="accuracy", ylim=(-0.03, 1.03), title=f"step {trainer.global_step:,}"
            )
            axes.grid(alpha=0.25)
            picture = png(figure)
            for board in boards:
                board.log_picture(f"accuracy by {what}", picture, trainer.global_step)
