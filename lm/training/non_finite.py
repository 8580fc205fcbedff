"""A step whose loss or gradient is not a number: found out where it began, saved, and left out or the run ended."""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor

from mixerlab.data.module import IGNORE
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.checkpoint import CheckpointError
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.diagnosis import PARAMETER, NonFiniteError, first_non_finite

logger = logging.getLogger("mixerlab")

MOST_SKIPPED = 10
"""Steps one after another that may be left out: more are no accident."""


class NonFiniteSteps:
    """What happens to steps that would destroy the weights."""

    def __init__(self, recipe: Recipe, decoder: Decoder, world: World, run: Run | None):
        self.recipe, self.decoder, self.world, self.run = recipe, decoder, world, run
        self.in_a_row = 0
        """Steps left out one after another."""

    def handle(
        self, trainer: L.Trainer, loss: float, norm: float, batches: list[dict[str, Tensor]], seeds: list[int]
    ) -> None:
        """Says what was found and saves the batches; drops the gradients, or raises NonFiniteError."""
        step = trainer.global_step + 1
        with trainer.precision_plugin.forward_context():  # the dtypes of the step itself
            name = first_non_finite(self.decoder, batches, seeds)
        if name is None and not any((batch["labels"] != IGNORE).any() for batch in batches):
            name = "the mean over the labels, since no position of the step's rows has one"
        names = self.world.gather(name)
        # Without gradients the optimiser changes nothing, its averages included.
        self.decoder.zero_grad(set_to_none=True)
        # A bad number of one rank reaches the parameters' gradients on all: the rank that saw it earlier made it.
        found = [rank for rank, name in enumerate(names) if name]
        rank = min(found, key=lambda rank: PARAMETER in str(names[rank]), default=0)
        where = names[rank] or "no module when the batch was run again"
        on_rank = f" on rank {rank}" if self.world.size > 1 else ""
        text = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; first not finite{on_rank}: {where}"
        if self.run is not None:
            path = self.run.path / f"non-finite-step-{step}-rank-{self.world.rank}.pt"
            try:
                torch.save({"step": step, "seeds": seeds, "micro_batches": batches}, path)
                text += f"; the batch is in {path.with_name(f'non-finite-step-{step}-rank-{rank}.pt')}"
            except (OSError, RuntimeError) as error:
                text += f"; the batch could not be saved: {error}"
        self.in_a_row += 1
        if self.recipe.trainer.on_non_finite == "skip" and self.in_a_row < MOST_SKIPPED:
            if self.world.rank == 0:
                logger.warning("%s; left out", text)
            return
        if self.in_a_row > 1:
            text += f"; {self.in_a_row} steps one after another"
        if self.run is not None:
            try:
                checkpoints: Any = trainer.checkpoint_callback
                if checkpoints is not None:
                    checkpoints.wait()  # it may be the one of the step before that is being written
                if not self.world.ask_main((before := self.run.checkpoints.at(step - 1)).exists):
                    trainer.save_checkpoint(before)
            except CheckpointError as error:
                text += f"; {error}"
        self.world.all_raised = True
        raise NonFiniteError(
            f"{text}. The weights are as they were before this step. Continue with resume=auto and "
            "trainer.on_non_finite=skip; or start anew with a lower optim.lr, more optim.warmup_steps, a smaller "
            "optim.grad_clip, or trainer.precision=32"
        )
