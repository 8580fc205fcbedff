"""All that is measured of one subject: curves of influence against lag, heat maps, and the routing of a text."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mixerlab.lm.memory.curves import HELD, Array, Curve, by_lag, lag_curve, lag_edges
from mixerlab.lm.memory.influence import fixed_influence, hidden, jacobian_norms, mixer_inputs
from mixerlab.lm.memory.subject import Subject
from mixerlab.lm.model.decoder import Decoder
from mixerlab.options import ConfigError

MEASURES = {
    "routing": "each layer's influence while its routing is held",
    "blocks": "the norm of each block's Jacobian",
    "decoder": "the norm of the decoder's Jacobian, end to end",
}

SOURCES = 16
JACOBIAN_SOURCES = 4
MAP_SIZE = 128
"""Most rows and columns of a heat map."""
WORDS = 40
"""Tokens whose routing is drawn."""


@dataclass
class Measured:
    """What was found of one subject."""

    subject: Subject
    curves: list[Curve] = field(default_factory=list)
    maps: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Name of a layer -> influence (t, tau) within the first sequence, and which positions those are."""
    routing: dict[str, dict[str, Array]] = field(default_factory=dict)
    """Name of a layer -> what its mixer's `routing` says of the first words, averaged over heads: (T, T) or (T,)."""
    without: list[str] = field(default_factory=list)
    """Layers whose mixer has no routing that could be held."""


def sources_of(length: int, most: int = SOURCES) -> list[int]:
    """Positions tau near the beginning, so that almost every lag has all of them; not the first, which is special."""
    last = min(max(4, length // 64), (length - 1) // 2)
    return sorted({round(tau) for tau in np.linspace(min(1, last), last, most)})


def measure(
    subject: Subject,
    measures: list[str],
    projections: int,
    say: Callable[[str], None] = lambda doing: None,
    curves_only: bool = False,
) -> Measured:
    """Measures what is asked for, with `curves_only` no heat maps and no routing of a text.

    Raises ConfigError where "routing" is the only measure and no layer has any.
    """
    found = Measured(subject)
    T = subject.tokens.shape[1]
    sources = sources_of(T)
    samples: dict[str, list[Array]] = {}
    errors: dict[str, list[float]] = {}
    lags: dict[str, Array] = {}
    centres: dict[str, float] = {}
    for number, decoder in enumerate(subject.decoders()):
        generator = torch.Generator().manual_seed(number)
        names = _layer_names(decoder)
        for i, row in enumerate(subject.tokens.to(subject.device)):
            first = number == 0 and i == 0
            say(f"{subject.label}: seed {number + 1}, sequence {i + 1} of {len(subject.tokens)}")
            inputs = mixer_inputs(decoder, row[None]) if "routing" in measures else []
            for name, block, x in zip(names, decoder.layers, inputs, strict=False):
                influence = fixed_influence(block.mixer, x, sources)
                if influence is None:
                    found.without += [name] if first else []
                    continue
                key = f"{name}, {HELD}"
                samples.setdefault(key, []).append(by_lag(influence, sources))
                lags[key] = np.arange(1, samples[key][0].shape[1] + 1, dtype=float)
                centres[key] = float(np.mean(sources))
                if first and not curves_only:
                    _draw(found, name, block.mixer, x)
            for key, function, x in _functions(decoder, row, measures, names):
                at, values, centre, error = _pairs(function, x, projections, generator)
                samples.setdefault(key, []).append(values)
                errors.setdefault(key, []).append(error)
                lags[key], centres[key] = at, centre
    if found.without and measures == ["routing"] and not samples:
        raise ConfigError(
            f"--measure routing: {subject.label}: its mixers define no routing that could be held (mix_fixed); "
            "--measure blocks decoder works for every mixer"
        )
    for key, rows in samples.items():
        error = max(errors[key]) if key in errors else 0.0
        if lags[key].size:
            values = np.concatenate(rows)
            found.curves.append(lag_curve(subject.label, key, lags[key], values, centres[key], error))
    return found


def _layer_names(decoder: Decoder) -> list[str]:
    return [f"layer {i + 1} {type(b.mixer).__name__.lower()}" for i, b in enumerate(decoder.layers)]


@torch.no_grad()
def _draw(found: Measured, name: str, mixer, x: Tensor) -> None:
    """Adds the heat map of the first sequence, and the routing of its first words."""
    T = x.shape[1]
    places = np.unique(np.linspace(0, T - 1, min(T, MAP_SIZE)).round()).astype(int)
    influence = fixed_influence(mixer, x, places.tolist())
    assert influence is not None
    found.maps[name] = (influence[0, places].double().cpu().numpy(), places)
    routing = mixer.routing(x[:, :WORDS])
    found.routing[name] = {key: value[0].mean(0).double().cpu().numpy() for key, value in routing.items()}


def _functions(decoder: Decoder, row: Tensor, measures: list[str], names: list[str]):
    """(name, function, its input (T, D)) of each block, and of all together."""
    x = decoder.embedding(row[None]).detach()
    if "decoder" in measures:
        yield "decoder's Jacobian", lambda y: hidden(decoder, y), x[0]
    if "blocks" in measures:
        for name, block in zip(names, decoder.layers, strict=True):
            yield f"{name}, block's Jacobian", block, x[0]
            x = block(x).detach()


def _pairs(
    function: Callable[[Tensor], Tensor], x: Tensor, projections: int, generator: torch.Generator
) -> tuple[Array, Array, float, float]:
    """Lags (L,) and norms (1, L), means over neighbouring sources, of one output in each bin; mean source; error."""
    T = len(x)
    sources = sources_of(T)
    middle = len(sources) // 2
    sources = list(range(sources[middle], min(sources[middle] + JACOBIAN_SOURCES, T - 1)))
    edges = lag_edges(T - 1 - sources[-1])[:-1:2].astype(int)  # three an octave are enough
    norms, errors = [], []
    for lag in edges:
        result = jacobian_norms(function, x, sources[-1] + int(lag), projections, generator)
        norms.append(result.norms[sources].double().cpu().numpy())
        errors.append(float(result.error[sources].max()))
    centre = float(np.mean(sources))
    with np.errstate(divide="ignore"):
        table = np.exp(np.log(np.stack(norms, 1)).mean(0, keepdims=True))
    return edges + sources[-1] - centre, table, centre, max(errors)
