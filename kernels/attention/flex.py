"""Causal softmax attention by torch's flex_attention: a kernel that needs no T x T mask and skips what nobody sees.

Letters: B batch, T time, H query heads, G key-value heads, K key width, P value width, n blocks of time.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mixerlab.kernels.backend import why_not_cuda

BLOCK = 128


def why_not_flex(q: Tensor, k: Tensor, v: Tensor, positions: tuple[Tensor, Tensor] | None) -> str | None:
    """None if the kernel can take the input, else the reason why not."""
    if reason := why_not_cuda(q):
        return reason
    if positions is not None:
        return "queries and keys have positions of their own"
    if min(q.shape[3], v.shape[3]) < 16:
        return f"heads are {min(q.shape[3], v.shape[3])} wide, and the kernel takes widths from 16"
    if q.dtype == torch.float64 or not q.dtype == k.dtype == v.dtype:
        return f"dtypes are {q.dtype}, {k.dtype} and {v.dtype}, and the kernel takes one of at most 32 bits"
    return None


def attention_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    window: int | None,
    selected: Tensor | None,
) -> Tensor:
    """As `causal_attention`."""
    mask = block_mask(segment_ids, window, q.shape[2], q.device, selected)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@lru_cache(maxsize=1)
def _compiled():
    return torch.compile(flex_attention)


def block_mask(
    segment_ids: Tensor | None,
    window: int | None,
    time: int,
    device: torch.device,
    selected: Tensor | None = None,
) -> BlockMask:
    """What `flex_attention` needs to know of the visible positions, made without a T x T mask.

    segment_ids (B, T) int64 or None, selected (B, T) bool or None, as in `causal_attention`. Since ids do not
    decrease along a row, their first and last in a block of positions tell whether two blocks share a segment.
    """
    n_blocks = -(-time // BLOCK)
    first = torch.arange(n_blocks, device=device) * BLOCK  # (n,)
    last = (first + BLOCK - 1).clamp(max=time - 1)  # (n,)
    shared = first[:, None] >= first  # (n, n): blocks of queries by blocks of keys
    if window is not None:
        shared = shared & (last > first[:, None] - window)
    if segment_ids is not None:
        shared = shared & (segment_ids[:, last][:, None, :] >= segment_ids[:, first][:, :, None])  # (B, n, n)
    shared = shared.view(-1, 1, n_blocks, n_blocks)

    def visible(b, h, i, j):
        mask = j <= i
        if window is not None:
            mask = mask & (j > i - window)
        if segment_ids is not None:
            mask = mask & (segment_ids[b, i] == segment_ids[b, j])
        if selected is not None:
            mask = mask & (selected[b, j] | (i == j))
        return mask

    return BlockMask.from_kv_blocks(
        shared.sum(-1).int(),
        shared.int().argsort(dim=-1, descending=True, stable=True).int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(time, time),
    )
