"""Feedback attention by the Triton kernels as one differentiable operator.

Letters: B batch, H heads, T new positions, L past positions, S = L + T columns, K key width, P value width.
"""

from math import log

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixerlab.kernels.backend import why_not_triton
from mixerlab.kernels.operator import operator

_TILE = 128
"""The past is padded to a multiple of every tile, so that tiles of new rows and columns meet at the diagonal."""


def why_not(q: Tensor, f: Tensor, gamma: Tensor, S: int) -> str | None:
    """Why the kernels cannot take the input, or None. S: columns of the solve."""
    if reason := why_not_triton(q, capability=80):
        return reason
    if torch.float64 in (q.dtype, f.dtype, gamma.dtype):
        return "an input is float64, and the kernels compute in float32"
    if max(q.shape[-1], f.shape[-1]) > 4096:
        return f"K = {q.shape[-1]} and P = {f.shape[-1]}, and the kernels take widths up to 4096"
    if q.shape[0] * q.shape[1] > 65535:
        return f"B * H is {q.shape[0] * q.shape[1]}, and a launch takes at most 65535"
    widest = max(q.shape[-1], f.shape[-1], 4 * _TILE)  # of keys, values and the weights of a panel
    if (S + 2 * _TILE) * widest >= 2**31:
        return f"{S} positions are {widest} wide, and the kernels count a sequence's numbers in 32 bits"
    if 0 in (*q.shape, *f.shape):
        return "there is nothing to compute"
    return None


def feedback_fused(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    past: tuple[Tensor, Tensor] | None,
    past_length: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as of `feedback_attention`. Memory is linear in T; differentiable once."""
    # A panel of weights and what it multiplies share a dtype.
    dtype = torch.promote_types(q.dtype, f.dtype)
    q, k, s = q.to(dtype), k.to(dtype), f.to(dtype)
    s_past = s.new_empty(*s.shape[:2], 0, s.shape[3])  # a view of s would ask for a gradient
    length = None
    if past is not None:
        k_past, s_past = (x.to(dtype) for x in past)
        L = k_past.shape[2]
        length = past_length if past_length is not None else q.new_full(q.shape[:1], L, dtype=torch.int64)
        gap = (0, 0, 0, -L % _TILE)
        s_past = pad(s_past, gap)
        k = torch.cat([pad(k_past, gap), k], dim=2)
    s, _, top, total, _ = _feedback(q, k, s, gamma.float(), s_past, length, segment_ids, scale, chunk_size)
    return s.to(f.dtype), (top + total.log2()) * log(2) if return_lse else None


def _forward(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor,
    length: Tensor | None,
    ids: Tensor | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mixerlab.kernels.feedback.triton import feedback_forward  # here: triton need not be installed

    return feedback_forward(q, k, f, gamma, s_past, length, ids, scale, chunk_size)


def _backward(
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    s: Tensor,
    attended: Tensor,
    top: Tensor,
    total: Tensor,
    inverse: Tensor,
    s_past: Tensor,
    length: Tensor | None,
    ids: Tensor | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mixerlab.kernels.feedback.triton import feedback_backward

    saved = (s, attended, top, total, inverse, s_past)
    dq, dk, dgamma, g = feedback_backward(ds, q, k, gamma, *saved, length, ids, scale, chunk_size)
    L = s_past.shape[2]
    return dq, dk, g[:, :, L:].contiguous(), dgamma, g[:, :, :L].clone(memory_format=torch.contiguous_format)


def _forward_fake(q, k, f, gamma, s_past, length, ids, scale, chunk_size):
    from mixerlab.kernels.feedback.triton import tiles_for

    B, H, T, _ = f.shape
    M = tiles_for(f.dtype).block
    s, attended, top = f.new_empty(f.shape), gamma.new_empty(f.shape), gamma.new_empty(gamma.shape)
    inverse = f.new_empty(B, H, (T + M - 1) // M * M, M)
    return s, attended, top, torch.empty_like(top), inverse


def _backward_fake(ds, q, k, gamma, s, attended, top, total, inverse, s_past, length, ids, scale, chunk_size):
    return tuple(x.new_empty(x.shape) for x in (q, k, s, gamma, s_past))


_feedback = operator(
    "feedback_triton",
    _forward,
    _backward,
    outputs=("s", "attended", "top", "total", "inverse"),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
)
