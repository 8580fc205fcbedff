"""Learning-rate schedules at their corners."""

import pytest
from mixerlab.lm.config import OptimConfig
from mixerlab.lm.optim import lr_factor


def factors(**options):
    config = OptimConfig(warmup_steps=10, **options)
    return [lr_factor(step, 100, config) for step in range(101)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    rates = factors(schedule=schedule)
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1)


def test_cosine_falls_to_the_final_ratio_half_way_at_the_mean():
    rates = factors(schedule="cosine", final_lr_ratio=0.2)
    assert rates[55] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_wsd_is_flat_then_falls_linearly():
    rates = factors(schedule="wsd", decay_fraction=0.4, final_lr_ratio=0.0)
    assert rates[10:61] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5)
    assert rates[100] == 0


def test_constant_stays():
    assert factors(schedule="constant")[10:] == [1.0] * 91
