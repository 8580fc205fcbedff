"""The mixer that does not mix: the control that every comparison should beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixerlab.mixers.mixer import Mixer, State, check_room
from mixerlab.mixers.registry import register_mixer


@dataclass
class IdentityConfig:
    pass


@dataclass
class IdentityState(State):
    max_len: int


@register_mixer("identity", IdentityConfig)
class Identity(Mixer):
    """Returns its input: a decoder of these sees one token at a time."""

    supports_segments = True

    def __init__(self, config: IdentityConfig, d_model: int, layer_index: int = 0, n_layers: int = 1):
        super().__init__()

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        return x

    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        return values[:, None]  # (B, 1, T, C)

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> IdentityState:
        return IdentityState(torch.zeros(batch_size, dtype=torch.int64, device=device), max_len)

    def extend(self, x: Tensor, state: IdentityState) -> tuple[Tensor, IdentityState]:
        check_room(state.longest, x.shape[1], state.max_len)
        return x, state.advanced(x.shape[1])

    def flops(self, seq_len: int) -> int:
        return 0

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        return 0
