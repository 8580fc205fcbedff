"""Feedback attention, the operator of the Sessa mixer (Horbatko, arXiv 2604.18580).

Letters: B batch, H heads, T new positions, L past positions, S = L + T columns, K key width, P value width.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from mixerlab.kernels.backend import choose
from mixerlab.kernels.feedback.chunked import entropy_chunked, feedback_chunked
from mixerlab.kernels.feedback.fused import feedback_fused, why_not
from mixerlab.kernels.feedback.reference import feedback_reference
from mixerlab.kernels.feedback.step import feedback_step
from mixerlab.kernels.operands import check_chunk_size

__all__ = ["feedback_attention", "routing_entropy"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@overload
def feedback_attention(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    *,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    past_length: Tensor | None = None,
    past_longest: int | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor: ...


@overload
def feedback_attention(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    *,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    past_length: Tensor | None = None,
    past_longest: int | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def feedback_attention(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    *,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    past_length: Tensor | None = None,
    past_longest: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Solve s_t = f_t + gamma_t * sum_{j<t} alpha_tj s_j, alpha the softmax of scale * <q_t, k_j> over j < t.

    The feedback branch of arXiv 2604.18580. A position that sees nothing (the first of a sequence or
    of a segment) has s_t = f_t. |gamma| < 1 keeps s bounded by max |f| / (1 - max |gamma|).

    Args:
        q: queries (B, H, T, K).
        k: keys (B, H, T, K), of q's dtype.
        f: input of the recurrence (B, H, T, P).
        gamma: gain (B, H, T); float32 is right even where the others are bf16, in which 0.999 is 1.
        scale: factor of the logits; None means K ** -0.5.
        segment_ids: (B, T) int64, non-decreasing in each row; nothing flows between segments.
        past: (k, s) of earlier positions, (B, H, L, K) and (B, H, L, P); one softmax runs over past and new
            positions. Not together with `segment_ids`. With T = 1 the triton backend reads it in place; else
            other dtypes than those of k and f are cast to them.
        past_length: (B,) int64, how many of the L past positions of each row are valid (the first
            ones; the rest may hold anything finite); None means all.
        past_longest: at least the most of `past_length`, for the host, which cannot read that at once; None
            means L. So a buffer longer than its content can be given whole: none of the rest is copied, and
            none of it is read by the triton backend with T = 1.
        return_lse: also return the natural log-sum-exp of each row's visible scaled logits; it carries no
            gradient.
        backend: "auto", "triton" (CUDA), "chunked" or "reference".
        chunk_size: rows per panel of the triton and chunked backends, a bound of their transient memory; the
            first takes 1, 2 or 4 tiles of 128 rows (64 in float32), at least one. None lets them decide.

    Returns:
        s (B, H, T, P) in f's dtype; with `return_lse` also lse (B, H, T), float32 (float64 for float64
        inputs), -inf where nothing is visible. Softmax, gain and solve have that precision too,
        whatever autocast says.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend cannot take the input.
    """
    _check(q, k, f, gamma, segment_ids, past, past_length, chunk_size)
    one = q.shape[2] == 1  # which has nothing to solve
    L = 0 if past is None or one else past[0][:, :, :past_longest].shape[2]
    name = choose(
        "feedback_attention",
        backend,
        {
            "triton": lambda: why_not(q, f, gamma, L + q.shape[2]),
            "chunked": lambda: None,
            "reference": lambda: None,
        },
    )
    if past is not None and not (one and name == "triton" and past[0].shape[2]):
        past = past[0][:, :, :past_longest].to(k.dtype), past[1][:, :, :past_longest].to(f.dtype)
        past = None if past[0].shape[2] == 0 else past
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    accumulate = torch.float32
    for x in (q, f, gamma):
        accumulate = torch.promote_types(accumulate, x.dtype)

    s_past, ids = None, segment_ids
    with torch.autocast(q.device.type, enabled=False):
        if past is not None and q.shape[2] == 1:
            step = (q, past[0], f, gamma, past[1], past_length, scale)
            s, lse = feedback_step(*step, accumulate, return_lse, by_kernels=name == "triton")
            return s if lse is None else (s, lse)
        if name == "triton":
            s, lse = feedback_fused(
                q, k, f, gamma, past, past_length, segment_ids, scale, chunk_size, return_lse
            )
            return s if lse is None else (s, lse)
        if past is not None:
            k_past, s_past = past
            k = torch.cat([k_past, k], dim=2)  # (B, H, S, K)
            ids = None if past_length is None else _past_ids(past_length, s_past.shape[2], q.shape[2])
        if name == "chunked":
            s, lse = feedback_chunked(q, k, f, gamma, s_past, ids, scale, accumulate, chunk_size)
        else:
            s, lse = feedback_reference(q, k, f, gamma, s_past, ids, scale, accumulate, return_lse)
    return (s, lse) if return_lse and lse is not None else s


@torch.no_grad()
def routing_entropy(
    q: Tensor, k: Tensor, *, scale: float | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """How diffuse the routing of `feedback_attention` is: the entropy of each row of alpha.

    A diagnostic: no gradient, memory linear in T.

    Args:
        q, k, scale, segment_ids: as for `feedback_attention`.

    Returns:
        (B, H, T) in nats, float32 (float64 for float64 inputs): 0 where one position gets all the
        weight or nothing is visible, ln(n) where n visible positions share it equally.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_query(q, k, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        return entropy_chunked(q, k, segment_ids, scale, torch.promote_types(torch.float32, q.dtype))


def _past_ids(past_length: Tensor, L: int, T: int) -> Tensor:
    """Segment ids (B, S) that hide the padding of ragged caches: it is a segment that no row belongs to."""
    hidden = torch.arange(L + T, device=past_length.device) >= past_length[:, None]  # (B, S)
    hidden = hidden & (torch.arange(L + T, device=past_length.device) < L)
    return -hidden.long()


def _check_query(q: Tensor, k: Tensor, segment_ids: Tensor | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, H, T, K)")
    B, _, T, _ = q.shape
    _expect_float("q", q)
    _expect("k", k, tuple(q.shape), "(B, H, T, K), as q", q.dtype, q.device)
    if segment_ids is not None:
        _expect("segment_ids", segment_ids, (B, T), "(B, T), as q", torch.int64, q.device)


def _check(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    segment_ids: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    past_length: Tensor | None,
    chunk_size: int | None,
) -> None:
    _check_query(q, k, segment_ids)
    B, H, T, K = q.shape
    if f.ndim != 4:
        raise ValueError(f"f has shape {tuple(f.shape)}, expected (B, H, T, P)")
    P = f.shape[3]
    _expect_float("f", f)
    _expect("f", f, (B, H, T, P), "(B, H, T, P), as q", f.dtype, q.device)
    _expect_float("gamma", gamma)
    _expect("gamma", gamma, (B, H, T), "(B, H, T), as q", gamma.dtype, q.device)
    if past is not None:
        if segment_ids is not None:
            raise ValueError("segment_ids and past exclude each other: a continued sequence is one segment")
        if len(past) != 2:
            raise ValueError(f"past has {len(past)} entries, expected two: k and s of earlier positions")
        if past[0].ndim != 4:
            raise ValueError(f"past[0] has shape {tuple(past[0].shape)}, expected (B, H, L, K)")
        L = past[0].shape[2]
        _expect_float("past[0]", past[0])
        _expect("past[0]", past[0], (B, H, L, K), "(B, H, L, K), as k", past[0].dtype, q.device)
        _expect_float("past[1]", past[1])
        _expect("past[1]", past[1], (B, H, L, P), "(B, H, L, P), as past[0] and f", past[1].dtype, q.device)
    if past_length is not None:
        if past is None:
            raise ValueError("past_length is given without past")
        _expect("past_length", past_length, (B,), "(B,)", torch.int64, q.device)
    check_chunk_size(chunk_size)


def _expect_float(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}, expected one of {', '.join(map(str, _DTYPES))}")


def _expect(
    name: str, x: Tensor, shape: tuple[int, ...], letters: str, dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {letters}: {shape}")
    if x.dtype != dtype:
        raise ValueError(f"{name} has dtype {x.dtype}, expected {dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on device {x.device}, expected {device}, as q")
