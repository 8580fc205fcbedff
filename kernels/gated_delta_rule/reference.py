"""The gated delta rule by its definition: one step of the recurrence after another.

Letters: B batch, T time, H heads, K key width, P value width.
"""

import torch
from torch import Tensor


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    accumulate: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + beta_t (v_t - a_t S_{t-1} k_t) k_t^T and y_t = S_t q_t, all in `accumulate`.

    a_t = exp(log_decay_t). What is found, added and read are matrix products, so that torch's counter sees the
    6 T H P K FLOPs that the recurrence takes.

    Returns:
        y (B, T, H, P) in v's dtype; the last state (B, H, P, K) in `accumulate`.
    """
    B, T, H, K = q.shape
    queries, keys, values = (x.to(accumulate)[..., None] for x in (q, k, v))  # (B, T, H, K or P, 1)
    gain = beta.to(accumulate)[..., None, None]  # (B, T, H, 1, 1)
    decay = log_decay.to(accumulate).exp()  # (B, T, H)
    if segment_ids is not None:
        starts = segment_ids[:, 1:] != segment_ids[:, :-1]  # (B, T - 1)
        decay = torch.cat((decay[:, :1], decay[:, 1:].masked_fill(starts[..., None], 0.0)), dim=1)

    state = values.new_zeros(B, H, v.shape[3], K) if initial_state is None else initial_state.to(accumulate)
    outputs = []
    for t in range(T):
        state = decay[:, t, :, None, None] * state  # (B, H, P, K)
        new = gain[:, t] * (values[:, t] - state @ keys[:, t])  # (B, H, P, 1)
        state = state + new @ keys[:, t].mT
        outputs.append((state @ queries[:, t])[..., 0])  # (B, H, P)
    return torch.stack(outputs, dim=1).to(v.dtype), state
