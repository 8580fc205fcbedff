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

from mixerlab.lm.memory.curves import BAND, Array, Curve
from mixerlab.lm.memory.fits import SMALLEST, Fit

LEAST_DRAWN = 1e-12
"""Of the largest value of a plot: exponentials go on for ever."""


def influence_figure(curves: Sequence[Curve], fits: Sequence[Fit]) -> Figure:
    """A row for each kind of quantity: log-log at the left, semi-log at the right, laws dashed over their tails."""
    kinds = list(dict.fromkeys(_kind(curve) for curve in curves))
    figure = Figure(figsize=(12, 4.6 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for kind, (loglog, semilog) in zip(kinds, axes, strict=True):
        chosen = [(c, f) for c, f in zip(curves, fits, strict=True) if _kind(c) == kind]
        top = max(curve.mean.max() for curve, _ in chosen)
        colours = mpl.colormaps["viridis" if len(chosen) > 10 else "tab10"]
        for i, (curve, fit) in enumerate(chosen):
            colour = colours(i / len(chosen) if len(chosen) > 10 else i)
            for axis in (loglog, semilog):
                _draw(axis, curve, fit, colour, top * LEAST_DRAWN)
        loglog.set_xscale("log")
        for axis in (loglog, semilog):
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
    return "Frobenius norm of the Jacobian" if "Jacobian" in curve.quantity else "influence, routing held"


def _draw(axis: Axes, curve: Curve, fit: Fit, colour, least: float) -> None:
    seen = curve.mean > max(least, SMALLEST * curve.mean.max())
    lags = curve.lags[seen]
    law = fit.winner
    label = f"{curve.label}: {law.summary if law else 'no law named'}"
    (line,) = axis.plot(lags, curve.mean[seen], color=colour, lw=1.5)
    line.set_label(_plain(label))
    axis.fill_between(
        lags, np.maximum(curve.low[seen], least), curve.high[seen], color=colour, alpha=0.15, lw=0
    )
    if law is not None:
        tail = lags[lags >= fit.start]
        drawn = law(tail)
        axis.plot(tail[drawn > least], drawn[drawn > least], "--", color=colour, lw=2.5, alpha=0.6)


def _plain(text: str) -> str:
    """As it is: matplotlib takes what is between dollars for mathematics."""
    return text.replace("$", r"\$")


def heat_figure(
    title: str, influence: Array, t: Array, tau: Array, words: Sequence[str] | None = None
) -> Figure:
    """Influence (t, tau), in logarithmic colours over the six decades below its maximum."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axis = figure.subplots()
    _matrix(figure, axis, influence, words, logarithmic=True, t=t, tau=tau)
    axis.set_title(_plain(title), fontsize=10)
    return figure


def routing_figure(title: str, routing: dict[str, Array], words: Sequence[str] | None) -> Figure:
    """Weights (T, T) as matrices, and values (T,) as bars over the tokens, side by side."""
    figure = Figure(figsize=(7.2 * len(routing), 7.4), layout="constrained")
    for axis, (name, value) in zip(
        figure.subplots(1, len(routing), squeeze=False)[0], routing.items(), strict=True
    ):
        if value.ndim == 2:
            _matrix(figure, axis, value, words, logarithmic=False)
        else:
            axis.bar(np.arange(len(value)), value, color="tab:blue")
            axis.margins(x=0)
            _ticks(axis.xaxis, words, len(value), rotation=90)
            axis.grid(alpha=0.25, axis="y")
        axis.set_title(_plain(f"{name}: {title}"), fontsize=10)
    return figure


def _matrix(
    figure: Figure,
    axis: Axes,
    matrix: Array,
    words: Sequence[str] | None,
    logarithmic: bool,
    t: Array | None = None,
    tau: Array | None = None,
) -> None:
    top = max(float(matrix.max()), 1e-30)
    shown = np.ma.masked_less_equal(matrix, 0 if logarithmic else -1)
    norm = LogNorm(top * 1e-6, top) if logarithmic else None
    n = len(matrix)
    places = (np.arange(n), np.arange(n)) if t is None or tau is None else (tau, t)
    mesh = axis.pcolormesh(*places, shown, norm=norm, cmap="magma", shading="nearest", rasterized=True)
    axis.invert_yaxis()
    axis.set_facecolor("0.85")
    figure.colorbar(mesh, ax=axis, shrink=0.7)
    _ticks(axis.xaxis, words, n, rotation=90)
    _ticks(axis.yaxis, words, n)
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
        figure.savefig(buffer, dpi=110, format="png", metadata={"Software": None})
    return buffer.getvalue()
