"""Causal softmax attention: grouped KV heads, rotary positions, an optional sliding window and QK norm.

Letters: B batch, T time (new positions), S cached slots, D model width, H query heads, G key-value heads,
K head dim. Head-first tensors are (B, H, T, K).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mixerlab.mixers.mixer import Mixer, State, check_room
from mixerlab.mixers.registry import register_mixer
from mixerlab.options import option


def default_n_heads(d_model: int) -> int:
    """The number of heads whose width is 64, or the next wider even width that divides `d_model`."""
    for n_heads in range(max(1, d_model // 64), 1, -1):
        if d_model % n_heads == 0 and (d_model // n_heads) % 2 == 0:
            return n_heads
    return 1


def head_problems(
    d_model: int, n_heads: int | None, n_kv_heads: int | None, rope: bool
) -> Iterator[tuple[str, str]]:
    """What is wrong with a choice of heads, as (option, what would be right)."""
    heads = default_n_heads(d_model) if n_heads is None else n_heads
    if d_model % heads:
        divisors = [h for h in range(1, d_model + 1) if d_model % h == 0]
        near = min(divisors, key=lambda h: abs(h - heads))
        yield "n_heads", f"it must divide model.d_model = {d_model}; nearest: {near}"
        return
    if rope and (d_model // heads) % 2:
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
    rope: bool = option(True, "rotate queries and keys by position (RoPE)")
    rope_theta: float = option(10000.0, "base of the rotation's wavelengths", above=1)
    window: int | None = option(
        None, "positions each query sees, itself included; null: the whole past", min=1
    )
    qk_norm: bool = option(False, "RMS-normalise queries and keys per head")
    bias: bool = option(False, "biases on the query, key and value projections")

    def problems(self, d_model: int) -> Iterator[tuple[str, str]]:
        yield from head_problems(d_model, self.n_heads, self.n_kv_heads, self.rope)


@dataclass
class AttentionState(State):
    k: Tensor  # (B, G, S, K), rotated; position p lies in slot p mod S
    v: Tensor  # (B, G, S, K)
    selected: Tensor | None  # (B, S) bool, the slots that later positions see; None: all
    max_len: int


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding on interleaved pairs (Su et al., arXiv 2104.09864, eq. 34).

    x (B, H, T, K) with K even; positions (B or 1, T) int64 -> (B, H, T, K) in x's dtype.
    """
    head_dim = x.shape[-1]
    # float32 whatever the model's dtype: the published layer has float32 frequencies, and bf16 positions
    # would collide from 257 on.
    exponents = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim  # (K/2,)
    angles = positions[:, None, :, None].float() / theta**exponents  # (B, 1, T, K/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]  # (B, H, T, K/2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)  # (B, H, T, K)


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Positions counted from 0 within each segment: (B, T) int64 -> (B, T) int64."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)  # (T,)
    first = torch.ones_like(segment_ids, dtype=torch.bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(first, index, 0).cummax(dim=1).values


BLOCK = 128


def block_mask(
    segment_ids: Tensor | None,
    window: int | None,
    time: int,
    device: torch.device,
    selected: Tensor | None = None,
) -> BlockMask:
    """What `flex_attention` needs to know of the visible positions, made without a T x T mask.

    segment_ids (B, T) int64 or None, selected (B, T) bool or None, as in `causal_attention`. Since ids do not
    decrease along a row, their first and last in a block of positions tell whether two blocks share a segment.
    """
    n_blocks = -(-time // BLOCK)
    first = torch.arange(n_blocks, device=device) * BLOCK  # (n,)
    last = (first + BLOCK - 1).clamp(max=time - 1)  # (n,)
    shared = first[:, None] >= first  # (n, n): blocks of queries by blocks of keys
    if window is not None:
        shared = shared & (last > first[:, None] - window)
    if segment_ids is not None:
        shared = shared & (segment_ids[:, last][:, None, :] >= segment_ids[:, first][:, :, None])  # (B, n, n)
    shared = shared.view(-1, 1, n_blocks, n_blocks)

    def visible(b, h, i, j):
        mask = j <= i
        if window is not None:
            mask = mask & (j > i - window)
        if segment_ids is not None:
            mask = mask & (segment_ids[b, i] == segment_ids[b, j])
        if selected is not None:
            mask = mask & (selected[b, j] | (i == j))
        return mask

    return BlockMask.from_kv_blocks(
        shared.sum(-1).int(),
        shared.int().argsort(dim=-1, descending=True, stable=True).int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(time, time),
    )


@lru_cache(maxsize=1)
def _compiled_flex_attention():
    return torch.compile(flex_attention)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None = None,
    window: int | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the visible past and the position itself.

    q (B, H, T, K); k, v (B, G, T, K), G dividing H -> (B, H, T, K). Visible to i are j in (i - window, i] of
    i's own segment, and of those, if `selected` (B, T) bool is given, the selected ones and i itself. On CUDA
    no T x T mask is made.
    """
    gqa = q.shape[1] != k.shape[1]
    if segment_ids is None and selected is None and (window is None or window >= q.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if q.is_cuda:
        mask = block_mask(segment_ids, window, q.shape[2], q.device, selected)
        attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        return attend(q, k, v, block_mask=mask, enable_gqa=gqa)
    index = torch.arange(q.shape[2], device=q.device)  # (T,)
    visible = index[:, None] >= index  # (T, T)
    if window is not None:
        visible = visible & (index[:, None] - index < window)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])  # (B, 1, T, T)
    if selected is not None:
        itself = index[:, None] == index  # (T, T)
        visible = visible & (selected[:, None, None, :] | itself)  # (B, 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=gqa)


def write_slots(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """Writes new (B, H, T, K) into cache (B, H, S, K) at slots (B, T), in place."""
    index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])  # (B, H, T, K)
    cache.scatter_(2, index, new.to(cache.dtype))


def _write(state: AttentionState, k: Tensor, v: Tensor, positions: Tensor, selected: Tensor | None) -> None:
    """Keeps keys and values (B, G, T, K) of new positions (B, T), and which of them are selected (B, T)."""
    slots = state.k.shape[2]
    # Of more new positions than slots only the last survive; writing all would leave the order to chance.
    kept = slice(max(0, positions.shape[1] - slots), None)
    at = positions[:, kept] % slots
    write_slots(state.k, k[:, :, kept], at)
    write_slots(state.v, v[:, :, kept], at)
    if selected is not None:
        assert state.selected is not None
        state.selected.scatter_(1, at, selected[:, kept])


def _cached(state: AttentionState) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Views of the slots in use: k and v (B, G, S, K); their positions (B, S), below 0 if none; `selected` (B, S)."""
    slots = state.k.shape[2]
    used = min(slots, state.longest)
    last = state.length[:, None] - 1  # (B, 1)
    slot = torch.arange(used, device=last.device)  # (S,)
    newest = last - (last - slot) % slots  # (B, S): the newest position written to each slot
    selected = None if state.selected is None else state.selected[:, :used]
    return state.k[:, :, :used], state.v[:, :, :used], newest, selected


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
        self.head_dim = d_model // self.n_heads
        kv_dim = self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, d_model, bias=config.bias)
        self.k_proj = nn.Linear(d_model, kv_dim, bias=config.bias)
        self.v_proj = nn.Linear(d_model, kv_dim, bias=config.bias)
        self.out_proj: nn.Module = nn.Linear(d_model, d_model, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), positions (B or 1, T) -> q (B, H, T, K) and k, v (B, G, T, K)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or G, T, K)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q.to(self.q_norm.weight.dtype)), self.k_norm(k.to(self.k_norm.weight.dtype))
        if self.config.rope:
            q, k = (rotate(y, positions, self.config.rope_theta) for y in (q, k))
        return q.to(v.dtype), k.to(v.dtype), v

    def _merge(self, y: Tensor) -> Tensor:
        """Heads (B, H, T, K) -> output (B, T, D)."""
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, segment_ids: Tensor | None = None, selected: Tensor | None = None) -> Tensor:
        """As every mixer's; with `selected` (B, T) bool a position sees, besides itself, the selected alone."""
        if segment_ids is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        else:
            positions = segment_positions(segment_ids)  # (B, T)
        q, k, v = self._project(x, positions)
        return self._merge(causal_attention(q, k, v, segment_ids, self.config.window, selected))

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
        new, slots = x.shape[1], state.k.shape[2]
        check_room(state.longest, new, state.max_len)
        positions = state.length[:, None] + torch.arange(new, device=x.device)  # (B, T)
        q, k, v = self._project(x, positions)
        after = state.advanced(new)
        if new > 1 and state.longest == 0:
            # The whole past is in x: no mask over cached slots needed.
            y = causal_attention(q, k, v, window=self.config.window, selected=selected)
            _write(state, k, v, positions, selected)
        elif new > 1 and after.longest > slots:
            # Written first, the last of the new positions could take slots that the first of them still see.
            k_past, v_past, keys_at, seen = _cached(state)
            y = self._attend(
                q,
                torch.cat((k_past.to(k.dtype), k), dim=2),
                torch.cat((v_past.to(v.dtype), v), dim=2),
                positions,
                torch.cat((keys_at, positions), dim=1),
                None if seen is None or selected is None else torch.cat((seen, selected), dim=1),
            )
            _write(state, k, v, positions, selected)
        else:
            _write(state, k, v, positions, selected)
            k_all, v_all, keys_at, seen = _cached(after)  # views: the cache is not copied
            y = self._attend(q, k_all.to(k.dtype), v_all.to(v.dtype), positions, keys_at, seen)
        return self._merge(y), after

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys_at: Tensor, selected: Tensor | None
    ) -> Tensor:
        """Attention of q (B, H, T, K) at `positions` (B, T) over k and v (B, G, S, K) at `keys_at` (B, S).

        A key at a position below 0 is none; of the others, if `selected` (B, S) is given, a query sees the selected
        and its own.
        """
        keys_at = keys_at[:, None, :]  # (B, 1, S)
        visible = (keys_at >= 0) & (keys_at <= positions[:, :, None])  # (B, T, S)
        if self.config.window is not None:
            visible &= keys_at > positions[:, :, None] - self.config.window
        if selected is not None:
            visible &= selected[:, None, :] | (keys_at == positions[:, :, None])
        gqa = self.n_heads != self.n_kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=gqa)

    def flops(self, seq_len: int) -> int:
        window = seq_len if self.config.window is None else min(self.config.window, seq_len)
        pairs = seq_len * window - window * (window - 1) // 2  # visible (query, key) pairs
        if window == seq_len:
            pairs = seq_len * seq_len // 2  # the usual count of a causal half
        linear = sum(p.weight.numel() for p in self.children() if isinstance(p, nn.Linear))
        return 2 * seq_len * linear + 2 * 2 * pairs * self.d_model

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        return 2 * self.n_kv_heads * self._slots(seq_len) * self.head_dim * dtype.itemsize
