"""How much each input token counted for an output token: gradient times input, and integrated gradients.

Letters: T time, D model width, S steps.

What is explained is the output token's logit less the mean of all logits: a shift that they share means nothing. This
score is linear in what the head gets.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixerlab.lm.memory.influence import TOKENS_AT_ONCE, hidden
from mixerlab.lm.model.decoder import Decoder


@dataclass(frozen=True)
class Relevance:
    """What a method gives to each token, and what it gives to none."""

    tokens: Tensor  # (T,)
    rest: float
    """The score of the baseline, or what the biases brought; 0 where the method knows of neither."""
    score: float

    @property
    def gap(self) -> float:
        """How far tokens and rest together are from the score."""
        return self.score - self.rest - float(self.tokens.sum())


def direction(decoder: Decoder, target: int) -> Tensor:
    """(D,): its product with what the head gets is the score of the token `target`."""
    weight = decoder.head_weight()  # (V, D)
    return (weight[target] - weight.mean(0)).detach()


def score(decoder: Decoder, x: Tensor, target: int) -> Tensor:
    """Embedded tokens (B, T, D) -> (B,), the score of the token `target` after them."""
    return hidden(decoder, x)[:, -1] @ direction(decoder, target)


@torch.enable_grad()
def gradient_times_input(decoder: Decoder, input_ids: Tensor, target: int) -> Relevance:
    """The score's gradient times the embedding of each token; for input_ids (T,).

    Simonyan et al., arXiv 1312.6034, and Shrikumar et al., arXiv 1605.01713. It need not add up to anything.
    """
    x = decoder.embedding(input_ids).detach().requires_grad_()  # (T, D)
    value = score(decoder, x[None], target)[0]
    (gradient,) = torch.autograd.grad(value, x)
    return Relevance((gradient * x).sum(-1).detach(), 0.0, value.item())


@torch.enable_grad()
def integrated_gradients(
    decoder: Decoder, input_ids: Tensor, target: int, baseline: int, steps: int = 64
) -> Relevance:
    """Gradients averaged along the straight way from a baseline to the text, times the way (Sundararajan et al.,
    arXiv 1703.01365), for input_ids (T,). With enough steps, the tokens add up to the score less the baseline's.

    Args:
        baseline: the token that stands at every position at the beginning. Zeros will not do: norms see no
            difference between a small embedding and a large one, and all would happen in the first step.
        steps: points on the way, those of Gauss and Legendre's quadrature.
    """
    x, start = decoder.embedding(input_ids).detach(), decoder.embedding.weight[baseline].detach()
    way = x - start  # (T, D)
    nodes, weights = (torch.from_numpy(a).to(x) for a in np.polynomial.legendre.leggauss(steps))
    total = torch.zeros_like(x)
    at_once = max(1, TOKENS_AT_ONCE // len(x))
    for node, weight in zip(nodes.split(at_once), weights.split(at_once), strict=True):
        points = (start + (node[:, None, None] + 1) / 2 * way).requires_grad_()  # (S, T, D)
        (gradient,) = torch.autograd.grad(score(decoder, points, target).sum(), points)
        total += torch.einsum("s,std->td", weight / 2, gradient)
    with torch.no_grad():
        ends = score(decoder, torch.stack((start.expand_as(x), x)), target)
    return Relevance((way * total).sum(-1), ends[0].item(), ends[1].item())
