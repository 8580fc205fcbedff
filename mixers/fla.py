"""Layers of flash-linear-attention (github.com/fla-org/flash-linear-attention) as mixers.

Their kernels are Triton's: they run on a GPU, in float32 or less. Decoding hands a layer its past through a cache of
one layer, made anew for each call from tensors of fixed shapes, of which zeros mean that there is no past.

Letters: B batch, T time, D model width, H heads, K key width, P value width, W kernel width of a convolution.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mixerlab.kernels.backend import why_not_triton
from mixerlab.kernels.fla import document_bounds
from mixerlab.mixers.mixer import Contract, Mixer, State, check_room
from mixerlab.mixers.registry import register_mixer
from mixerlab.mixers.rotary import rotate
from mixerlab.options import PluginError, UserError, option

try:
    with warnings.catch_warnings(action="ignore"):  # where there is no GPU
        from fla import layers
        from fla.modules import ShortConvolution
except ModuleNotFoundError as error:
    if error.name != "fla":
        raise
    raise PluginError(
        "flash-linear-attention is not installed; expected it: pip install 'mixerlab[fla]'"
    ) from error

Shape = tuple[int, ...]


@dataclass
class NoOptions:
    pass


@dataclass
class HeadsConfig:
    n_heads: int | None = option(
        None, "heads; null: each as wide as the largest power of 2 up to 128 that fits", min=1
    )

    def heads(self, d_model: int) -> int:
        """The number of heads in a model of width `d_model`."""
        return self.n_heads or d_model // math.gcd(d_model, 128)

    def problems(self, d_model: int) -> Iterator[tuple[str, str]]:
        if d_model % (2 * self.heads(d_model)):
            yield "n_heads", f"twice their number must divide model.d_model = {d_model}"


@dataclass
class SlotsConfig(HeadsConfig):
    n_slots: int = option(64, "slots of a head's memory", min=1)


@dataclass
class GatedDeltaNetConfig:
    n_heads: int | None = option(
        None, "heads; null: as many as make all keys together three quarters of the model's width", min=1
    )
    head_dim: int | None = option(
        None, "key width of a head; null: the largest power of 2 up to 128 that fits", min=1
    )
    expand_v: int = option(2, "value width of a head as a multiple of its key width", min=1)


MEMORIES, TAILS = ("memory", "second"), ("tail_q", "tail_k", "tail_v")


@dataclass
class FlaState(State):
    max_len: int
    memory: Tensor  # (B, ...) float32: (B, H, K, P), (B, H, P, K), or what else a layer has
    second: Tensor | None = None  # (B, ...) float32, of a layer with two memories
    tail_q: Tensor | None = None  # (B, ...), the last inputs of a convolution, or of the shift of RWKV
    tail_k: Tensor | None = None
    tail_v: Tensor | None = None


class _OneLayer:
    """What a layer asks of fla's cache, where one tensor is itself and several are a tuple."""

    def __init__(self, memories: tuple[Tensor, ...], tails: tuple[Tensor, ...], lengths: Tensor):
        memory, tail = (x if len(x) > 1 else x[0] if x else None for x in (memories, tails))
        self.past, self.lengths = {"recurrent_state": memory, "conv_state": tail}, lengths

    def __len__(self) -> int:
        return 1

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self.past

    def get_seq_length(self, layer_idx: int) -> Tensor:
        return self.lengths

    def update(self, recurrent_state: Any = None, conv_state: Any = None, **_: Any) -> None:
        self.past = {"recurrent_state": recurrent_state, "conv_state": conv_state}

    def tensors(self) -> list[Tensor]:
        """Memories and tails, in order."""
        parts = [[x] if isinstance(x, Tensor) else x for x in self.past.values() if x is not None]
        return [tensor for part in parts for tensor in part]


class FlaMixer(Mixer):
    """A layer of fla. A subclass says which, with which arguments, and what it remembers."""

    supports_segments = True
    output_projection = "layer.o_proj"
    contract = Contract(
        dtype=torch.float32, tolerance=2e-4, one_graph=False, counted_flops=False, needs_triton=True
    )
    layer: Any
    layer_class: ClassVar[type[nn.Module]]
    values_first: ClassVar[bool] = False
    """Is the memory (H, P, K) instead of (H, K, P)?"""
    products: ClassVar[int] = 2
    """Matrix products with the memory at each position: what is written and what is read."""

    def __init__(self, config: Any, d_model: int, layer_index: int = 0, n_layers: int = 1):
        super().__init__()
        self.config, self.d_model = config, d_model
        self.layer = self._build()
        for name, module in self.layer.named_modules():
            own = tuple(name for name, _ in module.named_parameters(recurse=False))
            if own and not isinstance(module, (nn.Linear, nn.Conv1d)):
                module.no_decay = module.keep_float32 = own  # norms, gains, decays, steps
                if not hasattr(module, "reset_parameters"):
                    module.reset_parameters = functools.partial(self._redraw, name)

    def arguments(self) -> Mapping[str, Any]:
        """The layer's, beside its width."""
        return {"num_heads": self.config.heads(self.d_model)}

    def memories(self) -> list[Shape]:
        """Shapes of what the layer remembers of a row beside its convolutions' inputs: one or two."""
        widths = (self.layer.head_k_dim, self.layer.head_v_dim)
        return [(self.layer.num_heads, *(reversed(widths) if self.values_first else widths))]

    def tails(self) -> list[Shape]:
        """Shapes of the inputs that it remembers of a row: none, one or three."""
        convolutions = [m for m in self.layer.children() if isinstance(m, ShortConvolution)]
        return [(conv.hidden_size, conv.kernel_size[0]) for conv in convolutions]

    def _build(self) -> Any:
        with warnings.catch_warnings(action="ignore"):  # RWKV's, at each layer
            return self.layer_class(hidden_size=self.d_model, layer_idx=0, **self.arguments())

    @torch.no_grad()
    def _redraw(self, path: str) -> None:
        """Draws a module's own parameters as its constructor does, which has no other way."""
        with torch.device("cpu"):  # so that the values are the same on every device
            fresh = self._build().get_submodule(path)
        for name, parameter in self.layer.get_submodule(path).named_parameters(recurse=False):
            parameter.copy_(fresh.get_parameter(name))

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        if segment_ids is None:
            return self._run(x)
        rows = x.reshape(1, -1, self.d_model)  # laid end to end (1, B T, D)
        return self._run(rows, cu_seqlens=document_bounds(segment_ids)).view(x.shape)

    @torch.compiler.disable  # its kernels would break the graph many times
    def _run(self, x: Tensor, **options: Any) -> Tensor:
        if reason := why_not_triton(x):
            raise UserError(f"{type(self).__name__} of fla cannot take this input: {reason}")
        return self.layer(x, **options)[0]

    def init_state(self, batch_size, max_len, device=None, dtype=None) -> FlaState:
        tensors: dict[str, Any] = {}
        # In bf16 the sum over a long past would stop growing.
        for names, shapes, kind in ((MEMORIES, self.memories(), torch.float32), (TAILS, self.tails(), dtype)):
            for name, shape in zip(names, shapes, strict=False):
                tensors[name] = torch.zeros(batch_size, *shape, device=device, dtype=kind)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return FlaState(length, max_len, **tensors)

    def extend(self, x: Tensor, state: FlaState) -> tuple[Tensor, FlaState]:
        check_room(state.longest, x.shape[1], state.max_len)
        before = {name: t for name in (*MEMORIES, *TAILS) if (t := getattr(state, name)) is not None}
        memories, tails = (tuple(before[n] for n in names if n in before) for names in (MEMORIES, TAILS))
        cache = _OneLayer(memories, tails, state.length)
        y = self._run(x, past_key_values=cache, use_cache=True)
        pairs = zip(before.items(), cache.tensors(), strict=True)
        changes = {name: new.to(old.dtype) for (name, old), new in pairs}
        return y, state.advanced(x.shape[1], **changes)

    def flops(self, seq_len: int) -> int:
        linear = sum(m.weight.numel() for m in self.layer.modules() if isinstance(m, nn.Linear))
        return 2 * seq_len * (linear + self.products * sum(map(math.prod, self.memories())))

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        return 4 * sum(map(math.prod, self.memories())) + dtype.itemsize * sum(map(math.prod, self.tails()))


@register_mixer("deltanet", HeadsConfig)
class DeltaNet(FlaMixer):
    """A memory in which the value of a key is replaced (Yang et al., arXiv 2406.06484)."""

    layer_class = layers.DeltaNet
    products = 3  # what a key finds is read too

    def _run(self, x: Tensor, **options: Any) -> Tensor:
        # The kernel by chunks refuses float32; step by step is as exact, and slow.
        low = torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize == 2
        self.layer.mode = "chunk" if low else "fused_recurrent"
        return super()._run(x, **options)


@register_mixer("fla_gated_deltanet", GatedDeltaNetConfig)
class FlaGatedDeltaNet(FlaMixer):
    """fla's own layer of what `gated_deltanet` is (Yang et al., arXiv 2412.06464)."""

    layer_class = layers.GatedDeltaNet
    values_first = True
    products = 3

    def arguments(self) -> Mapping[str, Any]:
        wanted = max(1, 3 * self.d_model // 4)
        head_dim = self.config.head_dim or math.gcd(wanted, 128)
        n_heads = self.config.n_heads or max(1, wanted // head_dim)
        return {"num_heads": n_heads, "head_dim": head_dim, "expand_v": self.config.expand_v}


@register_mixer("kda", HeadsConfig)
class KimiDeltaAttention(FlaMixer):
    """The gated delta rule with a decay for each key channel (Kimi Team, arXiv 2510.26692)."""

    layer_class = layers.KimiDeltaAttention
    values_first = True
    products = 3

    def arguments(self) -> Mapping[str, Any]:
        heads = self.config.heads(self.d_model)
        return {"num_heads": heads, "head_dim": self.d_model // heads}


@register_mixer("gla", HeadsConfig)
class GatedLinearAttention(FlaMixer):
    """A memory with a decay for each key channel (Yang et al., arXiv 2312.06635)."""

    layer_class = layers.GatedLinearAttention
    values_first = True


@register_mixer("hgrn2", HeadsConfig)
class HGRN2(FlaMixer):
    """Gated linear attention whose keys are what its decays leave (Qin et al., arXiv 2404.07904)."""

    layer_class = layers.HGRN2Attention

    def arguments(self) -> Mapping[str, Any]:
        return {"num_heads": self.config.heads(self.d_model), "expand_ratio": None}

    def memories(self) -> list[Shape]:
        return [(self.layer.num_heads, self.layer.head_i_dim, self.layer.head_f_dim)]


@register_mixer("hgrn", NoOptions)
class HGRN(FlaMixer):
    """A gated recurrence of each channel alone (Qin et al., arXiv 2311.04823)."""

    layer_class = layers.HGRNAttention
    products = 0

    def arguments(self) -> Mapping[str, Any]:
        return {"mode": "fused_recurrent"}  # the other takes no packed documents

    def memories(self) -> list[Shape]:
        return [(self.layer.input_dim,)]


@register_mixer("gsa", SlotsConfig)
class GatedSlotAttention(FlaMixer):
    """Attention over a fixed number of slots, that are forgotten and written (Zhang et al., arXiv 2409.07146)."""

    layer_class = layers.GatedSlotAttention

    def arguments(self) -> Mapping[str, Any]:
        return {**super().arguments(), "num_slots": self.config.n_slots}

    def memories(self) -> list[Shape]:
        heads, slots = self.layer.num_heads, self.layer.num_slots
        return [(heads, self.layer.head_k_dim, slots), (heads, slots, self.layer.head_v_dim)]


@register_mixer("rwkv6", HeadsConfig)
class RWKV6(FlaMixer):
    """The time mixing of Finch (Peng et al., arXiv 2404.05892)."""

    layer_class = layers.RWKV6Attention

    def tails(self) -> list[Shape]:
        return [(self.d_model,)]


@register_mixer("linear_attention", HeadsConfig)
class LinearAttention(FlaMixer):
    """A sum over the past, read through elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236) and normed."""

    layer_class = layers.LinearAttention

    def arguments(self) -> Mapping[str, Any]:
        return {**super().arguments(), "feature_map": "elu"}


@register_mixer("retnet", HeadsConfig)
class Retention(FlaMixer):
    """A memory with one fixed decay per head, and rotary positions (Sun et al., arXiv 2307.08621)."""

    layer_class = layers.MultiScaleRetention

    def _build(self) -> Any:
        layer = super()._build()
        layer.rotary = _Rotary()
        return layer


class _Rotary(nn.Module):
    """As fla's, which has a table in place of the frequencies, and one position for all rows of a batch."""

    def forward(
        self, q: Tensor, k: Tensor, seqlen_offset: int | Tensor = 0, max_seqlen=None, cu_seqlens=None
    ) -> tuple[Tensor, Tensor]:
        """q, k (B, T, H, K), offsets (B,) -> rotated q and k, their channels in another order."""
        positions = torch.arange(q.shape[1], device=q.device)[None]  # (1, T)
        if cu_seqlens is not None:
            starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=q.shape[1])
            positions = positions - starts
        elif isinstance(seqlen_offset, Tensor):
            positions = positions + seqlen_offset[:, None]  # (B, T)

        def rotated(x: Tensor) -> Tensor:
            # Channels i and i + K/2 are a pair there; here they are neighbours.
            pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # (B, T, H, K)
            return rotate(pairs.transpose(1, 2), positions, 10000.0).transpose(1, 2)

        return rotated(q), rotated(k)
