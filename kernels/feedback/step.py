"""One new position by the Triton kernels of decode.py, as an opaque operator: what torch.compile sees is one call.

Letters: B batch, H heads, L past positions, K key width, P value width.
"""

import torch
from torch import Tensor

from mixerlab.kernels.operator import opaque


def _step(
    q: Tensor,
    k_past: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor,
    past_length: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """s (B, H, 1, P) and lse (B, H, 1), arguments as of `feedback_decode`. Without a gradient."""
    from mixerlab.kernels.feedback.decode import feedback_decode  # here: triton need not be installed

    return feedback_decode(q, k_past, f, gamma, s_past, past_length, scale)


def _fake(q, k_past, f, gamma, s_past, past_length, scale):
    return f.new_empty(f.shape), gamma.new_empty(gamma.shape, dtype=torch.float32)


step_fused = opaque("feedback_triton_step", _step, _fake)


def needs_gradient(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
