"""The short causal convolution of the Mamba mixers.

Letters: B batch, T time, X channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def causal_conv(padded: Tensor, conv: nn.Conv1d, segment_ids: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution with the weight (X, 1, W) and bias of `conv`.

    Args:
        padded: W - 1 earlier positions, zeros before the first, and T new ones: (B, W - 1 + T, X).
        conv: depthwise; its last tap meets the position itself.
        segment_ids: (B, T); a position sees nothing of another segment. What is before the new positions
            must be zeros then.

    Returns:
        (B, T, X), at least in the parameters' dtype.
    """
    return _CausalConv.apply(padded, conv.weight[:, 0].T.contiguous(), conv.bias, segment_ids)


def _seen(segment_ids: Tensor | None, lag: int) -> Tensor | None:
    """Which positions lie in the same segment as the one `lag` before: (B, T, 1) bool, or None for all."""
    if segment_ids is None or lag == 0:
        return None
    same = torch.ones_like(segment_ids, dtype=torch.bool)
    same[:, lag:] = segment_ids[:, lag:] == segment_ids[:, :-lag]
    return same[..., None]


class _CausalConv(torch.autograd.Function):
    """One tap after another, along contiguous channels: conv1d wants time last, and knows no segments.

    Left to autograd, every tap would keep its operands and give back a whole tensor of zeros around its share.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(padded: Tensor, taps: Tensor, bias: Tensor | None, segment_ids: Tensor | None) -> Tensor:
        width = taps.shape[0]
        time = padded.shape[1] - width + 1
        y = taps.new_zeros(()) if bias is None else bias
        for tap in range(width):
            inputs = padded[:, tap : tap + time]  # (B, T, X)
            same = _seen(segment_ids, width - 1 - tap)
            y = torch.addcmul(y, inputs if same is None else inputs * same, taps[tap])
        return y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        padded, taps, bias, segment_ids = inputs
        ctx.save_for_backward(padded, taps, segment_ids)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, gradient: Tensor):
        padded, taps, segment_ids = ctx.saved_tensors
        time, width = gradient.shape[1], taps.shape[0]
        d_padded = gradient.new_zeros(padded.shape)
        d_taps = []
        for tap in range(width):
            same = _seen(segment_ids, width - 1 - tap)
            flow = gradient if same is None else gradient * same  # (B, T, X)
            d_taps.append((flow * padded[:, tap : tap + time]).sum((0, 1)))  # (X,)
            d_padded[:, tap : tap + time] += flow * taps[tap]
        return d_padded, torch.stack(d_taps), gradient.sum((0, 1)) if ctx.has_bias else None, None
