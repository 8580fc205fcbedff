"""The selective scan on CUDA: one program per sequence and tile of channels walks over time, its states in registers.

The forward pass saves the states before each chunk of positions. The backward pass goes through the chunks from the
last to the first: it computes a chunk's states again into a scratch buffer, small enough to stay in the cache, then
walks back over them. Gradients that sum over channels (those of B and C) leave each program as partial sums, which
are added up afterwards: the result does not depend on the order in which programs finish.

Letters: B batch, T time, D channels, N state size per channel, BD and BN the tile of them that a program holds, M
positions of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 16
"""Channels per program: few, so that there are enough programs, and their states fit into the registers."""


def chunk_length(D: int, N: int, device: torch.device) -> int:
    """Positions per chunk; saved states take 1 / chunk of what all would."""
    return 64


def launch_options(N: int) -> dict[str, int]:
    """The tile of a program, and warps enough that its states leave registers free: 4 or 8 of them per thread."""
    BN = triton.next_power_of_2(N)
    elements = BLOCK_D * BN
    return {"BD": BLOCK_D, "BN": BN, "num_warps": 1 if elements <= 256 else min(elements // 128, 16)}


def scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.scan_forward`."""
    B, T, D = x.shape
    N = A.shape[-1]
    inputs = [y.contiguous() for y in (x, dt, A, B_in, C_out, initial_state)]
    y = A.new_empty(B, T, D)
    state = A.new_empty(B, D, N)
    boundaries = A.new_empty(B, triton.cdiv(T, chunk), D, N)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(D, BLOCK_D), B)](
            *inputs,
            _bytes(resets, x),
            y,
            state,
            boundaries,
            T,
            D,
            N=N,
            M=chunk,
            HAS_RESETS=resets is not None,
            **launch_options(N),
        )
    return y, state, boundaries


def scan_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `chunked.scan_backward`."""
    B, T, D = x.shape
    N = A.shape[-1]
    tiles = triton.cdiv(D, BLOCK_D)
    inputs = [y.contiguous() for y in (dy, dh, x, dt, A, B_in, C_out, boundaries)]
    dx, ddt = A.new_empty(B, T, D), A.new_empty(B, T, D)
    dA, dh0 = A.new_empty(B, D, N), A.new_empty(B, D, N)
    dB, dC = A.new_empty(tiles, B, T, N), A.new_empty(tiles, B, T, N)
    scratch = A.new_empty(B, min(chunk, T), D, N)
    with torch.cuda.device_of(x):
        backward_kernel[(tiles, B)](
            *inputs,
            _bytes(resets, x),
            scratch,
            dx,
            ddt,
            dA,
            dB,
            dC,
            dh0,
            T,
            D,
            N=N,
            M=chunk,
            HAS_RESETS=resets is not None,
            **launch_options(N),
        )
    return dx, ddt, dA, dB.sum(0), dC.sum(0), dh0


def _bytes(resets: Tensor | None, x: Tensor) -> Tensor:
    """`resets` as bytes, or any tensor where there is none: the kernel does not read it then."""
    return x if resets is None else resets.contiguous().view(torch.uint8)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x,  # (B, T, D)
    dt,  # (B, T, D)
    A,  # (B, D, N)
    B_in,  # (B, T, N)
    C_out,  # (B, T, N)
    initial_state,  # (B, D, N)
    resets,  # (B, T)
    y,  # (B, T, D)
    state,  # (B, D, N)
    boundaries,  # (B, ceil(T / M), D, N)
    T,
    D,
    N: tl.constexpr,
    M: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)  # (BD,)
    n = tl.arange(0, BN)  # (BN,)
    tile = d[:, None] * N + n[None, :]  # (BD, BN)
    inside = (d < D)[:, None] & (n < N)[None, :]  # (BD, BN)
    dtype = A.dtype.element_ty

    rate = tl.load(A + row * D * N + tile, mask=inside, other=0.0)  # (BD, BN)
    h = tl.load(initial_state + row * D * N + tile, mask=inside, other=0.0)  # (BD, BN)
    n_chunks = tl.cdiv(T, M)
    for chunk in range(n_chunks):
        tl.store(boundaries + (row * n_chunks + chunk) * D * N + tile, h, mask=inside)
        for t in range(chunk * M, tl.minimum(T, chunk * M + M)):
            at = row * T + t
            x_t = tl.load(x + at * D + d, mask=d < D, other=0.0).to(dtype)  # (BD,)
            dt_t = tl.load(dt + at * D + d, mask=d < D, other=0.0).to(dtype)  # (BD,)
            B_t = tl.load(B_in + at * N + n, mask=n < N, other=0.0).to(dtype)  # (BN,)
            C_t = tl.load(C_out + at * N + n, mask=n < N, other=0.0).to(dtype)  # (BN,)
            decay = tl.exp(dt_t[:, None] * rate)  # (BD, BN)
            if HAS_RESETS:
                decay = tl.where(tl.load(resets + at) != 0, 0.0, decay)
            h = decay * h + (dt_t * x_t)[:, None] * B_t[None, :]
            tl.store(y + at * D + d, tl.sum(h * C_t[None, :], axis=1), mask=d < D)
    tl.store(state + row * D * N + tile, h, mask=inside)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy,  # (B, T, D)
    dh,  # (B, D, N)
    x,  # (B, T, D)
    dt,  # (B, T, D)
    A,  # (B, D, N)
    B_in,  # (B, T, N)
    C_out,  # (B, T, N)
    boundaries,  # (B, ceil(T / M), D, N)
    resets,  # (B, T)
    scratch,  # (B, min(M, T), D, N): the states before each position of a chunk
    dx,  # (B, T, D)
    ddt,  # (B, T, D)
    dA,  # (B, D, N)
    dB,  # (ceil(D / BD), B, T, N)
    dC,  # (ceil(D / BD), B, T, N)
    dh0,  # (B, D, N)
    T,
    D,
    N: tl.constexpr,
    M: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)  # (BD,)
    n = tl.arange(0, BN)  # (BN,)
    tile = d[:, None] * N + n[None, :]  # (BD, BN)
    inside = (d < D)[:, None] & (n < N)[None, :]  # (BD, BN)
    dtype = A.dtype.element_ty
    partial = (
        tl.program_id(0).to(tl.int64) * tl.num_programs(1) + row
    ) * T  # this program's rows of dB and dC

    rate = tl.load(A + row * D * N + tile, mask=inside, other=0.0)  # (BD, BN)
    carry = tl.load(
        dh + row * D * N + tile, mask=inside, other=0.0
    )  # (BD, BN): decay times g of position t + 1
    rate_grad = tl.zeros((BD, BN), dtype)
    n_chunks = tl.cdiv(T, M)
    saved = scratch + row * tl.minimum(M, T) * D * N + tile  # (BD, BN)
    for back in range(n_chunks):
        chunk = n_chunks - 1 - back
        start = chunk * M
        stop = tl.minimum(T, start + M)
        h = tl.load(boundaries + (row * n_chunks + chunk) * D * N + tile, mask=inside, other=0.0)  # (BD, BN)
        tl.debug_barrier()  # the states of the chunk before have been read
        for t in range(start, stop):
            at = row * T + t
            tl.store(saved + (t - start) * D * N, h, mask=inside)
            x_t = tl.load(x + at * D + d, mask=d < D, other=0.0).to(dtype)  # (BD,)
            dt_t = tl.load(dt + at * D + d, mask=d < D, other=0.0).to(dtype)  # (BD,)
            B_t = tl.load(B_in + at * N + n, mask=n < N, other=0.0).to(dtype)  # (BN,)
            decay = tl.exp(dt_t[:, None] * rate)  # (BD, BN)
            if HAS_RESETS:
                decay = tl.where(tl.load(resets + at) != 0, 0.0, decay)
            h = decay * h + (dt_t * x_t)[:, None] * B_t[None, :]
        tl.debug_barrier()  # what other threads stored is there to be read
        for behind in range(stop - start):
            t = stop - 1 - behind
            at = row * T + t
            x_t = tl.load(x + at * D + d, mask=d < D, other=0.0).to(dtype)  # (BD,)
            dt_t = tl.load(dt + at * D + d, mask=d < D, other=0.0).to(dtype)  # (BD,)
            dy_t = tl.load(dy + at * D + d, mask=d < D, other=0.0).to(dtype)  # (BD,)
            B_t = tl.load(B_in + at * N + n, mask=n < N, other=0.0).to(dtype)  # (BN,)
            C_t = tl.load(C_out + at * N + n, mask=n < N, other=0.0).to(dtype)  # (BN,)
            before = tl.load(saved + (t - start) * D * N, mask=inside, other=0.0)  # (BD, BN)
            decay = tl.exp(dt_t[:, None] * rate)  # (BD, BN)
            if HAS_RESETS:
                decay = tl.where(tl.load(resets + at) != 0, 0.0, decay)

            g = carry + dy_t[:, None] * C_t[None, :]  # (BD, BN), the gradient of the state
            tl.store(dC + (partial + t) * N + n, tl.sum(dy_t[:, None] * h, axis=0), mask=n < N)
            tl.store(dB + (partial + t) * N + n, tl.sum((dt_t * x_t)[:, None] * g, axis=0), mask=n < N)
            input_grad = tl.sum(g * B_t[None, :], axis=1)  # (BD,), the gradient of dt x
            carry = decay * g
            step_grad = carry * before  # (BD, BN), the gradient of dt A
            rate_grad += step_grad * dt_t[:, None]
            tl.store(dx + at * D + d, input_grad * dt_t, mask=d < D)
            tl.store(ddt + at * D + d, tl.sum(step_grad * rate, axis=1) + input_grad * x_t, mask=d < D)
            h = before
    tl.store(dA + row * D * N + tile, rate_grad, mask=inside)
    tl.store(dh0 + row * D * N + tile, carry, mask=inside)
