"""Loss, perplexity, accuracy and bits per byte over labelled positions.

Letters: B batch, T time, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mixerlab.data.module import IGNORE


def token_sums(nll: Tensor, correct: Tensor, labels: Tensor, token_bytes: Tensor | None) -> Tensor:
    """Sums over labelled positions, (4,) float64: nats, positions, correct ones, bytes of text.

    nll in nats, correct, labels: (B, T) each, nll 0 and correct false where there is no label. `token_bytes` (V,) is
    the bytes of text each token stands for; None where there is no text.
    """
    labelled = labels != IGNORE
    text = labels.new_zeros(())
    if token_bytes is not None:
        text = token_bytes.to(labels.device)[labels.clamp(min=0)].mul(labelled).sum()
    sums = (nll.detach().sum(dtype=torch.float64), labelled.sum(), correct.sum(), text)
    return torch.stack([value.to(torch.float64) for value in sums])


def rates(sums: Tensor, has_bytes: bool) -> dict[str, Tensor]:
    """loss (nats per labelled position), perplexity, accuracy, and bits_per_byte where bytes are known."""
    nll, labelled, correct, text_bytes = sums
    loss = nll / labelled
    found = {"loss": loss, "perplexity": loss.exp(), "accuracy": correct / labelled}
    return {**found, "bits_per_byte": nll / math.log(2) / text_bytes} if has_bytes else found


class TokenMetrics(Metric):
    """The rates of many batches, added up over ranks when they are computed."""

    full_state_update = False
    sums: Tensor

    def __init__(self, token_bytes: Tensor | None = None, **options: Any):
        super().__init__(**options)
        self.set_dtype(torch.float64)
        self.token_bytes = token_bytes
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, correct: Tensor, labels: Tensor) -> None:
        """Arguments as of `token_sums`."""
        self.sums += token_sums(nll, correct, labels, self.token_bytes)

    def compute(self) -> dict[str, Tensor]:
        return rates(self.sums, self.token_bytes is not None)
