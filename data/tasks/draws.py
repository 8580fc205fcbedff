"""Random numbers of many samples side by side, those of a sample being a function of its index alone.

Letters: n samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that a counter times it takes every value."""


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatters numbers over all of uint64: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Draws:
    """A random generator for each of n samples, all drawn from together: SplitMix64, whose state is a counter.

    The k-th number of a sample is mix(key + k GAMMA), with a key of its own. So it depends neither on the other
    samples nor on how many there are.

    Args:
        seed: of the run.
        split: name of the split; others have other numbers.
        index: (n,) int64, the samples.
    """

    def __init__(self, seed: int, split: str, index: NDArray[np.int64]) -> None:
        first, second = np.random.SeedSequence([seed, *split.encode()]).generate_state(2, np.uint64)
        self.keys = mix(mix(index.astype(np.uint64) * GAMMA + first) + second)
        self.drawn = 0

    def bits(self, *shape: int) -> NDArray[np.uint64]:
        """(n, *shape), all 64 bits random."""
        count = np.arange(self.drawn + 1, self.drawn + 1 + int(np.prod(shape)), dtype=np.uint64)
        self.drawn += count.size
        return mix(self.keys.reshape(-1, *[1] * len(shape)) + (count * GAMMA).reshape(shape))

    def uniform(self, *shape: int) -> NDArray[np.floating]:
        """(n, *shape), at least 0 and below 1."""
        return (self.bits(*shape) >> np.uint64(11)) * 2.0**-53

    def integers(self, low: int | NDArray, high: int | NDArray, *shape: int) -> NDArray[np.int64]:
        """(n, *shape), each number from low to high, both included; these broadcast against it."""
        return low + (self.uniform(*shape) * (np.asarray(high) - low + 1)).astype(np.int64)

    def function(self, numbers: NDArray[np.int64]) -> NDArray[np.floating]:
        """A random function of each sample's own, at numbers (n, ...): the same number has the same value again.

        Its values are at least 0 and below 1, and have nothing to do with the numbers drawn in turn.
        """
        keys = mix(~self.keys).reshape(-1, *[1] * (numbers.ndim - 1))
        return (mix(keys + (numbers.astype(np.uint64) + np.uint64(1)) * GAMMA) >> np.uint64(11)) * 2.0**-53

    def distinct(self, size: int, k: int) -> NDArray[np.int64]:
        """(n, k) different numbers of range(size), every ordered choice as likely.

        Floyd's algorithm (Bentley and Floyd, CACM 1987) chooses the set with k draws, then it is shuffled.
        """
        chosen = self.integers(0, np.arange(size - k, size), k)
        for j in range(1, k):
            taken = (chosen[:, :j] == chosen[:, j, None]).any(axis=1)
            chosen[taken, j] = size - k + j
        return np.take_along_axis(chosen, np.argsort(self.bits(k), axis=1), axis=1)

    def weighted(self, weights: NDArray[np.floating], k: int) -> NDArray[np.int64]:
        """(n, k) different places of `weights`, drawn one after another, each with probability in proportion to them.

        The first k arrivals of exponential clocks (Efraimidis and Spirakis, Information Processing Letters 2006).
        """
        arrivals = -np.log1p(-self.uniform(len(weights))) / weights
        return np.argsort(arrivals, axis=1)[:, :k]


def skipping(numbers: NDArray[np.int64], excluded: NDArray[np.int64]) -> NDArray[np.int64]:
    """Maps 0, 1, 2, ... (n, ...) to the non-negative integers that are not in `excluded` (n, k), different in each row.

    A uniform draw from range(size - k) becomes one from the size - k numbers of range(size) that are allowed.
    """
    k, rows = excluded.shape[1], np.arange(len(excluded))
    # The number r is moved up by each excluded s_j, in order, for which s_j - j <= r. One search for all rows:
    # each row's thresholds are put beyond those of the rows before.
    thresholds = np.sort(excluded, axis=1) - np.arange(k)
    span = max(int(thresholds.max(initial=0)), int(numbers.max(initial=0))) + 1
    offset = (rows * span).reshape(-1, *[1] * (numbers.ndim - 1))
    ordered = (thresholds + (rows * span)[:, None]).ravel()
    return (
        numbers + np.searchsorted(ordered, numbers + offset, side="right") - (rows * k).reshape(offset.shape)
    )
