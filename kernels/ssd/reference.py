"""SSD by its definition: one step of the recurrence after another.

Letters: B batch, T time, H heads, G groups that share B_in and C_out, P head dim, N state size.
"""

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    accumulate: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t, all in `accumulate`.

    Both terms are matrix products, so that torch's counter sees the 4 T H P N FLOPs that the recurrence takes.

    Returns:
        y (B, T, H, P) in x's dtype, without the skip; the last state (B, H, P, N) in `accumulate`.
    """
    B, T, H, P = x.shape
    dt, values = dt.to(accumulate), x.to(accumulate)
    values = (dt[..., None] * values)[..., None]  # (B, T, H, P, 1)
    decay = (dt * A.to(accumulate)).exp()  # (B, T, H)
    if segment_ids is not None:
        starts = segment_ids[:, 1:] != segment_ids[:, :-1]  # (B, T - 1)
        decay = torch.cat((decay[:, :1], decay[:, 1:].masked_fill(starts[..., None], 0.0)), dim=1)
    share = H // B_in.shape[2]
    rows = B_in.to(accumulate).repeat_interleave(share, dim=2)[..., None, :]  # (B, T, H, 1, N)
    columns = C_out.to(accumulate).repeat_interleave(share, dim=2)[..., None]  # (B, T, H, N, 1)

    state = (
        values.new_zeros(B, H, P, B_in.shape[3]) if initial_state is None else initial_state.to(accumulate)
    )
    outputs = []
    for t in range(T):
        state = decay[:, t, :, None, None] * state + values[:, t] @ rows[:, t]  # (B, H, P, N)
        outputs.append((state @ columns[:, t])[..., 0])  # (B, H, P)
    return torch.stack(outputs, dim=1).to(x.dtype), state
