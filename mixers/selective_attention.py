"""Selective attention: a layer whose gate lets some positions attend to each other (Taipan, arXiv 2410.18572).

Letters: B batch, T time, D model width, S cached slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.mixers.attention import Attention, AttentionConfig, head_problems
from mixerlab.mixers.kv_cache import AttentionState
from mixerlab.mixers.mixer import Mixer, State, check_room
from mixerlab.mixers.registry import build_mixer, register_mixer
from mixerlab.options import option


@dataclass
class SelectiveAttentionConfig:
    below: Any = option(
        "mamba2", "the mixer whose output the attention refines, a name or a mapping", mixers=True
    )
    n_heads: int | None = option(
        None, "attention heads; null: as many as make heads 64 wide, or the next wider that fit", min=1
    )
    window: int = option(2048, "positions that an attending one looks back on, itself included", min=1)
    capacity: float = option(0.15, "share of attending positions to be learned", min=0, max=1)
    penalty_weight: float = option(1.0, "weight in the loss of (capacity - share)^2, per such layer", min=0)

    def problems(self, d_model: int) -> Iterator[tuple[str, str]]:
        yield from head_problems(d_model, self.n_heads, None, rope=False)
        if isinstance(self.below, (list, tuple)):
            yield "below", "expected one mixer, not a list"


class CapacityPenalty(torch.autograd.Function):
    """Returns `attending` as it is; its gradient gains that of weight * (capacity - mean(attending))^2.

    A mixer has no part in the loss, so this gradient is added where it would arrive. The training loss is a mean:
    it is divided by the number of labels of the whole step before the backward pass. So with weight
    `penalty_weight / micro_batches` a step minimises that mean plus penalty_weight * (capacity - share)^2, averaged
    over its micro-batches.
    """

    @staticmethod
    def forward(attending: Tensor, capacity: float, weight: float) -> Tensor:
        return attending.view_as(attending)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        attending, ctx.capacity, ctx.weight = inputs
        ctx.save_for_backward(attending)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (attending,) = ctx.saved_tensors
        # d/dm_i of weight (C - sum(m) / N)^2 is 2 weight (sum(m) / N - C) / N, the same for each position.
        slope = 2 * ctx.weight * (attending.mean() - ctx.capacity) / attending.numel()
        return grad + slope, None, None


@dataclass
class SelectiveAttentionState(State):
    below: State
    attention: AttentionState
    max_len: int


@register_mixer("selective_attention", SelectiveAttentionConfig)
class SelectiveAttention(Mixer):
    """y_i = h_i + m_i alpha_i (o_i - h_i): where the gate says m_i = 1, h = below(x) is mixed with attention o.

    The gate's two scores s_i = W h_i + b choose m_i, the larger, and weigh it: alpha_i = softmax(s_i)_1. In training
    m_i is a hard sample of softmax(s_i) with the straight-through gradient of the Gumbel-softmax at temperature 1
    (arXiv 1611.01144), and `CapacityPenalty` draws the share of attending positions to `capacity`. In evaluation
    m is a constant, so gradients are exact and there is no `surrogate` to declare. Keys and queries are of
    attending positions only, within `window` positions and without positional encoding.
    """

    supports_segments = True

    def __init__(
        self, config: SelectiveAttentionConfig, d_model: int, layer_index: int = 0, n_layers: int = 1
    ):
        super().__init__()
        self.config = config
        self.below = build_mixer(config.below, d_model, layer_index, n_layers)
        self.gate = nn.Linear(d_model, 2)
        attention = AttentionConfig(n_heads=config.n_heads, rope=False, window=config.window)
        self.attention = Attention(attention, d_model, layer_index, n_layers)
        self.supports_segments = self.below.supports_segments
        if self.below.output_projection is not None:
            self.output_projection = f"below.{self.below.output_projection}"

    def _select(self, h: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """h (B, T, D) -> m and alpha, (B, T) each, at least float32; m is 0 or 1."""
        # In bf16 more positions would be near a tie.
        dtype = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            scores = F.linear(h.to(dtype), self.gate.weight.to(dtype), self.gate.bias.to(dtype))  # (B, T, 2)
        alpha = scores.softmax(-1)[..., 1]  # (B, T)
        if not training:
            return (scores[..., 1] > scores[..., 0]).to(dtype), alpha
        noise = -torch.empty_like(scores).exponential_().log()  # Gumbel
        soft = (scores + noise).softmax(-1)[..., 1]  # (B, T)
        attending = (soft > 0.5).to(dtype) + (soft - soft.detach())  # the value hard, the gradient soft
        weight = self.config.penalty_weight / self.micro_batches  # a step adds up their gradients
        return CapacityPenalty.apply(attending, self.config.capacity, weight), alpha

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        h = self.below(x, segment_ids)
        attending, alpha = self._select(h, self.training)
        o = self.attention(h, segment_ids, selected=attending > 0.5)
        return _refine(h, o, attending * alpha)

    @torch.no_grad()
    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor | None:
        """As every mixer's, per path: through a head of the attention or past it, from a head of the layer below."""
        below = self.below.mix_fixed(x, values, segment_ids)  # (B, heads below, T, C)
        if below is None:
            return None
        h = self.below(x, segment_ids)
        attending, alpha = self._select(h, training=False)
        columns = below.transpose(1, 2).flatten(2)  # (B, T, heads below * C)
        o = self.attention.mix_fixed(h, columns, segment_ids, selected=attending > 0.5)
        o = o.unflatten(-1, (below.shape[1], -1)).transpose(2, 3)  # (B, heads, heads below, T, C)
        return _refine(below[:, None], o, (attending * alpha)[:, None, None]).flatten(1, 2)

    @torch.no_grad()
    def routing(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        attending, alpha = self._select(self.below(x, segment_ids), training=False)
        inner = {f"below/{key}": value for key, value in self.below.routing(x, segment_ids).items()}
        return {**inner, "share of attention": (attending * alpha)[:, None]}

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> SelectiveAttentionState:
        attention = self.attention.init_state(batch_size, max_len, device, dtype)
        attention.selected = torch.zeros(
            batch_size, attention.k.shape[2], dtype=torch.bool, device=device
        )  # (B, S)
        return SelectiveAttentionState(
            length=torch.zeros(batch_size, dtype=torch.int64, device=device),
            below=self.below.init_state(batch_size, max_len, device, dtype),
            attention=attention,
            max_len=max_len,
        )

    def extend(self, x: Tensor, state: SelectiveAttentionState) -> tuple[Tensor, SelectiveAttentionState]:
        check_room(state.longest, x.shape[1], state.max_len)
        h, below = self.below.extend(x, state.below)
        attending, alpha = self._select(h, training=False)
        o, attention = self.attention.extend(h, state.attention, selected=attending > 0.5)
        after = state.advanced(x.shape[1], below=below, attention=attention)
        return _refine(h, o, attending * alpha), after

    def flops(self, seq_len: int) -> int:
        """All causal pairs of the window count: what the gate could save depends on the input, and is not counted."""
        gate = 2 * seq_len * self.gate.weight.numel()
        return self.below.flops(seq_len) + gate + self.attention.flops(seq_len)

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        selected = min(self.config.window, seq_len)  # a bool per slot
        attention = self.attention.state_bytes(seq_len, dtype)
        return self.below.state_bytes(seq_len, dtype) + attention + selected

    @torch.no_grad()
    def diagnostics(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Whether each position attends (its mean is the share), alpha, (B, T) each, and those of the layer below."""
        attending, alpha = self._select(self.below(x, segment_ids), training=False)
        inner = self.below.diagnostics(x, segment_ids)
        return {"attending": attending, "alpha": alpha, **{f"below/{key}": v for key, v in inner.items()}}


def _refine(h: Tensor, o: Tensor, amount: Tensor) -> Tensor:
    """h, o (B, T, D), amount (B, T) -> h moved towards o, (B, T, D) in h's dtype."""
    return h + (amount[..., None] * (o - h)).to(h.dtype)
