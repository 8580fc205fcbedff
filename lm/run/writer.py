"""Writing checkpoints: every rank its part, at once or while training goes on.

A folder is written under another name, each file checksummed on its way, synced, and renamed: it is whole or absent.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixerlab import sealed
from mixerlab.lm.run.shards import divided
from mixerlab.options import ConfigError, first_line

Gather = Callable[[Any], list[Any]]
"""A value of this rank, which JSON can express -> those of all ranks, on every rank."""

STATE = "state.ckpt"

ADDED_LATER = ("valid_loss", "metrics")
"""What a validation after the checkpoint was written may add, in meta.json alone."""

PATIENCE = 60.0
"""Seconds for which a failed rank waits for others to agree on a checkpoint: they may have gone."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read; the message is for the user."""


def alone(value: Any) -> list[Any]:
    """`Gather` of a single process."""
    return [value]


def nothing(*args: Any) -> None:
    pass


def shard_name(number: int, files: int) -> str:
    return f"shard-{number}-of-{files}.ckpt"


class Writer:
    """Writes a run's checkpoints, one at a time. Every rank has one and calls it alike.

    Args:
        rank: of this process, among `ranks`.
        gather: brings the ranks together; in the background from another thread.
        background: whether `save` returns when the state is copied, and not only when it is written.
        after: called by rank 0 when a checkpoint is written, on the thread that wrote it.
        report: hears, as a sign of life, what this rank does while it waits for the disk.
    """

    def __init__(
        self,
        rank: int = 0,
        ranks: int = 1,
        gather: Gather = alone,
        background: bool = False,
        after: Callable[[], None] = nothing,
        report: Callable[[str], None] = nothing,
    ):
        self.rank, self.ranks, self.gather = rank, ranks, gather
        self.background, self.after, self.report = background, after, report
        self._buffers = Buffers()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._waits = True  # the training thread, for what is written
        self._blocks = 0  # written so far

    def save(self, state: dict[str, Any], folder: str | Path) -> None:
        """Writes a checkpoint that appears under its name only when it is whole.

        In the background, it first waits for an earlier one, and returns when `state` may change again.

        Args:
            state: nested dicts and lists; `global_step` must be among them, `valid_loss`, `recipe` and
                `rows_per_step` may. It is in shards, or the same on all ranks; each writes a part of its tensors.
            folder: the checkpoint's folder, as from `Checkpoints.at`.

        Raises:
            CheckpointError: it, or the one before, cannot be written, on whichever rank; earlier ones are as they were.
        """
        self.wait()
        keep = self._buffers.copy if self.background else _as_it_is
        number, files, tree = divided(state, keep, self.rank, self.ranks)
        mine = {STATE if files is None else shard_name(number, files): tree}
        if not self.background:
            publish(Path(folder), mine, self.rank, self.gather, self._sign, self.after)
            return
        self._buffers.settle()
        self._waits = False
        self._thread = threading.Thread(target=self._write, args=[Path(folder), mine], daemon=True)
        self._thread.start()

    def make_room(self, state: dict[str, Any]) -> None:
        """Takes the memory that saving `state` in the background needs, in the background.

        Else the first save would: touching new memory takes several times as long as copying.

        Args:
            state: as for `save`, or its large parts; only shapes and types matter.
        """
        if self.background:
            self.wait()
            self._thread = threading.Thread(target=self._make_room, args=[state], daemon=True)
            self._thread.start()

    def _make_room(self, state: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # saving meets it again, and says so
            divided(state, self._buffers.room, self.rank, self.ranks)

    def _write(self, folder: Path, mine: dict[str, Any]) -> None:
        try:
            publish(folder, mine, self.rank, self.gather, self._sign, self.after)
        except Exception as error:  # for the training thread to raise
            self._error = error

    def _sign(self) -> None:
        self._blocks += 1
        if self._waits:
            self.report("writing a checkpoint")

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a checkpoint could not be written."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when nothing is being written. Raises CheckpointError, on all ranks, where a write has failed."""
        self._waits = True
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def let_finish(self) -> None:
        """As `wait` when training has failed: raises nothing, and does not wait for ranks that have gone."""
        blocks, until = -1, 0.0
        while self._thread is not None and self._thread.is_alive():
            if blocks != self._blocks:
                blocks, until = self._blocks, time.monotonic() + PATIENCE
            if time.monotonic() > until:
                return
            self._thread.join(0.2)


class Buffers:
    """Memory for a copy of the state, kept for the next one: what takes long is to touch pages for the first time."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def room(self, path: tuple[Any, ...], tensor: Tensor) -> Tensor:
        """Memory for a copy of what stands at `path` of the state, which is `tensor` or one like it."""
        kept = self._kept.get(path)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).zero_()
            self._kept[path] = kept
        return kept

    def copy(self, path: tuple[Any, ...], tensor: Tensor) -> Tensor:
        """The copy of what stands at `path` of the state; it is whole after `settle`."""
        return self.room(path, tensor).copy_(tensor.detach(), non_blocking=True)

    def settle(self) -> None:
        """Waits for the copies that a GPU still makes."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()


def _as_it_is(path: tuple[Any, ...], tensor: Tensor) -> Tensor:
    """A tensor that is about to be written; a copy where it shares its memory, which would be written too."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def publish(
    folder: Path,
    files: dict[str, Any],
    rank: int = 0,
    gather: Gather = alone,
    sign: Callable[[], None] = nothing,
    after: Callable[[], None] = nothing,
) -> None:
    """Makes `folder` hold the files of all ranks; `files` are this rank's, by name.

    `sign` is called often while this rank writes, `after` by rank 0 once all is done.
    Raises CheckpointError, on every rank alike.
    """
    temporary = folder.with_name(folder.name + ".tmp")

    def make_room() -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)

    def write() -> dict[str, tuple[int, sealed.Checksum]]:
        written = {}
        for name, tree in files.items():
            with sealed.Summed(temporary / name, sign) as file:
                torch.save(tree, file)  # type: ignore[arg-type]  # which writes and flushes, no more
                written[name] = file.size_and_checksum()
        return written

    def finish() -> None:
        head = next(tree for name, tree in files.items() if name.startswith((STATE, "shard-0-")))
        notes = {
            key: head.get(key)
            for key in ("global_step", *ADDED_LATER, "rows_per_step", "row_order", "recipe")
        }
        sizes = {name: size for part in written for name, size in part.items()}
        sealed.seal(temporary, folder.name, sizes, **notes)
        sealed.publish(temporary, folder)
        after()

    _together(gather, folder, make_room if rank == 0 else None)
    written = _together(gather, folder, write)
    _together(gather, folder, finish if rank == 0 else None)


def _together(gather: Gather, folder: Path, work: Callable[[], Any] | None) -> list[Any]:
    """Every rank does its part; where one fails, all raise the same error, so that none waits for it in vain."""
    result, problem = None, None
    if work is not None:
        try:
            result = work()
        except Exception as error:  # whatever it is: the others wait for this rank's answer
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
