"""Diffuse MQAR: recall with keys of several tokens, among distractors that share their beginnings, at a chosen lag.

Our definition, version 1, of what arXiv 2604.18580, section 5.2, says in words. Letters: n samples, N tokens of the
noise block, T positions of a row, k tokens of a key, p of its prefix, u = k + 1 of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixerlab.data.module import Rows
from mixerlab.data.registry import register_data
from mixerlab.data.tasks.draws import Draws, skipping
from mixerlab.data.tasks.task import Ids, Task, TaskConfig, unlabelled
from mixerlab.options import option

PAD, BOS, MEM, NOISE, QUERY, Q, FILL = range(7)  # 7 is reserved
KEY = 8


@dataclass
class DiffuseMQARConfig(TaskConfig):
    """Sizes of the row `bos mem (key value) x n_pairs noise <N tokens> query (q key) x n_queries`."""

    n_symbols: int = option(512, "tokens that keys are made of, and as many values", min=2, max=512)
    n_pairs: int = option(16, "pairs in memory, less than n_symbols", min=1)
    n_queries: int = option(8, "pairs that are asked for, at most all", min=1)
    key_length: int = option(4, "k, tokens of a key", min=2, max=6)
    prefix_length: int = option(
        2, "p, tokens at the beginning of a key, by which keys in memory differ", min=1
    )
    clash_rate: float = option(
        0.75, "share of the noise's pairs that have the prefix of a key in memory", min=0, max=1
    )
    min_lag: int = option(40, "smallest lag from a key in memory to its query", min=1)
    lags: list[int] = option(
        [512, 1024, 1536, 2048],
        "largest lags of the datasets lag_512 and so on, which begin above the one before; the first is also that of "
        "training and `valid`",
    )
    n_train: int = option(100_000, "rows to train on", min=1)
    n_valid: int = option(2_000, "rows of the dataset `valid`", min=1)
    n_test: int = option(1_000, "rows of each of the datasets lag_512 and so on", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.n_pairs >= self.n_symbols:
            yield "n_pairs", f"less than n_symbols = {self.n_symbols} is needed"
        if self.n_queries > self.n_pairs:
            yield "n_queries", f"at most n_pairs = {self.n_pairs} is needed"
        if self.prefix_length >= self.key_length:
            yield "prefix_length", f"less than key_length = {self.key_length} is needed"
        if not self.lags:
            yield "lags", "at least one is needed"
        elif self.noise_range(0)[0] < 0:
            yield "min_lag", f"at least {self.key_length + 4} is needed, the lag without noise"
        else:
            for i, lag in enumerate(self.lags):
                low, high = self.noise_range(i)
                if low > high:
                    yield (
                        "lags",
                        f"at least {lag + low - high} instead of {lag} is needed, for some noise to fit",
                    )

    @property
    def first_value(self) -> int:
        """The smallest id of a value."""
        return KEY + self.n_symbols

    @property
    def pair(self) -> int:
        """u, which is also the length of a query with its q."""
        return self.key_length + 1

    def noise_range(self, i: int) -> tuple[int, int]:
        """Smallest and largest N of the i-th range of lags.

        The lag from the a-th pair to the b-th query is u (n_pairs - a + b) + N + 3.
        """
        shortest = self.min_lag if i == 0 else self.lags[i - 1] + 1
        nearest = self.pair + 3
        return shortest - nearest, self.lags[i] - nearest - self.pair * (self.n_pairs + self.n_queries - 2)

    def row_length(self, i: int) -> int:
        """T, with the most noise of the i-th range of lags."""
        return self.pair * (self.n_pairs + self.n_queries) + 4 + self.noise_range(i)[1]


@register_data("diffuse_mqar", DiffuseMQARConfig)
class DiffuseMQAR(Task):
    """Recall with long keys, among distractors that share their prefixes, at a chosen lag (after arXiv 2604.18580)."""

    config: DiffuseMQARConfig

    def __init__(self, config: DiffuseMQARConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = config.row_length(0), config.first_value + config.n_symbols

    def train_dataset(self) -> Rows:
        return self.dataset("train", self.config.n_train)

    def val_datasets(self) -> dict[str, Rows]:
        config = self.config
        tests = {
            f"lag_{lag}": self.dataset(f"lag_{lag}", config.n_test, config.row_length(i), lags=i)
            for i, lag in enumerate(config.lags)
        }
        return {"valid": self.dataset("valid", config.n_valid), **tests}

    def make(self, draws: Draws, index: Ids, lags: int = 0, **how: Any) -> tuple[NDArray, NDArray]:
        config, n, u = self.config, len(index), self.config.pair
        T = config.row_length(lags)
        N = draws.integers(*config.noise_range(lags))  # (n,)
        prefixes, suffixes, values = memory(draws, config)
        pairs = spell(prefixes, suffixes, values, config)  # (n, n_pairs, u)
        asked = np.argsort(draws.bits(config.n_pairs), axis=1)[:, : config.n_queries]
        ids, labels, rows = np.full((n, T), PAD), unlabelled(n, T), np.arange(n)[:, None]
        begin = 2 + u * config.n_pairs
        ids[:, 0], ids[:, 1], ids[:, 2:begin], ids[:, begin] = BOS, MEM, pairs.reshape(n, -1), NOISE
        noise(draws, ids[:, begin + 1 :], N, config, prefixes, suffixes, values)
        query = begin + 1 + N
        ids[rows[:, 0], query] = QUERY
        place = query[:, None] + 1 + u * np.arange(config.n_queries)  # (n, n_queries) of each q
        ids[rows, place] = Q
        for j in range(config.key_length):
            ids[rows, place + 1 + j] = pairs[rows, asked, j]
        labels[rows, place + config.key_length] = config.first_value + values[rows, asked]
        return ids, labels


def memory(draws: Draws, config: DiffuseMQARConfig) -> tuple[Ids, Ids, Ids]:
    """Prefixes, suffixes and values of the pairs in memory, each as a number, (n, n_pairs) each."""
    symbols, p = config.n_symbols, config.prefix_length
    prefixes = draws.distinct(symbols**p, config.n_pairs)
    suffixes = draws.integers(0, symbols ** (config.key_length - p) - 1, config.n_pairs)
    return prefixes, suffixes, draws.distinct(symbols, config.n_pairs)


def spell(prefixes: Ids, suffixes: Ids, values: Ids, config: DiffuseMQARConfig) -> Ids:
    """Pairs as tokens: (n, m) each -> (n, m, u)."""
    symbols, length, p = config.n_symbols, config.key_length, config.prefix_length
    digits = [prefixes // symbols ** (p - 1 - j) % symbols for j in range(p)]
    digits += [suffixes // symbols ** (length - p - 1 - j) % symbols for j in range(length - p)]
    return np.stack([*(KEY + digit for digit in digits), config.first_value + values], axis=-1)


def noise(
    draws: Draws, ids: Ids, N: Ids, config: DiffuseMQARConfig, prefixes: Ids, suffixes: Ids, values: Ids
) -> None:
    """Writes N (n,) tokens of distractors to the beginnings of the rows of `ids`: pairs, and fill between them."""
    u, symbols = config.pair, config.n_symbols
    beginnings = symbols**config.prefix_length
    endings = symbols ** (config.key_length - config.prefix_length)
    most = ids.shape[1] // u
    clashes = draws.uniform(most) < config.clash_rate
    like = draws.integers(0, config.n_pairs - 1, most)  # the pair in memory that has the same prefix
    of_like = [np.take_along_axis(what, like, axis=1) for what in (prefixes, suffixes, values)]
    suffix, value = draws.integers(0, endings - 2, most), draws.integers(0, symbols - 2, most)
    other = skipping(draws.integers(0, beginnings - 1 - config.n_pairs, most), prefixes)
    pairs = spell(
        np.where(clashes, of_like[0], other),
        np.where(clashes, suffix + (suffix >= of_like[1]), draws.integers(0, endings - 1, most)),
        np.where(clashes, value + (value >= of_like[2]), draws.integers(0, symbols - 1, most)),
        config,
    )
    held, fills = np.divmod(N, u)
    boundary = draws.integers(0, held[:, None], u - 1)  # of each fill: 0 is before the first pair
    is_fill = np.arange(u - 1) < fills[:, None]
    before = (is_fill[:, None] & (boundary[:, None] <= np.arange(most)[:, None])).sum(axis=-1)  # (n, most)
    place = u * np.arange(most) + before
    rows, which = np.nonzero(np.arange(most) < held[:, None])
    ids[np.arange(ids.shape[1]) < N[:, None]] = FILL
    for j in range(u):
        ids[rows, place[rows, which] + j] = pairs[rows, which, j]
