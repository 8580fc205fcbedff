"""One new position of feedback attention: attention over the strict past, with nothing to solve.

Letters: B batch, H heads, L past positions, K key width, P value width.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mixerlab.kernels.operator import opaque


def feedback_step(
    q: Tensor,
    k_past: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor,
    past_length: Tensor | None,
    scale: float,
    accumulate: torch.dtype,
    return_lse: bool,
    *,
    by_kernels: bool,
) -> tuple[Tensor, Tensor | None]:
    """s = f + gamma * alpha s_past with alpha the softmax of scale * <q, k_past> over the valid positions.

    The cache is read in place, not copied: by the Triton kernels, which have no gradient, always; by torch's
    attention where its dtypes agree.

    Args:
        q: (B, H, 1, K). k_past: (B, H, L, K). f: (B, H, 1, P). gamma: (B, H, 1). s_past: (B, H, L, P).
        past_length: (B,) int64, how many of the L are valid, or None for all.
        accumulate: dtype of gain and sum; of the softmax too by torch's attention in inputs of that dtype.
        by_kernels: by the Triton kernels, unless a gradient is wanted.

    Returns:
        s (B, H, 1, P) in f's dtype, and the log-sum-exp (B, H, 1) of the valid logits if asked for.
    """
    if by_kernels and not (
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_past, f, gamma, s_past))
    ):
        s, lse = step_fused(q, k_past, f, gamma, s_past, past_length, scale)
        return s, lse if return_lse else None
    gain = gamma.to(accumulate)[..., None]  # (B, H, 1, 1)
    visible = nothing = None
    if past_length is not None:
        length = past_length[:, None, None, None]  # (B, 1, 1, 1)
        nothing = length == 0
        # A row that sees nothing attends to column 0, for a softmax without NaN, with gain 0.
        visible = torch.arange(k_past.shape[2], device=q.device) < length.clamp_min(1)  # (B, 1, 1, L)
        gain = gain.masked_fill(nothing, 0.0)
    dtype = torch.promote_types(k_past.dtype, s_past.dtype)
    attended = scaled_dot_product_attention(
        q.to(dtype), k_past.to(dtype), s_past.to(dtype), attn_mask=visible, scale=scale
    )  # (B, H, 1, P)
    # The gain comes last, in `accumulate`: as a bf16 weight, 0.999 would round to 1.
    s = (f.to(accumulate) + gain * attended.to(accumulate)).to(f.dtype)

    lse = None
    if return_lse:
        logits = (q.to(dtype) @ k_past.to(dtype).mT).detach().to(accumulate) * scale  # (B, H, 1, L)
        if visible is not None and nothing is not None:
            logits = logits.masked_fill(~visible | nothing, float("-inf"))
        lse = logits.logsumexp(-1)  # (B, H, 1)
    return s, lse


def _by_kernels(
    q: Tensor,
    k_past: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor,
    past_length: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from mixerlab.kernels.feedback.triton.decode import feedback_decode  # here: triton need not be installed

    return feedback_decode(q, k_past, f, gamma, s_past, past_length, scale)


def _fake(q, k_past, f, gamma, s_past, past_length, scale):
    return f.new_empty(f.shape), gamma.new_empty(gamma.shape, dtype=torch.float32)


step_fused = opaque("feedback_triton_step", _by_kernels, _fake)
"""As `feedback_step`, by the kernels: an opaque operator, so that torch.compile sees one call."""
