"""A run's scores on tasks of lm-evaluation-harness, and on tasks of the same form in a local folder."""

import difflib
import fnmatch
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partialmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from mixerlab.lm.evaluation.adapter import MixerlabLM
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.run.checkpoint import step_of
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.scores import add_scores
from mixerlab.lm.run.weights import check_tokens
from mixerlab.options import ConfigError, first_line

RESAMPLES = 1000
"""Of the bootstrap of standard errors that have no formula."""


@dataclass(frozen=True)
class Evaluation:
    """What came out, of one checkpoint."""

    step: int
    tasks: dict[str, dict[str, Any]]
    """Task -> what `lm.run.scores` keeps of it."""
    file: Path
    requests: int
    cut: int
    """Texts that were read, and how many of them lost their beginning, since they had more than `max_length` tokens."""
    max_length: int

    @property
    def metrics(self) -> dict[str, float]:
        """As curves and reports name them."""
        return {
            f"eval/{task}/{metric}": value
            for task, noted in self.tasks.items()
            for metric, value in noted["scores"].items()
        }


def evaluate(
    run: Run,
    tasks: Sequence[str],
    *,
    checkpoint: str | int = "last",
    device: str = "cpu",
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    world: World | None = None,
) -> Evaluation | None:
    """Evaluates a checkpoint on tasks and notes the scores in the run's folder; called alike by all processes.

    Args:
        run: of a model of text.
        tasks: names of tasks, groups or tags; with * of all that fit.
        checkpoint: "last", "best" or a step.
        device: of this process.
        include_path: a folder with more tasks, which come before the harness' own of the same name.
        num_fewshot: examples before each question, where the task leaves that open.
        limit: of each task the first so many documents alone.
        batch_size: texts that are read at a time.
        max_length: tokens of text that are read at once; None: a row of the run's training.
        world: the processes among which the texts are shared; None: this one.

    Returns:
        None on all ranks but the first.

    Raises:
        ConfigError: the run has no text, no such task, or a text does not fit.
    """
    world = world or World()
    if world.rank:
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the bootstrap's processes would be copies of this one
    world.moved("looking for the checkpoint")
    step = world.ask_main(lambda: _check(run, str(checkpoint)))
    world.moved("loading the model")
    decoder, tokenizer = run.decoder(step, device), run.tokenizer()
    check_tokens(run.path, tokenizer, decoder)
    world.moved("loading the tasks")
    found: list[list[Any]] = []
    world.ask_main(lambda: found.append(find_tasks(tasks, include_path)))  # downloads once
    chosen = found[0] if found else find_tasks(tasks, include_path)
    row: int = getattr(run.recipe.data.options, "seq_len", 2048)
    length = max_length or row
    low = run.recipe.trainer.precision != "32"  # as in validation
    model = MixerlabLM(decoder, tokenizer, length, batch_size, low, world)
    try:
        results = simple_evaluate(
            model,
            tasks=chosen,
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0 if world.rank else RESAMPLES,
        )
    except ValueError as error:
        if "larger than population" not in str(error):
            raise
        raise ConfigError(f"--num-fewshot {num_fewshot}: a task has fewer examples to show") from None
    if world.rank:
        return None
    asked = {"max_length": length, "precision": run.recipe.trainer.precision}
    noted = _noted(results, asked, num_fewshot, limit)
    return Evaluation(step, noted, add_scores(run, step, noted), model.requests, model.cut, length)


def _check(run: Run, checkpoint: str) -> int:
    """The step of a checkpoint. Raises ConfigError unless it is there and reads text."""
    folder = run.checkpoints.named(checkpoint)
    run.tokenizer()
    return step_of(folder)


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> list[Any]:
    """The harness' tasks and groups of some names. Raises ConfigError."""
    if include_path is not None and not include_path.is_dir():
        what = "that is a file" if include_path.exists() else "no such folder"
        raise ConfigError(f"--include-path {include_path}: {what}; expected a folder with tasks")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if include_path is not None and not manager.all_tasks:
        raise ConfigError(
            f"--include-path {include_path}: no tasks in it; expected YAML files that say `task:`"
        )
    if not {*names} <= {*manager.all_subtasks}:  # to look at all of the harness' own takes seconds
        manager = TaskManager(include_path=include_path)
    chosen = dict.fromkeys(name for pattern in names for name in matching(pattern, manager.all_tasks))
    try:
        loaded = manager.load([*chosen])
    except Exception as error:  # of whatever a task's file, its code, a download or its data raises
        raise ConfigError(
            f"--tasks {','.join(names)}: they cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            why = (
                "shows pictures" if getattr(task, "MULTIMODAL", False) else "runs code that the model writes"
            )
            raise ConfigError(f"--tasks {name}: it {why}; expected a task of text alone")
    inside = {child for children in loaded["group_map"].values() for child in children}
    everything = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in everything.items() if name not in inside]


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern fits. Raises ConfigError where there is none."""
    if found := [pattern] if pattern in names else fnmatch.filter(names, pattern):
        return found
    near = difflib.get_close_matches(pattern, names, n=3) or [name for name in names if pattern in name][:3]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"--tasks {pattern}: no such task; {hint}`lm_eval ls tasks` lists the harness' own, --include-path names a "
        "folder of others"
    )


def _noted(
    results: Any, asked: dict[str, Any], num_fewshot: int | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """What is kept of the harness' results. A task that was asked otherwise than it says has another name."""
    noted = {}
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        numbers = {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if "," in name and isinstance(value, (int, float)) and not math.isnan(value)
        }
        better = results["higher_is_better"].get(task, {})
        scores = {name: value for name, value in numbers.items() if "_stderr" not in name}
        shots = results["n-shot"].get(task)
        name = task if num_fewshot is None or shots != num_fewshot else f"{task}-{shots}shot"
        if scores:
            noted[name if limit is None else f"{name}-first{limit}"] = {
                "scores": scores,
                "errors": {name: numbers[e] for name in scores if (e := _stderr(name)) in numbers},
                "higher_is_better": {name: better.get(name.partition(",")[0], True) for name in scores},
                "documents": results["n-samples"].get(task, {}).get("effective"),
                "num_fewshot": shots,
                "version": results["versions"].get(task),
                "harness": version("lm_eval"),
                **asked,
            }
    return noted


def _stderr(metric: str) -> str:
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"
