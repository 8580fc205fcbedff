"""SSD, the operator of the Mamba-2 mixer: state space duality (Dao & Gu, arXiv 2405.21060).

Letters: B batch, T time, H heads, G groups that share B_in and C_out, P head dim, N state size.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from mixerlab.kernels.backend import choose
from mixerlab.kernels.fla import why_not_fla
from mixerlab.kernels.operands import check_chunk_size, check_operands
from mixerlab.kernels.ssd.chunked import ssd_chunked
from mixerlab.kernels.ssd.fla_kernel import ssd_fla
from mixerlab.kernels.ssd.mamba_ssm_kernel import ssd_mamba_ssm, why_not_mamba_ssm
from mixerlab.kernels.ssd.reference import ssd_reference

__all__ = ["ssd"]


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D_skip: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_state: Literal[False] = False,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor: ...


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D_skip: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_state: Literal[True],
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D_skip: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t, per head (arXiv 2405.21060, eq. 2).

    Args:
        x: values (B, T, H, P), T at least 1.
        dt: step sizes (B, T, H), not negative: after softplus and clamp. float32 is right even where the
            others are bf16.
        A: rate of each head (H,), negative.
        B_in: what enters the state (B, T, G, N); G divides H, and head h uses group h // (H / G).
        C_out: what is read from the state (B, T, G, N).
        D_skip: weight of x in the output (H,); None means none.
        initial_state: h before the first position (B, H, P, N), which enters the first segment only; None
            means zeros.
        segment_ids: (B, T) int64, non-decreasing in each row; nothing flows between segments.
        return_state: also return h after the last position.
        backend: "auto", "mamba_ssm" or "fla" (those packages' kernels, on CUDA, outside of torch.compile and
            torch.func), "chunked" or "reference". A single position takes one step of the recurrence in each.
        chunk_size: positions per chunk of the backends that have chunks; None lets them decide.

    Returns:
        y (B, T, H, P) in x's dtype; with `return_state` also h (B, H, P, N), which belongs to the last
        segment, in float32 (float64 for float64 inputs). Decays have that precision too, whatever autocast
        says.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend cannot take the input.
    """
    _check(x, dt, A, B_in, C_out, D_skip, initial_state, segment_ids, chunk_size)
    name = choose(
        "ssd",
        backend,
        {
            "mamba_ssm": lambda: why_not_mamba_ssm(x, dt, A, B_in, C_out, chunk_size),
            "fla": lambda: why_not_fla((C_out, B_in, x), (dt, A), chunk_size),
            "chunked": lambda: None,
            "reference": lambda: None,
        },
        by_name_alone=("fla",),  # no GPU has run it yet
    )
    accumulate = torch.float32
    for operand in (x, dt, A, B_in, C_out):
        accumulate = torch.promote_types(accumulate, operand.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if name == "reference" or x.shape[1] == 1:
            y, state = ssd_reference(x, dt, A, B_in, C_out, initial_state, segment_ids, accumulate)
        elif name == "mamba_ssm":
            y, state = ssd_mamba_ssm(x, dt, A, B_in, C_out, D_skip, initial_state, segment_ids, chunk_size)
            D_skip = None  # its part is in y
        elif name == "fla":
            y, state = ssd_fla(x, dt, A, B_in, C_out, initial_state, segment_ids)
        else:
            y, state = ssd_chunked(x, dt, A, B_in, C_out, initial_state, segment_ids, accumulate, chunk_size)
        if D_skip is not None:
            y = (y + D_skip.to(accumulate)[:, None] * x).to(x.dtype)  # (B, T, H, P)
    return (y, state) if return_state else y


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D_skip: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int | None,
) -> None:
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, T, H, P) with T at least 1")
    B, T, H, P = x.shape
    if B_in.ndim != 4 or H % max(1, B_in.shape[2]):
        raise ValueError(
            f"B_in has shape {tuple(B_in.shape)}, expected (B, T, G, N) with G a divisor of H = {H}"
        )
    G, N = B_in.shape[2:]
    expected = [
        ("x", x, (B, T, H, P), "(B, T, H, P)"),
        ("dt", dt, (B, T, H), "(B, T, H)"),
        ("A", A, (H,), "(H,)"),
        ("B_in", B_in, (B, T, G, N), "(B, T, G, N)"),
        ("C_out", C_out, (B, T, G, N), "(B, T, G, N), as B_in"),
        ("D_skip", D_skip, (H,), "(H,)"),
        ("initial_state", initial_state, (B, H, P, N), "(B, H, P, N)"),
        ("segment_ids", segment_ids, (B, T), "(B, T)"),
    ]
    check_operands(expected)
    check_chunk_size(chunk_size)
