"""Gated DeltaNet: a memory that forgets, and replaces what it holds for a key (Yang et al., arXiv 2412.06464).

Letters: B batch, T time, D model width, H heads, K key width of a head, P its value width (expand_v * K), W kernel
width of the convolution, X = H (2 K + P) its channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.kernels.gated_delta_rule import gated_delta_rule
from mixerlab.mixers.convolution import causal_conv
from mixerlab.mixers.mamba2 import A_MAX, A_MIN, DT_FLOOR, DT_MAX, DT_MIN
from mixerlab.mixers.mixer import Mixer, State, check_room
from mixerlab.mixers.registry import register_mixer
from mixerlab.options import option


@dataclass
class GatedDeltaNetConfig:
    n_heads: int | None = option(
        None, "heads; null: as many as make all keys together three quarters of the model's width", min=1
    )
    head_dim: int | None = option(
        None, "key width of a head; null: the largest power of 2 up to 128 that fits", min=1
    )
    expand_v: int = option(2, "value width of a head as a multiple of its key width", min=1)
    d_conv: int = option(4, "positions that the convolution sees", min=1)
    norm_eps: float = option(1e-5, "epsilon of the gated norm", above=0)
    backend: Literal["auto", "fla", "chunked", "reference"] = option(
        "auto", "implementation of the gated delta rule"
    )


@dataclass
class GatedDeltaNetState(State):
    conv: Tensor  # (B, W - 1, X), the last inputs of the convolution, 0 before the first position
    memory: Tensor  # (B, H, P, K), at least float32
    max_len: int


class GatedHeadNorm(nn.RMSNorm):
    """RMS norm of y over its last dimension, times silu(z), at least in float32."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., P) -> (..., P) in y's dtype."""
        dtype = _at_least_float32(y.dtype)
        normed = F.rms_norm(y.to(dtype), self.normalized_shape, eps=self.eps)
        return (normed * self.weight * F.silu(z.to(dtype))).to(y.dtype)


@register_mixer("gated_deltanet", GatedDeltaNetConfig)
class GatedDeltaNet(Mixer):
    """out_proj(norm(delta_rule(q, k, v)) * silu(z)) with q', k', v', z, b, dt = in_proj(x); q, k and v are convolved.

    q and k are silu(conv(.)) with norm 1 in each head, v = silu(conv(v')), beta = sigmoid(b), and the log decay is
    -A softplus(dt + bias), A and the bias as in Mamba-2 (section 3.4).
    """

    supports_segments = True
    no_decay = ("dt_bias", "A_log")
    keep_float32 = ("dt_bias", "A_log")
    output_projection = "out_proj"

    def __init__(self, config: GatedDeltaNetConfig, d_model: int, layer_index: int = 0, n_layers: int = 1):
        super().__init__()
        self.config = config
        wanted = max(1, 3 * d_model // 4)
        self.head_dim = config.head_dim or math.gcd(wanted, 128)
        self.n_heads = config.n_heads or max(1, wanted // self.head_dim)
        self.value_dim = config.expand_v * self.head_dim
        keys, self.inner = self.n_heads * self.head_dim, self.n_heads * self.value_dim
        self.widths = (keys, keys, self.inner)  # of q, k and v
        channels = sum(self.widths)
        self.in_proj = nn.Linear(d_model, channels + self.inner + 2 * self.n_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedHeadNorm(self.value_dim, eps=config.norm_eps)
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [1, 16], and steps log-uniform in [1e-3, 0.1] where the projected step is 0, as Mamba-2's."""
        with torch.no_grad():
            # Drawn on the CPU, so that the values are the same on every device.
            log_dt = torch.empty(self.n_heads).uniform_(math.log(DT_MIN), math.log(DT_MAX))
            dt = log_dt.exp().clamp_min(DT_FLOOR)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.copy_(torch.empty(self.n_heads).uniform_(A_MIN, A_MAX).log())

    def _select(
        self, x: Tensor, tail: Tensor, segment_ids: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        """x (B, T, D) behind tail (B, W - 1, X) -> gate z (B, T, H, P), the operator's input, and the new tail."""
        sizes = (sum(self.widths), self.inner, self.n_heads, self.n_heads)
        mixed, z, b, dt = self.in_proj(x).split(sizes, dim=-1)  # X, H P, H and H wide
        padded = torch.cat((tail.to(mixed.dtype), mixed), dim=1)  # (B, W - 1 + T, X)
        new_tail = padded[:, x.shape[1] :]  # (B, W - 1, X)
        parts = F.silu(causal_conv(padded, self.conv1d, segment_ids)).split(self.widths, dim=-1)
        z, q, k, v = (y.unflatten(-1, (self.n_heads, -1)) for y in (z, *parts))  # (B, T, H, P or K)
        q, k, v = (y.to(mixed.dtype) for y in (_unit(q), _unit(k), v))
        # Shares, steps and decays at least in float32: a slow decay rounds to 1 in bf16.
        dtype = _at_least_float32(self.A_log.dtype)
        beta = b.to(dtype).sigmoid()  # (B, T, H)
        log_decay = -self.A_log.to(dtype).exp() * F.softplus(
            dt.to(dtype) + self.dt_bias.to(dtype)
        )  # (B, T, H)
        return z, (q, k, v, log_decay, beta), new_tail

    def _mix(
        self, x: Tensor, tail: Tensor, memory: Tensor | None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) behind tail (B, W - 1, X) and memory (B, H, P, K) -> output (B, T, D), new tail and memory."""
        z, selected, new_tail = self._select(x, tail, segment_ids)
        y, memory = gated_delta_rule(
            *selected,
            initial_state=memory,
            segment_ids=segment_ids,
            return_state=True,
            backend=self.config.backend,
        )  # (B, T, H, P), (B, H, P, K)
        return self.out_proj(self.norm(y, z).flatten(2)), new_tail, memory  # (B, T, D)

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        return self._mix(x, self._no_tail(x), None, segment_ids)[0]

    def _no_tail(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.config.d_conv - 1, sum(self.widths))  # (B, W - 1, X)

    @torch.no_grad()
    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """As every mixer's, per head: the gated delta rule with keys, queries, decays and shares held."""
        _, (q, k, v, log_decay, beta), _ = self._select(x, self._no_tail(x), segment_ids)
        columns = values[:, :, None].expand(-1, -1, self.n_heads, -1).to(v.dtype)  # (B, T, H, C)
        routing = (q, k, columns, log_decay, beta)
        mixed = gated_delta_rule(*routing, segment_ids=segment_ids, backend=self.config.backend)
        return mixed.transpose(1, 2)  # (B, H, T, C)

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> GatedDeltaNetState:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        conv = (batch_size, self.config.d_conv - 1, sum(self.widths))
        memory = (batch_size, self.n_heads, self.value_dim, self.head_dim)
        return GatedDeltaNetState(
            length=torch.zeros(batch_size, dtype=torch.int64, device=device),
            conv=torch.zeros(conv, device=device, dtype=dtype),
            # In bf16 the sum over a long past would stop growing.
            memory=torch.zeros(memory, device=device, dtype=_at_least_float32(dtype)),
            max_len=max_len,
        )

    def extend(self, x: Tensor, state: GatedDeltaNetState) -> tuple[Tensor, GatedDeltaNetState]:
        check_room(state.longest, x.shape[1], state.max_len)
        y, conv, memory = self._mix(x, state.conv, state.memory)
        conv, memory = conv.to(state.conv.dtype), memory.to(state.memory.dtype)
        return y, state.advanced(x.shape[1], conv=conv, memory=memory)

    def flops(self, seq_len: int) -> int:
        # The recurrence's three products with the state, whatever the backend adds to compute it by chunks.
        linear = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * seq_len * (linear + 3 * self.inner * self.head_dim)

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        conv = (self.config.d_conv - 1) * sum(self.widths) * dtype.itemsize
        return conv + self.inner * self.head_dim * _at_least_float32(dtype).itemsize


def _unit(x: Tensor) -> Tensor:
    """x (..., K) with norm 1 in its last dimension, at least in float32; a vector of nearly 0 stays small."""
    x = x.to(_at_least_float32(x.dtype))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
