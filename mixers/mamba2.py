"""Mamba-2: a gated state-space model whose decay is one number per head (Dao & Gu, arXiv 2405.21060).

Letters: B batch, T time, D model width, E inner width (expand * D), H heads, P = E / H the head dim, G groups of heads
that share B and C, N state size, W kernel width of the convolution, X = E + 2 G N its channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.kernels.ssd import ssd
from mixerlab.mixers.convolution import causal_conv
from mixerlab.mixers.mixer import Mixer, State, check_room
from mixerlab.mixers.registry import register_mixer
from mixerlab.options import option

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4
A_MIN, A_MAX = 1.0, 16.0


@dataclass
class Mamba2Config:
    expand: int = option(2, "inner width as a multiple of the model's", min=1)
    d_state: int = option(128, "state size per channel", min=1)
    head_dim: int | None = option(
        None, "width of a head; null: the largest power of 2 up to 64 that fits", min=1
    )
    n_groups: int = option(1, "groups of heads that share B and C", min=1)
    d_conv: int = option(4, "positions that the convolution sees", min=1)
    dt_limit: tuple[float, float] = option((0.0, math.inf), "bounds that steps are clamped to")
    norm_eps: float = option(1e-5, "epsilon of the gated norm", above=0)
    conv_bias: bool = option(True, "bias on the convolution")
    bias: bool = option(False, "biases on the input and output projections")
    backend: Literal["auto", "mamba_ssm", "fla", "chunked", "reference"] = option(
        "auto", "implementation of the SSD operator"
    )

    def head_dim_in(self, d_model: int) -> int:
        """The width of a head in a model of width `d_model`."""
        return self.head_dim or math.gcd(self.expand * d_model, 64)

    def problems(self, d_model: int) -> Iterator[tuple[str, str]]:
        inner, head_dim = self.expand * d_model, self.head_dim_in(d_model)
        if inner % head_dim:
            yield "head_dim", f"it must divide expand * model.d_model = {inner}"
        elif (heads := inner // head_dim) % self.n_groups:
            yield "n_groups", f"it must divide the number of heads, {inner} / {head_dim} = {heads}"
        if not 0 <= self.dt_limit[0] < self.dt_limit[1]:
            yield "dt_limit", "it must be two numbers, 0 <= the first < the second"


@dataclass
class Mamba2State(State):
    conv: Tensor  # (B, W - 1, X), the last inputs of the convolution, 0 before the first position
    ssm: Tensor  # (B, H, P, N), at least float32
    max_len: int


class GatedNorm(nn.RMSNorm):
    """RMS norm of y * silu(z) within each of `groups` equal parts of the last dimension, at least in float32."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__(width, eps=eps)
        self.groups = groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., E) -> (..., E) in y's dtype."""
        dtype = _at_least_float32(y.dtype)
        gated = (y.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (self.groups, -1))  # (..., G, E / G)
        scale = (gated.square().mean(-1, keepdim=True) + self.eps).rsqrt()  # (..., G, 1)
        return ((gated * scale).flatten(-2) * self.weight).to(y.dtype)  # (..., E)


@register_mixer("mamba2", Mamba2Config)
class Mamba2(Mixer):
    """out_proj(norm(ssd(silu(conv(x'))) * silu(z))) with z, x', B, C, dt = in_proj(x); x', B, C are convolved.

    Parameter names and layouts are those of `mamba_ssm` and of transformers' Mamba2Mixer.
    """

    supports_segments = True
    no_decay = ("dt_bias", "A_log", "D")
    keep_float32 = ("dt_bias", "A_log", "D")
    output_projection = "out_proj"

    def __init__(self, config: Mamba2Config, d_model: int, layer_index: int = 0, n_layers: int = 1):
        super().__init__()
        self.config = config
        self.inner = config.expand * d_model
        self.head_dim = config.head_dim_in(d_model)
        self.n_heads = self.inner // self.head_dim
        self.channels = self.inner + 2 * config.n_groups * config.d_state
        self.in_proj = nn.Linear(d_model, self.inner + self.channels + self.n_heads, bias=config.bias)
        self.conv1d = nn.Conv1d(
            self.channels, self.channels, config.d_conv, groups=self.channels, bias=config.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedNorm(self.inner, config.n_groups, config.norm_eps)
        self.out_proj = nn.Linear(self.inner, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [1, 16], D = 1, and steps log-uniform in [1e-3, 0.1] where the projected step is 0."""
        with torch.no_grad():
            # Drawn on the CPU, so that the values are the same on every device.
            log_dt = torch.empty(self.n_heads).uniform_(math.log(DT_MIN), math.log(DT_MAX))
            dt = log_dt.exp().clamp_min(DT_FLOOR)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.copy_(torch.empty(self.n_heads).uniform_(A_MIN, A_MAX).log())
            self.D.fill_(1.0)

    def _select(
        self, x: Tensor, tail: Tensor, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """x (B, T, D) behind tail (B, W - 1, X) -> gate z and SSD's input, its dt, A, B and C, and the new tail."""
        z, x, dt = self.in_proj(x).split((self.inner, self.channels, self.n_heads), dim=-1)  # E, X and H wide
        padded = torch.cat((tail.to(x.dtype), x), dim=1)  # (B, W - 1 + T, X)
        new_tail = padded[:, x.shape[1] :]  # (B, W - 1, X)
        x = F.silu(causal_conv(padded, self.conv1d, segment_ids)).to(x.dtype)  # (B, T, X)
        shared = self.config.n_groups * self.config.d_state
        x, B_in, C_out = x.split((self.inner, shared, shared), dim=-1)  # (B, T, E), (B, T, G * N) twice
        # Steps and decays at least in float32: a slow decay rounds to 1 in bf16.
        dtype = _at_least_float32(self.A_log.dtype)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype)).clamp(*self.config.dt_limit)  # (B, T, H)
        A = -self.A_log.to(dtype).exp()  # (H,)
        B_in, C_out = (y.unflatten(-1, (self.config.n_groups, -1)) for y in (B_in, C_out))  # (B, T, G, N)
        return z, x.unflatten(-1, (self.n_heads, -1)), (dt, A, B_in, C_out), new_tail

    def _mix(
        self, x: Tensor, tail: Tensor, ssm: Tensor | None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) behind tail (B, W - 1, X) and ssm (B, H, P, N) -> output (B, T, D), new tail and ssm."""
        z, x, selected, new_tail = self._select(x, tail, segment_ids)
        y, ssm = ssd(
            x,
            *selected,
            self.D,
            initial_state=ssm,
            segment_ids=segment_ids,
            return_state=True,
            backend=self.config.backend,
        )  # (B, T, H, P), (B, H, P, N)
        return self.out_proj(self.norm(y.flatten(2), z)), new_tail, ssm  # (B, T, D)

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        return self._mix(x, self._no_tail(x), None, segment_ids)[0]

    def _no_tail(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.config.d_conv - 1, self.channels)  # (B, W - 1, X)

    @torch.no_grad()
    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """As every mixer's, per head: SSD, and the skip past it."""
        _, x, selected, _ = self._select(x, self._no_tail(x), segment_ids)
        columns = values[:, :, None].expand(-1, -1, self.n_heads, -1).to(x.dtype)  # (B, T, H, C)
        mixed = ssd(columns, *selected, self.D, segment_ids=segment_ids, backend=self.config.backend)
        return mixed.transpose(1, 2)  # (B, H, T, C)

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> Mamba2State:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        conv = (batch_size, self.config.d_conv - 1, self.channels)
        ssm = (batch_size, self.n_heads, self.head_dim, self.config.d_state)
        return Mamba2State(
            length=torch.zeros(batch_size, dtype=torch.int64, device=device),
            conv=torch.zeros(conv, device=device, dtype=dtype),
            # In bf16 the sum over a long past would stop growing.
            ssm=torch.zeros(ssm, device=device, dtype=_at_least_float32(dtype)),
            max_len=max_len,
        )

    def extend(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        check_room(state.longest, x.shape[1], state.max_len)
        y, conv, ssm = self._mix(x, state.conv, state.ssm)
        conv, ssm = conv.to(state.conv.dtype), ssm.to(state.ssm.dtype)
        return y, state.advanced(x.shape[1], conv=conv, ssm=ssm)

    def flops(self, seq_len: int) -> int:
        # The recurrence's two products with the state, whatever the backend adds to compute it by chunks.
        linear = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * seq_len * (linear + 2 * self.inner * self.config.d_state)

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        conv = (self.config.d_conv - 1) * self.channels * dtype.itemsize
        return conv + self.inner * self.config.d_state * _at_least_float32(dtype).itemsize


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
