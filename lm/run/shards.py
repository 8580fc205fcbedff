"""A state divided over files, each holding some rows of its tensors: dividing it, and putting it together again.

A file's tree is nested dicts and lists. A tensor that is divided is a mapping there, with its shape and the rows that
this file has of it. The first file's mapping says in `starts` with which row each file begins; where it does not, as in
files of older versions, all files have as many. What is not divided is in the first file alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Keep = Callable[[tuple[Any, ...], Tensor], Tensor]
"""Where in the tree it stands, and a tensor of the model or a view of one -> what shall be written of it."""


@dataclass
class Pieces:
    """A tensor of which each file has some rows."""

    starts: Sequence[int]
    """The first row of each file."""
    shape: tuple[int, ...]
    part: Callable[[int], Tensor]
    """The rows that a file has, by its number."""

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last); opens the files that have them, and no others. Where one has all, a view of it."""
        found = []
        for number, (start, end) in enumerate(pairwise([*self.starts, self.shape[0]])):
            if max(start, first) < min(end, last):
                rows = self.part(number)
                if tuple(rows.shape) != (end - start, *self.shape[1:]):
                    raise ValueError(
                        f"file {number} has rows of shape {list(rows.shape)} of a tensor {self.shape}"
                    )
                found.append(rows[max(first - start, 0) : last - start])
        if not found:
            return self.part(0)[:0]
        return found[0] if len(found) == 1 else torch.cat(found)


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


def divided(tree: Any, keep: Keep, rank: int = 0, ranks: int = 1) -> tuple[int, int | None, Any]:
    """What a rank writes of a state that all ranks hold, in shards or in copies.

    Args:
        tree: nested dicts and lists. Where it holds sharded tensors this rank's part is of its own rows, divided
            over the copies of a shard; else the bytes of all weights and optimiser state are dealt out in order, so
            that most tensors are whole in one file.
        keep: is given every tensor that is written.
        rank: of this process, among `ranks` that hold the same state.

    Returns:
        The number of this rank's file, of how many (None: one file has all), and its tree.
    """
    starts: Callable[[Tensor], list[int]]
    sharded = next((leaf for leaf in _leaves(tree) if isinstance(leaf, DTensor)), None)
    if sharded is not None:
        mesh = sharded.device_mesh
        shards = mesh.size(mesh.ndim - 1)
        copies, copy = (mesh.size(0), mesh.get_local_rank(0)) if mesh.ndim > 1 else (1, 0)
        number, files = mesh.get_local_rank(mesh.ndim - 1) * copies + copy, shards * copies
        starts = partial(_starts_of_shards, shards=shards, copies=copies)
    elif ranks > 1:
        number, files, starts = rank, ranks, Deal(tree, ranks).starts
    else:
        return 0, None, _mapped(tree, keep)
    return number, files, _part(tree, number, starts, keep, (), DTensor if sharded is not None else Tensor)


def cut(tree: Any, number: int, files: int) -> Any:
    """The tree of one file of several, made from one that is whole, as that of a rank among copies is."""
    return _part(tree, number, Deal(tree, files).starts, lambda _, tensor: tensor.clone(), (), Tensor)


class Deal:
    """Deals the bytes of a state's weights and optimiser state out to files, tensor after tensor."""

    def __init__(self, tree: Any, files: int):
        self.files = files
        self._total = sum(tensor.nbytes for tensor in _divisible(tree))
        self._passed = 0

    def starts(self, tensor: Tensor) -> list[int]:
        """The first row of each file; to be called for each tensor once, in order."""
        row = tensor.nbytes // len(tensor)
        shares = [self._total * n // self.files - self._passed for n in range(self.files)]
        self._passed += tensor.nbytes
        return [min(max(math.ceil(share / row), 0), len(tensor)) for share in shares]


def _starts_of_shards(tensor: DTensor, shards: int, copies: int) -> list[int]:
    rows = tensor.shape[0]
    if not any(isinstance(placement, Shard) for placement in tensor.placements):
        return [0] + [rows] * (shards * copies - 1)
    bounds = [rows_of_shard(rows, shard, shards) for shard in range(shards)]
    return [a + rows_of_shard(b - a, copy, copies)[0] for a, b in bounds for copy in range(copies)]


IN_TENSORS = ("state_dict", "state")
"""Below these keys of the tree lie the tensors that are divided."""


def _part(
    tree: Any,
    number: int,
    starts: Callable[[Any], list[int]],
    keep: Keep,
    path: tuple[Any, ...],
    kind: type[Tensor],
    in_tensors: bool = False,
) -> Any:
    if isinstance(tree, kind) and (kind is DTensor or (in_tensors and _can_be_cut(tree))):
        begins = starts(tree)
        first, last = [*begins, tree.shape[0]][number : number + 2]
        if number and first == last:
            return None
        offset, held = (shard_rows(tree)[0], tree.to_local()) if isinstance(tree, DTensor) else (0, tree)
        rows = keep(path, held[first - offset : last - offset])
        made = {"sharded": True, "start": first, "shape": list(tree.shape), "rows": rows}
        return made if number else {**made, "starts": begins}
    if isinstance(tree, dict):
        return {
            key: value
            if key == "global_step"
            else _part(value, number, starts, keep, (*path, key), kind, in_tensors or key in IN_TENSORS)
            for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return type(tree)(
            _part(item, number, starts, keep, (*path, i), kind, in_tensors) for i, item in enumerate(tree)
        )
    if number:
        return None
    return keep(path, tree) if isinstance(tree, Tensor) else tree


def _mapped(tree: Any, keep: Keep, path: tuple[Any, ...] = ()) -> Any:
    """The tree with containers of its own, and the tensors that are to be written."""
    if isinstance(tree, dict):
        return {key: _mapped(value, keep, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(item, keep, (*path, i)) for i, item in enumerate(tree))
    return keep(path, tree) if isinstance(tree, Tensor) else tree


def _can_be_cut(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.numel() > 0


def _divisible(tree: Any, inside: bool = False) -> Iterator[Tensor]:
    """The tensors that are dealt out, in the order of `_part`."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from _divisible(item, inside or key in IN_TENSORS)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _divisible(item, inside)
    elif inside and _can_be_cut(tree):
        yield tree


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (dict, list, tuple)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(item)
    else:
        yield tree


def _is_sharded(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.get("sharded") is True


def joined(files: Sequence[Any], whole: bool) -> Any:
    """The trees of all files as one; divided tensors become whole ones, or `Pieces`.

    Only the first file is looked at but for the rows that are asked for. Raises ValueError, KeyError, TypeError or
    the like where the trees are not what `divided` made.
    """
    return _joined(files[0], files, (), whole)


def _joined(head: Any, files: Sequence[Any], path: tuple[Any, ...], whole: bool) -> Any:
    if _is_sharded(head):
        shape = tuple(head["shape"])
        starts = head.get("starts") or [rows_of_shard(shape[0], n, len(files))[0] for n in range(len(files))]
        bounds = [0, *starts, shape[0]]
        if len(starts) != len(files) or starts[0] != 0 or bounds != sorted(bounds):
            raise ValueError(f"the rows of {path[-1]} cannot begin at {starts}")
        pieces = Pieces(starts, shape, partial(_rows, files, path))
        return pieces.rows(0, shape[0]) if whole else pieces
    if isinstance(head, dict):
        return {key: _joined(value, files, (*path, key), whole) for key, value in head.items()}
    if isinstance(head, (list, tuple)):
        return type(head)(_joined(item, files, (*path, i), whole) for i, item in enumerate(head))
    return head


def _rows(files: Sequence[Any], path: tuple[Any, ...], number: int) -> Tensor:
    tree = files[number]
    for key in path:
        tree = tree[key]
    return tree["rows"]


def is_cut(tree: Any) -> bool:
    """Whether a file's tree holds rows of tensors instead of whole ones."""
    if _is_sharded(tree):
        return True
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return any(is_cut(child) for child in children)
