"""Sessa's influence taken apart by the number of hops through its feedback.

Letters: T time, D model width, H heads (feedback head by forward head, as in `Sessa.mix_fixed`), K numbers of hops.
"""

import torch
from torch import Tensor

from mixerlab.mixers.sessa import Sessa


@torch.no_grad()
def influence_by_hops(mixer: Sessa, x: Tensor) -> Tensor:
    """What reaches the last position from each, by exactly k hops through feedback; exact, routing held.

    s = (I - B)^-1 f is the sum of B^k f over k from 0 to T - 1 (docs/sessa.md), and the entry (t, j) of B^k is the sum
    over all paths of k hops from j to t. Each path begins with the attention of the forward branch. Summed over k this
    is the last row of what `mix_fixed` makes of unit impulses. Memory grows with T^2 H.

    Args:
        mixer: with feedback.
        x: (T, D), what the mixer routes by.

    Returns:
        (K, H, T) with K = T.
    """
    routing = mixer.routing(x[None])
    forward, alpha = routing["forward attention"][0], routing["feedback attention"][0]  # (heads, T, T)
    B = routing["gain"][0, :, :, None].to(x) * alpha
    row = torch.zeros_like(B[:, -1])  # (feedback heads, T), the last row of B^k
    row[:, -1] = 1.0
    rows = []
    for _ in range(len(x)):
        rows.append(row)
        row = (row[:, None] @ B)[:, 0]
    return torch.einsum("khj,fji->khfi", torch.stack(rows), forward).flatten(1, 2)


def shares(by_hops: Tensor) -> Tensor:
    """(K, H, T) -> (K,): how much of the influence, in size, takes each number of hops; they add up to 1."""
    sizes = by_hops.abs().sum((1, 2))
    return sizes / sizes.sum()
