"""The contract between a decoder and the token mixers in its layers.

Letters: B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


@dataclass
class State:
    """What a mixer remembers of the positions it has seen: batch-first tensors and a length per row.

    Subclasses add fields: tensors with the batch first, other States, or plain values such as `max_len`, which stay
    as they are. `extend` returns `state.advanced(T, field=...)`.
    A State is used up by `extend`, which may write into its tensors; `clone()` branches it.
    """

    length: Tensor  # (B,) int64, positions seen so far
    longest: int = field(default=0, kw_only=True)
    """At least the most of `length`, for the host: to read `length` would wait for the device."""

    def advanced(self, new: int, **changes: Any) -> Self:
        """The State after `new` more positions, with these fields changed."""
        return replace(self, length=self.length + new, longest=self.longest + new, **changes)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, State):
                value = value._map(function)
            elif isinstance(value, Tensor):
                value = function(value)
            values[name] = value
        return type(self)(**values)

    def clone(self) -> Self:
        """An independent copy: extending one of the two leaves the other as it is."""
        return self._map(Tensor.clone)

    def bounded(self, longest: int) -> Self:
        """This State, tensors and all, with another `longest`, in the States inside too."""
        changes: dict[str, Any] = {"longest": longest}
        for name in (f.name for f in fields(self)):
            if isinstance(value := getattr(self, name), State):
                changes[name] = value.bounded(longest)
        return replace(self, **changes)

    def assign(self, after: Self) -> None:
        """Writes the numbers of `after`, which has the same shapes, into the tensors of this State.

        Raises ValueError where a plain value other than `longest` differs, for that is no place to write to.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        for name in (f.name for f in fields(self)):
            old, new = getattr(self, name), getattr(after, name)
            if isinstance(old, State):
                old.assign(new)
            elif isinstance(old, Tensor):
                pairs.append((old, new))
            elif name != "longest" and old != new:
                raise ValueError(
                    f"{type(self).__name__}.{name} changes from {old} to {new}, and is no tensor"
                )
        # Copied first: what is new may share memory with another of the old tensors.
        for old, new in [(old, new.clone()) for old, new in pairs if new is not old]:
            old.copy_(new)

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """One State for the rows of several, in order; all must have the same `max_len`."""
        values: dict[str, Any] = {}
        for name in (f.name for f in fields(cls)):
            parts = [getattr(state, name) for state in states]
            if name == "longest":
                values[name] = max(parts)
            elif isinstance(parts[0], State):
                values[name] = type(parts[0]).cat(parts)
            elif isinstance(parts[0], Tensor):
                values[name] = torch.cat(parts)
            elif all(part == parts[0] for part in parts):
                values[name] = parts[0]
            else:
                raise ValueError(f"states to concatenate differ in {name}: {parts}")
        return cls(**values)

    def nbytes(self) -> int:
        """Bytes of the tensors that hold the past (not of `length`), over all rows."""
        values = [getattr(self, f.name) for f in fields(self) if f.name != "length"]
        return sum(
            v.nbytes() if isinstance(v, State) else v.nbytes for v in values if isinstance(v, (State, Tensor))
        )


def check_room(longest: int, new: int, max_len: int) -> None:
    """Raises ValueError if a State whose `longest` is this has no room for `new` more positions."""
    if longest + new > max_len:
        raise ValueError(
            f"the state holds {longest} of at most {max_len} positions and cannot take {new} more; "
            f"call init_state with max_len of at least {longest + new}"
        )


@dataclass(frozen=True)
class Contract:
    """What a mixer promises of all that `mixerlab.mixers.testing` checks; with other people's kernels it is less."""

    dtype: torch.dtype = torch.float64
    """The widest in which it computes, and in which it is checked."""

    tolerance: float = 1e-10
    """Of values that must agree however they are computed, cut or packed; in float64."""

    one_graph: bool = True
    """Does torch.compile make one graph of it?"""

    counted_flops: bool = True
    """Does torch's counter see its matrix products, in the form without kernels? `flops` is a formula otherwise."""

    needs_triton: bool = False
    """Does it run on a GPU alone, or else in Triton's interpreter?"""


class Mixer(nn.Module):
    """Maps (B, T, D) to (B, T, D), causally: the output at t depends on inputs up to t alone.

    A subclass takes `(config, d_model, layer_index, n_layers)`, sets the class attributes below where they
    differ, and implements every method but `reset_parameters`, `diagnostics`, `mix_fixed` and `routing`, which are
    optional.
    """

    supports_segments: bool = False
    """May several documents be packed into one row, told apart by `segment_ids`? A mixer with others inside
    says of its class whether it could, and sets it on the instance once it knows them."""

    no_decay: ClassVar[tuple[str, ...]] = ()
    """Own parameters that weight decay must spare: gains, decays, steps. Biases and norms are spared without
    being named."""

    keep_float32: ClassVar[tuple[str, ...]] = ()
    """Own parameters that stay in float32 where the others are bf16, which is too coarse for them: gains, decays,
    steps. Biases and norms stay float32 without being named."""

    micro_batches: int = 1
    """Forward passes whose gradients are summed to one optimiser step; set by the training side on every mixer. A
    mixer that adds the gradient of a penalty in its backward pass divides it by this."""

    surrogate: ClassVar[tuple[str, ...]] = ()
    """Own parameters (dotted names reach into submodules) whose gradient in evaluation mode is on purpose not
    the output's derivative, such as straight-through estimates: `mixerlab.mixers.testing` does not compare them with
    finite differences."""

    contract: ClassVar[Contract] = Contract()
    """What it promises, and to which precision."""

    output_projection: str | None = None
    """The submodule, a linear map, whose output is the mixer's: initialised smaller with depth where a block adds
    the mixer's output straight to the residual stream. Where there is None such a block adds its own."""

    def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), parallel in time, for training.

        `segment_ids` (B, T) int64, non-decreasing in a row: nothing flows from one segment to another, and
        the first position of each is like position 0. A mixer without `supports_segments` raises ValueError.
        """
        raise NotImplementedError

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """An empty State for `batch_size` rows of up to `max_len` positions."""
        raise NotImplementedError

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, T, D) and the State before it -> (B, T, D) and the State after it.

        However a sequence is cut, the outputs put together equal those of `forward`. The State given is
        used up, and its tensors may be written to: gradients are of the newest call alone. Raises ValueError
        past `max_len`.
        """
        raise NotImplementedError

    def flops(self, seq_len: int) -> int:
        """Matrix-product FLOPs of one forward sequence; causal halves are counted once."""
        raise NotImplementedError

    def state_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        """Bytes of the State of one sequence, made with max_len == seq_len."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draws the mixer's own parameters anew (not those of submodules), on whatever device they are.

        A mixer that has any must implement it: a run's initial values come from its seed alone.
        """
        if own := [name for name, _ in self.named_parameters(recurse=False)]:
            raise NotImplementedError(
                f"{type(self).__name__} must draw {', '.join(own)} in reset_parameters()"
            )

    def diagnostics(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        """What is worth watching in training: name -> values of any shape, logged as mean and spread."""
        return {}

    def mix_fixed(self, x: Tensor, values: Tensor, segment_ids: Tensor | None = None) -> Tensor | None:
        """What each head makes of `values` with the routing that `x` gives: its influence, of any columns at once.

        All that says where information goes (attention weights, gains, steps, B and C) is computed from `x` (B, T, D)
        and then held, so that the result is linear in `values` (B, T, C). Those take the place of what the heads mix,
        the same for every head and each of the C columns alone: a unit impulse at tau gives the influence of tau on
        every t. What maps features at one position (projections, gates, norms) or sees a few neighbours (the short
        convolution before a scan) is left out.

        Returns (B, H, T, C), H being heads, or channels, or paths through several, whichever are routed apart; None
        where a mixer has no such routing. No gradient is promised.
        """
        return None

    def routing(self, x: Tensor, segment_ids: Tensor | None = None) -> dict[str, Tensor]:
        """For pictures of a short text: name -> weights (B, H, T, T), from tau to t, or values (B, H, T)."""
        return {}

    def refuse_segments(self, segment_ids: Tensor | None) -> None:
        """Raises ValueError unless `segment_ids` is None; for mixers that cannot keep documents apart."""
        if segment_ids is not None:
            raise ValueError(
                f"{type(self).__name__} cannot keep packed documents apart (supports_segments is False); "
                "give it rows without segment_ids"
            )
