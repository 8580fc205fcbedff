"""The gated delta rule by chunks: a triangular solve and matrix products inside each, a short recurrence between them.

The WY form of Yang et al. (arXiv 2412.06464, section 3.3). With G_i the sum of the log decays from the chunk's first
position to i, and S the state before the chunk, position i adds u_i k_i^T to the state, where

    u_i = beta_i (v_i - exp(G_i) S k_i - sum_{j < i} exp(G_i - G_j) <k_i, k_j> u_j).

This is a unit triangular system. Solved for the values and for the keys it gives U = U' - W S^T, and with it

    y_i = exp(G_i) S q_i + sum_{j <= i} exp(G_i - G_j) <q_i, k_j> u_j,
    S'  = exp(G_Q) S + sum_j exp(G_Q - G_j) u_j k_j^T        the state after the chunk, linear in S.

No exponent is positive: nothing is divided by a decay.

Letters: B batch, T time, H heads, K key width, P value width; M chunks of Q positions.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixerlab.kernels.decays import decays

_CHUNK = 64


def gated_delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    accumulate: torch.dtype,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """As `gated_delta_rule_reference`, with memory T * (P + K + Q + P K / Q) per head.

    All that makes the state has `accumulate`, for an error in it would grow from chunk to chunk; the products that
    read it have the dtype of their operands.
    """
    B, T, H, K = q.shape
    P = v.shape[3]
    Q = min(_CHUNK if chunk_size is None else chunk_size, T)
    dtype = torch.promote_types(v.dtype, torch.promote_types(q.dtype, k.dtype))

    def chunks(x: Tensor) -> Tensor:
        """(B, T, H, ...) -> (B, M, H, Q, ...). Zeros fill the last chunk: with a beta of 0 they change no state."""
        if T % Q:
            x = pad(x, (0, 0) * (x.ndim - 2) + (0, Q - T % Q))
        return x.unflatten(1, (-1, Q)).transpose(2, 3)

    keys, values = chunks(k).to(accumulate), chunks(v).to(accumulate)  # (B, M, H, Q, K), (B, M, H, Q, P)
    gain = chunks(beta).to(accumulate)[..., None]  # (B, M, H, Q, 1)
    exponent = chunks(log_decay).double()  # (B, M, H, Q)
    total = exponent.cumsum(-1)  # (B, M, H, Q)
    entering = total.to(accumulate).exp()  # from before the chunk to its positions
    leaving = (total[..., -1:] - total).to(accumulate).exp()  # from its positions to its end
    ids = None
    if segment_ids is not None:
        last = segment_ids[:, -1:].expand(-1, -T % Q)
        ids = torch.cat((segment_ids, last), dim=1).unflatten(1, (-1, Q))  # (B, M, Q)
        # The segment that the state at the start of each chunk and at the end of the last belongs to.
        before = torch.cat((ids[:, :1, 0], ids[:, :, -1]), dim=1)  # (B, M + 1)
        entering = entering.masked_fill((ids != before[:, :-1, None])[:, :, None], 0.0)
        leaving = leaving.masked_fill((ids != before[:, 1:, None])[:, :, None], 0.0)

    # What each chunk adds to the state, and what it leaves of the one before.
    weights = decays(exponent, ids, accumulate)  # (B, M, H, Q, Q)
    wanted = gain * torch.cat((values, entering[..., None] * keys), dim=-1)  # (B, M, H, Q, P + K)
    # The solver reads what lies strictly below the diagonal and takes the diagonal for 1.
    system = gain * weights * (keys @ keys.mT)  # (B, M, H, Q, Q)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    new, erased = solved.split((P, K), dim=-1)  # U' (B, M, H, Q, P) and W (B, M, H, Q, K)
    kept = leaving[..., None] * keys  # (B, M, H, Q, K)
    added = new.mT @ kept  # (B, M, H, P, K)
    identity = torch.eye(K, dtype=accumulate, device=q.device)
    transition = entering[..., -1:, None] * identity - erased.mT @ kept  # (B, M, H, K, K)

    state = added.new_zeros(B, H, P, K) if initial_state is None else initial_state.to(accumulate)
    states = []
    for through, entered in zip(transition.unbind(1), added.unbind(1), strict=True):
        states.append(state)
        state = state @ through + entered  # (B, H, P, K)
    carried = torch.stack(states, dim=1)  # (B, M, H, P, K), the states before the chunks

    queries = chunks(q).to(dtype)  # (B, M, H, Q, K)
    corrected = (new - erased @ carried.mT).to(dtype)  # U (B, M, H, Q, P)
    scores = (weights * (queries @ keys.to(dtype).mT)).to(dtype)  # (B, M, H, Q, Q)
    past = entering[..., None] * (queries @ carried.to(dtype).mT)  # (B, M, H, Q, P)
    y = (scores @ corrected + past).to(v.dtype)  # (B, M, H, Q, P)
    return y.transpose(2, 3).flatten(1, 2)[:, :T], state
