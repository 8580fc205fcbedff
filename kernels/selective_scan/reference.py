"""The selective scan by its definition: one position after another, autograd.

Letters: B batch, T time, D channels, N state size per channel.
"""

import torch
from torch import Tensor


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    accumulate: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = <C_t, h_t> (Gu & Dao, arXiv 2312.00752, Algorithm 2).

    Args:
        x, dt: (B, T, D). A: (D, N). B_in, C_out: (B, T, N). initial_state: (B, D, N).
        resets: (B, T) bool, True where the state before a position is forgotten; None: nowhere.

    Returns:
        y (B, T, D) and the state after the last position (B, D, N), both of dtype `accumulate`.
    """
    x, dt, A, B_in, C_out, h = (y.to(accumulate) for y in (x, dt, A, B_in, C_out, initial_state))
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp()  # (B, D, N)
        if resets is not None:
            decay = decay.masked_fill(resets[:, t, None, None], 0.0)
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * B_in[:, t, None]  # (B, D, N)
        outputs.append((h * C_out[:, t, None]).sum(-1))  # (B, D)
    return torch.stack(outputs, dim=1), h  # (B, T, D), (B, D, N)
