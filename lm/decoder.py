"""A decoder-only language model whose layers hold any mixer.

Letters: B batch, T time, D model width, F MLP width, V vocabulary, N = B * T positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixers import Mixer, State, build_mixer

Watched = list[dict[str, Tensor]]
"""One entry per layer: what its mixer's `diagnostics` returned."""


class LayerNorm(nn.LayerNorm):
    """Normalises in its weight's dtype: float32 even where the residual stream is bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class RMSNorm(nn.RMSNorm):
    """Normalises in its weight's dtype: float32 even where the residual stream is bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_norm(kind: str, width: int) -> nn.Module:
    return LayerNorm(width, eps=1e-5) if kind == "layernorm" else RMSNorm(width, eps=1e-5)


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

    def forward(self, x: Tensor, segment_ids: Tensor | None = None, watched: Watched | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). Appends the mixer's diagnostics to `watched` if that is given."""

        def mix(y: Tensor) -> Tensor:
            if watched is not None:
                watched.append(self._diagnose(y, segment_ids))
            return self.mixer(y, segment_ids)

        return self._run(x, mix)

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

    def __init__(self, mixer: Mixer, d_model: int, norm: str, dropout: float):
        super().__init__()
        self.norm = make_norm(norm, d_model)
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

    def __init__(self, mixer: Mixer, d_model: int, norm: str, dropout: float, mlp: str, mlp_width: int):
        super().__init__()
        self.norm = make_norm(norm, d_model)
        self.mixer = mixer
        self.out_proj = (
            nn.Linear(d_model, d_model, bias=False) if mixer.output_projection is None else nn.Identity()
        )
        self.mlp_norm = None if mlp == "none" else make_norm(norm, d_model)
        self.mlp = (
            None
            if mlp == "none"
            else SwiGLU(d_model, mlp_width)
            if mlp == "swiglu"
            else GeluMLP(d_model, mlp_width)
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


class Decoder(nn.Module):
    """Token embedding, blocks, final norm, head.

    `mixer` is a name, a mapping with `name` and options, or a list of those, repeated over the depth.
    Raises ValueError for mixers or options that do not exist or do not fit `d_model`.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 256,
        n_layers: int = 4,
        mixer: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = "sessa",
        block: str = "gated",
        mlp: str = "swiglu",
        mlp_width: int | None = None,
        norm: str = "layernorm",
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.init_std = init_std
        specs = [mixer] if isinstance(mixer, (str, Mapping)) else list(mixer)
        if mlp_width is None:
            mlp_width = default_mlp_width(d_model, mlp)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        blocks: list[Block] = []
        for i in range(n_layers):
            layer_mixer = build_mixer(specs[i % len(specs)], d_model, i, n_layers)
            blocks.append(
                GatedBlock(layer_mixer, d_model, norm, dropout)
                if block == "gated"
                else TransformerBlock(layer_mixer, d_model, norm, dropout, mlp, mlp_width)
            )
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(norm, d_model)
        self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        watched: Watched | None = None,
    ) -> Any:
        """Logits, or with labels the loss of each position.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, what each position must predict; -100: nothing.
            segment_ids: (B, T) int64, the document of each position in a packed row.
            watched: a list that receives each layer's mixer diagnostics.

        Returns:
            Without labels, logits (B, T, V). With labels, `nll` (B, T) float32 in nats, 0 where there is no
            label, and `correct` (B, T) bool, whether the likeliest token is the label; then the logits of
            all positions never exist together in float32.
        """
        x = self.dropout(self.embedding(input_ids))  # (B, T, D)
        for block in self.layers:
            x = block(x, segment_ids, watched)
        x = self.norm(x)
        if labels is None:
            return F.linear(x, self._head_weight())  # (B, T, V)
        return token_losses(x, self._head_weight(), labels)

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast(list[Block], list(self.blocks))

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight  # (V, D)

    def init_state(self, batch_size: int, max_len: int) -> list[State]:
        """Empty States, one per layer, for `batch_size` rows of up to `max_len` tokens."""
        weight = self.embedding.weight
        return [
            block.mixer.init_state(batch_size, max_len, weight.device, weight.dtype) for block in self.layers
        ]

    def extend(self, input_ids: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """(B, T) new tokens and the States before -> logits (B, T, V) and the States after them."""
        x = self.embedding(input_ids)  # (B, T, D)
        after = []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block.extend(x, state)
            after.append(state)
        return F.linear(self.norm(x), self._head_weight()), after

    def initialize(self, seed: int, only: Container[nn.Module] | None = None) -> None:
        """Draws every parameter anew, or those of the modules in `only`. Values depend on (seed, name) alone.

        Linear maps and the embedding: normal with `init_std`, those whose output is added to the residual
        stream divided by sqrt(number of such additions) (Radford et al., GPT-2). Biases: 0. The rest is up to
        each module's `reset_parameters`.
        """
        residual = [p for block in self.layers for p in block.residual_projections()]
        modules = [
            (name, module)
            for name, module in self.named_modules()
            if (only is None or module in only) and next(module.parameters(recurse=False), None) is not None
        ]
        for name, module in reversed(modules):  # children first, so that a mixer has the last word on its own
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
                torch.manual_seed(int.from_bytes(digest, "little") >> 1)
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    scale = 1 / math.sqrt(len(residual)) if any(module is p for p in residual) else 1.0
                    # Drawn on the CPU, so that the values are the same on every device.
                    drawn = torch.randn(module.weight.shape) * (self.init_std * scale)
                    module.weight.copy_(drawn)
                    if isinstance(module, nn.Linear) and module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
                else:
                    raise TypeError(
                        f"{name}: {type(module).__name__} has parameters but no reset_parameters()"
                    )

    def flops(self, seq_len: int) -> int:
        """Matrix-product FLOPs of one forward sequence; training takes three times that."""
        total = 2 * seq_len * self._head_weight().numel()
        for block in self.layers:
            mixer = {id(p) for p in block.mixer.parameters()}
            dense = sum(p.numel() for p in block.parameters() if p.ndim == 2 and id(p) not in mixer)
            total += 2 * seq_len * dense + block.mixer.flops(seq_len)
        return total

    def parameter_groups(self) -> dict[str, int]:
        """Number of parameters by what they are for, all in all; "block": projections around mixers, and norms."""
        mixers = sum(p.numel() for block in self.layers for p in block.mixer.parameters())
        mlps = sum(p.numel() for name, p in self.blocks.named_parameters() if ".mlp." in name)
        blocks = sum(p.numel() for p in self.blocks.parameters())
        return {
            "embedding": self.embedding.weight.numel(),
            "mixer": mixers,
            "MLP": mlps,
            "block": blocks - mixers - mlps + sum(p.numel() for p in self.norm.parameters()),
            "head": 0 if self.head is None else self.head.weight.numel(),
        }


MLP_RATIO = {"swiglu": 8 / 3, "gelu": 4.0}
"""Hidden width of an MLP by the model's: SwiGLU's three matrices have the parameters of two of 4 D."""


def default_mlp_width(d_model: int, mlp: str) -> int:
    """4 D, or for SwiGLU 8/3 D rounded up to a multiple of 64."""
    return math.ceil(8 * d_model / 3 / 64) * 64 if mlp == "swiglu" else 4 * d_model


def no_decay_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay spares and low precision leaves in float32.

    Biases, norms' weights and what a module lists as `no_decay` (gains, decays, step sizes).
    """
    names = set()
    for prefix, owner in module.named_modules():
        for name, _ in owner.named_parameters(recurse=False):
            is_norm = isinstance(owner, (nn.LayerNorm, nn.RMSNorm))
            if is_norm or name == "bias" or name in getattr(owner, "no_decay", ()):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


LOGITS_AT_ONCE = 2**25
"""Elements of the largest float32 block of logits that the loss makes (128 MiB)."""


def token_losses(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position without holding all logits.

    The positions are cut into pieces whose logits are made, used and dropped, and made again in the backward
    pass. x (B, T, D), weight (V, D), labels (B, T) -> nll (B, T) float32 in nats, correct (B, T) bool.
    """
    n_positions = labels.numel()
    pieces = max(8, math.ceil(n_positions * weight.shape[0] / LOGITS_AT_ONCE))
    size = max(1, math.ceil(n_positions / pieces))
    nlls, hits = [], []
    for x_piece, y_piece in zip(x.flatten(0, 1).split(size), labels.flatten().split(size), strict=True):
        if torch.is_grad_enabled():
            nll, hit = checkpoint(_piece_losses, x_piece, weight, y_piece, use_reentrant=False)
        else:
            nll, hit = _piece_losses(x_piece, weight, y_piece)
        nlls.append(nll)
        hits.append(hit)
    return torch.cat(nlls).view_as(labels), torch.cat(hits).view_as(labels)


def _piece_losses(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, D), weight (V, D), labels (n,) -> nll (n,), correct (n,)."""
    logits = F.linear(x, weight)  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return nll, logits.argmax(-1) == labels
