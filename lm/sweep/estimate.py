"""How long a sweep will take, judged by a step of each model on this machine."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from mixerlab.data import build_data
from mixerlab.lm.model.precision import to_bf16
from mixerlab.lm.parallel.launch import device_kind
from mixerlab.lm.parallel.sharding import make_decoder
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.sweep.plan import Point
from mixerlab.lm.training.optim import build_optimizer
from mixerlab.options import ConfigError

MEASURED = 4096
"""Tokens that are measured, at most: a step may be too much for the machine that is asked."""


def seconds_per_step(planned: Sequence[tuple[Point, Recipe]], threads: int) -> list[float | None]:
    """Of each point: a step of random tokens, measured once for each model. None where its device is not here."""
    torch.set_num_threads(threads)
    known: dict[str, float | None] = {}
    found = []
    for point, recipe in planned:
        model = repr((recipe.model, replace(recipe.trainer, steps=1, epochs=None, tokens=None), recipe.data))
        if model not in known:
            known[model] = _measure(point, recipe)
        found.append(known[model])
    return found


def _measure(point: Point, recipe: Recipe) -> float | None:
    try:
        device = {"gpu": "cuda"}.get(device_kind(recipe.strategy), "cpu")
    except ConfigError:
        return None
    data = build_data(recipe.data, recipe.seed)
    eager = replace(recipe, strategy=replace(recipe.strategy, compile=False))
    decoder = make_decoder(eager, data.vocab_size).to(device)
    if recipe.trainer.precision == "bf16-true":
        to_bf16(decoder)
    optimizer = build_optimizer(decoder, recipe.optim)
    rows = max(1, min(recipe.trainer.batch_size, MEASURED // data.seq_len))
    ids = torch.randint(data.vocab_size, (rows, data.seq_len + 1), device=device)
    began = 0.0
    for _ in range(2):  # the first also loads what it needs
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=recipe.trainer.precision != "32"):
            nll, _ = decoder(ids[:, :-1], ids[:, 1:])
        nll.mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) * point.step_rows / rows
