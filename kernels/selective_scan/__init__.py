"""The selective scan, the operator of the Mamba mixer (Gu & Dao, arXiv 2312.00752, Algorithm 2).

Letters: B batch, T time, D channels, N state size per channel.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from mixerlab.kernels.backend import choose, why_not_triton
from mixerlab.kernels.selective_scan.autograd import scan
from mixerlab.kernels.selective_scan.reference import selective_scan_reference

__all__ = ["selective_scan"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@overload
def selective_scan(
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
) -> Tensor: ...


@overload
def selective_scan(
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
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) * h_{t-1} + dt_t B_t x_t and y_t = <C_t, h_t> + D x_t, per channel.

    Algorithm 2 of Gu & Dao (arXiv 2312.00752), discretised as their code does: B by dt B.

    Args:
        x: input (B, T, D).
        dt: step sizes (B, T, D), at least 0, after the softplus; float32 is right even where x is bf16.
        A: rates (D, N), negative.
        B_in, C_out: input and output maps (B, T, N).
        D_skip: weight of the skip connection (D,); None: no skip.
        initial_state: (B, D, N) before the first position, entering the first segment only; None: zeros.
        segment_ids: (B, T) int64, non-decreasing in each row; nothing flows between segments.
        return_state: also return the state after the last position, that of the last segment.
        backend: "auto", "triton" (CUDA), "chunked" or "reference".

    Returns:
        y (B, T, D) in x's dtype; with `return_state` also the state (B, D, N), float32 (float64 if any input
        is), the precision in which decays and states are computed whatever autocast says.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the backend cannot take the input.
    """
    _check(x, dt, A, B_in, C_out, D_skip, initial_state, segment_ids)
    name = choose(
        "selective_scan",
        backend,
        {"triton": lambda: why_not_triton(x), "chunked": lambda: None, "reference": lambda: None},
    )
    accumulate = torch.float32
    for tensor in (x, dt, A, B_in, C_out):
        accumulate = torch.promote_types(accumulate, tensor.dtype)
    resets = None
    if segment_ids is not None:
        same = torch.zeros_like(
            segment_ids[:, :1], dtype=torch.bool
        )  # (B, 1): the initial state enters there
        resets = torch.cat((same, segment_ids[:, 1:] != segment_ids[:, :-1]), dim=1)  # (B, T)
    with torch.autocast(x.device.type, enabled=False):
        if initial_state is None:
            initial_state = A.new_zeros(x.shape[0], *A.shape, dtype=accumulate)  # (B, D, N)
        inputs = (x, dt, A, B_in, C_out, initial_state, resets, accumulate)
        if name == "reference":
            y, state = selective_scan_reference(*inputs)
        else:
            y, state = scan(*inputs, triton=name == "triton")
        if D_skip is not None:
            y = y + D_skip * x
    return (y.to(x.dtype), state) if return_state else y.to(x.dtype)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D_skip: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, T, D)")
    B, T, D = x.shape
    if T == 0:
        raise ValueError("x has no positions, expected T of at least 1")
    if A.ndim != 2:
        raise ValueError(f"A has shape {tuple(A.shape)}, expected (D, N)")
    N = A.shape[1]
    expected: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
        ("x", x, (B, T, D), "(B, T, D)"),
        ("dt", dt, (B, T, D), "(B, T, D), as x"),
        ("A", A, (D, N), "(D, N), D as in x"),
        ("B_in", B_in, (B, T, N), "(B, T, N), B and T as in x, N as in A"),
        ("C_out", C_out, (B, T, N), "(B, T, N), B and T as in x, N as in A"),
        ("D_skip", D_skip, (D,), "(D,), as x"),
        ("initial_state", initial_state, (B, D, N), "(B, D, N), as x and A"),
        ("segment_ids", segment_ids, (B, T), "(B, T), as x"),
    ]
    for name, tensor, shape, letters in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {letters}: {shape}")
        dtypes = (torch.int64,) if name == "segment_ids" else _DTYPES
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {', '.join(map(str, dtypes))}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on device {tensor.device}, expected {x.device}, as x")
