"""The selective scan by chunks of time: a two-level scan inside each, states kept at the chunks' boundaries.

With the decay a_t = exp(dt_t A) and the input u_t = dt_t x_t B_t, both (D, N) per position,

    forward, first chunk to last:   h_t = a_t h_{t-1} + u_t;         y_t = <C_t, h_t>
    backward, last chunk to first:  g_t = a_{t+1} g_{t+1} + C_t dy_t

and g is the gradient of u, g_t h_{t-1} a_t that of dt_t A. The backward pass computes the states of a chunk
again from the one before it. Decays are multiplied and never divided by, so a product that underflows is a past
that is forgotten, and nothing overflows however long the sequence or large the steps.

Letters: B batch, T time, D channels, N state size per channel, M positions of a chunk, R rows and L positions per
row of a chunk seen as a matrix.
"""

from itertools import pairwise
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_length(D: int, N: int, device: torch.device) -> int:
    """Positions per chunk, a square: as many as keep a (M, D, N) tensor near the caches of the device."""
    elements = 2**18 if device.type == "cpu" else 2**22
    return min(max(isqrt(elements // (D * N)), 4), 32) ** 2


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
    """The recurrence, with what `scan_backward` needs of it.

    Args:
        x, dt, B_in, C_out, resets: as for `selective_scan_reference`.
        A, initial_state: (B, D, N), of the dtype that the states have.
        chunk: positions per chunk, M.

    Returns:
        y (B, T, D), the state after the last position (B, D, N), and the states before each chunk
        (B, ceil(T / M), D, N), all of the states' dtype.
    """
    T = x.shape[1]
    y = A.new_empty(x.shape)
    boundaries = A.new_empty(A.shape[0], -(-T // chunk), *A.shape[1:])  # (B, T / M, D, N)
    h = initial_state
    for index, start in enumerate(range(0, T, chunk)):
        boundaries[:, index] = h
        stop = min(start + chunk, T)
        x_c, dt_c, B_c, C_c, resets_c = _slice(start, stop, A.dtype, x, dt, B_in, C_out, resets)
        decay, states = (
            _decay(dt_c, A, resets_c),
            (dt_c * x_c)[..., None] * B_c[:, :, None],
        )  # (B, M, D, N) each
        states[:, 0].addcmul_(decay[:, 0], h)
        _scan_(decay, states)
        y[:, start:stop] = (states @ C_c[..., None])[:, : stop - start, :, 0]  # (B, M, D)
        h = states[:, stop - start - 1]
    return y, h.clone(), boundaries


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
    """Gradients of x, dt, A, B_in, C_out and initial_state, in the states' dtype.

    Args:
        dy, dh: gradients of the outputs (B, T, D) and of the last state (B, D, N).
        boundaries: as `scan_forward` returned it. The rest as given to `scan_forward`.
    """
    T = x.shape[1]
    dx, ddt = A.new_empty(x.shape), A.new_empty(x.shape)
    dB, dC = A.new_empty(B_in.shape), A.new_empty(C_out.shape)
    dA = torch.zeros_like(A, memory_format=torch.contiguous_format)
    carry = dh  # a_{t+1} g_{t+1} (B, D, N) for the last t of the chunk at hand
    for index, start in reversed(list(enumerate(range(0, T, chunk)))):
        stop = min(start + chunk, T)
        m = stop - start
        x_c, dt_c, B_c, C_c, resets_c, dy_c = _slice(start, stop, A.dtype, x, dt, B_in, C_out, resets, dy)
        decay, states = (
            _decay(dt_c, A, resets_c),
            (dt_c * x_c)[..., None] * B_c[:, :, None],
        )  # (B, M, D, N) each
        states[:, 0].addcmul_(decay[:, 0], boundaries[:, index])
        _scan_(decay.clone(), states)
        dC[:, start:stop] = (dy_c[:, :, None] @ states)[:, :m, 0]  # (B, M, N)

        g = dy_c[..., None] * C_c[:, :, None]  # (B, M, D, N)
        g[:, -1] += carry
        _scan_(decay.roll(-1, dims=1), g, backwards=True)  # the decay rolled past the end meets nothing
        du = (g @ B_c[..., None])[..., 0]  # (B, M, D), the gradient of dt x
        dB[:, start:stop] = ((dt_c * x_c)[:, :, None] @ g)[:, :m, 0]  # (B, M, N)

        carry = decay[:, 0] * g[:, 0]  # (B, D, N)
        decay.mul_(g)
        decay[:, 1:].mul_(states[:, :-1])
        decay[:, 0].mul_(boundaries[:, index])  # now the gradient of dt A
        dA += torch.einsum("bmdn,bmd->bdn", decay, dt_c)
        ddt[:, start:stop] = ((decay * A[:, None]).sum(-1) + du * x_c)[:, :m]
        dx[:, start:stop] = (du * dt_c)[:, :m]
    return dx, ddt, dA, dB, dC, carry.clone()


def _slice(start: int, stop: int, dtype: torch.dtype, *tensors: Tensor | None) -> list:
    """Positions start to stop of each (B, T, ...), padded with zeros to the R L positions that `_scan_` takes.

    A zero step changes no state and adds nothing to any gradient.
    """
    m = stop - start
    R, L = _rows(m)
    padding = (0, 0, 0, R * L - m)
    return [
        None
        if y is None
        else F.pad(y[:, start:stop].to(dtype), padding)
        if y.ndim == 3
        else F.pad(y[:, start:stop], padding[2:])
        for y in tensors
    ]


def _rows(m: int) -> tuple[int, int]:
    """(R, L), about equal, with R L >= m the least of that kind."""
    L = isqrt(m - 1) + 1
    return -(-m // L), L


def _decay(dt: Tensor, A: Tensor, resets: Tensor | None) -> Tensor:
    """exp(dt A) (B, M, D, N), 0 where the past is forgotten."""
    decay = (dt[..., None] * A[:, None]).exp_()
    return decay if resets is None else decay.masked_fill_(resets[..., None, None], 0.0)


def _scan_(decay: Tensor, value: Tensor, backwards: bool = False) -> None:
    """value_t += decay_t * value_{t-1}, one t after another, in place (t+1 if backwards); spoils `decay`.

    The R rows of the chunk go side by side through their L positions, each as if nothing came before it; then the
    last state of each row enters the next. That is R + L steps for R L positions.
    """
    R, L = _rows(value.shape[1])
    decay, value = decay.unflatten(1, (R, L)), value.unflatten(1, (R, L))  # (B, R, L, D, N)
    rows, positions = list(range(R)), list(range(L))
    if backwards:
        rows.reverse()
        positions.reverse()
    for before, t in pairwise(positions):
        value[:, :, t].addcmul_(decay[:, :, t], value[:, :, before])
        decay[:, :, t].mul_(decay[:, :, before])  # the decay since the row's start
    for before, r in pairwise(rows):
        value[:, r].addcmul_(decay[:, r], value[:, before, positions[-1], None])
