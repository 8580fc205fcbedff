"""Feedback attention by its definition: the whole matrix, one triangular solve, autograd.

Letters: B batch, H heads, T new positions, L past positions, S = L + T columns, K key width, P value width.
"""

import torch
from torch import Tensor


def feedback_reference(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor | None,
    ids: Tensor | None,
    scale: float,
    accumulate: torch.dtype,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Solve (I - B) s = f with B = gamma * alpha (arXiv 2604.18580), holding alpha (B, H, T, S).

    The logits are rounded to q's dtype; softmax, gain and solve are in `accumulate`.

    Args:
        q: (B, H, T, K). k: (B, H, S, K), past first. f: (B, H, T, P). gamma: (B, H, T).
        s_past: (B, H, L, P), or None where L = 0.
        ids: (B, S), or None: row t sees column c < L + t only where ids[L + t] == ids[c].

    Returns:
        s (B, H, T, P) in f's dtype, and the log-sum-exp (B, H, T) of the visible logits if asked for.
    """
    B, H, T, _ = q.shape
    S = k.shape[2]
    L = S - T
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(L - 1)  # (T, S)
    if ids is not None:
        visible = visible & (ids[:, None, L:, None] == ids[:, None, None, :])  # (B, 1, T, S)
    empty = ~visible.any(-1)  # (T,) or (B, 1, T)

    # baddbmm scales inside the product: one rounding, no pass over the T x S logits of its own.
    q, k = q.flatten(0, 1), k.flatten(0, 1)  # (B * H, T, K), (B * H, S, K)
    logits = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=scale).unflatten(0, (B, H))  # (B, H, T, S)
    # A finite fill keeps empty rows free of NaN, forward and backward. Their softmax is then uniform
    # over what they must not see, so their gain is 0.
    logits = logits.masked_fill_(~visible, torch.finfo(logits.dtype).min)
    alpha = logits.softmax(-1, dtype=accumulate)
    gain = gamma.to(accumulate).masked_fill(empty, 0.0)[..., None]  # (B, H, T, 1)

    rhs = f.to(accumulate)
    if s_past is not None:
        rhs = rhs + gain * (alpha[..., :L] @ s_past.to(accumulate))
        alpha = alpha[..., L:]  # (B, H, T, T)
    # The solver reads what lies strictly below the diagonal and takes the diagonal for 1.
    s = torch.linalg.solve_triangular(-gain * alpha, rhs, upper=False, unitriangular=True)

    lse = None
    if return_lse:
        lse = logits.detach().to(accumulate).logsumexp(-1).masked_fill(empty, float("-inf"))
    return s.to(f.dtype), lse
