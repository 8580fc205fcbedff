"""Checkpoints: sealed folders with one file, or a file of each rank that wrote them.

    checkpoints/step-00000250/
        meta.json             step, validation loss, recipe; size and checksum of each file below
        state.ckpt            everything, or
        shard-0-of-2.ckpt     everything, but of weights and optimiser state a part only (lm/run/shards.py)
        shard-1-of-2.ckpt     the other part

Files hold plain tensors, numbers, texts, lists and dicts, and are read with torch.load(weights_only=True).
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.serialization import config as serialization

from mixerlab import sealed
from mixerlab.lm.run.shards import Pieces, cut, is_cut, joined
from mixerlab.lm.run.writer import (
    ADDED_LATER,
    STATE,
    CheckpointError,
    Gather,
    Writer,
    alone,
    publish,
    shard_name,
)
from mixerlab.options import first_line, with_new_names

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "find_damage",
    "note_validation",
    "read",
    "read_meta",
    "reshard",
    "save",
]

logger = logging.getLogger("mixerlab")


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

    def last(
        self,
        rank: int = 0,
        ranks: int = 1,
        gather: Gather = alone,
        sign: Callable[[], None] = lambda: None,
    ) -> Path | None:
        """The newest undamaged checkpoint; damaged newer ones are reported. None if there never was one.

        Every rank calls this and verifies its share of the files, calling `sign` while it does; what one finds holds
        for all. Raises CheckpointError if all that there are are damaged.
        """
        if rank == 0:
            self.put_back()
        damaged: list[str] = []
        for name in gather([folder.name for folder in reversed(self.all())])[0]:
            folder = self.folder / name
            problem = next(filter(None, gather(find_damage(folder, rank, ranks, sign))), None)
            if problem is None:
                for said in damaged:
                    logger.warning("%s; using the one before", said)
                return folder
            damaged.append(f"checkpoint {folder} is damaged: {problem}")
        if damaged:
            raise CheckpointError(f"{damaged[0]}; the run has no other that is whole, so start a new one")
        return None

    def put_back(self) -> None:
        """Gives its name back to a checkpoint in whose replacement the process was killed."""
        for old in self.folder.glob("step-*.old"):
            try:
                sealed.put_back(old.with_suffix(""))
            except OSError as error:  # in a folder that can only be read
                logger.warning("%s cannot get its name back: %s", old, error)

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
        self.put_back()
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
        self.clear()

    def clear(self) -> None:
        """Deletes what killed processes have left behind; not while one writes."""
        self.put_back()
        for remains in (".doomed", ".tmp", ".old"):
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
    if problem := _odd(meta):
        raise CheckpointError(f"checkpoint {folder}: {sealed.META} is not what training writes: {problem}")
    if meta.get("recipe") is not None:
        meta["recipe"] = with_new_names(meta["recipe"])
    return meta


def _odd(meta: dict[str, Any]) -> str | None:
    """What of a meta.json whose checksum is right is not as it should be."""
    kinds: dict[str, Any] = {
        "global_step": int,
        "rows_per_step": int,
        "row_order": int,
        "valid_loss": (int, float),
        "metrics": dict,
        "recipe": dict,
    }
    for key, kind in kinds.items():
        value = meta.get(key)
        if (value is not None or key == "global_step") and not isinstance(value, kind):
            return f"{key} = {value!r}"
    names = set(meta["files"])
    if names not in ({STATE}, {shard_name(n, len(names)) for n in range(len(names))}):
        return f"it names the files {', '.join(sorted(names))}"
    return None


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def note_validation(folder: Path, valid_loss: float | None, metrics: dict[str, float]) -> None:
    """Adds what a validation found to a checkpoint that was written before it."""
    sealed.write_meta(folder, {**read_meta(folder), "valid_loss": valid_loss, "metrics": metrics})


def find_damage(
    folder: Path, rank: int = 0, ranks: int = 1, sign: Callable[[], None] = lambda: None
) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte of it; several ranks share the files out.

    Of as many files as ranks each reads one. `sign` is called whenever a part is read.
    """
    problem = sealed.damage(folder, checksums=False)
    if problem is None:
        try:
            names = _in_order(read_meta(folder)["files"])
        except CheckpointError as error:
            return str(error)
        problem = sealed.damage(folder, checksums=names[rank::ranks], sign=sign)
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


def save(
    state: dict[str, Any], folder: str | Path, rank: int = 0, ranks: int = 1, gather: Gather = alone
) -> None:
    """Writes a checkpoint; returns when it is there. See `Writer.save`."""
    Writer(rank, ranks, gather).save(state, folder)


def read(folder: str | Path, whole: bool = True) -> dict[str, Any]:
    """The state that `save` was given, from the files of any number of ranks, on the CPU.

    Its tensors are views of the files where one file has all of a tensor.

    Args:
        folder: the checkpoint; whether it is damaged is asked elsewhere (`find_damage`).
        whole: join divided tensors; else they are `Pieces`, of which any rows can be read, and a file is opened when
            the first of its rows are.

    Raises:
        CheckpointError: it cannot be read, or is not of the structure that `save` writes.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    files = _Files([folder / name for name in _in_order(meta["files"])])
    head = files[0]
    try:
        state = joined(files, whole) if len(files) > 1 or is_cut(head) else head
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        if state.get("global_step") != meta["global_step"]:
            raise ValueError(f"global_step = {state.get('global_step')!r} in the files")
        weights = state.get("state_dict")
        if not isinstance(weights, dict) or not all(map(_is_weight, weights.items())):
            raise TypeError("its state_dict does not map names to tensors")
    except CheckpointError:
        raise
    except Exception as error:  # the files may hold anything
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"checkpoint {folder} is not what training writes: {reason}") from None
    return {**state, **{key: meta[key] for key in ADDED_LATER if meta.get(key) is not None}}


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], (Tensor, Pieces))


class _Files(Sequence[Any]):
    """The trees of a checkpoint's files, each opened when it is first asked for."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._trees: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: Any) -> Any:
        if number not in self._trees:
            path = self._paths[number]
            try:
                self._trees[number] = _load(path)
            except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
                raise CheckpointError(
                    f"checkpoint {path.parent} cannot be read, it must be damaged: {first_line(error)}"
                ) from error
        return self._trees[number]


def _load(path: Path) -> Any:
    # Where the tensors lie is computed: their headers, all over the file, need not be read.
    with serialization.patch({"load.calculate_storage_offsets": True}):  # type: ignore[attr-defined]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def reshard(folder: Path, files: int | None) -> None:
    """Rewrites a checkpoint in place as so many files, or as one (None), optimiser state included.

    Raises CheckpointError if it cannot be read or written; then it is as it was.
    """
    state = read(folder)
    if files is None:
        publish(folder, {STATE: state})
    else:
        publish(folder, {shard_name(n, files): cut(state, n, files) for n in range(files)})
