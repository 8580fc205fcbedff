"""Causal softmax attention by its definition: all weights at once.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K key width, P value width.
"""

import torch
from torch import Tensor


def visible(
    q: Tensor,
    segment_ids: Tensor | None,
    window: int | None,
    selected: Tensor | None,
    positions: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Which keys each query sees, arguments as of `causal_attention`: bool (B or 1, 1, T, S)."""
    if positions is None:
        positions = (torch.arange(q.shape[2], device=q.device)[None],) * 2
    at, keys_at = positions[0][:, None, :, None], positions[1][:, None, None, :]  # (B, 1, T, 1), (B, 1, 1, S)
    mask = (keys_at >= 0) & (keys_at <= at)  # (B, 1, T, S)
    if window is not None:
        mask = mask & (keys_at > at - window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if selected is not None:
        mask = mask & (selected[:, None, None, :] | (keys_at == at))
    return mask


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, T, K), k (B, G, S, K), v (B, G, S, P), mask (B or 1, 1, T, S) -> (B, H, T, P) in the dtype of v.

    In float32 at least, whatever autocast says.
    """
    accumulate = torch.promote_types(torch.float32, torch.promote_types(q.dtype, v.dtype))
    share = q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        keys, values = (x.to(accumulate).repeat_interleave(share, dim=1) for x in (k, v))  # (B, H, S, K or P)
        logits = (q.to(accumulate) * q.shape[3] ** -0.5) @ keys.mT  # (B, H, T, S)
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ values).to(v.dtype)
