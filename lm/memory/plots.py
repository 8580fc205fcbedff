"""The pictures: influence against lag with the laws fitted, heat maps, and the routing of a text."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mixerlab.lm.memory.curves import BAND, HELD, Array, Curve
from mixerlab.lm.memory.fits import SMALLEST, Fit

LEAST_DRAWN = 1e-12
"""Of the largest value of a plot: exponentials go on for ever."""


def influence_figure(curves: Sequence[Curve], fits: Sequence[Fit]) -> Figure:
    """A row for each kind of quantity: log-log at the left, semi-log at the right, laws dashed over their tails."""
    kinds = list(dict.fromkeys(_kind(curve) for curve in curves))
    figure = Figure(figsize=(13, 4.6 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    one_subject = len({curve.subject for curve in curves}) == 1
    for kind, (loglog, semilog) in zip(kinds, axes, strict=True):
        chosen = [(c, f) for c, f in zip(curves, fits, strict=True) if _kind(c) == kind]
        least = LEAST_DRAWN * max(curve.mean.max() for curve, _ in chosen)
        for i, (curve, fit) in enumerate(chosen):
            colour = (
                mpl.colormaps["tab10"](i) if len(chosen) <= 10 else mpl.colormaps["turbo"](i / len(chosen))
            )
            names = ["" if one_subject else curve.subject, curve.quantity.removesuffix(HELD).rstrip(", ")]
            label = _plain(" · ".join(filter(None, names)))
            for axis in (loglog, semilog):
                _draw(axis, curve, fit, colour, label, least, alpha=0.5 / (2 + len(chosen)))
        loglog.set_xscale("log")
        for axis in (loglog, semilog):
            if least > 0:  # else nothing is drawn
                axis.set_yscale("log")
            axis.set_xlabel("lag t - τ")
            axis.grid(alpha=0.25)
        loglog.set_ylabel(kind)
        loglog.set_title("log-log: a power law is straight", fontsize=10)
        semilog.set_title("semi-log: an exponential is straight", fontsize=10)
        semilog.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(
        f"mean, band: {BAND[0]}th to {BAND[1]}th percentile; dashed: the law fitted to the tail", fontsize=9
    )
    return figure


def _kind(curve: Curve) -> str:
    return f"influence, {HELD}" if curve.quantity.endswith(HELD) else "Frobenius norm of the Jacobian"


def _draw(axis: Axes, curve: Curve, fit: Fit, colour, label: str, least: float, alpha: float) -> None:
    law = fit.winner
    seen = curve.mean > max(least, SMALLEST * curve.mean.max())
    lags = curve.lags[seen]
    axis.plot(
        lags, curve.mean[seen], color=colour, label=f"{label}: {law.summary if law else 'no law named'}"
    )
    if not seen.any():
        return
    low = np.maximum(curve.low[seen], least)
    axis.fill_between(lags, low, curve.high[seen], color=colour, alpha=alpha, lw=0)
    if law is not None:
        tail = lags[lags >= fit.start]
        axis.plot(tail, law(tail), "--", color=colour, lw=2.5, alpha=0.6)


def _plain(text: str) -> str:
    """As it is: matplotlib takes what is between dollars for mathematics."""
    return text.replace("$", r"\$")


def heat_figure(title: str, influence: Array, places: Array) -> Figure:
    """Influence (t, tau) at those places, in logarithmic colours over the six decades below its maximum."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axis = figure.subplots()
    _matrix(figure, axis, influence, places, decades=6)
    axis.set_title(_plain(title), fontsize=10)
    return figure


def routing_figure(title: str, routing: dict[str, Array], words: Sequence[str] | None) -> Figure:
    """Weights (T, T) as matrices over three decades, and values (T,) as bars over the tokens, side by side."""
    figure = Figure(figsize=(7.2 * len(routing), 6.6), layout="constrained")
    axes = figure.subplots(1, len(routing), squeeze=False)[0]
    for axis, (name, value) in zip(axes, routing.items(), strict=True):
        places = np.arange(len(value), dtype=float)
        if value.ndim == 2:
            _matrix(figure, axis, value, places, decades=3)
            _ticks(axis.yaxis, words, len(value))
        else:
            axis.bar(places, value, color="tab:blue")
            axis.margins(x=0)
            axis.grid(alpha=0.25, axis="y")
        _ticks(axis.xaxis, words, len(value), rotation=90)
        axis.set_title(_plain(f"{name}: {title}"), fontsize=10)
    return figure


def _matrix(figure: Figure, axis: Axes, matrix: Array, places: Array, decades: int) -> None:
    """Rows t, columns tau; grey where there is nothing."""
    top = max(float(matrix.max()), SMALLEST)
    mesh = axis.pcolormesh(
        places,
        places,
        np.ma.masked_less_equal(matrix, 0),
        norm=LogNorm(top * 10**-decades, top),
        cmap="magma",
        shading="nearest",
    )
    axis.invert_yaxis()
    axis.set_facecolor("0.85")
    figure.colorbar(mesh, ax=axis, shrink=0.7)
    axis.set_xlabel("input τ")
    axis.set_ylabel("output t")


def _ticks(axis, words: Sequence[str] | None, n: int, rotation: int = 0) -> None:
    if words is not None:
        axis.set_ticks(range(n), [_plain(word) for word in words[:n]], rotation=rotation, fontsize=7)


def save(figure: Figure, path: Path) -> None:
    path.write_bytes(png(figure))


def png(figure: Figure) -> bytes:
    """The picture's file; `figure` needs no screen."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # tokens may be of any script
        figure.savefig(buffer, dpi=90, format="png", metadata={"Software": None})
    return buffer.getvalue()
