"""The selective scan as one differentiable operator over its chunked and Triton forms."""

import torch
from torch import Tensor

from mixerlab.kernels.operator import operator
from mixerlab.kernels.selective_scan import chunked


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    accumulate: torch.dtype,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """As `selective_scan_reference`, with memory for states linear in T / chunk. Differentiable once."""
    D, N = A.shape
    chunk = _passes(triton).chunk_length(D, N, x.device)
    # A row of A for every sequence: what vmap folds into the batch may then hold different A.
    A = A.to(accumulate).expand(x.shape[0], *A.shape)  # (B, D, N)
    y, state, _ = _scan(x, dt, A, B_in, C_out, initial_state.to(accumulate), resets, chunk, triton)
    return y, state


def _passes(triton: bool):
    """The module that holds `scan_forward` and `scan_backward`."""
    if triton:
        from mixerlab.kernels.selective_scan import triton as kernels  # here: triton need not be installed

        return kernels
    return chunked


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    chunk: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _passes(triton).scan_forward(x, dt, A, B_in, C_out, initial_state, resets, chunk)


def _backward(
    dy: Tensor | None,
    dstate: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    boundaries: Tensor,
    resets: Tensor | None,
    chunk: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy = A.new_zeros(x.shape) if dy is None else dy
    dstate = A.new_zeros(A.shape) if dstate is None else dstate
    gradients = _passes(triton).scan_backward(dy, dstate, x, dt, A, B_in, C_out, boundaries, resets, chunk)
    inputs = (x, dt, A, B_in, C_out, dstate)
    return tuple(gradient.to(y.dtype) for gradient, y in zip(gradients, inputs, strict=True))


def _forward_fake(x, dt, A, B_in, C_out, initial_state, resets, chunk, triton):
    B, T, _ = x.shape
    return A.new_empty(x.shape), A.new_empty(A.shape), A.new_empty(B, -(-T // chunk), *A.shape[1:])


def _backward_fake(dy, dstate, x, dt, A, B_in, C_out, boundaries, resets, chunk, triton):
    return tuple(y.new_empty(y.shape) for y in (x, dt, A, B_in, C_out, A))


_scan = operator(
    "selective_scan",
    _forward,
    _backward,
    outputs=("y", "state", "boundaries"),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
)
