"""The one training step: a decoder, its loss over the labelled positions, its optimiser.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lm.config import Recipe
from lm.decoder import Decoder, Watched
from lm.metrics import TokenMetrics
from lm.optim import build_optimizer, lr_factor

Batch = dict[str, Tensor]


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number: going on would destroy the weights."""


class LanguageModel(L.LightningModule):
    """Trains a decoder; the loss of a step is the mean over the labelled positions of the global batch.

    Args:
        recipe: what to train and how.
        decoder: the model, initialised.
        total_steps: optimiser steps of the run, for the schedule.
        token_bytes: (V,) bytes of text of each token, or None.
        valid_names: the validation loaders' names, in order.
    """

    def __init__(
        self,
        recipe: Recipe,
        decoder: Decoder,
        total_steps: int,
        token_bytes: Tensor | None = None,
        valid_names: tuple[str, ...] = ("valid",),
    ):
        super().__init__()
        self.recipe = recipe
        self.decoder = decoder
        self.total_steps = total_steps
        self.valid_names = valid_names
        self.valid_metrics = nn.ModuleDict({name: TokenMetrics(token_bytes) for name in valid_names})
        self.train_metrics = TokenMetrics(token_bytes)  # of the optimiser step under way
        self.step_metrics: dict[str, Tensor | float] = {}
        """Loss, gradient norm and so on of the last optimiser step."""

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.decoder, self.recipe.optim)
        schedule = LambdaLR(optimizer, lambda step: lr_factor(step, self.total_steps, self.recipe.optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout depends on the seed and the batch's number alone, so a resumed run draws the same.
        assert self.trainer is not None
        torch.manual_seed((self.recipe.seed << 32) + self.trainer.fit_loop.total_batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        nll, correct = self.decoder(batch["input_ids"], batch["labels"], batch.get("segment_ids"))
        self.train_metrics.update(nll, correct, batch["labels"])
        # Lightning divides by the number of micro-batches. Undone here, so that the backward pass sees the gradient
        # of the plain sum: a mixer may add a penalty's gradient to it, which must not depend on that number.
        return nll.sum() * self.recipe.trainer.accumulate

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns the gradient of the summed loss into that of the mean over the whole step's labels."""
        factor = 1 / self.train_metrics.labelled  # a tensor: its value is not waited for
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        limit = self.recipe.optim.grad_clip
        norm = nn.utils.clip_grad_norm_(self.parameters(), math.inf if limit is None else limit)
        rates = self.train_metrics.compute()
        self.train_metrics.reset()
        if not torch.isfinite(norm + rates["loss"]):
            raise NonFiniteError(
                f"step {self.trainer.global_step + 1}: loss {rates['loss']:.4g}, gradient norm {norm:.4g}. "
                "The weights are as they were before this step. Try a lower optim.lr, more optim.warmup_steps, "
                "a smaller optim.grad_clip, or trainer.precision=32"
            )
        self.step_metrics = {**rates, "gradient_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        watched: Watched | None = [] if batch_idx == 0 and dataloader_idx == 0 else None
        nll, correct = self.decoder(batch["input_ids"], batch["labels"], batch.get("segment_ids"), watched)
        metrics = cast(TokenMetrics, self.valid_metrics[self.valid_names[dataloader_idx]])
        metrics.update(nll, correct, batch["labels"])
        for layer, values in enumerate(watched or []):
            for name, value in values.items():
                # TensorBoard sorts by name: "watch" comes after the losses.
                self._report(f"watch/{name}/layer_{layer}_mean", value.mean())
                self._report(f"watch/{name}/layer_{layer}_spread", value.std())

    def on_validation_epoch_end(self) -> None:
        for name in self.valid_names:
            metrics = cast(TokenMetrics, self.valid_metrics[name])
            for rate, value in metrics.compute().items():
                self._report(f"{name}/{rate}", value)
            metrics.reset()

    def _report(self, name: str, value: Tensor) -> None:
        """To the loggers at the number of finished steps, and to callbacks such as the best checkpoint."""
        self.log(name, value.float(), logger=False, add_dataloader_idx=False)
        for logger in self.loggers:
            logger.log_metrics({name: float(value)}, step=self.trainer.global_step)
