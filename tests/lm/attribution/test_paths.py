"""Paths through Sessa's feedback, against the solve, and against all paths of a short text one by one."""

import itertools
import math

import pytest
import torch

from mixerlab.lm.attribution.paths import influence_by_hops, shares
from mixerlab.mixers import build_mixer
from mixerlab.mixers.testing import double, inputs


def sessa(**options):
    return double(lambda d: build_mixer({"name": "sessa", "n_heads": 2, **options}, d), 8)


@pytest.mark.parametrize("heads", [1, 2])
def test_all_hops_together_are_the_exact_solve(heads):
    mixer = sessa(n_feedback_heads=heads)
    x = inputs(1, 40, 8)
    solved = mixer.mix_fixed(x, torch.eye(40, dtype=torch.float64)[None])[0, :, -1]  # (H, T)
    by_hops = influence_by_hops(mixer, x[0])
    assert by_hops.shape == (40, 2 * heads, 40)
    torch.testing.assert_close(by_hops.sum(0), solved, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(by_hops[:2].sum(0), solved, rtol=1e-10), "longer paths count"


def test_each_number_of_hops_is_the_sum_over_its_paths():
    mixer, time = sessa(), 6
    x = inputs(1, time, 8)
    routing = mixer.routing(x)
    feedback, gain = routing["feedback attention"][0, 0], routing["gain"][0, 0]
    expected = torch.zeros(time, 2, time, dtype=torch.float64)
    for hops in range(time):
        for between in itertools.combinations(range(time - 1), hops):
            path = [time - 1, *reversed(between)]  # from the last position back to where the feedback begins
            weight = math.prod(float(gain[t] * feedback[t, j]) for t, j in itertools.pairwise(path))
            expected[hops] += weight * routing["forward attention"][0, :, path[-1]]
    torch.testing.assert_close(influence_by_hops(mixer, x[0]), expected, rtol=1e-10, atol=1e-14)


def test_shares_add_up_and_without_gain_nothing_hops():
    mixer = sessa()
    x = inputs(1, 12, 8)[0]
    share = shares(influence_by_hops(mixer, x))
    assert float(share.sum()) == pytest.approx(1)
    assert (share[:6] > 0).all()
    mixer.gamma_ctx.weight.data.zero_()
    mixer.gamma_bias.data.zero_()
    torch.testing.assert_close(shares(influence_by_hops(mixer, x))[0], torch.tensor(1.0, dtype=torch.float64))
