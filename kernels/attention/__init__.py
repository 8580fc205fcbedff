"""Causal softmax attention, the operator of the attention mixer (Vaswani et al., arXiv 1706.03762).

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K key width, P value width.
"""

import torch.nn.functional as F
from torch import Tensor

from mixerlab.kernels.attention.flex import attention_flex, why_not_flex
from mixerlab.kernels.attention.reference import attention_reference, visible
from mixerlab.kernels.backend import choose

__all__ = ["causal_attention"]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    window: int | None = None,
    selected: Tensor | None = None,
    *,
    positions: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over the visible past and the position itself, with logits <q, k> / sqrt(K).

    Visible to a query at i are keys at j in (i - window, i], of i's own segment; of those, if `selected` is given, the
    selected ones and the one at i.

    Args:
        q: queries (B, H, T, K).
        k: keys (B, G, S, K), G dividing H: group h // (H / G) is that of head h.
        v: values (B, G, S, P).
        segment_ids: (B, T) int64, non-decreasing in each row; nothing flows between segments. Not together with
            `positions`.
        window: how many positions a query sees, itself included; None means the whole past.
        selected: (B, S) bool; None means all.
        positions: those of queries (B, T) and of keys (B, S), int64; a key below 0 is none, and a query must see at
            least one. None: S = T, and both are 0 to T - 1.
        backend: "auto", "sdpa" (torch's scaled_dot_product_attention), "flex" (torch's flex_attention, on CUDA) or
            "reference". By "auto" no T x T mask is made on CUDA where "flex" can take the input.

    Returns:
        (B, H, T, P) in the dtype of v.

    Raises:
        ValueError: the backend cannot take the input, or arguments exclude each other.
    """
    if segment_ids is not None and positions is not None:
        raise ValueError("segment_ids and positions exclude each other: positions are of one segment")
    masked = positions is not None or segment_ids is not None or selected is not None
    masked |= window is not None and window < q.shape[2]
    unfit = why_not_flex(q, k, v, positions)
    by_flex = masked and unfit is None and backend == "auto"
    name = choose(
        "causal_attention",
        backend,
        {
            "sdpa": lambda: "it would hold a T x T mask on the GPU, and flex does not" if by_flex else None,
            "flex": lambda: unfit,
            "reference": lambda: None,
        },
    )
    if name == "flex":
        return attention_flex(q, k, v, segment_ids, window, selected)
    if name == "reference":
        return attention_reference(q, k, v, visible(q, segment_ids, window, selected, positions))
    mask = visible(q, segment_ids, window, selected, positions) if masked else None
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
