"""The selective scan as one differentiable operator over its chunked and Triton forms.

Both passes are opaque operators: torch.compile and torch.func see one call each, and apply the backward and vmap
rules registered here instead of tracing the loops.
"""

import torch
from torch import Tensor

from mixerlab.kernels.selective_scan import chunked


class _Scan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, dt, A, B_in, C_out, initial_state, resets, chunk, triton):
        return _forward(x, dt, A, B_in, C_out, initial_state, resets, chunk, triton)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, dt, A, B_in, C_out, _, resets, ctx.chunk, ctx.triton = inputs
        boundaries = output[2]
        ctx.mark_non_differentiable(boundaries)
        ctx.save_for_backward(x, dt, A, B_in, C_out, boundaries, resets)

    @staticmethod
    def backward(ctx, dy, dh, _):
        gradients = _ScanBackward.apply(dy, dh, *ctx.saved_tensors, ctx.chunk, ctx.triton)
        return *gradients, None, None, None


class _ScanBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that differentiating them raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, dh, x, dt, A, B_in, C_out, boundaries, resets, chunk, triton):
        return _backward(dy, dh, x, dt, A, B_in, C_out, boundaries, resets, chunk, triton)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("the selective scan has a second derivative only with backend='reference'")


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
    y, state, _ = _Scan.apply(x, dt, A, B_in, C_out, initial_state.to(accumulate), resets, chunk, triton)
    return y, state


@torch.library.custom_op("mixerlab::selective_scan_forward", mutates_args=())
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
    with torch.autocast(x.device.type, enabled=False):
        return _passes(triton).scan_forward(x, dt, A, B_in, C_out, initial_state, resets, chunk)


@torch.library.custom_op("mixerlab::selective_scan_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dh: Tensor,
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
    with torch.autocast(x.device.type, enabled=False):
        gradients = _passes(triton).scan_backward(dy, dh, x, dt, A, B_in, C_out, boundaries, resets, chunk)
    inputs = (x, dt, A, B_in, C_out, dh)
    return tuple(gradient.to(y.dtype) for gradient, y in zip(gradients, inputs, strict=True))


def _passes(triton: bool):
    """The module that holds `scan_forward` and `scan_backward`."""
    if triton:
        from mixerlab.kernels.selective_scan import triton as kernels  # here: triton need not be installed

        return kernels
    return chunked


@_forward.register_fake
def _(x, dt, A, B_in, C_out, initial_state, resets, chunk, triton):
    B, T, _ = x.shape
    return A.new_empty(x.shape), A.new_empty(A.shape), A.new_empty(B, -(-T // chunk), *A.shape[1:])


@_backward.register_fake
def _(dy, dh, x, dt, A, B_in, C_out, boundaries, resets, chunk, triton):
    return tuple(y.new_empty(y.shape) for y in (x, dt, A, B_in, C_out, dh))


def _vmap_rule(op):
    """Folds the mapped dimension of size V into the batch: (V, B, ...) -> (V * B, ...)."""

    def rule(info, in_dims, *args):
        def fold(x, dim):
            if not isinstance(x, Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        outputs = op(*map(fold, args, in_dims))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)

    return rule


_forward.register_vmap(_vmap_rule(_forward))
_backward.register_vmap(_vmap_rule(_backward))
