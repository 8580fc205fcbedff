"""What attention remembers: the keys and values of the past, or of its newest positions.

Letters: B batch, T new positions, S slots, G key-value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixerlab.mixers.mixer import State


@dataclass
class AttentionState(State):
    k: Tensor  # (B, G, S, K), rotated; position p lies in slot p mod S
    v: Tensor  # (B, G, S, K)
    selected: Tensor | None  # (B, S) bool, the slots that later positions see; None: all
    max_len: int

    def write(self, k: Tensor, v: Tensor, positions: Tensor, selected: Tensor | None) -> None:
        """Keeps keys and values (B, G, T, K) of new positions (B, T), and which of them are selected (B, T)."""
        slots = self.k.shape[2]
        # Of more new positions than slots only the last survive; writing all would leave the order to chance.
        kept = slice(max(0, positions.shape[1] - slots), None)
        at = positions[:, kept] % slots
        write_slots(self.k, k[:, :, kept], at)
        write_slots(self.v, v[:, :, kept], at)
        if selected is not None:
            assert self.selected is not None
            self.selected.scatter_(1, at, selected[:, kept])

    def take(
        self, k: Tensor, v: Tensor, positions: Tensor, selected: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keeps what is new, as `write`, and returns all that it may see.

        Keys and values (B, G, S, K) of the dtype of `k` and `v`, views of the slots where that is theirs; their
        positions (B, S), below 0 where there is none; which of them are selected (B, S).
        """
        new = positions.shape[1]
        if new == 1 or self.longest + new <= self.k.shape[2]:
            self.write(k, v, positions, selected)
            k_all, v_all, keys_at, seen = self.advanced(new)._used()
            return k_all.to(k.dtype), v_all.to(v.dtype), keys_at, seen
        # Written first, the last of the new positions would take slots that the first of them still see.
        k_past, v_past, keys_at, seen = self._used()
        k_all, v_all = (
            torch.cat((past.to(x.dtype), x), dim=2) for past, x in ((k_past, k), (v_past, v))
        )  # (B, G, S, K)
        seen = None if seen is None or selected is None else torch.cat((seen, selected), dim=1)
        self.write(k, v, positions, selected)  # now, for what is above are views of the slots
        return k_all, v_all, torch.cat((keys_at, positions), dim=1), seen

    def _used(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of the slots in use: k and v (B, G, S, K), their positions (B, S), `selected` (B, S); views."""
        slots = self.k.shape[2]
        used = min(slots, self.longest)
        last = self.length[:, None] - 1  # (B, 1)
        slot = torch.arange(used, device=last.device)  # (S,)
        newest = last - (last - slot) % slots  # (B, S): the newest position written to each slot
        selected = None if self.selected is None else self.selected[:, :used]
        return self.k[:, :, :used], self.v[:, :, :used], newest, selected


def write_slots(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """Writes new (B, G, T, K) into cache (B, G, S, K) at slots (B, T), in place."""
    index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])  # (B, G, T, K)
    cache.scatter_(2, index, new.to(cache.dtype))
