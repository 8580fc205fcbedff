"""Influence as a function of the lag: averages in bins of the lag, with a band."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

BINS_PER_OCTAVE = 6
HELD = "routing held"
BAND = (10, 90)
"""Percentiles of the samples."""


@dataclass(frozen=True)
class Curve:
    """A quantity against the lag t - tau, averaged over samples: sequences, seeds and sources."""

    subject: str
    quantity: str  # ends in HELD where routing is held; else it is the norm of a Jacobian
    lags: Array  # (n,) mean lag of each bin
    mean: Array  # (n,) over samples
    low: Array  # (n,) and `high`: the percentiles BAND of the samples
    high: Array
    samples: int
    source: float = 0.0
    """Mean position of the sources: t = lag + source."""
    error: float = 0.0
    """Of single values, relative: where random projections estimate them."""


def lag_edges(longest: int) -> Array:
    """Whole lags at which bins begin, from 1, each at most 2^(1/6) times the last, and the end of the last bin."""
    steps = np.arange(int(BINS_PER_OCTAVE * np.log2(max(longest, 1))) + 1)
    edges = np.unique(np.round(2 ** (steps / BINS_PER_OCTAVE)))
    return np.append(edges, longest + 1) if edges[-1] <= longest else edges


def lag_curve(
    subject: str, quantity: str, lags: Array, values: Array, source: float = 0.0, error: float = 0.0
) -> Curve:
    """The curve of values (samples, L), at least 0, at lags (L,) of at least 1, in increasing order.

    In a bin each sample has the geometric mean of its values, so that the curve of an exponential is exact at the
    bin's mean lag, and that of a power law all but exact. Samples are averaged plainly.
    """
    edges = lag_edges(int(lags[-1]))
    found = np.digitize(lags, edges)
    with np.errstate(divide="ignore"):  # the logarithm of 0
        logs = np.log(values)
    at, means = [], []
    for bin in np.unique(found):
        at.append(lags[found == bin].mean())
        means.append(np.exp(logs[:, found == bin].mean(1)))  # (samples,)
    table = np.stack(means, axis=1)  # (samples, n)
    low, high = np.percentile(table, BAND, axis=0)
    return Curve(subject, quantity, np.array(at), table.mean(0), low, high, len(table), source, error)


def by_lag(influence: Tensor, sources: list[int]) -> Array:
    """influence (B, T, C) of sources tau -> (B * C, L): sample by sample at lags 1 to L, which all sources have."""
    longest = influence.shape[1] - 1 - max(sources)
    columns = [influence[:, tau + 1 : tau + 1 + longest, c] for c, tau in enumerate(sources)]
    return torch.cat(columns).double().cpu().numpy()
