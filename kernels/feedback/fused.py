"""Feedback attention by the Triton kernels as one differentiable operator.

Letters: B batch, H heads, T new positions, L past positions, S = L + T columns, K key width, P value width.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixerlab.kernels.feedback.chunked import _vmap_rule

_HAS_TRITON = find_spec("triton") is not None
_TILE = 128
"""The past is padded to a multiple of every tile, so that tiles of new rows and columns meet at the diagonal."""
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(q: Tensor, f: Tensor, gamma: Tensor, S: int) -> str | None:
    """Why the kernels cannot take the input, or None. S: columns of the solve."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if not q.is_cuda and not _INTERPRETED:
        return f"q is on device {q.device}, and Triton kernels run on CUDA"
    if q.is_cuda and _capability(q.device.index) < 80:
        return f"the GPU has compute capability {_capability(q.device.index) / 10}, and the kernels need 8.0"
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


@torch.compiler.assume_constant_result  # a number while torch.compile traces
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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
    s_past = s[:, :, :0]  # (B, H, 0, P)
    length = None
    if past is not None:
        k_past, s_past = (x.to(dtype) for x in past)
        L = k_past.shape[2]
        length = past_length if past_length is not None else q.new_full(q.shape[:1], L, dtype=torch.int64)
        gap = (0, 0, 0, -L % _TILE)
        s_past = pad(s_past, gap)
        k = torch.cat([pad(k_past, gap), k], dim=2)
    s, _, top, total, _ = _Feedback.apply(
        q, k, s, gamma.float(), s_past, length, segment_ids, scale, chunk_size
    )
    return s.to(f.dtype), top + total.log() if return_lse else None


class _Feedback(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, f, gamma, s_past, length, ids, scale, chunk_size):
        return _forward(q, k, f, gamma, s_past, length, ids, scale, chunk_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, _, gamma, s_past, length, ids, ctx.scale, ctx.chunk_size = inputs
        s, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, gamma, s, *statistics, s_past, length, ids)

    @staticmethod
    def backward(ctx, ds, *_):
        if ds is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # read once: activation checkpointing frees them as they are read
        L = saved[8].shape[2]
        dq, dk, dgamma, g = _FeedbackBackward.apply(ds, *saved, ctx.scale, ctx.chunk_size)
        return dq, dk, g[:, :, L:], dgamma, g[:, :, :L], None, None, None, None


class _FeedbackBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that differentiating them raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ds, q, k, gamma, s, attended, top, total, inverse, s_past, length, ids, scale, chunk_size):
        saved = (s, attended, top, total, inverse, s_past)
        return _backward(ds, q, k, gamma, *saved, length, ids, scale, chunk_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "Triton feedback attention has no second derivative; use backend='reference'"
        )


# The two passes are opaque operators: torch.compile and torch.func see one call each, and apply the
# backward and vmap rules registered below instead of tracing the launches.


@torch.library.custom_op("mixerlab::feedback_triton_forward", mutates_args=())
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

    with torch.autocast(q.device.type, enabled=False):
        return feedback_forward(q, k, f, gamma, s_past, length, ids, scale, chunk_size)


@torch.library.custom_op("mixerlab::feedback_triton_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mixerlab.kernels.feedback.triton import feedback_backward

    saved = (s, attended, top, total, inverse, s_past)
    with torch.autocast(q.device.type, enabled=False):
        return feedback_backward(ds, q, k, gamma, *saved, length, ids, scale, chunk_size)


@_forward.register_fake
def _(q, k, f, gamma, s_past, length, ids, scale, chunk_size):
    from mixerlab.kernels.feedback.triton import tiles_for

    B, H, T, _ = f.shape
    M = tiles_for(f.dtype).block
    s, attended, top = f.new_empty(f.shape), gamma.new_empty(f.shape), gamma.new_empty(gamma.shape)
    inverse = f.new_empty(B, H, (T + M - 1) // M * M, M)
    return s, attended, top, torch.empty_like(top), inverse


@_backward.register_fake
def _(ds, q, k, gamma, s, attended, top, total, inverse, s_past, length, ids, scale, chunk_size):
    B, H, _, P = s.shape
    inputs = (q, k, gamma)
    return *(x.new_empty(x.shape) for x in inputs), s.new_empty(B, H, k.shape[2], P)


_forward.register_vmap(_vmap_rule(_forward))
_backward.register_vmap(_vmap_rule(_backward))
