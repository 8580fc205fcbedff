"""A report as one page of HTML, pictures included, that opens without a network."""

import base64
from collections.abc import Sequence
from html import escape

import pandas as pd

from mixerlab.lm.sweep.folder import Sweep
from mixerlab.lm.sweep.plots import CAPTIONS
from mixerlab.lm.sweep.table import Table, in_words

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --soft: light-dark(#666, #aaa); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
pre { color: var(--soft); margin: 0; white-space: pre-wrap; font-size: .85rem; }
.verdict { font-size: 1.1rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.pictures img { width: 100%; background: #fff; border-radius: 6px; }
figure { margin: 1rem 0 0; }
figcaption { font-size: .9rem; margin-bottom: .3rem; }
li { color: var(--soft); font-size: .9rem; }
summary { cursor: pointer; margin-top: 1.5rem; }
</style>
</head>
<body>
<h1>{title}</h1>
<pre>{commands}</pre>
<div class="verdict">{verdicts}</div>
{tables}
<ul>{notes}</ul>
<div class="pictures">{pictures}</div>
<details><summary>Every run</summary>{runs}</details>
</body>
</html>
"""


def page(
    sweeps: Sequence[Sweep], table: Table, shown: Sequence[pd.DataFrame], pictures: dict[str, bytes]
) -> str:
    """The page's text.

    Args:
        shown: the tables as people read them.
        pictures: their names, as of `plots.pictures` -> SVG.
    """
    runs = table.runs.drop(columns=["log", "reason", "step", "state_bytes"]).rename(columns=in_words)
    title = escape(", ".join(sweep.name for sweep in sweeps))
    head, _, body = PAGE.partition("</style>")
    images = {CAPTIONS[name]: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    return (
        head.replace("TITLE", title)
        + "</style>"
        + body.format(
            title=title,
            commands="\n".join(escape(" ".join(["mixerlab sweep", *sweep.command])) for sweep in sweeps),
            verdicts="".join(f"<p>{escape(line)}.</p>" for line in table.verdicts),
            tables="".join(map(_html, shown)),
            notes="".join(f"<li>{escape(line)}.</li>" for line in table.notes),
            pictures="".join(
                f"<figure><figcaption>{escape(name)}</figcaption>"
                f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{image}"></figure>'
                for name, image in images.items()
            ),
            runs=_html(runs),
        )
    )


def _html(frame: pd.DataFrame) -> str:
    table = frame.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)
    return f'<div class="wide">{table}</div>'
