"""Checkpoints: sealed folders with one file, or a file per shard of fsdp.

    checkpoints/step-00000250/
        meta.json             step, validation loss, recipe; size and checksum of each file below
        state.ckpt            everything, or
        shard-0-of-2.ckpt     everything, but of each sharded tensor some rows only
        shard-1-of-2.ckpt     the other rows

Files hold plain tensors, numbers, texts, lists and dicts, and are read with torch.load(weights_only=True).
"""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixerlab import sealed
from mixerlab.lm.run.shards import cut, is_cut, joined, own_rows, shard_of
from mixerlab.options import ConfigError, first_line, with_new_names

logger = logging.getLogger("mixerlab")

Gather = Callable[[Any], list[Any]]
"""A value of this rank -> those of all ranks, on every rank."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read; the message is for the user."""


class Checkpoints:
    """The checkpoints of a run, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def at(self, step: int) -> Path:
        """Where the checkpoint after `step` optimiser steps lies."""
        return self.folder / f"step-{step:08d}"

    def all(self) -> list[Path]:
        """The checkpoint folders, oldest first, damaged ones included."""
        return sorted(
            (p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)), key=step_of
        )

    def last(self) -> Path | None:
        """The newest undamaged checkpoint; damaged newer ones are reported. None if there never was one.

        Raises CheckpointError if all that there are are damaged.
        """
        self.put_back()
        damaged = []
        for folder in reversed(self.all()):
            if (problem := find_damage(folder)) is None:
                return folder
            damaged.append(f"checkpoint {folder} is damaged: {problem}")
            logger.warning("%s; using the one before", damaged[-1])
        if damaged:
            raise CheckpointError(f"{damaged[0]}; the run has no other that is whole, so start a new one")
        return None

    def put_back(self) -> None:
        """Gives its name back to a checkpoint in whose replacement the process was killed."""
        for old in self.folder.glob("step-*.old"):
            sealed.put_back(old.with_suffix(""))

    def best(self) -> Path | None:
        """The checkpoint with the smallest validation loss, or None."""
        measured = []
        for folder in self.all():
            try:
                loss = read_meta(folder).get("valid_loss")
            except CheckpointError:
                continue
            if loss is not None:
                measured.append((loss, folder))
        return min(measured, default=(None, None))[1]

    def named(self, name: str) -> Path:
        """The checkpoint "last", "best", or of a step's number. Raises CheckpointError."""
        found = {"last": self.last, "best": self.best}
        folder = found[name]() if name in found else self.at(int(name)) if name.isdecimal() else None
        if folder is None or not folder.is_dir():
            steps = ", ".join(str(step_of(f)) for f in self.all())
            has = f"that run has checkpoints of steps {steps}" if steps else "that run has none"
            lacks = "none was validated" if name == "best" and steps else "no such checkpoint"
            raise CheckpointError(f"checkpoint {name!r} of {self.folder.parent}: {lacks}; {has}")
        if problem := find_damage(folder):
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {problem}; try another with --checkpoint STEP"
            )
        return folder

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints after `step`, all of them damaged, so that none counts among the newest."""
        for folder in self.all():
            if step_of(folder) > step:
                shutil.rmtree(aside := folder.with_name(folder.name + ".damaged"), ignore_errors=True)
                folder.rename(aside)

    def prune(self, keep: int) -> None:
        """Deletes all checkpoints but the newest `keep` and the best."""
        kept = {*self.all()[-keep:], self.best()}
        for folder in self.all():
            if folder not in kept:
                folder.rename(folder.with_name(folder.name + ".doomed"))  # never a half of one under its name
        for remains in (".doomed", ".tmp"):
            for folder in self.folder.glob(f"step-*{remains}"):
                shutil.rmtree(folder, ignore_errors=True)


def step_of(folder: Path) -> int:
    """Optimiser steps that were done when a checkpoint was written, by its name."""
    return int(folder.name.removeprefix("step-"))


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a checkpoint. Raises CheckpointError if it is not what was written."""
    try:
        meta = sealed.read_meta(folder)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from None
    if meta.get("recipe") is not None:
        meta["recipe"] = with_new_names(meta["recipe"])
    return meta


def note_validation(folder: Path, valid_loss: float | None, metrics: dict[str, float]) -> None:
    """Adds what a validation found to a checkpoint that was written before it."""
    sealed.write_meta(folder, {**read_meta(folder), "valid_loss": valid_loss, "metrics": metrics})


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte of it."""
    problem = sealed.damage(folder)
    if problem is None:
        return None
    # A wrong shard may be a whole one of another step, put there by hand or by a copy that was interrupted.
    steps = {}
    for path in sorted(folder.glob("shard-*.ckpt")):
        try:
            steps[path.name] = _load(path)["global_step"]
        except Exception:  # a damaged file raises anything; its name is in `problem`
            continue
    if len(set(steps.values())) > 1:
        listed = ", ".join(f"{name} is of step {step}" for name, step in steps.items())
        return f"its shards are of different steps: {listed}"
    return problem


NOTED = ("valid_loss", "metrics")
"""What a validation after the checkpoint was written may add, in meta.json alone."""


def alone(value: Any) -> list[Any]:
    """`Gather` of a single process."""
    return [value]


def save(state: dict[str, Any], folder: str | Path, rank: int = 0, gather: Gather = alone) -> None:
    """Writes a checkpoint that appears under its name only when it is whole. Every rank calls this.

    Args:
        state: nested dicts and lists; `global_step` must be among them, `valid_loss`, `recipe` and `rows_per_step`
            may. Where it holds sharded tensors each rank writes its own rows; else rank 0 alone writes.
        folder: the checkpoint's folder, as from `Checkpoints.at`.
        rank: of this process.
        gather: brings the ranks together.

    Raises:
        CheckpointError: it cannot be written, on whichever rank; earlier checkpoints are as they were.
    """
    shard = shard_of(state)
    files = {}
    if shard is not None:
        number, shards, copy = shard
        if copy == 0:
            files[f"shard-{number}-of-{shards}.ckpt"] = own_rows(state, first=number == 0)
    elif rank == 0:
        files["state.ckpt"] = state
    _publish(Path(folder), files, rank, gather)


def _publish(folder: Path, files: dict[str, dict[str, Any]], rank: int = 0, gather: Gather = alone) -> None:
    """Makes `folder` hold the files of all ranks: written to the disk under another name first, then renamed."""
    temporary = folder.with_name(folder.name + ".tmp")

    def make_room() -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)

    def write() -> dict[str, tuple[int, int]]:
        for name, state in files.items():
            torch.save(state, temporary / name)
        return {name: sealed.size_and_checksum(temporary / name) for name in files}

    def finish() -> None:
        head = next(tree for name, tree in files.items() if name.startswith(("state", "shard-0-")))
        notes = {key: head.get(key) for key in ("global_step", *NOTED, "rows_per_step", "recipe")}
        sizes = {name: size for part in written for name, size in part.items()}
        sealed.seal(temporary, folder.name, sizes, **notes)
        sealed.publish(temporary, folder)

    _together(gather, folder, make_room if rank == 0 else None)
    written = _together(gather, folder, write)
    _together(gather, folder, finish if rank == 0 else None)


def _together(gather: Gather, folder: Path, work: Callable[[], Any] | None) -> list[Any]:
    """Every rank does its part; where one fails, all raise the same error, so that none waits for it in vain."""
    result, problem = None, None
    if work is not None:
        try:
            result = work()
        except (OSError, RuntimeError) as error:  # torch raises the latter where the disk is full
            problem = first_line(error)
    outcomes = gather((result, problem))
    for rank, (_, problem) in enumerate(outcomes):
        if problem:
            who = f" by rank {rank}" if len(outcomes) > 1 else ""
            shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {folder} cannot be written{who}: {problem}{_free_space(folder)}. Earlier checkpoints are "
                "whole: make room, then continue with resume=auto"
            )
    return [result for result, _ in outcomes]


def _free_space(folder: Path) -> str:
    existing = next((path for path in folder.parents if path.exists()), None)
    return f" ({shutil.disk_usage(existing).free / 1e9:.2f} GB are free there)" if existing else ""


def read(folder: str | Path, whole: bool = True) -> dict[str, Any]:
    """The state that `save` was given, from the files of any number of ranks, on the CPU.

    Args:
        folder: the checkpoint; whether it is damaged is asked elsewhere (`find_damage`).
        whole: join sharded tensors; else they are `Pieces`, of which any rows can be read.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    numbered = sorted(meta["files"], key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    try:
        trees = [_load(folder / name) for name in numbered]
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise CheckpointError(
            f"checkpoint {folder} cannot be read, it must be damaged: {first_line(error)}"
        ) from error
    state = joined(trees, whole) if len(trees) > 1 or is_cut(trees[0]) else trees[0]
    return {**state, **{key: meta[key] for key in NOTED if meta.get(key) is not None}}


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def reshard(folder: Path, shards: int | None) -> None:
    """Rewrites a checkpoint in place as `shards` files, or as one (None), optimiser state included.

    Raises CheckpointError if it cannot be read or written; then it is as it was.
    """
    state = read(folder)
    if shards is None:
        _publish(folder, {"state.ckpt": state})
    else:
        _publish(folder, {f"shard-{n}-of-{shards}.ckpt": cut(state, n, shards) for n in range(shards)})
