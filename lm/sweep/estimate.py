"""How long a sweep will take, judged by a step of each model on this machine."""

import heapq
import time
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from rich.console import Console

from mixerlab.data import build_data
from mixerlab.lm.model.cost import si
from mixerlab.lm.model.precision import to_bf16
from mixerlab.lm.parallel.launch import device_kind
from mixerlab.lm.parallel.sharding import make_decoder
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.sweep.plan import Point
from mixerlab.lm.sweep.report import print_table
from mixerlab.lm.sweep.view import duration
from mixerlab.lm.training.optim import build_optimizer
from mixerlab.options import ConfigError

MEASURED = 4096
"""Tokens that are measured, at most: a step may be too much for the machine that is asked."""


def list_points(planned: Sequence[tuple[Point, Recipe]], jobs: int, threads: int, console: Console) -> None:
    """Prints the points with their costs, and how long all of them take, `jobs` at a time on so many threads each."""
    times, lines = seconds(planned, threads), []
    for (point, recipe), time_ in zip(planned, times, strict=True):
        flops = point.row_flops * point.step_rows
        lines.append(
            {
                **point.values,
                "parameters": f"{point.parameters:,}",
                "d_model": str(recipe.model.d_model),
                "steps": "?" if point.steps is None else f"{point.steps:,}",
                "training FLOPs": f"{si(flops)} a step" if point.steps is None else si(flops * point.steps),
                "time": "?" if time_ is None else duration(time_),
            }
        )
    print_table(pd.DataFrame(lines), console)
    known = [time_ for time_ in times if time_ is not None]
    whole = f"about {duration(makespan(known, jobs))}" if len(known) == len(times) else "not known how long"
    console.print(
        f"{len(planned)} runs, {jobs} at a time: {whole}, without validations; judged by one step of each model here, "
        "alone on its cores",
        highlight=False,
        soft_wrap=True,
    )


def makespan(seconds: Sequence[float], jobs: int) -> float:
    """When the last of some runs ends that are begun in order, as soon as one of `jobs` places is free."""
    free = [0.0] * jobs
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def seconds(planned: Sequence[tuple[Point, Recipe]], threads: int) -> list[float | None]:
    """Of training each point, by a step of each model. None where its device is not here, or its steps not known."""
    torch.set_num_threads(threads)
    steps: dict[str, float | None] = {}
    found: list[float | None] = []
    for point, recipe in planned:
        model = repr((recipe.model, recipe.data, recipe.trainer.batch_size, recipe.trainer.precision))
        if point.steps is not None and model not in steps:
            steps[model] = _seconds_per_row(recipe)
        each = steps.get(model)
        found.append(None if point.steps is None or each is None else each * point.step_rows * point.steps)
    return found


def _seconds_per_row(recipe: Recipe) -> float | None:
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
    return (time.perf_counter() - began) / rows
