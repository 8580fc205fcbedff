"""Tensors saved by rows, each file of a checkpoint holding the rows of one rank: cutting and joining them.

A file's tree is nested dicts and lists, in which a sharded tensor is a mapping with its rows and where they start.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


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


def shard_of(tree: Any) -> tuple[int, int, int] | None:
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


def own_rows(tree: Any, first: bool) -> Any:
    """A tree for one file: sharded tensors become their rows on this rank; the rest is in the first file alone."""
    if isinstance(tree, DTensor):
        rows = tree.to_local().detach().cpu().clone()  # a view would save the padding too
        return {"sharded": True, "start": shard_rows(tree)[0], "shape": list(tree.shape), "rows": rows}
    if isinstance(tree, dict):
        return {key: value if key == "global_step" else own_rows(value, first) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(own_rows(item, first) for item in tree)
    return tree if first else None


def _is_sharded(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.get("sharded") is True


def joined(trees: Sequence[Any], whole: bool) -> Any:
    """The trees of all files as one; sharded tensors become whole ones, or `Pieces`."""
    head = trees[0]
    if _is_sharded(head):
        parts = sorted(((tree["start"], tree["rows"]) for tree in trees), key=lambda part: part[0])
        pieces = Pieces([part for part in parts if len(part[1])] or parts[:1], tuple(head["shape"]))
        return pieces.rows(0, pieces.shape[0]) if whole else pieces
    if isinstance(head, dict):
        return {key: joined([tree[key] for tree in trees], whole) for key in head}
    if isinstance(head, (list, tuple)):
        return type(head)(joined(items, whole) for items in zip(*trees, strict=True))
    return head


def cut(tree: Any, shard: int, shards: int, in_tensors: bool = False) -> Any:
    """The tree of one file of `shards`, made from one that is whole: weights and optimiser state are cut."""
    if isinstance(tree, Tensor) and in_tensors and tree.ndim:
        first, last = rows_of_shard(len(tree), shard, shards)
        rows = tree[first:last].clone()
        return {"sharded": True, "start": first, "shape": list(tree.shape), "rows": rows}
    if isinstance(tree, dict):
        return {
            key: value
            if key == "global_step"
            else cut(value, shard, shards, in_tensors or key in ("state_dict", "state"))
            for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return type(tree)(cut(item, shard, shards, in_tensors) for item in tree)
    return tree if shard == 0 else None


def is_cut(tree: Any) -> bool:
    """Whether a file's tree holds rows of tensors instead of whole ones."""
    if _is_sharded(tree):
        return True
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return any(is_cut(child) for child in children)
