"""Decays between the positions of a chunk, which operators with a log decay share.

Letters: B batch, M chunks, H heads, L positions of a chunk.
"""

import torch
from torch import Tensor


def decays(exponent: Tensor, ids: Tensor | None, accumulate: torch.dtype) -> Tensor:
    """What is left at i of what entered at j: exp(exponent_{j+1} + .. + exponent_i), 0 across segments and for j > i.

    Args:
        exponent: (B, M, H, L) float64. The sums are differences of running sums, which lose nothing that
            matters in float64; in float32 a step of 100 would cost the small ones after it three digits.
        ids: (B, M, L), the segment of each position, or None.

    Returns:
        (B, M, H, L, L), in `accumulate`.
    """
    hidden = torch.ones(exponent.shape[-1:] * 2, dtype=torch.bool, device=exponent.device).triu(1)  # (L, L)
    if ids is not None:
        hidden = hidden | (ids[..., :, None] != ids[..., None, :])[:, :, None]  # (B, M, 1, L, L)
    return _Decays.apply(exponent.cumsum(-1), hidden, accumulate)


class _Decays(torch.autograd.Function):
    """exp(total_i - total_j), 0 where `hidden`. What autograd would keep of it, in float64, takes longer than the
    matrix products it is for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(total: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        between = (total[..., :, None] - total[..., None, :]).to(dtype)  # (B, M, H, L, L)
        return between.masked_fill_(hidden, float("-inf")).exp_()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (left,) = ctx.saved_tensors
        flow = gradient * left  # (B, M, H, L, L)
        # In float64: what a position takes and gives nearly cancels where steps are large.
        return flow.sum(-1, dtype=torch.float64) - flow.sum(-2, dtype=torch.float64), None, None
