"""The influence plot of a decoder while it trains."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from mixerlab.data import DataModule
from mixerlab.lm.memory.fits import fit
from mixerlab.lm.memory.measure import measure
from mixerlab.lm.memory.subject import Subject
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.training.loggers import Board
from mixerlab.lm.training.module import LanguageModel
from mixerlab.options import first_line

log = logging.getLogger("mixerlab")

LENGTH = 256
"""Most tokens that are looked at. With the projections it bounds the cost of a plot, whatever the recipe's rows are: of
rows of as many tokens, about 3 to 12 steps of training, by mixer.
"""
PROJECTIONS = 4
"""Of each Jacobian: fewer than `mixerlab memory` takes, for a picture."""


@dataclass(frozen=True)
class _InTraining(Subject):
    """The decoder as it is now."""

    decoder: Decoder | None = None

    def decoders(self) -> Iterator[Decoder]:
        assert self.decoder is not None
        yield self.decoder


class MemoryPlot(Callback):
    """Adds a picture of influence against lag to the loggers before each `memory_every`-th validation and the last.

    Of one sequence, the first of the validation split; documents packed into it see each other. Rank 0 alone does it,
    which has the whole decoder: fsdp is refused with the recipe.
    """

    def __init__(self, recipe: Recipe, data: DataModule):
        self.recipe = recipe
        self.every = recipe.logging.memory_every * recipe.trainer.val_every  # steps
        self.tokens = next(iter(data.val_datasets().values()))[0]["input_ids"][None, :LENGTH]  # (1, T)
        self.tries = [["routing", "decoder"], ["routing"]]
        if recipe.strategy.activation_checkpointing != "none" or recipe.trainer.precision == "bf16-true":
            # torch.func cannot differentiate what is recomputed, and bf16 is too coarse for small derivatives.
            self.tries = [["routing"]]

    def on_validation_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        step, last = trainer.global_step, trainer.max_steps
        boards = [logger for logger in trainer.loggers if isinstance(logger, Board)]  # of rank 0 alone
        if not boards or (step % self.every and step < last):
            return
        subject = _InTraining(
            label=str(self.recipe.name),
            about="in training",
            tokens=self.tokens,
            words=None,
            run=None,
            recipe=self.recipe,
            device=str(trainer.strategy.root_device),
            decoder=pl_module.decoder,
        )
        why_not = ""  # training need not end for a picture
        for measures in self.tries:
            try:
                picture = _picture(subject, measures)
            except Exception as error:  # of a plug-in's mixer, or of memory
                why_not = why_not or first_line(error)
                continue
            if why_not:
                log.warning("logging.memory_every: no curve of the decoder's Jacobian: %s", why_not)
            for board in boards if picture else []:
                board.log_picture("influence", picture, step)
            return
        log.warning("logging.memory_every: no plot: %s", why_not)


def _picture(subject: _InTraining, measures: list[str]) -> bytes:
    """PNG; nothing of a single token, which has no lag."""
    from mixerlab.lm.memory import plots  # matplotlib, which other runs need not load

    assert subject.decoder is not None
    low = subject.decoder.embedding.weight.dtype == torch.bfloat16
    with (
        torch.inference_mode(False),  # in which a validation may be: nothing there has a gradient
        torch.autocast(torch.device(subject.device).type, torch.bfloat16, enabled=low),
        torch.compiler.set_stance("force_eager"),  # other lengths would be compiled
    ):
        curves = measure(subject, measures, PROJECTIONS, curves_only=True).curves
    return plots.png(plots.influence_figure(curves, [fit(curve) for curve in curves])) if curves else b""
