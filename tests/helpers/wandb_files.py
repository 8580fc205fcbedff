"""What Weights & Biases has written into the folder of a run that is offline."""

import json
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

Record: Any = vars(wandb_internal_pb2)["Record"]  # made when it is imported
BLOCK, HEADER = 32768, 7


def wandb_files(run: Path) -> list[Path]:
    """One for each time that the run began or went on, in order."""
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_records(path: Path) -> list[Any]:
    """All messages of a run that has ended; another process may still be writing them."""
    began = time.monotonic()
    while not (found := _records(path)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    return found


def _records(path: Path) -> list[Any]:
    """Messages in a log of LevelDB's form, behind a header of seven bytes."""
    data, at, parts, found = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def wandb_run(path: Path) -> Any:
    """The run's id, project, name, group and tags."""
    return next(r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run")


def wandb_config(path: Path) -> dict[str, Any]:
    updates = [u for r in wandb_records(path) for u in (*r.config.update, *r.run.config.update)]
    return {update.key: json.loads(update.value_json) for update in updates}


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The values of each call of `log`."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in wandb_records(path)
        if r.WhichOneof("record_type") == "history"
    ]


def wandb_curve(path: Path, name: str) -> dict[int, float]:
    """step -> value."""
    return {row["trainer/global_step"]: row[name] for row in wandb_history(path) if name in row}
