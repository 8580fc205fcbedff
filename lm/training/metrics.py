"""Loss, perplexity, accuracy and bits per byte over labelled positions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from mixerlab.data.module import IGNORE


class TokenMetrics(Metric):
    """Sums over labelled positions, kept in float64 and added up over ranks; `compute` makes the rates.

    `token_bytes` (V,) is the bytes of text each token stands for; None where there is no text.
    """

    full_state_update = False
    nll: Tensor
    labelled: Tensor
    correct: Tensor
    text_bytes: Tensor

    def __init__(self, token_bytes: Tensor | None = None, **options: Any):
        super().__init__(**options)
        self.set_dtype(torch.float64)
        self.token_bytes = token_bytes
        for name in ("nll", "labelled", "correct", "text_bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, correct: Tensor, labels: Tensor) -> None:
        """nll in nats, correct, labels: (B, T) each, nll 0 and correct false where the label is -100."""
        is_labelled = labels != IGNORE
        self.nll += nll.detach().sum(dtype=torch.float64)
        self.labelled += is_labelled.sum()
        self.correct += correct.sum()
        if self.token_bytes is not None:
            self.token_bytes = self.token_bytes.to(labels.device)
            self.text_bytes += self.token_bytes[labels.clamp(min=0)].mul(is_labelled).sum()

    def compute_over_ranks(self) -> dict[str, Tensor]:
        """The rates over all processes of the run, in one exchange; the sums start anew."""
        names = ("nll", "labelled", "correct", "text_bytes")
        if dist.is_initialized():
            sums = torch.stack([getattr(self, name) for name in names])
            dist.all_reduce(sums)
            for name, value in zip(names, sums, strict=True):
                setattr(self, name, value)
        rates = self.compute()
        self.reset()
        return rates

    def compute(self) -> dict[str, Tensor]:
        """loss (nats per labelled position), perplexity, accuracy, and bits_per_byte where bytes are known."""
        loss = self.nll / self.labelled
        rates = {"loss": loss, "perplexity": loss.exp(), "accuracy": self.correct / self.labelled}
        if self.token_bytes is not None:
            rates["bits_per_byte"] = self.nll / math.log(2) / self.text_bytes
        return rates
