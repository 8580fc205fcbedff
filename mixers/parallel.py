"""Two mixers side by side in one layer, as in Hymba (Dong et al., arXiv 2411.13676, section 2.1).

Letters: B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixerlab.mixers.mixer import Mixer, State, check_room
from mixerlab.mixers.registry import MIXERS, build_mixer, register_mixer
from mixerlab.options import option


@dataclass
class ParallelConfig:
    mixers: list[Any] = option(
        ["attention", "mamba2"], "two mixers, each a name or a mapping with `name` and options", mixers=True
    )

    def problems(self, d_model: int) -> Iterator[tuple[str, str]]:
        if not isinstance(self.mixers, list) or len(self.mixers) != 2:
            yield "mixers", "expected a list of exactly two mixers"


@dataclass
class ParallelState(State):
    first: State
    second: State
    max_len: int


@register_mixer("parallel", ParallelConfig)
class Parallel(Mixer):
    """y = (norm_1(mixer_1(x)) + norm_2(mixer_2(x))) / 2, so that neither is drowned by the other's scale."""

    supports_segments = True

    def __init__(self, config: ParallelConfig, d_model: int, layer_index: int = 0, n_layers: int = 1):
        super().__init__()
        self.first, self.second = (build_mixer(m, d_model, layer_index, n_layers) for m in config.mixers)
        self.first_norm = nn.RMSNorm(d_model, eps=1e-5)
        self.second_norm = nn.RMSNorm(d_model, eps=1e-5)
        self.names = [MIXERS.choose(m).name for m in config.mixers]
        if self.names[0] == self.names[1]:
            self.names = [f"{name}_{i}" for i, name in enumerate(self.names)]
        self.supports_segments = self.first.supports_segments and self.second.supports_segments

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        """The branches' outputs, (B, T, D) each -> (B, T, D)."""
        # In the norms' dtype: float32 even where the branches are bf16.
        first = self.first_norm(first.to(self.first_norm.weight.dtype)).to(first.dtype)
        second = self.second_norm(second.to(self.second_norm.weight.dtype)).to(second.dtype)
        return (first + second) / 2

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        return self._join(self.first(x, segment_ids), self.second(x, segment_ids))

    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor | None:
        """As every mixer's: the heads of the first branch, then those of the second."""
        branches = [mixer.mix_fixed(x, values, segment_ids) for mixer in (self.first, self.second)]
        mixed = [branch for branch in branches if branch is not None]
        return torch.cat(mixed, dim=1) if len(mixed) == 2 else None

    def routing(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        branches = zip(self.names, (self.first, self.second), strict=True)
        return {
            f"{name}/{key}": value
            for name, mixer in branches
            for key, value in mixer.routing(x, segment_ids).items()
        }

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> ParallelState:
        return ParallelState(
            length=torch.zeros(batch_size, dtype=torch.int64, device=device),
            first=self.first.init_state(batch_size, max_len, device, dtype),
            second=self.second.init_state(batch_size, max_len, device, dtype),
            max_len=max_len,
        )

    def extend(self, x: Tensor, state: ParallelState) -> tuple[Tensor, ParallelState]:
        check_room(state.longest, x.shape[1], state.max_len)
        y_first, first = self.first.extend(x, state.first)
        y_second, second = self.second.extend(x, state.second)
        return self._join(y_first, y_second), state.advanced(x.shape[1], first=first, second=second)

    def flops(self, seq_len: int) -> int:
        return self.first.flops(seq_len) + self.second.flops(seq_len)

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        return self.first.state_bytes(seq_len, dtype) + self.second.state_bytes(seq_len, dtype)

    @torch.no_grad()
    def diagnostics(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        """The branches' own, and the RMS of each branch's output (B, T) before its norm."""
        values = {}
        for name, mixer in zip(self.names, (self.first, self.second), strict=True):
            values[f"{name}/rms"] = mixer(x, segment_ids).float().square().mean(-1).sqrt()
            values |= {f"{name}/{key}": v for key, v in mixer.diagnostics(x, segment_ids).items()}
        return values
