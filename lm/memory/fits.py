"""Which law a curve's tail follows: constant, exponential, a power of the lag, or none that can be told.

The model: the logarithm of the value is a law plus noise, log v = a + b g(lag) + e, with g = 0 (constant), lag
(exponential) or log lag (power law). A power law may be one of t + 1 instead, as under even routing, whichever fits
better; where the lag is long the two are one. The noise is normal, that is multiplicative and log-normal in the value,
and correlated from one point to the next, e_i = rho e_{i-1} + n_i, rho >= 0: neighbouring lags share sequences and
sources. All parameters, those of the noise too, are by maximum likelihood for each law. The noise is taken to be FLOOR
at least, so that no law is refused for systematic deviations that nobody could see in a plot.

Laws are compared by Akaike's criterion, AIC = 2 parameters - 2 log-likelihood. A law is named if it is better by
DECISIVE than its rivals, and if a power law times an exponential, which has both as special cases, is not better than
it by SURPLUS: a curve in between is neither. A constant is named where nothing is better than it by DECISIVE.
"""

from dataclasses import dataclass, replace

import numpy as np

from mixerlab.lm.memory.curves import Array, Curve

FLOOR = 0.01
"""Of the noise's standard deviation: one percent of the value."""
DECISIVE, SURPLUS = 6.0, 4.0
MOST_HIDDEN = 0.1
"""Two standard errors of the exponent, beyond which no constant is named."""
FEWEST = 8
"""Points below which nothing is fitted."""
SMALLEST = 1e-30
"""Of the largest value: what is smaller may be rounding."""
TAIL = 16
"""The tail begins at the longest lag divided by this."""
CORRELATIONS = np.linspace(0, 0.95, 39)


@dataclass(frozen=True)
class Law:
    """A law fitted by maximum likelihood."""

    name: str
    intercept: float
    slope: float  # of log v in lag or log lag; 0 for the constant
    slope_error: float  # standard error
    rho: float
    sigma: float  # standard deviation of the noise
    aic: float
    shift: float = 0.0
    """Of a power law, (lag + shift)^-beta: 0, or what makes it one of t + 1."""

    def __call__(self, lags: Array) -> Array:
        if self.name == "constant":
            return np.full_like(lags, np.exp(self.intercept))
        g = np.log(lags + self.shift) if self.name == "power law" else lags
        return np.exp(self.intercept + self.slope * g)

    @property
    def summary(self) -> str:
        if self.name == "power law":
            base = "(t+1)" if self.shift else "lag"
            return f"{base}^{self.slope:.3f} ± {2 * self.slope_error:.3f}"
        if self.name == "exponential":
            return (
                f"half-life {self.half_life:.4g} lags"
                if self.slope < 0
                else f"grows by {self.slope:.3g} a lag"
            )
        return f"constant {np.exp(self.intercept):.3g}"

    @property
    def exponent(self) -> float:
        """beta of a power law, lag^-beta."""
        return -self.slope

    @property
    def half_life(self) -> float:
        """Lags in which an exponential falls to half; infinite where it does not fall."""
        return np.log(2) / -self.slope if self.slope < 0 else np.inf


@dataclass(frozen=True)
class Fit:
    """The laws fitted to a curve's tail, and which of them it follows."""

    laws: dict[str, Law]
    winner: Law | None
    reason: str
    """Why that one, or none."""
    start: float = 0.0
    """Smallest lag of the tail."""


def fit(curve: Curve, tail_from: float | None = None) -> Fit:
    """Fits each law to the values at lags of at least `tail_from`, by default 1/16 of the longest, and judges."""
    start = max(2.0, curve.lags[-1] / TAIL) if tail_from is None else tail_from
    tail = curve.lags >= start
    chosen = tail & (curve.mean > SMALLEST * curve.mean.max())
    if tail.any() and not chosen.any():
        return Fit({}, None, f"nothing is left from lag {start:.0f} on")
    return fit_points(curve.lags[chosen], curve.mean[chosen], curve.source + 1)


def fit_points(lags: Array, values: Array, shift: float = 0.0) -> Fit:
    """As `fit`, of lags (n,) in increasing order and values (n,) above 0; t + 1 is lag + `shift`."""
    if len(lags) < FEWEST:
        return Fit({}, None, f"only {len(lags)} points on the tail, of at least {FEWEST} that a fit needs")
    y = np.log(values)
    one, lag = np.ones_like(lags), lags / lags[-1]  # of which sums of squares are well conditioned
    laws = {
        "constant": _maximise("constant", [one], y),
        "exponential": _in_lags(_maximise("exponential", [one, lag], y), lags[-1]),
    }
    both = []
    for s in sorted({0.0, shift}):
        law = replace(_maximise("power law", [one, np.log(lags + s)], y), shift=s)
        laws["power law"] = min(laws.get("power law", law), law, key=lambda law: law.aic)
        both.append(_maximise("both", [one, np.log(lags + s), lag], y).aic)
    winner, reason = _judge(laws, min(both))
    return Fit(laws, winner, reason, float(lags[0]))


def _judge(laws: dict[str, Law], both: float) -> tuple[Law | None, str]:
    """The law to be named, if any, and why; `both` is the AIC of a power law times an exponential."""
    best, second = sorted(laws.values(), key=lambda law: law.aic)[:2]
    constant, power, exponential = (laws[name] for name in ("constant", "power law", "exponential"))
    if constant.aic < min(power.aic, exponential.aic, both) + DECISIVE:
        if 2 * power.slope_error > MOST_HIDDEN:
            return None, "too noisy: a slope could hide in it"
        return constant, "no slope that the noise would not explain"
    if best.aic - both >= SURPLUS:
        return None, f"neither; a power law times an exponential is better by AIC {best.aic - both:.1f}"
    margin = second.aic - best.aic
    if margin < DECISIVE:
        return None, f"the data do not say: {best.name} is better than {second.name} by AIC {margin:.1f}"
    return best, f"better than {second.name} by AIC {margin:.1f}"


def _in_lags(law: Law, unit: float) -> Law:
    """An exponential fitted to lag / unit."""
    return replace(law, slope=law.slope / unit, slope_error=law.slope_error / unit)


def _maximise(name: str, columns: list[Array], y: Array) -> Law:
    """Generalised least squares with first-order autoregressive noise, the likelihood maximised over rho."""
    design = np.stack(columns, axis=1)
    return min((_given_rho(name, design, y, rho) for rho in CORRELATIONS), key=lambda law: law.aic)


def _given_rho(name: str, design: Array, y: Array, rho: float) -> Law:
    def whiten(z: Array) -> Array:
        first = np.sqrt(1 - rho**2) * z[:1]
        return np.concatenate((first, z[1:] - rho * z[:-1]))

    A, b = whiten(design), whiten(y)
    coefficients, *_ = np.linalg.lstsq(A, b)
    residual = float(((b - A @ coefficients) ** 2).sum())
    n, k = design.shape
    innovation = max(residual / n, FLOOR**2 * (1 - rho**2))  # sigma^2
    log_likelihood = -0.5 * (n * np.log(2 * np.pi * innovation) - np.log(1 - rho**2) + residual / innovation)
    covariance = innovation * n / (n - k) * np.linalg.inv(A.T @ A)
    slope, error = (coefficients[1], np.sqrt(covariance[1, 1])) if k > 1 else (0.0, 0.0)
    sigma = np.sqrt(innovation / (1 - rho**2))
    return Law(name, coefficients[0], slope, error, rho, sigma, 2 * (k + 2) - 2 * log_likelihood)
