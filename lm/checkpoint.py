"""Checkpoints: written aside, checksummed, moved into place; one file, or a file per shard of fsdp.

    checkpoints/step-00000250/
        meta.json             step, validation loss, recipe; size and checksum of each file below
        state.ckpt            everything, or
        shard-0-of-2.ckpt     everything, but of each sharded tensor some rows only
        shard-1-of-2.ckpt     the other rows

Files hold plain tensors, numbers, texts, lists and dicts, and are read with torch.load(weights_only=True).

    python -m lm.checkpoint runs/quickstart/RUN                            list them, and check every byte
    python -m lm.checkpoint runs/quickstart/RUN --to one-file              join the shards of the last
    python -m lm.checkpoint runs/quickstart/RUN --to sharded --shards 4    cut it into four
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from data.cache import crc32, damage, sync
from lm.config import ConfigError
from lm.processes import World

logger = logging.getLogger("mixerlab")

_FOLDER = re.compile(r"step-(\d+)")


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read; the message is for the user."""


# ---------------------------------------------------------------------------------------------- finding


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimiser steps lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first, damaged ones included."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a checkpoint. Raises CheckpointError if it is not what was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files, checksum = dict(meta["files"]), meta.pop("checksum")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {folder}: meta.json cannot be read: {error!r}") from None
    if checksum != _checksum(meta):
        raise CheckpointError(f"checkpoint {folder}: the checksum of meta.json is wrong")
    return {**meta, "files": files}


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Replaces meta.json as a whole."""
    text = json.dumps({**meta, "checksum": _checksum(meta)}, indent=1)
    (folder / "meta.json.new").write_text(text)
    sync(folder / "meta.json.new")
    (folder / "meta.json.new").replace(folder / "meta.json")
    sync(folder)


def note_validation(folder: Path, valid_loss: float | None, metrics: dict[str, float]) -> None:
    """Adds what a validation found to a checkpoint that was written before it."""
    _write_meta(folder, {**read_meta(folder), "valid_loss": valid_loss, "metrics": metrics})


def last_checkpoint(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run; damaged newer ones are reported. None if there never was one.

    Raises CheckpointError if all that there are are damaged.
    """
    _put_back(run)
    damaged = []
    for folder in reversed(list_checkpoints(run)):
        if (problem := find_damage(folder)) is None:
            return folder
        damaged.append(f"checkpoint {folder} is damaged: {problem}")
        logger.warning("%s; using the one before", damaged[-1])
    if damaged:
        raise CheckpointError(f"{damaged[0]}; the run has no other that is whole, so start a new one")
    return None


def _put_back(run: Path) -> None:
    """Gives its name back to a checkpoint in whose replacement the process was killed."""
    for old in (run / "checkpoints").glob("step-*.old"):
        folder = old.with_suffix("")
        if not folder.exists():
            old.rename(folder)


def set_aside_after(run: Path, step: int) -> None:
    """Renames the checkpoints after `step`, all of them damaged, so that none counts among the newest."""
    for folder in list_checkpoints(run):
        if folder > folder_of(run, step):
            shutil.rmtree(aside := folder.with_name(folder.name + ".damaged"), ignore_errors=True)
            folder.rename(aside)


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the smallest validation loss, or None."""
    measured = []
    for folder in list_checkpoints(run):
        try:
            loss = read_meta(folder).get("valid_loss")
        except CheckpointError:
            continue
        if loss is not None:
            measured.append((loss, folder))
    return min(measured, default=(None, None))[1]


def named_checkpoint(run: Path, name: str) -> Path:
    """The checkpoint "last", "best", or of a step's number. Raises CheckpointError."""
    if name == "last":
        folder = last_checkpoint(run)
    elif name == "best":
        folder = best_checkpoint(run)
    else:
        folder = folder_of(run, int(name)) if name.isdigit() else None
    if folder is None or not folder.is_dir():
        steps = ", ".join(str(int(f.name.removeprefix("step-"))) for f in list_checkpoints(run))
        has = f"that run has checkpoints of steps {steps}" if steps else "that run has none"
        lacks = "none was validated" if name == "best" and steps else "no such checkpoint"
        raise CheckpointError(f"checkpoint {name!r} of {run}: {lacks}; {has}")
    if problem := find_damage(folder):
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {problem}; try another with --checkpoint STEP"
        )
    return folder


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte of it."""
    problem = damage(folder, checksums=True)
    if problem is None:
        try:
            read_meta(folder)
        except CheckpointError as error:
            return str(error).partition(": ")[2]
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


# ---------------------------------------------------------------------------------------------- writing


def save(state: dict[str, Any], folder: str | Path, world: World | None = None) -> None:
    """Writes a checkpoint that appears under its name only when it is whole.

    Args:
        state: nested dicts and lists; `global_step` must be among them, `valid_loss`, `recipe` and `rows_per_step`
            may. Where it holds sharded tensors, every rank calls this with its own; else rank 0 alone.
        folder: the checkpoint's folder, as from `folder_of`.
        world: the ranks that hold shards; None: everything is here.

    Raises:
        CheckpointError: it cannot be written, on whichever rank; earlier checkpoints are as they were.
    """
    shard = _shard_of(state)
    files = {}
    if shard is not None:
        number, shards, copy = shard
        if copy == 0:
            files[f"shard-{number}-of-{shards}.ckpt"] = _own_rows(state, first=number == 0)
    elif world is None or world.rank == 0:
        files["state.ckpt"] = state
    _publish(Path(folder), files, world)


def _publish(folder: Path, files: dict[str, dict[str, Any]], world: World | None = None) -> None:
    """Makes `folder` hold the files of all ranks: written to the disk under another name first, then renamed."""
    rank = 0 if world is None else world.rank
    gather: Callable[[Any], list[Any]] = (lambda value: [value]) if world is None else world.gather
    temporary, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))

    def make_room() -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)

    def finish() -> None:
        (head,) = (
            tree for name, tree in files.items() if name == "state.ckpt" or name.startswith("shard-0-")
        )
        meta = {key: head.get(key) for key in ("global_step", *NOTED, "rows_per_step", "recipe")}
        meta["name"] = folder.name
        meta["files"] = {name: list(size) for part in written for name, size in part.items()}
        _write_meta(temporary, meta)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():  # it is damaged, or being converted; `_put_back` mends a crash between the two
            folder.rename(old)
        temporary.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    _together(gather, folder, make_room if rank == 0 else None)
    written = _together(
        gather, folder, lambda: {name: _write(temporary / name, files[name]) for name in files}
    )
    _together(gather, folder, finish if rank == 0 else None)


def _together(gather: Callable[[Any], list[Any]], folder: Path, work: Callable[[], Any] | None) -> list[Any]:
    """Every rank does its part; where one fails, all raise the same error, so that none waits for it in vain."""
    result, problem = None, None
    if work is not None:
        try:
            result = work()
        except (OSError, RuntimeError) as error:  # torch raises the latter where the disk is full
            problem = (str(error) or type(error).__name__).splitlines()[0]
    outcomes = gather((result, problem))
    for rank, (_, problem) in enumerate(outcomes):
        if problem:
            who = f" by rank {rank}" if len(outcomes) > 1 else ""
            shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)
            free = _free_space(folder)
            raise CheckpointError(
                f"checkpoint {folder} cannot be written{who}: {problem}{free}. Earlier checkpoints are whole: make "
                "room, then continue with resume=auto"
            )
    return [result for result, _ in outcomes]


def _free_space(folder: Path) -> str:
    existing = next((path for path in folder.parents if path.exists()), None)
    return f" ({shutil.disk_usage(existing).free / 1e9:.2f} GB are free there)" if existing else ""


def _write(path: Path, state: dict[str, Any]) -> tuple[int, int]:
    """Returns size and checksum."""
    torch.save(state, path)
    sync(path)
    return path.stat().st_size, crc32(path)


def prune(run: Path, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep` and the best."""
    kept = {*list_checkpoints(run)[-keep:], best_checkpoint(run)}
    for folder in list_checkpoints(run):
        if folder not in kept:
            folder.rename(folder.with_name(folder.name + ".doomed"))  # never a half of one under its own name
    for remains in (".doomed", ".tmp"):
        for folder in (run / "checkpoints").glob(f"step-*{remains}"):
            shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------------------------- shards


@dataclass
class Pieces:
    """A tensor saved in several files, by rows: (first row, rows) in order."""

    parts: list[tuple[int, Tensor]]
    shape: tuple[int, ...]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last); reads no others."""
        found = [
            part[max(first - start, 0) : max(last - start, 0)]
            for start, part in self.parts
            if start < last and start + len(part) > first
        ]
        return torch.cat(found) if found else self.parts[0][1][:0]


def rows_of_shard(n_rows: int, shard: int, shards: int) -> tuple[int, int]:
    """[first, last) of a shard: pieces of ceil(n / shards) rows, the last ones shorter or empty, as in FSDP2."""
    size = math.ceil(n_rows / shards)
    return min(shard * size, n_rows), min((shard + 1) * size, n_rows)


def shard_rows(tensor: DTensor) -> tuple[int, int]:
    """[first, last) of the rows that this rank holds of a tensor sharded over its first dimension."""
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0
            return rows_of_shard(
                tensor.shape[0], tensor.device_mesh.get_local_rank(axis), tensor.device_mesh.size(axis)
            )
    return 0, tensor.shape[0]


def _shard_of(tree: Any) -> tuple[int, int, int] | None:
    """(number of this rank's shard, shards, copy) of the first sharded tensor in a tree, or None."""
    for tensor in _leaves(tree):
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            axis = mesh.ndim - 1
            copy = mesh.get_local_rank(0) if mesh.ndim > 1 else 0
            return mesh.get_local_rank(axis), mesh.size(axis), copy
    return None


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (dict, list, tuple)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(item)
    else:
        yield tree


def _own_rows(tree: Any, first: bool) -> Any:
    """A tree for one file: sharded tensors become their rows on this rank; the rest is in the first file alone."""
    if isinstance(tree, DTensor):
        rows = tree.to_local().detach().cpu().clone()  # a view would save the padding too
        return {"sharded": True, "start": shard_rows(tree)[0], "shape": list(tree.shape), "rows": rows}
    if isinstance(tree, dict):
        return {
            key: value if key == "global_step" else _own_rows(value, first) for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return type(tree)(_own_rows(item, first) for item in tree)
    return tree if first else None


def _is_sharded(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.get("sharded") is True


def _joined(trees: Sequence[Any], whole: bool) -> Any:
    """The trees of all files as one; sharded tensors become whole ones, or `Pieces`."""
    head = trees[0]
    if _is_sharded(head):
        parts = sorted(((tree["start"], tree["rows"]) for tree in trees), key=lambda part: part[0])
        pieces = Pieces([part for part in parts if len(part[1])] or parts[:1], tuple(head["shape"]))
        return pieces.rows(0, pieces.shape[0]) if whole else pieces
    if isinstance(head, dict):
        return {key: _joined([tree[key] for tree in trees], whole) for key in head}
    if isinstance(head, (list, tuple)):
        return type(head)(_joined(items, whole) for items in zip(*trees, strict=True))
    return head


def _cut(tree: Any, shard: int, shards: int, in_tensors: bool = False) -> Any:
    """The tree of one file of `shards`, made from one that is whole: weights and optimiser state are cut."""
    if isinstance(tree, Tensor) and in_tensors and tree.ndim:
        first, last = rows_of_shard(len(tree), shard, shards)
        rows = tree[first:last].clone()
        return {"sharded": True, "start": first, "shape": list(tree.shape), "rows": rows}
    if isinstance(tree, dict):
        return {
            key: value
            if key == "global_step"
            else _cut(value, shard, shards, in_tensors or key in ("state_dict", "state"))
            for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return type(tree)(_cut(item, shard, shards, in_tensors) for item in tree)
    return tree if shard == 0 else None


# ---------------------------------------------------------------------------------------------- reading


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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint {folder} cannot be read, it must be damaged: {reason}") from error
    state = _joined(trees, whole) if len(trees) > 1 or _is_cut(trees[0]) else trees[0]
    return {**state, **{key: meta[key] for key in NOTED if meta.get(key) is not None}}


NOTED = ("valid_loss", "metrics")
"""What a validation after the checkpoint was written may add, in meta.json alone."""


def _is_cut(tree: Any) -> bool:
    if _is_sharded(tree):
        return True
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return any(_is_cut(child) for child in children)


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class CheckpointFolders(CheckpointIO):
    """Lets Lightning write and read these folders where the model is whole on every rank."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(path)

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path)


# ------------------------------------------------------------------------------------------- converting


def convert(folder: Path, shards: int | None) -> None:
    """Rewrites a checkpoint in place as `shards` files, or as one (None), optimiser state included.

    Raises CheckpointError if it cannot be read or written; then it is as it was.
    """
    state = read(folder)
    if shards is None:
        _publish(folder, {"state.ckpt": state})
    else:
        files = {f"shard-{n}-of-{shards}.ckpt": _cut(state, n, shards) for n in range(shards)}
        _publish(folder, files)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lm.checkpoint",
        description="List and check a run's checkpoints, or convert one between one file and shards.",
        epilog="Every tool reads either kind, on any number of processes; converting is for tools of your own.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, runs/<recipe name>/<run id>")
    parser.add_argument("--to", choices=["one-file", "sharded"], help="convert in place (default: only list)")
    parser.add_argument("--shards", type=int, default=2, help="number of shards (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", default="last", help="which to convert: last, best or a step (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if args.shards < 1:
        parser.error(f"--shards {args.shards}: expected at least 1")
    try:
        if not list_checkpoints(args.run):
            raise CheckpointError(f"run folder {args.run}: it has no checkpoints/step-*")
        if args.to is not None:
            folder = named_checkpoint(args.run, args.checkpoint)
            convert(folder, args.shards if args.to == "sharded" else None)
        return _print_list(args.run)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _print_list(run: Path) -> int:
    """Prints the checkpoints with their state; returns 1 if one is damaged."""
    best, damaged = best_checkpoint(run), False
    for folder in list_checkpoints(run):
        problem = find_damage(folder)
        damaged = damaged or problem is not None
        if problem is not None:
            print(f"{folder}: damaged: {problem}")
            continue
        meta = read_meta(folder)
        size = sum(size for size, _ in meta["files"].values())
        loss = "" if meta["valid_loss"] is None else f", validation loss {meta['valid_loss']:.4f}"
        marks = ", the best" if folder == best else ""
        kind = "one file" if list(meta["files"]) == ["state.ckpt"] else f"{len(meta['files'])} shards"
        print(f"{folder}: {kind}, {size / 1e6:.1f} MB, whole{loss}{marks}")
    return int(damaged)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
