"""Scores of a run on tasks that are not its own: what `mixerlab evaluate` leaves in it, and reports show.

evaluation/step-00000250.json, of the checkpoint of that step: task -> `scores` by metric, `errors` (standard errors),
`higher_is_better`, and how it was asked.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from mixerlab.lm.run.folder import Run, writing
from mixerlab.lm.run.results import results_in
from mixerlab.options import ConfigError, first_line
from mixerlab.sealed import read_noted, write_noted

FOLDER = "evaluation"


class Score(NamedTuple):
    value: float
    higher_is_better: bool


def add_scores(run: Run, step: int, tasks: dict[str, dict[str, Any]]) -> Path:
    """Writes the scores of a checkpoint on some tasks; those on others stay. Returns the file. Raises ConfigError."""
    folder = run.path / FOLDER
    file = folder / f"step-{step:08}.json"
    with results_in(folder), writing(file), FileLock(folder / ".lock"):
        known = _read(file) if file.exists() else {}
        write_noted(file, json.dumps({**known, **tasks}, indent=1) + "\n")
    return file


def scores_of(run: Run) -> dict[str, Score]:
    """Metric, such as eval/hellaswag/acc -> its score at the last step that was evaluated on that task.

    The folder may be a stranger's. Raises ConfigError where it is damaged.
    """
    found: dict[str, Score] = {}
    for file in sorted((run.path / FOLDER).glob("step-*.json")):
        for task, noted in _read(file).items():
            try:
                better = noted["higher_is_better"]
                found |= {
                    f"eval/{task}/{metric}": Score(float(value), better.get(metric, True) is not False)
                    for metric, value in noted["scores"].items()
                }
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ConfigError(f"{file}: it holds no scores of {task!r}: {error!r}") from None
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_noted(file))
    except OSError as error:
        raise ConfigError(f"{file}: it cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is damaged: expected a JSON object")
    return found
