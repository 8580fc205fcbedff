"""The optimiser step: a decoder, its loss over the labelled positions, its optimiser; and validation.

Letters: B batch, T time, V vocabulary.
"""

import math
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixerlab.data.module import IGNORE
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.parallel.strategies import synchronise_gradients
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.batches import ROW_ORDER
from mixerlab.lm.training.metrics import TokenMetrics, rates, token_sums
from mixerlab.lm.training.non_finite import NonFiniteSteps
from mixerlab.lm.training.optim import build_optimizer, lr_factor
from mixerlab.mixers import Mixer
from mixerlab.options import plain

Batch = dict[str, Tensor]


def seed_dropout(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which takes longer, since it asks for every kind of device there could be."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class LanguageModel(L.LightningModule):
    """Trains a decoder; the loss of a step is the mean over the labelled positions of the global batch.

    Args:
        recipe: what to train and how.
        decoder: the model, initialised, and sharded if it shall be.
        total_steps: optimiser steps of the run, for the schedule.
        token_bytes: (V,) bytes of text of each token, or None.
        valid_names: the validation loaders' names, in order.
        world: this process among all.
        run: where batches that fail are saved; None: nowhere.
    """

    def __init__(
        self,
        recipe: Recipe,
        decoder: Decoder,
        total_steps: int,
        token_bytes: Tensor | None = None,
        valid_names: tuple[str, ...] = ("valid",),
        world: World | None = None,
        run: Run | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.recipe = recipe
        self.decoder = decoder
        self.total_steps = total_steps
        self.valid_names = valid_names
        self.world = world or World()
        self.non_finite = NonFiniteSteps(recipe, decoder, self.world, run)
        self.valid_metrics = nn.ModuleList(TokenMetrics(token_bytes) for _ in valid_names)
        self.token_bytes = token_bytes
        self.reduces_each_time = recipe.strategy.reduce_every == "micro_batch"
        self.step_metrics: dict[str, Tensor | float] = {}
        """Loss, gradient norm and so on of the last step."""
        self.row_order = ROW_ORDER
        """Which order the run's rows have."""
        self.validated_step = -1
        self.valid_rates: dict[str, float] = {}
        """What the last validation found, by "loader/rate", and after which step."""
        for mixer in (m for m in decoder.modules() if isinstance(m, Mixer)):
            mixer.micro_batches = recipe.trainer.accumulate

    def training_step(self, micro_batches: list[Batch], batch_idx: int) -> None:
        """One optimiser step on its micro-batches."""
        step, optimizer = self.trainer.global_step, cast(torch.optim.Optimizer, self.optimizers())
        labelled = torch.stack([(batch["labels"] != IGNORE).sum() for batch in micro_batches])
        # Over all ranks. Gradients are averaged over them, and the loss is a sum over all labels: hence the factor.
        scale = self.world.size / self.world.sum(labelled.sum()).clamp(min=1)
        sums = labelled.new_zeros(4, dtype=torch.float64)
        optimizer.zero_grad()
        for i, batch in enumerate(micro_batches):
            seed_dropout(self.seed_of(step, i), batch["labels"].device)
            is_last = i == len(micro_batches) - 1
            synchronise_gradients(self.trainer.strategy, is_last, self.reduces_each_time)
            with self.trainer.precision_plugin.forward_context():
                nll, correct = self.decoder(batch["input_ids"], batch["labels"], batch.get("segment_ids"))
            self.manual_backward(nll.sum() * scale)
            sums += token_sums(nll, correct, batch["labels"], self.token_bytes)
        norm = self.clip_gradients_by_norm()
        found = rates(self.world.sum(sums), self.token_bytes is not None)
        lr = self.recipe.optim.lr * lr_factor(step, self.total_steps, self.recipe.optim)
        self.step_metrics = {**found, "gradient_norm": norm, "learning_rate": lr}
        if torch.isfinite(norm + found["loss"].to(norm.device)):
            self.non_finite.in_a_row = 0
        else:  # raises, or leaves no gradients, so that the step changes nothing
            seeds = [self.seed_of(step, i) for i in range(len(micro_batches))]
            self.non_finite.handle(self.trainer, float(found["loss"]), float(norm), micro_batches, seeds)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    def seed_of(self, step: int, micro_batch: int) -> int:
        """Seed of dropout: of these numbers alone, so that a resumed run draws the same."""
        number = (step * self.recipe.trainer.accumulate + micro_batch) * self.world.size + self.world.rank
        return (self.recipe.seed << 32) + number

    def clip_gradients_by_norm(self) -> Tensor:
        """Scales the gradient down to `optim.grad_clip` where it is larger; returns its norm before that."""
        limit = self.recipe.optim.grad_clip
        norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), math.inf if limit is None else limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.decoder, self.recipe.optim)

    def configure_model(self) -> None:
        """Lightning's FSDP2 strategy asks for this; `parallelize` has done it."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        diagnose = batch_idx == 0 and dataloader_idx == 0
        result = self.decoder(batch["input_ids"], batch["labels"], batch.get("segment_ids"), diagnose)
        (nll, correct), layers = result if diagnose else (result, [])
        cast(TokenMetrics, self.valid_metrics[dataloader_idx]).update(nll, correct, batch["labels"])
        for layer, values in enumerate(layers):
            for name, value in values.items():
                # TensorBoard sorts by name: these come after the losses.
                self._report(f"valid_mixers/{name}/layer_{layer}_mean", value.mean())
                self._report(f"valid_mixers/{name}/layer_{layer}_spread", value.std())

    def on_validation_epoch_end(self) -> None:
        for name, metrics in zip(self.valid_names, self.valid_metrics, strict=True):
            assert isinstance(metrics, TokenMetrics)
            for rate, value in metrics.compute().items():
                self._report(f"{name}/{rate}", value)
                self.valid_rates[f"{name}/{rate}"] = float(value)
            metrics.reset()
        self.validated_step = self.trainer.global_step

    @property
    def rate_names(self) -> list[str]:
        """What is measured on each validation loader, the first being what people compare."""
        return [
            *(["bits_per_byte"] if self.token_bytes is not None else []),
            "accuracy",
            "loss",
            "perplexity",
        ]

    @property
    def valid_loss(self) -> float | None:
        """Loss of the first loader in the last validation; None where there was none or it is not finite."""
        loss = self.valid_rates.get(f"{self.valid_names[0]}/loss", math.nan)
        return loss if math.isfinite(loss) else None

    def _report(self, name: str, value: Tensor) -> None:
        """To the loggers at the number of finished steps."""
        for logger in self.loggers:
            logger.log_metrics({name: float(value)}, step=self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        validated = self.validated_step == checkpoint["global_step"]
        checkpoint["valid_loss"] = self.valid_loss if validated else None
        checkpoint["metrics"] = self.valid_rates if validated else None
        checkpoint["rows_per_step"] = self.recipe.trainer.step_rows(self.world.size)
        checkpoint["row_order"] = self.row_order
        checkpoint["recipe"] = plain(self.recipe)
        del checkpoint["loops"]  # of Lightning: all progress follows from the step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.pop("loops", None)  # of an older version
        self.row_order = checkpoint.get("row_order", 1)  # versions up to 0.2 noted none
        if checkpoint.get("metrics") is not None:
            self.validated_step, self.valid_rates = checkpoint["global_step"], checkpoint["metrics"]
