"""The one training step: a decoder, its loss over the labelled positions, its optimiser.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from lm.checkpoint import CheckpointError, folder_of
from lm.config import Recipe, to_dict
from lm.decoder import Decoder, Watched
from lm.diagnosis import PARAMETER, NonFiniteError, first_non_finite
from lm.metrics import TokenMetrics
from lm.optim import build_optimizer, lr_factor
from lm.processes import World

logger = logging.getLogger("mixerlab")

Batch = dict[str, Tensor]

MOST_SKIPPED = 10
"""Steps one after another that may be left out: more are no accident."""


class LanguageModel(L.LightningModule):
    """Trains a decoder; the loss of a step is the mean over the labelled positions of the global batch.

    Args:
        recipe: what to train and how.
        decoder: the model, initialised, and sharded if it shall be.
        total_steps: optimiser steps of the run, for the schedule.
        token_bytes: (V,) bytes of text of each token, or None.
        valid_names: the validation loaders' names, in order.
        world: this process among all.
        run: the run folder, where batches that fail are saved; None: nowhere.
    """

    def __init__(
        self,
        recipe: Recipe,
        decoder: Decoder,
        total_steps: int,
        token_bytes: Tensor | None = None,
        valid_names: tuple[str, ...] = ("valid",),
        world: World | None = None,
        run: Path | None = None,
    ):
        super().__init__()
        self.recipe = recipe
        self.decoder = decoder
        self.total_steps = total_steps
        self.valid_names = valid_names
        self.world = world or World()
        self.run = run
        self.valid_metrics = nn.ModuleDict({name: TokenMetrics(token_bytes) for name in valid_names})
        # Of the optimiser step under way. Its sums are taken once a step, when everyone needs them.
        self.train_metrics = TokenMetrics(token_bytes, sync_on_compute=False)
        self.step_metrics: dict[str, Tensor | float] = {}
        """Loss, gradient norm and so on of the last optimiser step."""
        self.validated_step = -1
        self.valid_rates: dict[str, float] = {}
        """What the last validation found, by "loader/rate", and after which step."""
        self._skipped = 0  # steps left out, one after another
        self._micro_batches: list[tuple[int, Batch]] = []  # of the step under way, with their seeds

    def configure_model(self) -> None:
        """Lightning's FSDP2 strategy asks for this; `parallelize` has done it."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = self.recipe.trainer
        validated = self.validated_step == checkpoint["global_step"]
        checkpoint["valid_loss"] = self.valid_loss if validated else None
        checkpoint["metrics"] = self.valid_rates if validated else None
        checkpoint["rows_per_step"] = trainer.batch_size * trainer.accumulate * self.world.size
        checkpoint["recipe"] = to_dict(replace(self.recipe, resume=None))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        step = checkpoint["global_step"]
        if checkpoint.get("metrics") is not None:
            self.validated_step, self.valid_rates = step, checkpoint["metrics"]
        # Lightning counts micro-batches of this rank, of which another number of ranks makes another number.
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        if progress is not None:
            done = step * self.recipe.trainer.accumulate
            for counts in (progress["total"], progress["current"]):
                counts.update(ready=done, started=done, processed=done, completed=done)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.decoder, self.recipe.optim)
        schedule = LambdaLR(optimizer, lambda step: lr_factor(step, self.total_steps, self.recipe.optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout depends on the seed and the batch's number alone, so a resumed run draws the same.
        number = self.trainer.fit_loop.total_batch_idx * self.world.size + self.world.rank
        seed = (self.recipe.seed << 32) + number
        torch.manual_seed(seed)
        self._micro_batches.append((seed, batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        nll, correct = self.decoder(batch["input_ids"], batch["labels"], batch.get("segment_ids"))
        self.train_metrics.update(nll, correct, batch["labels"])
        # Lightning divides by the number of micro-batches. Undone here, so that the backward pass sees the gradient
        # of the plain sum: a mixer may add a penalty's gradient to it, which must not depend on that number.
        return nll.sum() * self.recipe.trainer.accumulate

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns the gradient of the summed loss into that of the mean over the whole step's labels, on all ranks."""
        self.train_metrics.sum_over_ranks()
        # DDP and FSDP average over ranks. The factor is a tensor: its value is not waited for.
        factor = self.world.size / self.train_metrics.labelled
        for p in self.parameters():
            if p.grad is not None:
                local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                local.mul_(factor.to(local.device))

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        limit = self.recipe.optim.grad_clip
        norm = nn.utils.clip_grad_norm_(self.parameters(), math.inf if limit is None else limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        rates = self.train_metrics.compute()
        self.train_metrics.reset()
        self.step_metrics = {**rates, "gradient_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
        if not torch.isfinite(norm + rates["loss"].to(norm.device)):
            self._handle_non_finite(float(rates["loss"]), float(norm))
        else:
            self._skipped = 0
        self._micro_batches = []

    def _handle_non_finite(self, loss: float, norm: float) -> None:
        """Says what was found, saves the batches, and leaves the step out or raises NonFiniteError."""
        step = self.trainer.global_step + 1
        seeds, batches = (
            [seed for seed, _ in self._micro_batches],
            [batch for _, batch in self._micro_batches],
        )
        self._micro_batches = []
        with self.trainer.precision_plugin.forward_context():  # the dtypes of the step itself
            names = self.world.gather(first_non_finite(self.decoder, batches, seeds))
        # Without gradients the optimiser changes nothing, its averages included.
        self.zero_grad(set_to_none=True)
        # A bad number of one rank reaches the parameters' gradients on all: the rank that saw it earlier made it.
        found = [rank for rank, name in enumerate(names) if name]
        rank = min(found, key=lambda rank: PARAMETER in str(names[rank]), default=0)
        where = names[rank] or "no module when the batch was run again"
        on_rank = f" on rank {rank}" if self.world.size > 1 else ""
        text = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; first not finite{on_rank}: {where}"
        if self.run is not None:
            path = self.run / f"non-finite-step-{step}-rank-{self.world.rank}.pt"
            try:
                torch.save({"step": step, "seeds": seeds, "micro_batches": batches}, path)
                text += f"; the batch is in {path.with_name(f'non-finite-step-{step}-rank-{rank}.pt')}"
            except (OSError, RuntimeError) as error:
                text += f"; the batch could not be saved: {error}"
        self._skipped += 1
        if self.recipe.trainer.on_non_finite == "skip" and self._skipped < MOST_SKIPPED:
            if self.world.rank == 0:
                logger.warning("%s; left out", text)
            return
        if self._skipped > 1:
            text += f"; {self._skipped} steps one after another"
        if self.run is not None and not folder_of(self.run, step - 1).exists():
            try:
                self.trainer.save_checkpoint(folder_of(self.run, step - 1))
            except CheckpointError as error:
                text += f"; {error}"
        self.world.all_raised = True
        raise NonFiniteError(
            f"{text}. The weights are as they were before this step. Continue with resume=auto and "
            "trainer.on_non_finite=skip; or start anew with a lower optim.lr, more optim.warmup_steps, a smaller "
            "optim.grad_clip, or trainer.precision=32"
        )

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
                self.valid_rates[f"{name}/{rate}"] = float(value)
            metrics.reset()
        self.validated_step = self.trainer.global_step

    @property
    def valid_loss(self) -> float | None:
        """Loss of the first loader in the last validation; None where there was none or it is not finite."""
        loss = self.valid_rates.get(f"{self.valid_names[0]}/loss", math.nan)
        return loss if math.isfinite(loss) else None

    def _report(self, name: str, value: Tensor) -> None:
        """To the loggers at the number of finished steps, and to callbacks such as the best checkpoint."""
        self.log(name, value.float(), logger=False, add_dataloader_idx=False)
        for logger in self.loggers:
            logger.log_metrics({name: float(value)}, step=self.trainer.global_step)
