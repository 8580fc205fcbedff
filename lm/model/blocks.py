"""What surrounds a mixer in a layer: norms, MLPs, and the two kinds of block.

Letters: B batch, T time, D model width, F hidden width of the MLP.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.mixers import Mixer, State

Diagnostics = list[dict[str, Tensor]]
"""One entry per layer: what its mixer's `diagnostics` returned."""


class LayerNorm(nn.LayerNorm):
    """Normalises in its weight's dtype: float32 even where the residual stream is bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class RMSNorm(nn.RMSNorm):
    """Normalises in its weight's dtype: float32 even where the residual stream is bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_norm(kind: str, width: int, eps: float = 1e-5) -> nn.Module:
    return LayerNorm(width, eps=eps) if kind == "layernorm" else RMSNorm(width, eps=eps)


class GeluMLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # (B, T, F) inside


class SwiGLU(nn.Module):
    """SiLU-gated linear unit (Shazeer, arXiv 2002.05202)."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.gate = nn.Linear(d_model, width, bias=False)
        self.up = nn.Linear(d_model, width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, F) inside


class Block(nn.Module):
    """A mixer and what surrounds it; adds its output to the residual stream. Subclasses implement `_run`."""

    mixer: Mixer

    def forward(self, x: Tensor, segment_ids: Tensor | None = None, diagnose: bool = False) -> Any:
        """(B, T, D) -> (B, T, D); with `diagnose`, that and the mixer's diagnostics.

        They are returned: a list to be filled would be filled in a copy, since FSDP2 makes one of all arguments.
        """
        diagnostics: Diagnostics = []

        def mix(y: Tensor) -> Tensor:
            if diagnose:
                diagnostics.append(self._diagnose(y, segment_ids))
            return self.mixer(y, segment_ids)

        x = self._run(x, mix)
        return (x, diagnostics[0]) if diagnose else x

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, T, D) and the mixer's State -> the same after T more tokens."""
        states = [state]

        def mix(y: Tensor) -> Tensor:
            y, states[0] = self.mixer.extend(y, states[0])
            return y

        return self._run(x, mix), states[0]

    @torch.compiler.disable
    def _diagnose(self, x: Tensor, segment_ids: Tensor | None) -> dict[str, Tensor]:
        return self.mixer.diagnostics(x, segment_ids)

    def _run(self, x: Tensor, mix) -> Tensor:
        raise NotImplementedError

    def residual_projections(self) -> list[nn.Module]:
        """The linear maps whose outputs are added to the residual stream."""
        raise NotImplementedError


class GatedBlock(Block):
    """The Sessa paper's block around any mixer: x + W_out(mixer(GELU(a)) * g), a, g = W_in(norm(x))."""

    def __init__(self, mixer: Mixer, d_model: int, norm: str, dropout: float, norm_eps: float = 1e-5):
        super().__init__()
        self.norm = make_norm(norm, d_model, norm_eps)
        self.in_proj = nn.Linear(d_model, 2 * d_model)
        self.mixer = mixer
        self.out_proj = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def _run(self, x: Tensor, mix) -> Tensor:
        a, g = self.in_proj(self.norm(x)).chunk(2, dim=-1)  # (B, T, D) each
        return x + self.dropout(self.out_proj(mix(F.gelu(a)) * g))

    def residual_projections(self) -> list[nn.Module]:
        return [self.out_proj]


class TransformerBlock(Block):
    """x + mixer(norm(x)), then x + mlp(norm(x)) unless there is no MLP.

    A mixer that does not end in a projection of its own gets one, `out_proj`: the residual stream must not take
    up its output at whatever scale that has. Sessa's feedback sums the past, up to 1 / (1 - gamma) fold.
    """

    def __init__(
        self,
        mixer: Mixer,
        d_model: int,
        norm: str,
        dropout: float,
        mlp: str,
        mlp_dim: int,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.norm = make_norm(norm, d_model, norm_eps)
        self.mixer = mixer
        self.out_proj = (
            nn.Linear(d_model, d_model, bias=False) if mixer.output_projection is None else nn.Identity()
        )
        self.mlp_norm = None if mlp == "none" else make_norm(norm, d_model, norm_eps)
        self.mlp = (
            None
            if mlp == "none"
            else SwiGLU(d_model, mlp_dim)
            if mlp == "swiglu"
            else GeluMLP(d_model, mlp_dim)
        )
        self.dropout = nn.Dropout(dropout)

    def _run(self, x: Tensor, mix) -> Tensor:
        x = x + self.dropout(self.out_proj(mix(self.norm(x))))
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x

    def residual_projections(self) -> list[nn.Module]:
        name = self.mixer.output_projection
        projection = self.out_proj if name is None else self.mixer.get_submodule(name)
        return [projection] if self.mlp is None else [projection, self.mlp.down]


MLP_RATIO = {"swiglu": 8 / 3, "gelu": 4.0}
"""Hidden width of an MLP by the model's: SwiGLU's three matrices have the parameters of two of 4 D."""


def default_mlp_dim(d_model: int, mlp: str) -> int:
    """4 D, or for SwiGLU 8/3 D rounded up to a multiple of 64."""
    return math.ceil(8 * d_model / 3 / 64) * 64 if mlp == "swiglu" else 4 * d_model
