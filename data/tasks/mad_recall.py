"""Recall as in MAD: in context, among noise, and with keys and values of several tokens.

Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv 2403.17844, with the
settings of their repository athms/mad-lab. Letters: n samples, L tokens, S pairs and T positions of a row, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import perm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixerlab.data.module import IGNORE, Rows
from mixerlab.data.registry import register_data
from mixerlab.data.tasks.draws import Draws
from mixerlab.data.tasks.task import Ids, Task, TaskConfig
from mixerlab.options import option

NONE = -1
"""In the place of a token that is not there."""


@dataclass
class MadConfig(TaskConfig):
    """What the tasks of MAD share."""

    n_train: int = option(12_800, "rows to train on", min=1)
    n_valid: int = option(1_280, "rows to validate on", min=1)


class MadTask(Task):
    """Trained on rows made with training=True, where that makes a difference."""

    config: MadConfig

    def train_dataset(self) -> Rows:
        return self.dataset("train", self.config.n_train, training=True)

    def val_datasets(self) -> dict[str, Rows]:
        return {"valid": self.dataset("valid", self.config.n_valid)}


@dataclass
class RecallConfig(MadConfig):
    vocab_size: int = option(
        16, "V: the first half are keys, the second values; and noise, if there is any", min=4
    )
    seq_len: int = option(
        128, "L, tokens of a row; the last is only a label, so the row has L - 1 positions", min=4
    )
    every_token: bool = option(
        True,
        "train on each next token, as MAD does; false: on the values that can be known, as in validation",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.seq_len % 2:
            yield "seq_len", "an even number is needed, for pairs"


@dataclass
class NoisyRecallConfig(RecallConfig):
    vocab_size: int = option(
        32, "V: n_noise noise tokens, at the end; of the others half are keys, half values", min=5
    )
    n_noise: int = option(16, "tokens that are noise", min=1)
    noise_rate: float = option(0.2, "share of the pairs that are noise instead", min=0, below=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.n_noise > self.vocab_size - 4:
            yield "n_noise", f"at most vocab_size - 4 = {self.vocab_size - 4} is needed, for keys and values"


@register_data("mad_recall", RecallConfig)
class MadRecall(MadTask):
    """MAD's in-context recall: say the value of each key that was there before (Poli et al., arXiv 2403.17844)."""

    config: RecallConfig

    def __init__(self, config: RecallConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = config.seq_len - 1, config.vocab_size

    def make(self, draws: Draws, index: Ids, training: bool = False, **how: Any) -> tuple[NDArray, NDArray]:
        config, S = self.config, self.config.seq_len // 2
        n_noise, rate = getattr(config, "n_noise", 0), getattr(config, "noise_rate", 0.0)
        symbols = config.vocab_size - n_noise
        K = symbols // 2
        value_of = draws.integers(K, symbols - 1, K)  # (n, K)
        keys = draws.integers(0, K - 1, S - 1)
        # One pair at least is none.
        is_noise = (draws.uniform(S - 1) < rate) & (np.arange(S - 1) != draws.integers(0, S - 2)[:, None])
        shown = np.zeros((len(index), K))
        np.maximum.at(shown, (np.arange(len(index))[:, None], keys), ~is_noise)
        asked = np.argmax(shown * (1 + draws.uniform(K)), axis=1)[:, None]  # each key that was shown as often
        keys, is_noise = np.concatenate([keys, asked], axis=1), np.pad(is_noise, ((0, 0), (0, 1)))
        values = np.take_along_axis(value_of, keys, axis=1)
        known = seen_before(np.where(is_noise, -1 - np.arange(S), keys))
        rows: Ids = np.stack([keys, values], axis=2)  # (n, S, 2)
        if n_noise:
            rows = np.where(is_noise[..., None], draws.integers(symbols, config.vocab_size - 1, S, 2), rows)
        targets = np.full(rows.shape, IGNORE)
        targets[..., 1] = np.where(known, values, IGNORE)
        labels = rows if training and config.every_token else targets
        return rows.reshape(len(index), -1)[:, :-1], labels.reshape(len(index), -1)[:, 1:]


@register_data("mad_noisy_recall", NoisyRecallConfig)
class MadNoisyRecall(MadRecall):
    """MAD's noisy in-context recall: the same, with tokens between the pairs that mean nothing (arXiv 2403.17844)."""


def seen_before(items: Ids) -> NDArray[np.bool_]:
    """Whether each of the items (n, S) is in an earlier place of its row."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    seen = np.zeros(items.shape, bool)
    np.put_along_axis(seen, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return seen


@dataclass
class FuzzyRecallConfig(MadConfig):
    vocab_size: int = option(16, "V: keys, as many values or one more, and padding", min=3)
    seq_len: int = option(128, "T, the positions of a row, padded at its beginning", min=8)
    key_length: int = option(3, "tokens of the longest key; in validation all keys are as long", min=1, max=4)
    value_length: int = option(3, "tokens of the longest value", min=1, max=4)
    every_token: bool = option(
        True,
        "train on each next token, as MAD does; false: on the values that can be known, as in validation",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        keys, longest = (self.vocab_size - 1) // 2, self.key_length + self.value_length
        if keys < max(self.key_length, self.value_length):
            fewest = 2 * max(self.key_length, self.value_length) + 1
            yield "vocab_size", f"at least {fewest} is needed, since the tokens of a key or value differ"
        if self.seq_len < 3 * longest:
            yield "seq_len", f"at least {3 * longest} is needed, for three of the longest pairs"


@register_data("mad_fuzzy_recall", FuzzyRecallConfig)
class MadFuzzyRecall(MadTask):
    """MAD's fuzzy in-context recall: keys and values are one to three tokens long (Poli et al., arXiv 2403.17844)."""

    config: FuzzyRecallConfig

    def __init__(self, config: FuzzyRecallConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = config.seq_len, config.vocab_size

    def make(self, draws: Draws, index: Ids, training: bool = False, **how: Any) -> tuple[NDArray, NDArray]:
        config, n = self.config, len(index)
        K, pad = (config.vocab_size - 1) // 2, config.vocab_size - 1
        shortest, longest = 1 if training else config.key_length, config.key_length
        keys = Motifs(K, shortest, longest)
        values = Motifs(pad - K, 1, config.value_length)
        S = config.seq_len // (shortest + 1)
        drawn = keys.choose(draws.uniform(S), draws.uniform(S))  # (n, S)
        asked = keys.choose(draws.uniform(1), draws.uniform(1))
        chosen = np.concatenate([drawn, asked], axis=1)  # (n, S + 1)

        def value(key: Ids) -> Ids:
            return values.choose(draws.function(2 * key), draws.function(2 * key + 1))

        sizes = keys.lengths(chosen) + values.lengths(value(chosen))
        size = sizes[:, -1]
        room = config.seq_len - size - longest - config.value_length  # pairs begin before it
        shown_from = draws.integers(0, room - longest - config.value_length)
        position, shown = np.zeros(n, np.int64), np.zeros(n, bool)
        held = np.zeros((n, S + 1), bool)
        for s in range(S):
            due = ~shown & (position >= shown_from)  # so that what is asked for was shown
            chosen[due, s] = asked[due, 0]
            held[:, s] = position < room
            position += np.where(held[:, s], np.where(due, size, sizes[:, s]), 0)
            shown |= chosen[:, s] == asked[:, 0]
        held[:, -1] = True
        told = value(chosen)
        known = seen_before(np.where(held, chosen, -1 - np.arange(S + 1)))
        spelt_values = np.where(values.spell(told) == NONE, NONE, K + values.spell(told))
        tokens = np.concatenate([keys.spell(chosen), spelt_values], axis=2)
        targets = np.full(tokens.shape, IGNORE)
        targets[..., longest:] = np.where(known[..., None], spelt_values, IGNORE)
        there = held[..., None] & (tokens != NONE)
        rows, labels = np.full((n, config.seq_len + 1), pad), np.full((n, config.seq_len + 1), IGNORE)
        filled = np.arange(config.seq_len, -1, -1) < there.sum(axis=(1, 2))[:, None]
        rows[filled] = tokens[there]
        labels[filled] = (tokens if training and config.every_token else targets)[there]
        return rows[:, :-1], labels[:, 1:]


class Motifs:
    """All sequences of `shortest` to `longest` different ones of `symbols`, numbered."""

    def __init__(self, symbols: int, shortest: int, longest: int) -> None:
        self.symbols, self.shortest, self.longest = symbols, shortest, longest
        self.counts = np.array([perm(symbols, k) for k in range(shortest, longest + 1)])
        self.first = np.array([0, *accumulate(self.counts.tolist())])
        """Number of the first motif of each length, and how many there are."""

    def choose(self, of_length: NDArray[np.floating], of_motif: NDArray[np.floating]) -> Ids:
        """Motifs by two uniform numbers: every length as often, and every motif of a length."""
        which = (of_length * len(self.counts)).astype(np.int64)
        return self.first[which] + (of_motif * self.counts[which]).astype(np.int64)

    def lengths(self, motifs: Ids) -> Ids:
        return self.shortest + np.searchsorted(self.first[1:], motifs, side="right")

    def spell(self, motifs: Ids) -> Ids:
        """(...) -> (..., longest) symbols, NONE after the end of shorter ones."""
        lengths = self.lengths(motifs)
        rest = motifs - self.first[lengths - self.shortest]
        spelt = np.full((*motifs.shape, self.longest), NONE)
        for j in range(self.longest):
            rest, digit = np.divmod(rest, self.symbols - j)
            for before in np.moveaxis(np.sort(spelt[..., :j], axis=-1), -1, 0):
                digit += digit >= before  # the next of those that are left
            spelt[..., j] = np.where(j < lengths, digit, NONE)
        return spelt
