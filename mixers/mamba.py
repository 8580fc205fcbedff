"""Mamba (S6): a gated, selective state-space model (Gu & Dao, arXiv 2312.00752).

Letters: B batch, T time, D model width, E inner width (expand * D), N state size per channel, R width of the step
projection, W kernel width of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.kernels.selective_scan import selective_scan
from mixerlab.mixers.convolution import causal_conv
from mixerlab.mixers.mixer import Mixer, State, check_room
from mixerlab.mixers.registry import register_mixer
from mixerlab.options import option

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


@dataclass
class MambaConfig:
    d_state: int = option(16, "state size per channel", min=1)
    expand: int = option(2, "inner width as a multiple of the model's", min=1)
    d_conv: int = option(4, "positions that the convolution sees", min=1)
    dt_rank: int | None = option(None, "rank of the step projection; null: d_model / 16 rounded up", min=1)
    conv_bias: bool = option(True, "bias on the convolution")
    bias: bool = option(False, "biases on the input and output projections")
    backend: Literal["auto", "triton", "chunked", "reference"] = option(
        "auto", "implementation of the selective scan"
    )


@dataclass
class MambaState(State):
    conv: Tensor  # (B, W - 1, E), the last inputs of the convolution, 0 before the first position
    ssm: Tensor  # (B, E, N), at least float32
    max_len: int


@register_mixer("mamba", MambaConfig)
class Mamba(Mixer):
    """out_proj(scan(silu(conv(x'))) * silu(z)) with x', z = in_proj(x); steps, B and C depend on the input.

    Parameter names and layouts are those of `mamba_ssm` and of transformers' MambaMixer.
    """

    supports_segments = True
    no_decay = ("A_log", "D")  # dt_proj.bias is spared as every bias is
    keep_float32 = ("A_log", "D")
    output_projection = "out_proj"

    def __init__(self, config: MambaConfig, d_model: int, layer_index: int = 0, n_layers: int = 1):
        super().__init__()
        self.config = config
        self.inner = config.expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if config.dt_rank is None else config.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.inner, bias=config.bias)  # x', z
        self.conv1d = nn.Conv1d(
            self.inner, self.inner, config.d_conv, groups=self.inner, bias=config.conv_bias
        )
        self.x_proj = nn.Linear(self.inner, self.dt_rank + 2 * config.d_state, bias=False)  # dt, B, C
        self.dt_proj = nn.Linear(self.dt_rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, config.d_state))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1 .. -N, D = 1, and steps log-uniform in [1e-3, 0.1] where the input is 0, as in section 3.6."""
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.config.d_state + 1, dtype=torch.float32).log())  # (E, N)
            self.D.fill_(1.0)
            # Drawn on the CPU, so that the values are the same on every device.
            weight = torch.empty(self.dt_proj.weight.shape).uniform_(-1, 1)
            self.dt_proj.weight.copy_(weight * self.dt_rank**-0.5)
            log_dt = torch.empty(self.inner).uniform_(math.log(DT_MIN), math.log(DT_MAX))
            dt = log_dt.exp().clamp_min(DT_FLOOR)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def _select(
        self, x: Tensor, tail: Tensor, segment_ids: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """x' (B, T, E) behind tail (B, W - 1, E) -> the scan's input, its dt, A, B and C, and the new tail."""
        padded = torch.cat((tail.to(x.dtype), x), dim=1)  # (B, W - 1 + T, E)
        new_tail = padded[:, x.shape[1] :]  # (B, W - 1, E)
        x = F.silu(causal_conv(padded, self.conv1d, segment_ids)).to(x.dtype)  # (B, T, E)
        sizes = [self.dt_rank, self.config.d_state, self.config.d_state]
        dt, B_in, C_out = self.x_proj(x).split(sizes, dim=-1)  # (B, T, R), (B, T, N), (B, T, N)
        # Steps and decays at least in float32, whatever autocast says: a slow decay rounds to 1 in bf16.
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        dt = F.linear(dt, self.dt_proj.weight)  # (B, T, E)
        with torch.autocast(x.device.type, enabled=False):
            dt = F.softplus(dt.to(dtype) + self.dt_proj.bias.to(dtype))
            A = -self.A_log.to(dtype).exp()  # (E, N)
        return x, (dt, A, B_in, C_out), new_tail

    def _mix(
        self, x: Tensor, tail: Tensor, ssm: Tensor | None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) behind tail (B, W - 1, E) and ssm (B, E, N) -> output (B, T, D), new tail and ssm."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E) each
        x, selected, new_tail = self._select(x, tail, segment_ids)
        y, ssm = selective_scan(
            x,
            *selected,
            self.D,
            initial_state=ssm,
            segment_ids=segment_ids,
            return_state=True,
            backend=self.config.backend,
        )  # (B, T, E), (B, E, N)
        return self.out_proj(y * F.silu(z)), new_tail, ssm

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        return self._mix(x, self._no_tail(x), None, segment_ids)[0]

    def _no_tail(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.config.d_conv - 1, self.inner)  # (B, W - 1, E)

    @torch.no_grad()
    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """As every mixer's, per channel: the scan, and the skip past it."""
        x, _ = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E)
        x, selected, _ = self._select(x, self._no_tail(x), segment_ids)
        mixed = []
        for column in values.to(x.dtype).split(1, dim=-1):  # (B, T, 1) each
            y = selective_scan(
                column.expand_as(x), *selected, self.D, segment_ids=segment_ids, backend=self.config.backend
            )
            mixed.append(y)  # (B, T, E)
        return torch.stack(mixed, dim=-1).transpose(1, 2)  # (B, E, T, C)

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> MambaState:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        config = self.config
        return MambaState(
            length=torch.zeros(batch_size, dtype=torch.int64, device=device),
            conv=torch.zeros(batch_size, config.d_conv - 1, self.inner, device=device, dtype=dtype),
            # In bf16 the sum over a long past would stop growing.
            ssm=torch.zeros(
                batch_size, self.inner, config.d_state, device=device, dtype=_at_least_float32(dtype)
            ),
            max_len=max_len,
        )

    def extend(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        check_room(state.longest, x.shape[1], state.max_len)
        y, conv, ssm = self._mix(x, state.conv, state.ssm)
        conv, ssm = conv.to(state.conv.dtype), ssm.to(state.ssm.dtype)
        return y, state.advanced(x.shape[1], conv=conv, ssm=ssm)

    def flops(self, seq_len: int) -> int:
        # The scan and the depthwise convolution are element-wise work.
        linear = sum(p.weight.numel() for p in self.children() if isinstance(p, nn.Linear))
        return 2 * seq_len * linear

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        conv = (self.config.d_conv - 1) * dtype.itemsize
        return self.inner * (conv + self.config.d_state * _at_least_float32(dtype).itemsize)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
