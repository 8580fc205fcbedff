"""Causal softmax attention: grouped KV heads, rotary positions, an optional sliding window and QK norm.

Letters: B batch, T time (new positions), S cached slots, D model width, H query heads, G key-value heads,
K head dim. Head-first tensors are (B, H, T, K).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.kernels.attention import causal_attention
from mixerlab.mixers.kv_cache import AttentionState
from mixerlab.mixers.mixer import Mixer, check_room
from mixerlab.mixers.registry import register_mixer
from mixerlab.mixers.rotary import rotate, segment_positions
from mixerlab.options import option


def default_n_heads(d_model: int) -> int:
    """The number of heads whose width is 64, or the next wider even width that divides `d_model`."""
    for n_heads in range(max(1, d_model // 64), 1, -1):
        if d_model % n_heads == 0 and (d_model // n_heads) % 2 == 0:
            return n_heads
    return 1


def head_problems(
    d_model: int, n_heads: int | None, n_kv_heads: int | None, rope: bool, head_dim: int | None = None
) -> Iterator[tuple[str, str]]:
    """What is wrong with a choice of heads, as (option, what would be right)."""
    heads = default_n_heads(d_model) if n_heads is None else n_heads
    if head_dim is not None:
        if rope and head_dim % 2:
            yield "head_dim", "rotary positions need an even width"
    elif d_model % heads:
        divisors = [h for h in range(1, d_model + 1) if d_model % h == 0]
        near = min(divisors, key=lambda h: abs(h - heads))
        yield "n_heads", f"it must divide model.d_model = {d_model}; nearest: {near}"
        return
    elif rope and (d_model // heads) % 2:
        yield "n_heads", f"that makes heads {d_model // heads} wide, and rotary positions need an even width"
    if n_kv_heads is not None and heads % n_kv_heads:
        valid = [h for h in range(1, heads + 1) if heads % h == 0]
        yield "n_kv_heads", f"it must divide n_heads = {heads}; valid: {', '.join(map(str, valid))}"


@dataclass
class AttentionConfig:
    n_heads: int | None = option(
        None, "query heads; null: as many as make heads 64 wide, or the next wider that fit", min=1
    )
    n_kv_heads: int | None = option(
        None, "key and value heads, shared by groups of query heads; null: n_heads", min=1
    )
    head_dim: int | None = option(None, "width of a head; null: d_model / n_heads", min=1)
    rope: bool = option(True, "rotate queries and keys by position (RoPE)")
    rope_dim: int | None = option(
        None, "how many numbers of each head are rotated, the first; null: all of them", min=2
    )
    rope_theta: float = option(10000.0, "base of the rotation's wavelengths", above=1)
    window: int | None = option(
        None, "positions each query sees, itself included; null: the whole past", min=1
    )
    qk_norm: bool = option(False, "RMS-normalise queries and keys per head")
    norm_eps: float = option(1e-6, "epsilon of the norm of queries and keys", above=0)
    bias: bool = option(False, "biases on the query, key and value projections")

    def problems(self, d_model: int) -> Iterator[tuple[str, str]]:
        problems = list(head_problems(d_model, self.n_heads, self.n_kv_heads, self.rope, self.head_dim))
        yield from problems
        if problems or self.rope_dim is None:
            return
        width = self.head_dim or d_model // (self.n_heads or default_n_heads(d_model))
        if self.rope_dim % 2 or self.rope_dim > width:
            yield "rope_dim", f"an even number is needed, at most {width}, the width of a head"


def rotary_positions(x: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Those that rotary embedding takes of x (B, T, D): (1, T), or counted in each segment, (B, T)."""
    if segment_ids is None:
        return torch.arange(x.shape[1], device=x.device)[None]
    return segment_positions(segment_ids)


@register_mixer("attention", AttentionConfig)
class Attention(Mixer):
    """Multi-head causal softmax attention (Vaswani et al., arXiv 1706.03762) with the usual later options.

    RoPE (arXiv 2104.09864), grouped KV heads (arXiv 2305.13245), QK norm (arXiv 2010.04245), sliding window
    (arXiv 2004.05150). Decoding keeps keys and values of the window, or of the whole past without one.
    """

    supports_segments = True
    output_projection: str | None = "out_proj"

    def __init__(self, config: AttentionConfig, d_model: int, layer_index: int = 0, n_layers: int = 1):
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.n_heads = default_n_heads(d_model) if config.n_heads is None else config.n_heads
        self.n_kv_heads = self.n_heads if config.n_kv_heads is None else config.n_kv_heads
        self.head_dim = d_model // self.n_heads if config.head_dim is None else config.head_dim
        self.rope_dim = self.head_dim if config.rope_dim is None else config.rope_dim
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, q_dim, bias=config.bias)
        self.k_proj = nn.Linear(d_model, kv_dim, bias=config.bias)
        self.v_proj = nn.Linear(d_model, kv_dim, bias=config.bias)
        self.out_proj: nn.Module = nn.Linear(q_dim, d_model, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), positions (B or 1, T) -> q (B, H, T, K) and k, v (B, G, T, K)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or G, T, K)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q.to(self.q_norm.weight.dtype)), self.k_norm(k.to(self.k_norm.weight.dtype))
        if self.config.rope:
            q, k = (self._rotate(y, positions) for y in (q, k))
        return q.to(v.dtype), k.to(v.dtype), v

    def _rotate(self, y: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys (B, H or G, T, K), rotated by position."""
        if self.rope_dim == self.head_dim:
            return rotate(y, positions, self.config.rope_theta)
        turned, kept = y.split((self.rope_dim, self.head_dim - self.rope_dim), dim=-1)
        return torch.cat((rotate(turned, positions, self.config.rope_theta), kept), dim=-1)

    def _merge(self, y: Tensor) -> Tensor:
        """Heads (B, H, T, K) -> output (B, T, D)."""
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, segment_ids: Tensor | None = None, selected: Tensor | None = None) -> Tensor:
        """As every mixer's; with `selected` (B, T) bool a position sees, besides itself, the selected alone."""
        q, k, v = self._project(x, rotary_positions(x, segment_ids))
        return self._merge(causal_attention(q, k, v, segment_ids, self.config.window, selected))

    @torch.no_grad()
    def mix_fixed(
        self,
        x: Tensor,
        values: Tensor,
        segment_ids: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> Tensor:
        """As every mixer's, per query head: the attention weights times `values`. `selected` as in `forward`."""
        q, k, _ = self._project(x, rotary_positions(x, segment_ids))
        return self._attend(q, k, values[:, None].expand(-1, k.shape[1], -1, -1), segment_ids, selected)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        values: Tensor,
        segment_ids: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> Tensor:
        """The attention weights times values (B, G, T, C) of any width -> (B, H, T, C)."""
        mixed = []
        for piece in values.to(q.dtype).split(self.head_dim, dim=-1):
            # As wide as the keys: of other widths torch makes the T x T weights.
            padded = F.pad(piece, (0, self.head_dim - piece.shape[-1]))
            y = causal_attention(q, k, padded, segment_ids, self.config.window, selected)  # (B, H, T, K)
            mixed.append(y[..., : piece.shape[-1]])
        return torch.cat(mixed, dim=-1)

    @torch.no_grad()
    def routing(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        every = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)  # (B, T, T)
        return {"attention": Attention.mix_fixed(self, x, every, segment_ids)}

    def _slots(self, max_len: int) -> int:
        return max_len if self.config.window is None else min(self.config.window, max_len)

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> AttentionState:
        shape = (batch_size, self.n_kv_heads, self._slots(max_len), self.head_dim)
        return AttentionState(
            length=torch.zeros(batch_size, dtype=torch.int64, device=device),
            k=torch.zeros(shape, device=device, dtype=dtype),
            v=torch.zeros(shape, device=device, dtype=dtype),
            selected=None,
            max_len=max_len,
        )

    def extend(
        self, x: Tensor, state: AttentionState, selected: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """As every mixer's; `selected` (B, T) as in `forward`, kept in `state.selected`, which must be there."""
        new = x.shape[1]
        check_room(state.longest, new, state.max_len)
        positions = state.length[:, None] + torch.arange(new, device=x.device)  # (B, T)
        q, k, v = self._project(x, positions)
        after = state.advanced(new)
        if new > 1 and state.longest == 0:  # the whole past is in x: no mask over cached slots needed
            y = causal_attention(q, k, v, window=self.config.window, selected=selected)
            state.write(k, v, positions, selected)
        else:
            k, v, keys_at, seen = state.take(k, v, positions, selected)
            y = causal_attention(
                q, k, v, window=self.config.window, selected=seen, positions=(positions, keys_at)
            )
        return self._merge(y), after

    def flops(self, seq_len: int) -> int:
        window = seq_len if self.config.window is None else min(self.config.window, seq_len)
        pairs = seq_len * window - window * (window - 1) // 2  # visible (query, key) pairs
        if window == seq_len:
            pairs = seq_len * seq_len // 2  # the usual count of a causal half
        linear = sum(p.weight.numel() for p in self.children() if isinstance(p, nn.Linear))
        return 2 * seq_len * linear + 2 * 2 * pairs * self.n_heads * self.head_dim

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        return 2 * self.n_kv_heads * self._slots(seq_len) * self.head_dim * dtype.itemsize
