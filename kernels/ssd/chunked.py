"""SSD by chunks: matrix products inside each, and between them a scan over their states.

The state space dual form (Dao & Gu, arXiv 2405.21060, section 6). With a_t = dt_t A, a position's output is

    y_i = sum_{j <= i in its chunk} exp(a_{j+1} + .. + a_i) <C_i, B_j> dt_j x_j        within the chunk
        + exp(a_first + .. + a_i) C_i h                           h: the state before the chunk

and the states before the chunks are such sums too, over chunks instead of positions.

Letters: B batch, T time, H heads, G groups that share B_in and C_out, P head dim, N state size; M chunks of
Q positions.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixerlab.kernels.decays import decays

_CHUNK = 64
_BRANCH = 32  # chunks that the scan over states puts together at a time


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    accumulate: torch.dtype,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """As `ssd_reference`, with memory T * (P + N + Q) per head. The large products have the dtype of their
    operands; decays and the scan over states have `accumulate`."""
    B, T, H, P = x.shape
    G, N = B_in.shape[2:]
    Q = min(_CHUNK if chunk_size is None else chunk_size, T)
    dtype = torch.promote_types(x.dtype, torch.promote_types(B_in.dtype, C_out.dtype))

    def chunks(y: Tensor) -> Tensor:
        """(B, T, ...) -> (B, M, Q, ...). Zeros fill the last chunk: with steps of 0 they change no state."""
        if T % Q:
            y = pad(y, (0, 0) * (y.ndim - 2) + (0, Q - T % Q))
        return y.unflatten(1, (-1, Q))

    step = chunks(dt).to(accumulate)  # (B, M, Q, H)
    values = (step[..., None] * chunks(x)).to(dtype)  # (B, M, Q, H, P)
    keys = chunks(B_in).to(dtype).transpose(2, 3)  # (B, M, G, Q, N)
    queries = chunks(C_out).to(dtype).transpose(2, 3)  # (B, M, G, Q, N)
    exponent = (step.double() * A.double()).transpose(2, 3)  # (B, M, H, Q)
    ids = before = None
    if segment_ids is not None:
        last = segment_ids[:, -1:].expand(-1, -T % Q)
        ids = torch.cat((segment_ids, last), dim=1).unflatten(1, (-1, Q))  # (B, M, Q)
        # The segment that the state at the start of each chunk and at the end of the last belongs to.
        before = torch.cat((ids[:, :1, 0], ids[:, :, -1]), dim=1)  # (B, M + 1)

    # Positions to later positions of their chunk.
    weights = decays(exponent, ids, accumulate)  # (B, M, H, Q, Q)
    scores = (queries @ keys.mT)[:, :, :, None]  # (B, M, G, 1, Q, Q)
    weights = (weights.unflatten(2, (G, -1)) * scores).to(dtype).flatten(2, 3)  # (B, M, H, Q, Q)
    inside = (weights @ values.transpose(2, 3)).transpose(2, 3)  # (B, M, Q, H, P)

    # Positions to the end of their chunk, and chunks to later chunks.
    total = exponent.cumsum(-1)  # (B, M, H, Q)
    leaving = (total[..., -1:] - total).to(accumulate).exp()  # (B, M, H, Q)
    if ids is not None and before is not None:
        leaving = leaving.masked_fill((ids != before[:, 1:, None])[:, :, None], 0.0)
    weighted = (values * leaving.transpose(2, 3)[..., None]).to(dtype)  # (B, M, Q, H, P)
    weighted = weighted.reshape(B, -1, Q, G, H // G * P).permute(0, 1, 3, 4, 2)  # (B, M, G, H / G * P, Q)
    states = (weighted @ keys).to(accumulate)  # (B, M, G, H / G * P, N)
    states = states.reshape(B, -1, H, P * N).transpose(1, 2)  # (B, H, M, P * N)
    if initial_state is None:
        states = pad(states, (0, 0, 1, 0))  # (B, H, M + 1, P * N)
    else:
        states = torch.cat((initial_state.to(accumulate).reshape(B, H, 1, P * N), states), dim=2)
    states = _scan(pad(total[..., -1].transpose(1, 2), (1, 0)), states, before)  # (B, H, M + 1, P * N)

    # The state before a chunk to its positions.
    entering = states[:, :, :-1].transpose(1, 2).to(dtype)  # (B, M, H, P * N)
    entering = entering.reshape(B, -1, G, H // G * P, N)
    carried = (queries @ entering.mT).transpose(2, 3).reshape(values.shape)  # (B, M, Q, H, P)
    decay = total.to(accumulate).exp()  # (B, M, H, Q)
    if ids is not None and before is not None:
        decay = decay.masked_fill((ids != before[:, :-1, None])[:, :, None], 0.0)
    y = inside + carried * decay.transpose(2, 3)[..., None]  # (B, M, Q, H, P)
    return y.to(x.dtype).flatten(1, 2)[:, :T], states[:, :, -1].unflatten(-1, (P, N))


def _scan(exponent: Tensor, states: Tensor, ids: Tensor | None) -> Tensor:
    """s_m = exp(exponent_m) s_{m-1} + states_m, from s = 0 before the first and anew in each segment.

    Products over blocks of `_BRANCH` chunks, then over blocks of blocks: linear in M.

    Args:
        exponent: (B, H, M) float64. states: (B, H, M, S). ids: (B, M), the segment of each state, or None.

    Returns:
        (B, H, M, S).
    """
    M = states.shape[2]
    branch = M if M <= 2 * _BRANCH else _BRANCH
    fill = -M % branch
    blocks = pad(states, (0, 0, 0, fill)).unflatten(2, (-1, branch))  # (B, H, K, R, S)
    exponent = pad(exponent, (0, fill)).unflatten(2, (-1, branch))  # (B, H, K, R)
    if ids is not None:
        ids = torch.cat((ids, ids[:, -1:].expand(-1, fill)), dim=1).unflatten(1, (-1, branch))  # (B, K, R)
    weights = decays(exponent.transpose(1, 2), ids, states.dtype)  # (B, K, H, R, R)
    inside = weights.transpose(1, 2) @ blocks  # (B, H, K, R, S)
    if branch == M:
        return inside[:, :, 0]  # (B, H, M, S)

    total = exponent.cumsum(-1)  # (B, H, K, R)
    ends = _scan(total[..., -1], inside[..., -1, :], None if ids is None else ids[..., -1])  # (B, H, K, S)
    decay = total[:, :, 1:].to(states.dtype).exp()  # (B, H, K - 1, R)
    if ids is not None:
        decay = decay.masked_fill((ids[:, 1:] != ids[:, :-1, -1:])[:, None], 0.0)
    carried = decay[..., None] * ends[:, :, :-1, None]  # (B, H, K - 1, R, S)
    return (inside + pad(carried, (0, 0, 0, 0, 1, 0))).flatten(2, 3)[:, :, :M]  # (B, H, M, S)
