"""Sessa: attention inside a feedback path (arXiv 2604.18580; the mathematics is in docs/sessa.md).

Letters: B batch, T time, D model width, H feedback heads, K = D / H the head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.kernels.feedback import feedback_attention, routing_entropy
from mixerlab.mixers.attention import Attention, AttentionConfig, head_problems
from mixerlab.mixers.kv_cache import AttentionState, write_slots
from mixerlab.mixers.registry import register_mixer
from mixerlab.options import option


@dataclass
class SessaConfig:
    n_heads: int | None = option(
        None,
        "heads of the forward branch; null: as many as make heads 64 wide, or the next wider that fit",
        min=1,
    )
    n_kv_heads: int | None = option(None, "key and value heads of the forward branch; null: n_heads", min=1)
    rope: bool = option(True, "rotary positions in the forward branch")
    gamma_max: float = option(0.999, "bound of the gain; below 1 the recursion is stable", above=0, below=1)
    n_feedback_heads: int = option(1, "heads of the feedback branch; the paper's layer has one", min=1)
    feedback: bool = option(True, "false: no feedback branch (the paper's control, s = f)")
    backend: Literal["auto", "triton", "chunked", "reference"] = option(
        "auto", "implementation of the feedback operator"
    )

    def problems(self, d_model: int) -> Iterator[tuple[str, str]]:
        yield from head_problems(d_model, self.n_heads, self.n_kv_heads, self.rope)
        if d_model % self.n_feedback_heads:
            yield "n_feedback_heads", f"it must divide model.d_model = {d_model}"


@dataclass
class SessaState(AttentionState):
    k_fb: Tensor  # (B, H, max_len, K) feedback keys
    s: Tensor  # (B, H, max_len, K) outputs so far: the values of the feedback branch


@register_mixer("sessa", SessaConfig)
class Sessa(Attention):
    """s_t = f_t + gamma_t * sum_{j<t} alpha_tj s_j, with f the output of causal attention.

    The gain is gamma_t = gamma_max * tanh(<x_t, w> + b); alpha is a softmax over the strict past of the
    feedback branch's own queries and keys. Parameter names are those of the published layer.
    """

    no_decay = ("gamma_bias",)
    keep_float32 = ("gamma_bias",)
    output_projection = None  # out_proj is the forward branch's: the feedback comes after it

    def __init__(self, config: SessaConfig, d_model: int, layer_index: int = 0, n_layers: int = 1):
        forward_branch = AttentionConfig(
            n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, rope=config.rope, bias=True
        )
        super().__init__(forward_branch, d_model, layer_index, n_layers)
        if self.n_heads == 1:
            self.out_proj = nn.Identity()
        self.sessa = config
        if config.feedback:
            self.proj_fb = nn.Linear(d_model, 2 * d_model)  # queries of all heads, then keys of all heads
            self.gamma_ctx = nn.Linear(d_model, config.n_feedback_heads, bias=False)
            self.gamma_bias = nn.Parameter(torch.ones(config.n_feedback_heads))
            self.register_load_state_dict_pre_hook(_reshape_published_bias)
        else:
            self.register_parameter("gamma_bias", None)

    def reset_parameters(self) -> None:
        if self.sessa.feedback:
            nn.init.ones_(self.gamma_bias)

    def _heads(self, y: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, K), split into feedback heads."""
        return y.unflatten(-1, (self.sessa.n_feedback_heads, -1)).transpose(1, 2)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> feedback queries and keys (B, H, T, K) and gains (B, H, T)."""
        q, k = (self._heads(y) for y in self.proj_fb(x).chunk(2, dim=-1))
        # In bf16 0.999 rounds to 1, and the bound that makes the recursion stable is gone.
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            context = F.linear(x.to(dtype), self.gamma_ctx.weight.to(dtype))  # (B, T, H)
            gamma = self.sessa.gamma_max * torch.tanh(context + self.gamma_bias.to(dtype))
        return q, k, gamma.transpose(1, 2)

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        f = super().forward(x, segment_ids)  # (B, T, D)
        if not self.sessa.feedback:
            return f
        q, k, gamma = self._route(x)
        s = feedback_attention(
            q, k, self._heads(f), gamma, segment_ids=segment_ids, backend=self.sessa.backend
        )  # (B, H, T, K)
        return s.transpose(1, 2).flatten(2)  # (B, T, D)

    @torch.no_grad()
    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """As every mixer's, per feedback head and forward head: (I - B)^-1 times the forward attention's weights."""
        f = super().mix_fixed(x, values, segment_ids)  # (B, forward heads, T, C)
        if not self.sessa.feedback:
            return f
        q, k, gamma = self._route(x)
        columns = f.transpose(1, 2).flatten(2)[:, None].expand(-1, q.shape[1], -1, -1)  # (B, H, T, heads * C)
        s = feedback_attention(q, k, columns, gamma, segment_ids=segment_ids, backend=self.sessa.backend)
        return s.unflatten(-1, (f.shape[1], -1)).transpose(2, 3).flatten(1, 2)  # (B, H * heads, T, C)

    @torch.no_grad()
    def routing(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        forward = {"forward attention": super().routing(x, segment_ids)["attention"]}
        if not self.sessa.feedback:
            return forward
        q, k, gamma = self._route(x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu()  # (T, T)
        if segment_ids is not None:
            hidden = hidden | (segment_ids[:, None, :, None] != segment_ids[:, None, None, :])
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))  # (B, H, T, T)
        alpha = logits.softmax(-1).nan_to_num(0.0)  # the first row of a segment sees nothing
        return {**forward, "feedback attention": alpha, "gain": gamma}

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> AttentionState:
        state = super().init_state(batch_size, max_len, device, dtype)
        if not self.sessa.feedback:
            return state
        heads = self.sessa.n_feedback_heads
        shape = (batch_size, heads, max_len, self.d_model // heads)
        return SessaState(
            **vars(state),
            k_fb=torch.zeros(shape, device=device, dtype=dtype),
            s=torch.zeros(shape, device=device, dtype=dtype),
        )

    def extend(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        f, after = super().extend(x, state)  # (B, T, D)
        if not isinstance(state, SessaState):
            return f, after
        q, k, gamma = self._route(x)
        f = self._heads(f)
        s = feedback_attention(
            q,
            k,
            f,
            gamma,
            past=(state.k_fb, state.s),
            past_length=state.length,
            past_longest=state.longest,
            backend=self.sessa.backend,
        )  # (B, H, T, K)
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)  # (B, T)
        write_slots(state.k_fb, k, positions)
        write_slots(state.s, s, positions)
        return s.transpose(1, 2).flatten(2), after

    def flops(self, seq_len: int) -> int:
        # The attention's count has every projection; the feedback adds logits and update, a causal half each.
        feedback = 2 * seq_len * seq_len * self.d_model if self.sessa.feedback else 0
        return super().flops(seq_len) + feedback

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        feedback = 2 * seq_len * self.d_model * dtype.itemsize if self.sessa.feedback else 0
        return super().state_bytes(seq_len, dtype) + feedback

    @torch.no_grad()
    def diagnostics(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        if not self.sessa.feedback:
            return {}
        q, k, gamma = self._route(x)
        return {"gamma": gamma, "feedback_entropy": routing_entropy(q, k, segment_ids=segment_ids)}


def _reshape_published_bias(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """The published layer's gain bias has shape (); sharding needs a dimension."""
    key = prefix + "gamma_bias"
    if key in state_dict and state_dict[key].ndim == 0:
        state_dict[key] = state_dict[key].reshape(1)
