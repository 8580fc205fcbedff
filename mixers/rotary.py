"""Rotary position embedding, and the positions within packed documents.

Letters: B batch, H heads, T time, K head dim.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding on interleaved pairs (Su et al., arXiv 2104.09864, eq. 34).

    x (B, H, T, K) with K even; positions (B or 1, T) int64 -> (B, H, T, K) in x's dtype.
    """
    head_dim = x.shape[-1]
    # float32 whatever the model's dtype: the published layer has float32 frequencies, and bf16 positions
    # would collide from 257 on.
    exponents = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim  # (K/2,)
    angles = positions[:, None, :, None].float() / theta**exponents  # (B, 1, T, K/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]  # (B, H, T, K/2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)  # (B, H, T, K)


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Positions counted from 0 within each segment: (B, T) int64 -> (B, T) int64."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)  # (T,)
    first = torch.ones_like(segment_ids, dtype=torch.bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(first, index, 0).cummax(dim=1).values
