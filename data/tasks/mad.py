"""The other tasks of MAD: selective copying, compression, memorisation.

Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv 2403.17844, with the
settings of their repository athms/mad-lab. Letters: n samples, L tokens of a row, T positions of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixerlab.data.registry import register_data
from mixerlab.data.tasks.draws import Draws
from mixerlab.data.tasks.mad_recall import MadConfig, MadTask
from mixerlab.data.tasks.task import Ids, unlabelled
from mixerlab.options import option


@dataclass
class MadCopyingConfig(MadConfig):
    vocab_size: int = option(16, "V: data, the blank V - 2, and V - 1, after which to copy", min=3)
    seq_len: int = option(256, "T, the positions of a row", min=4)
    n_data: int = option(16, "tokens to copy", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if 2 * self.n_data + 1 > self.seq_len:
            yield "n_data", f"at most {(self.seq_len - 1) // 2} is needed, for seq_len = {self.seq_len}"


@register_data("mad_selective_copying", MadCopyingConfig)
class MadSelectiveCopying(MadTask):
    """MAD's selective copying: repeat the tokens that are not blank, in order (Poli et al., arXiv 2403.17844)."""

    config: MadCopyingConfig

    def __init__(self, config: MadCopyingConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = config.seq_len, config.vocab_size

    def make(self, draws: Draws, index: Ids, **how: Any) -> tuple[NDArray, NDArray]:
        config, n, k = self.config, len(index), self.config.n_data
        blank, copy = config.vocab_size - 2, config.vocab_size - 1
        data = draws.integers(0, blank - 1, k)
        before = draws.integers(0, k - 1, config.seq_len - 2 * k - 1)  # which token each blank comes before
        blanks = (before[:, None] <= np.arange(k)[:, None]).sum(axis=2)  # (n, k) before each token
        ids, labels = np.full((n, config.seq_len), blank), unlabelled(n, config.seq_len)
        np.put_along_axis(ids, blanks + np.arange(k), data, axis=1)
        ids[:, -k - 1], labels[:, -k:] = copy, data
        return ids, labels


@dataclass
class MadCompressionConfig(MadConfig):
    vocab_size: int = option(16, "V: data, and V - 1, from which on to say them", min=2)
    seq_len: int = option(
        32, "L: the row has L - 1 tokens of data and as many positions to say them at", min=2
    )


@register_data("mad_compression", MadCompressionConfig)
class MadCompression(MadTask):
    """After MAD's compression: say all of a sequence once it has ended (Poli et al., arXiv 2403.17844).

    MAD has an autoencoder say it from the last position alone. A decoder here sees one token more at each position, and
    may look back: what has to fit into the last position is its state.
    """

    config: MadCompressionConfig

    def __init__(self, config: MadCompressionConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = 2 * (config.seq_len - 1), config.vocab_size

    def make(self, draws: Draws, index: Ids, **how: Any) -> tuple[NDArray, NDArray]:
        data = draws.integers(0, self.vocab_size - 2, self.config.seq_len - 1)
        end = np.full(data.shape, self.vocab_size - 1)
        return np.concatenate([data, end], axis=1), np.concatenate([unlabelled(*data.shape), data], axis=1)


@dataclass
class MadMemorizationConfig(MadConfig):
    vocab_size: int = option(256, "V: keys, as many values, and V - 1, at which to say the value", min=3)
    seq_len: int = option(32, "T, the positions of a row; even", min=2)
    n_train: int = option(256, "rows to train on", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.seq_len % 2:
            yield "seq_len", "an even number is needed, for pairs"


@register_data("mad_memorization", MadMemorizationConfig)
class MadMemorization(MadTask):
    """MAD's memorisation: learn the value of each key by heart, the same in all rows (arXiv 2403.17844)."""

    config: MadMemorizationConfig

    def __init__(self, config: MadMemorizationConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = config.seq_len, config.vocab_size
        self.keys = (config.vocab_size - 1) // 2

    def make(self, draws: Draws, index: Ids, **how: Any) -> tuple[NDArray, NDArray]:
        keys = draws.integers(0, self.keys - 1, self.seq_len // 2)
        value_of = (
            self.keys + Draws(self.seed, "facts", np.zeros(1, np.int64)).distinct(self.keys, self.keys)[0]
        )
        ids, labels = (
            np.full((len(index), self.seq_len), self.vocab_size - 1),
            unlabelled(len(index), self.seq_len),
        )
        ids[:, ::2], labels[:, 1::2] = keys, value_of[keys]
        return ids, labels
