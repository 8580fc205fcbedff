"""Influence by lag, put into bins."""

import numpy as np
import pytest
import torch

from mixerlab.lm.memory.curves import by_lag, lag_curve, lag_edges
from mixerlab.lm.memory.measure import sources_of

LAGS = np.arange(1.0, 1001)


def test_influence_is_read_along_its_diagonals():
    T, sources = 9, [1, 3]
    t, tau = torch.arange(T)[:, None], torch.tensor(sources)
    influence = torch.stack([100.0 * t + tau, -(100.0 * t + tau)])  # (2, T, 2)
    table = by_lag(influence, sources)
    assert table.shape == (4, T - 1 - 3)
    expected = [[100 * (tau + lag) + tau for lag in range(1, 6)] for tau in sources]
    assert table[[0, 2]].tolist() == expected
    assert table[[1, 3]].tolist() == [[-value for value in row] for row in expected]


def test_bins_hold_each_lag_once_and_grow_with_it():
    edges = lag_edges(1000)
    assert edges[0] == 1
    assert edges[-1] == 1001
    assert (np.diff(edges) >= 1).all()
    ratios = edges[11:-1] / edges[10:-2]
    assert (ratios < 2 ** (1 / 6) * 1.1).all()


@pytest.mark.parametrize(
    "law", [lambda lag: np.exp(-0.05 * lag), lambda lag: 3.0 * lag**-0.7], ids=["exp", "power"]
)
def test_curves_of_the_laws_stay_on_them(law):
    curve = lag_curve("", "", LAGS, np.stack([law(LAGS), 3 * law(LAGS)]))
    np.testing.assert_allclose(curve.mean, 2 * law(curve.lags), rtol=1e-3)
    np.testing.assert_allclose(curve.low, 1.2 * law(curve.lags), rtol=1e-3)
    np.testing.assert_allclose(curve.high, 2.8 * law(curve.lags), rtol=1e-3)
    assert curve.samples == 2


def test_where_nothing_arrives_the_curve_is_zero():
    values = np.where(LAGS < 100, 1.0, 0.0)[None]
    curve = lag_curve("", "", LAGS, values)
    assert (curve.mean[curve.lags > 110] == 0).all()
    assert (curve.mean[curve.lags < 90] == 1).all()


@pytest.mark.parametrize("length", [2, 3, 4, 5, 16, 256, 4096])
def test_sources_leave_room_for_lags(length):
    sources = sources_of(length)
    assert sources == sorted(set(sources))
    assert 0 <= sources[0] <= sources[-1] <= max(4, length // 64)
    assert sources[-1] < length - 1
    assert (0 in sources) == (length == 2), "the first position is special"
