"""DeltaFormer: attention over values that the delta rule has corrected (Zhong et al., arXiv 2505.19488).

Letters: B batch, T time (new positions), S cached slots, D model width, H query heads, G key-value heads,
K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.kernels.attention import causal_attention
from mixerlab.kernels.feedback import feedback_attention
from mixerlab.mixers.attention import Attention, AttentionConfig, head_problems, rotary_positions
from mixerlab.mixers.kv_cache import AttentionState
from mixerlab.mixers.mixer import check_room
from mixerlab.mixers.registry import register_mixer
from mixerlab.options import option


@dataclass
class DeltaFormerConfig:
    n_heads: int | None = option(None, "query heads; null: as many as `attention` would have", min=1)
    n_kv_heads: int | None = option(None, "key and value heads, shared by groups; null: n_heads", min=1)
    rope: bool = option(True, "rotate queries and keys by position (RoPE)")
    qk_norm: bool = option(False, "RMS-normalise queries and keys per head")
    backend: Literal["auto", "triton", "chunked", "reference"] = option("auto", "of the feedback operator")

    def problems(self, d_model: int) -> Iterator[tuple[str, str]]:
        yield from head_problems(d_model, self.n_heads, self.n_kv_heads, self.rope)


@register_mixer("deltaformer", DeltaFormerConfig)
class DeltaFormer(Attention):
    """u_t = v_t - beta_t sum_{j<t} softmax(k_t k_j) u_j, then o_t = sum_{j<=t} softmax(q_t k_j) u_j.

    The delta rule with the softmax as kernel: a position takes back, by its share beta_t, what its own key finds
    among the earlier values, before it adds its own. The first line is Sessa's recursion with gain -beta and the
    keys as queries. Both softmaxes have scale K^-1/2 and see the same rotated keys. beta_t = sigmoid(<x_t, w> + b)
    per key-value head: below 1, so that u stays bounded. Decoding keeps k and u, no more than attention does.
    """

    def __init__(self, config: DeltaFormerConfig, d_model: int, layer_index: int = 0, n_layers: int = 1):
        attention = AttentionConfig(
            config.n_heads, config.n_kv_heads, rope=config.rope, qk_norm=config.qk_norm
        )
        super().__init__(attention, d_model, layer_index, n_layers)
        self.backend = config.backend
        self.beta_proj = nn.Linear(d_model, self.n_kv_heads)

    def _beta(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, G, T), at least float32: in bf16 it would round to 1 too soon."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.beta_proj.weight.to(dtype), self.beta_proj.bias.to(dtype))
        return logits.sigmoid().transpose(1, 2)

    def _corrected(self, x: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """u (B, G, T, K)."""
        w = k.view_as(k)  # a view: torch.compile refuses the same tensor twice
        return feedback_attention(w, k, v, -self._beta(x), backend=self.backend, **options)

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        q, k, v = self._project(x, rotary_positions(x, segment_ids))  # (B, H, T, K), (B, G, T, K) twice
        u = self._corrected(x, k, v, segment_ids=segment_ids)
        return self._merge(causal_attention(q, k, u, segment_ids))

    @torch.no_grad()
    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """As every mixer's, per query head: the attention weights times what the correction leaves of `values`."""
        q, k, _ = self._project(x, rotary_positions(x, segment_ids))
        columns = values[:, None].expand(-1, k.shape[1], -1, -1)  # (B, G, T, C)
        return self._attend(q, k, self._corrected(x, k, columns, segment_ids=segment_ids), segment_ids)

    def extend(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """As every mixer's; `state.v` holds u."""
        new = x.shape[1]
        check_room(state.longest, new, state.max_len)
        positions = state.length[:, None] + torch.arange(new, device=x.device)  # (B, T)
        q, k, v = self._project(x, positions)
        past = {"past": (state.k, state.v), "past_length": state.length, "past_longest": state.longest}
        u = self._corrected(x, k, v, **past)
        after = state.advanced(new)
        if new > 1 and state.longest == 0:  # the whole past is in x: no mask over cached slots needed
            y = causal_attention(q, k, u)
            state.write(k, u, positions, None)
        else:
            k, u, keys_at, _ = state.take(k, u, positions, None)
            y = causal_attention(q, k, u, positions=(positions, keys_at))
        return self._merge(y), after

    def flops(self, seq_len: int) -> int:
        # The attention's count has every projection; the correction adds logits and update, a causal half each.
        return super().flops(seq_len) + 2 * seq_len * seq_len * self.n_kv_heads * self.head_dim

    @torch.no_grad()
    def diagnostics(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        return {"beta": self._beta(x)}
