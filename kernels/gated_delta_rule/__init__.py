"""The gated delta rule, the operator of the Gated DeltaNet mixer (Yang et al., arXiv 2412.06464).

Letters: B batch, T time, H heads, K key width, P value width.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from mixerlab.kernels.backend import choose
from mixerlab.kernels.fla import why_not_fla
from mixerlab.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked
from mixerlab.kernels.gated_delta_rule.fla_kernel import gated_delta_rule_fla
from mixerlab.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from mixerlab.kernels.operands import check_chunk_size, check_operands

__all__ = ["gated_delta_rule"]


@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_state: Literal[False] = False,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor: ...


@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_state: Literal[True],
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T and y_t = S_t q_t, per head.

    Equation 10 of Yang et al. (arXiv 2412.06464), a_t = exp(log_decay_t): the state forgets, then what it holds for
    the key k_t moves by the share beta_t towards v_t. Nothing is normalised or scaled here: for the state to stay
    bounded, k_t must have at most norm 1.

    Args:
        q: what is read from the state (B, T, H, K), T at least 1.
        k: where it is written (B, T, H, K).
        v: values (B, T, H, P).
        log_decay: logarithm of what is left of the state (B, T, H), finite and not positive. float32 is right
            even where the others are bf16.
        beta: share of the old value that is replaced (B, T, H), from 0 to 1.
        initial_state: S before the first position (B, H, P, K), which enters the first segment only; None
            means zeros.
        segment_ids: (B, T) int64, non-decreasing in each row; nothing flows between segments.
        return_state: also return S after the last position.
        backend: "auto", "fla" (that package's kernels, on CUDA, outside of torch.compile and torch.func), "chunked" or
            "reference". A single position takes one step of the recurrence in each.
        chunk_size: positions per chunk of the backend that has chunks; None lets it decide.

    Returns:
        y (B, T, H, P) in v's dtype; with `return_state` also S (B, H, P, K), which belongs to the last
        segment, in float32 (float64 for float64 inputs). Decays and the solve have that precision too, whatever
        autocast says.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend is unknown.
    """
    _check(q, k, v, log_decay, beta, initial_state, segment_ids, chunk_size)
    name = choose(
        "gated_delta_rule",
        backend,
        {
            "fla": lambda: why_not_fla((q, k, v), (log_decay, beta), chunk_size),
            "chunked": lambda: None,
            "reference": lambda: None,
        },
        by_name_alone=("fla",),  # no GPU has run it yet
    )
    accumulate = torch.float32
    for operand in (q, k, v, log_decay, beta):
        accumulate = torch.promote_types(accumulate, operand.dtype)
    inputs = (q, k, v, log_decay, beta, initial_state, segment_ids, accumulate)
    with torch.autocast(q.device.type, enabled=False):
        if name == "reference" or q.shape[1] == 1:
            y, state = gated_delta_rule_reference(*inputs)
        elif name == "fla":
            y, state = gated_delta_rule_fla(q, k, v, log_decay, beta, initial_state, segment_ids)
        else:
            y, state = gated_delta_rule_chunked(*inputs, chunk_size)
    return (y, state) if return_state else y


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int | None,
) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, T, H, K) with T at least 1")
    B, T, H, K = q.shape
    P = v.shape[-1] if v.ndim else 0
    expected = [
        ("q", q, (B, T, H, K), "(B, T, H, K)"),
        ("k", k, (B, T, H, K), "(B, T, H, K), as q"),
        ("v", v, (B, T, H, P), "(B, T, H, P)"),
        ("log_decay", log_decay, (B, T, H), "(B, T, H)"),
        ("beta", beta, (B, T, H), "(B, T, H)"),
        ("initial_state", initial_state, (B, H, P, K), "(B, H, P, K)"),
        ("segment_ids", segment_ids, (B, T), "(B, T)"),
    ]
    check_operands(expected)
    check_chunk_size(chunk_size)
