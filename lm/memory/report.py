"""What is written of a measurement: CSV, PNG, a page that needs no network, and a verdict in words."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mixerlab.lm.memory import plots
from mixerlab.lm.memory.curves import Curve
from mixerlab.lm.memory.fits import Fit
from mixerlab.lm.memory.measure import WORDS, Measured

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;
text-align:left}h2{margin-top:2em}code{background:#f3f3f3}"""


def sentence(curve: Curve, fit: Fit) -> str:
    """The verdict on one curve."""
    if fit.winner is None:
        found = f"no law named ({fit.reason})"
        if fit.laws:
            found += f"; it would be {fit.laws['power law'].summary} or {fit.laws['exponential'].summary}"
    else:
        found = f"{fit.winner.name}, {fit.winner.summary} ({fit.reason})"
    estimated = f"; single norms within {curve.error:.0%} (99%)" if curve.error else ""
    return f"{curve.quantity}: {found}{estimated}"


def curve_table(curves: Sequence[Curve]) -> pd.DataFrame:
    """A row for each point of each curve."""
    columns = ("lags", "mean", "low", "high")
    parts = [
        pd.DataFrame({"subject": c.subject, "quantity": c.quantity, **{k: getattr(c, k) for k in columns}})
        for c in curves
    ]
    return pd.concat(parts, ignore_index=True).rename(columns={"lags": "lag"})


def fit_table(curves: Sequence[Curve], fits: Sequence[Fit]) -> pd.DataFrame:
    """A row for each law fitted to each curve."""
    rows = [
        {
            "subject": curve.subject,
            "quantity": curve.quantity,
            "law": law.name,
            "named": law is fit.winner,
            "exponent": law.exponent if law.name == "power law" else None,
            "half_life": law.half_life if law.name == "exponential" else None,
            "intercept": law.intercept,
            "slope": law.slope,
            "slope_error": law.slope_error,
            "noise": law.sigma,
            "correlation": law.rho,
            "aic": law.aic,
            "tail_from": fit.start,
            "samples": curve.samples,
        }
        for curve, fit in zip(curves, fits, strict=True)
        for law in fit.laws.values()
    ]
    return pd.DataFrame(rows)


def write(folder: Path, measured: Sequence[Measured], fits: Sequence[Fit]) -> list[Path]:
    """Writes everything into `folder`; returns the files, the page last. `fits` are of all curves, in order."""
    curves = [curve for one in measured for curve in one.curves]
    tables = {"curves.csv": curve_table(curves), "fits.csv": fit_table(curves, fits)}
    pictures = {"influence.png": plots.influence_figure(curves, fits)}
    for one in measured:
        prefix = "" if len(measured) == 1 else f"{_slug(one.subject.label)}-"
        words = None if one.subject.words is None else one.subject.words[:WORDS]
        for layer, (influence, places) in one.maps.items():
            title = f"{one.subject.label}, {layer}: influence, routing held"
            pictures[f"{prefix}{_slug(layer)}-map.png"] = plots.heat_figure(title, influence, places)
            table = pd.DataFrame(influence, index=pd.Index(places, name="t"), columns=places)
            tables[f"{prefix}{_slug(layer)}-map.csv"] = table.reset_index()
        for layer, routing in one.routing.items():
            if routing:
                picture = plots.routing_figure(f"{one.subject.label}, {layer}", routing, words)
                pictures[f"{prefix}{_slug(layer)}-routing.png"] = picture
                tables |= {
                    f"{prefix}{_slug(layer)}-{_slug(name)}.csv": pd.DataFrame(value, index=words)
                    for name, value in routing.items()
                }
    files = []
    for name, table in tables.items():
        table.to_csv(folder / name, index=name not in ("curves.csv", "fits.csv") and "-map" not in name)
        files.append(folder / name)
    for name, figure in pictures.items():
        plots.save(figure, folder / name)
        files.append(folder / name)
    page = folder / "report.html"
    page.write_text(_page(measured, curves, fits, files), encoding="utf-8")
    return [*files, page]


def _page(
    measured: Sequence[Measured], curves: Sequence[Curve], fits: Sequence[Fit], files: Sequence[Path]
) -> str:
    """One file of HTML: pictures and tables are inside it, so that it needs nothing beside it."""
    said = list(zip(curves, fits, strict=True))
    parts = [f"<title>Memory</title><style>{STYLE}</style><h1>How far back it remembers</h1>"]
    for one in measured:
        subject = one.subject
        n, T = subject.tokens.shape
        parts.append(
            f"<h2>{html.escape(subject.label)}</h2><p>{n} x {T} tokens: {html.escape(subject.about)}."
        )
        verdicts = [sentence(c, f) for c, f in said if c.subject == subject.label]
        parts.append("<ul>" + "".join(f"<li>{html.escape(verdict)}" for verdict in verdicts) + "</ul>")
    for path in files:
        if path.suffix == ".png":
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<h3>{path.stem}</h3><img alt="{path.stem}" src="data:image/png;base64,{data}">')
    parts.append(
        "<h2>The laws fitted</h2>"
        + fit_table(curves, fits).to_html(index=False, float_format="{:.5g}".format, border=0)
    )
    parts.append("<h2>The numbers</h2><ul>")
    for path in files:
        if path.suffix == ".csv":
            data = base64.b64encode(path.read_bytes()).decode()
            link = f'<a download="{path.name}" href="data:text/csv;base64,{data}">{path.name}</a>'
            parts.append(f"<li>{link}")
    parts.append("</ul>")
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{"".join(parts)}</html>\n'


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-")
