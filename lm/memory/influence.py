"""How strongly the output at t depends on the input at tau, measured for any mixer.

Letters: B batch, T time, D model width, H heads of a mixer (see `Mixer.mix_fixed`), C sources, which are positions tau,
P random projections.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixerlab.lm.model.decoder import Decoder
from mixerlab.mixers import Mixer

AT_ONCE = 16
"""Sources that are in memory at a time."""

TOKENS_AT_ONCE = 1 << 13
"""Of the copies of a sequence whose Jacobian is projected; one copy at least."""

QUANTILE = 2.576
"""Of the normal distribution: stated errors hold in 99 of 100 cases."""


def hidden(decoder: Decoder, x: Tensor) -> Tensor:
    """Embedded tokens (B, T, D) -> what the head gets, (B, T, D)."""
    for block in decoder.layers:
        x = block(x)
    return decoder.norm(x)


@torch.no_grad()
def mixer_inputs(decoder: Decoder, input_ids: Tensor) -> list[Tensor]:
    """What each layer's mixer gets, (B, T, D) each, for input_ids (B, T)."""
    found: list[Tensor] = []
    handles = [
        block.mixer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
        for block in decoder.layers
    ]
    try:
        hidden(decoder, decoder.embedding(input_ids))
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def fixed_influence(mixer: Mixer, x: Tensor, sources: Sequence[int]) -> Tensor | None:
    """Influence of the sources on every output while routing is held, its size averaged over heads.

    Exact. No T x T matrix of any feature is held: some of the sources at a time go through the mixer's operator.

    Args:
        x: (B, T, D), what the mixer routes by.
        sources: positions tau.

    Returns:
        (B, T, C); None where the mixer has no routing that could be held.
    """
    columns = []
    for piece in torch.tensor(sources, device=x.device).split(AT_ONCE):
        impulses = F.one_hot(piece, x.shape[1]).T.to(x.dtype)  # (T, C)
        mixed = mixer.mix_fixed(x, impulses.expand(x.shape[0], -1, -1))  # (B, H, T, C)
        if mixed is None:
            return None
        columns.append(mixed.abs().mean(1))
    return torch.cat(columns, dim=-1)


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of the D x D Jacobians of one output with respect to each input up to it."""

    norms: Tensor  # (t + 1,)
    error: Tensor  # (t + 1,), relative, at 99%; 0 where the norms are exact


@torch.no_grad()  # vjp differentiates none the less; else it would keep graphs for the parameters' sake
def jacobian_norms(
    function: Callable[[Tensor], Tensor], x: Tensor, t: int, projections: int, generator: torch.Generator
) -> Norms:
    """||d function(x)_t / d x_tau|| for every tau <= t, of a causal function.

    With w normal, |J^T w|^2 has the mean ||J||_F^2 (Hutchinson's estimator). The mean of P of them is distributed like
    a chi-squared variable over its degrees of freedom, P tr(J J^T)^2 / tr((J J^T)^2) of them (Satterthwaite), both
    traces estimated from the same projections. With P >= D the D unit vectors are taken instead, which is exact.

    Args:
        function: (B, T, D) -> (B, T, D), causal, each row of the batch alone.
        x: (T, D).
        projections: P.
    """
    x, D = x[: t + 1], x.shape[-1]
    exact = projections >= D
    w = torch.eye(D) if exact else torch.randn(projections, D, generator=generator)
    pulled = []
    for piece in w.to(x).split(max(1, TOKENS_AT_ONCE // len(x))):
        rows = x.expand(len(piece), -1, -1)  # (P, t + 1, D)
        pull_back = torch.func.vjp(lambda y: function(y)[:, t], rows)[1]
        pulled.append(pull_back(piece)[0])
    g = torch.cat(pulled)  # (P, t + 1, D)
    total = g.square().sum((0, 2))  # (t + 1,)
    if exact:
        return Norms(total.sqrt(), torch.zeros_like(total))
    P = projections
    products = torch.einsum("pti,qti->tpq", g, g).square()
    apart = (products.sum((1, 2)) - products.diagonal(dim1=1, dim2=2).sum(-1)) / max(P * (P - 1), 1)
    # Of rank 1 at worst, where one projection says least; so too, to be careful, where all are 0.
    rank = torch.where(apart > 0, (total / P).square() / apart, 1.0).clamp(1.0, float(D))
    return Norms((total / P).sqrt(), _relative_error(P * rank))


def _relative_error(freedom: Tensor) -> Tensor:
    """Of a square root of a mean of chi-squared variables: how far it may lie from the truth, relative to itself.

    The quantile below is Wilson and Hilferty's; the lower one is the farther, for it is divided by.
    """
    spread = 2 / (9 * freedom)
    return (1 - spread - QUANTILE * spread.sqrt()).clamp_min(0.05) ** -1.5 - 1
