"""Cross-entropy of each position without holding the logits of all.

Letters: B batch, T time, D model width, V vocabulary, n positions of a piece.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**25
"""Elements of the largest float32 block of logits that the loss makes (128 MiB)."""


def token_losses(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position without holding all logits.

    The positions are cut into pieces whose logits are made, used and dropped, and made again in the backward
    pass. x (B, T, D), weight (V, D), labels (B, T) -> nll (B, T) float32 in nats, correct (B, T) bool.
    """
    n_positions = labels.numel()
    pieces = max(8, math.ceil(n_positions * weight.shape[0] / LOGITS_AT_ONCE))
    size = max(1, math.ceil(n_positions / pieces))
    nlls, hits = [], []
    for x_piece, y_piece in zip(x.flatten(0, 1).split(size), labels.flatten().split(size), strict=True):
        if torch.is_grad_enabled():
            nll, hit = checkpoint(_piece_losses, x_piece, weight, y_piece, use_reentrant=False)
        else:
            nll, hit = _piece_losses(x_piece, weight, y_piece)
        nlls.append(nll)
        hits.append(hit)
    return torch.cat(nlls).view_as(labels), torch.cat(hits).view_as(labels)


def _piece_losses(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, D), weight (V, D), labels (n,) -> nll (n,), correct (n,)."""
    logits = F.linear(x, weight)  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return nll, logits.argmax(-1) == labels
