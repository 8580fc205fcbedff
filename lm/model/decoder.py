"""A decoder-only language model whose layers hold any mixer.

Letters: B batch, T time, D model width, V vocabulary.
"""

import hashlib
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixerlab.data import build_data
from mixerlab.lm.model.blocks import (
    Block,
    Diagnostics,
    GatedBlock,
    TransformerBlock,
    default_mlp_dim,
    make_norm,
)
from mixerlab.lm.model.loss import token_losses
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.mixers import State, build_mixer
from mixerlab.options import Choice

Spec = str | Mapping[str, Any] | Choice
"""A mixer: its name, a mapping with `name` and options, or what `choose_mixers` makes of either."""


class Decoder(nn.Module):
    """Token embedding, blocks, final norm, head.

    `mixer` is a mixer's spec, or a list of them, repeated over the depth.
    Raises ConfigError, a ValueError, for mixers or options that do not exist or do not fit `d_model`.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 256,
        n_layers: int = 4,
        mixer: Spec | Sequence[Spec] = "sessa",
        block: str = "gated",
        mlp: str = "swiglu",
        mlp_dim: int | None = None,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        dropout: float = 0.0,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.init_std = init_std
        specs = [mixer] if isinstance(mixer, (str, Mapping, Choice)) else list(mixer)
        if mlp_dim is None:
            mlp_dim = default_mlp_dim(d_model, mlp)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        blocks: list[Block] = []
        for i in range(n_layers):
            layer_mixer = build_mixer(specs[i % len(specs)], d_model, i, n_layers)
            blocks.append(
                GatedBlock(layer_mixer, d_model, norm, dropout, norm_eps)
                if block == "gated"
                else TransformerBlock(layer_mixer, d_model, norm, dropout, mlp, mlp_dim, norm_eps)
            )
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(norm, d_model, norm_eps)
        self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        diagnose: bool = False,
    ) -> Any:
        """Logits, or with labels the loss of each position.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, what each position must predict; -100: nothing.
            segment_ids: (B, T) int64, the document of each position in a packed row.
            diagnose: return each layer's mixer diagnostics too.

        Returns:
            Without labels, logits (B, T, V). With labels, `nll` (B, T) float32 in nats, 0 where there is no
            label, and `correct` (B, T) bool, whether the likeliest token is the label; then the logits of
            all positions never exist together in float32. With `diagnose`, a pair of that and Diagnostics.
        """
        diagnostics: Diagnostics = []
        x = self.dropout(self.embedding(input_ids))  # (B, T, D)
        for block in self.layers:
            x = block(x, segment_ids, diagnose)
            if diagnose:
                x, values = x
                diagnostics.append(values)
        x = self.norm(x)
        # (B, T, V), or the losses
        result = (
            F.linear(x, self.head_weight()) if labels is None else token_losses(x, self.head_weight(), labels)
        )
        return (result, diagnostics) if diagnose else result

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast(list[Block], list(self.blocks))

    def head_weight(self) -> Tensor:
        """(V, D), the embedding's where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

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
        return F.linear(self.norm(x), self.head_weight()), after

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
        total = 2 * seq_len * self.head_weight().numel()
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


def build_decoder(recipe: Recipe, vocab_size: int) -> Decoder:
    """The recipe's decoder, not yet initialised. Its width must be known: see `match.sized`."""
    assert recipe.model.is_sized
    options = {key: value for key, value in vars(recipe.model).items() if not key.startswith("match")}
    return Decoder(vocab_size, **options)


def count_parameters(recipe: Recipe) -> int:
    """Parameters of the recipe's decoder. Allocates none of them and touches no data."""
    with torch.device("meta"):
        decoder = build_decoder(recipe, build_data(recipe.data, recipe.seed).vocab_size)
    return sum(p.numel() for p in decoder.parameters())


def spared_parameters(module: nn.Module, lists: str) -> set[str]:
    """Names of biases, of norms' weights, and of what the modules inside name in their list `lists`.

    The lists are `no_decay`, what weight decay spares, and `keep_float32`, what low precision does not touch.
    """
    names = set()
    for prefix, owner in module.named_modules():
        for name, _ in owner.named_parameters(recurse=False):
            is_norm = isinstance(owner, (nn.LayerNorm, nn.RMSNorm))
            if is_norm or name == "bias" or name in getattr(owner, lists, ()):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names
