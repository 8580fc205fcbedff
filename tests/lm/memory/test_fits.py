"""Fits of the tail: known laws are found with their parameters, and curves in between get no name."""

import numpy as np
import pytest

from mixerlab.lm.memory.curves import lag_edges
from mixerlab.lm.memory.fits import FEWEST, fit_points

LAGS = lag_edges(4096)[:-1]
LAGS = LAGS[LAGS >= 64]
SEEDS = 100


def noise(seed, deviation=0.05, correlation=0.5):
    """Log-normal, multiplicative, correlated from point to point."""
    rng = np.random.default_rng(seed)
    e = np.zeros(len(LAGS))
    e[0] = rng.normal() * deviation
    for i in range(1, len(e)):
        e[i] = correlation * e[i - 1] + rng.normal() * deviation * np.sqrt(1 - correlation**2)
    return e


def fits(log_law, **options):
    return [fit_points(LAGS, np.exp(log_law + noise(seed, **options))) for seed in range(SEEDS)]


def named(found, name):
    return sum(fit.winner is not None and fit.winner.name == name for fit in found)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.5])
def test_power_laws_are_named_with_their_exponent(beta, correlation):
    found = fits(1.0 - beta * np.log(LAGS), deviation=0.03, correlation=correlation)
    assert named(found, "power law") >= 95
    near = [abs(fit.laws["power law"].exponent - beta) < 0.02 for fit in found]
    assert sum(near) >= 95


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("half_life", [40.0, 300.0, 2000.0])
def test_exponentials_are_named_with_their_half_life(half_life, correlation):
    found = fits(-np.log(2) * LAGS / half_life, deviation=0.03, correlation=correlation)
    assert named(found, "exponential") >= 95
    near = [abs(fit.laws["exponential"].half_life / half_life - 1) < 0.05 for fit in found]
    assert sum(near) >= 95


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_what_does_not_fall_is_named_constant(correlation):
    assert named(fits(np.zeros_like(LAGS), deviation=0.03, correlation=correlation), "constant") >= 95


IN_BETWEEN = {
    "power law with an exponential end": -0.5 * np.log(LAGS) - LAGS / 1500,
    "stretched exponential": -np.sqrt(LAGS / 100),
    "two half-lives": np.log(np.exp(-LAGS / 100) + 0.1 * np.exp(-LAGS / 1500)),
    "a power law that levels off": np.log(LAGS**-0.8 + 0.005),
}


@pytest.mark.parametrize("log_law", IN_BETWEEN.values(), ids=IN_BETWEEN)
def test_curves_in_between_get_no_name(log_law):
    assert sum(fit.winner is None for fit in fits(log_law, deviation=0.03)) >= 95


def test_noise_that_hides_the_law_leaves_it_without_a_name():
    found = fits(-0.5 * np.log(LAGS), deviation=1.0)
    assert sum(fit.winner is None for fit in found) >= 90
    assert any("do not say" in fit.reason or "too noisy" in fit.reason for fit in found)


def test_the_likelihood_is_that_of_autoregressive_normal_noise():
    found = fit_points(LAGS, np.exp(-0.5 * np.log(LAGS) + noise(0, 0.1)))
    for name, law in found.laws.items():
        residual = np.log(law(LAGS)) - (-0.5 * np.log(LAGS) + noise(0, 0.1))
        distance = np.abs(np.subtract.outer(range(len(LAGS)), range(len(LAGS))))
        covariance = law.sigma**2 * law.rho**distance
        _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
        log_likelihood = -0.5 * (logdet + residual @ np.linalg.solve(covariance, residual))
        parameters = 3 if name == "constant" else 4
        assert law.aic == pytest.approx(2 * parameters - 2 * log_likelihood, abs=1e-6)


def test_a_power_of_the_position_is_told_from_one_of_the_lag():
    for shift, base in ((0.0, "lag"), (20.0, "(t+1)")):
        found = fit_points(LAGS, np.exp(-0.7 * np.log(LAGS + shift) + noise(0, 0.01)), shift=20.0)
        assert found.winner.summary.startswith(f"{base}^-0.")
        assert found.winner.exponent == pytest.approx(0.7, abs=0.02)
        np.testing.assert_allclose(found.laws["power law"](LAGS), (LAGS + shift) ** -0.7, rtol=0.05)


def test_few_points_are_not_fitted():
    found = fit_points(LAGS[: FEWEST - 1], np.ones(FEWEST - 1))
    assert found.winner is None
    assert f"only {FEWEST - 1} points" in found.reason
