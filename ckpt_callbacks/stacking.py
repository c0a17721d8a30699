"""Layers put along an axis, and taken from it.

The same code works on what leaves are (`Leaf`), so that all is checked before anything is done,
on leaves that are yet to be read (`Tensor`), and on arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ckpt_callbacks.groups import Group, layers_in, stacks_in
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.paths import Path
from ckpt_callbacks.tensors import Tensor, in_turn

__all__ = ["joined", "split"]


def joined(leaves: Mapping[Path, Any], groups: Sequence[Group], axis: int) -> dict[Path, Any]:
    """Return leaves with layers stacked; those of groups within groups first."""
    parts: dict[Path, dict[tuple[int, ...], Any]] = {}
    for path, leaf in leaves.items():
        names, numbers = list[Path]((name,) for name in path), []
        for end, group, number in layers_in(path, groups):
            names[end - 1] = group.joined_name()
            numbers.append(number)
        parts.setdefault(tuple(itertools.chain(*names)), {})[tuple(numbers)] = leaf
    return {path: _joined(among, axis) for path, among in parts.items()}


def split(
    leaves: Mapping[Path, Any],
    groups: Sequence[Group],
    axis: int,
    sizes: Mapping[tuple[Path, Group], int],
) -> dict[Path, Any]:
    """Return leaves with one entry a layer, all layers of a leaf in a row."""
    made: dict[Path, Any] = {}
    last: dict[Path, Any] = {}
    for path, leaf in leaves.items():
        stacks = list(stacks_in(path, groups))
        ranges = [range(sizes[path[:end], group]) for end, group in stacks]
        dims = len(_shape(leaf)) if stacks else 0
        axes = [min(axis, dims - 1 - depth) for depth in range(len(stacks))]
        for numbers in itertools.product(*ranges):
            names = list[Path]((name,) for name in path)
            for (end, group), number in zip(stacks, numbers, strict=True):
                names[end - 1] = group.split_name(path[end - 1], number)
            cuts = list(zip(axes, numbers, strict=True))
            made[tuple(itertools.chain(*names))] = _cut(path, leaf, cuts, last) if cuts else leaf
    return made


def _joined(parts: Mapping[tuple[int, ...], Any], axis: int) -> Any:
    while () not in parts:
        outer: dict[tuple[int, ...], list[Any]] = {}
        for numbers in sorted(parts):
            outer.setdefault(numbers[:-1], []).append(parts[numbers])
        parts = {numbers: _join(among, axis) for numbers, among in outer.items()}
    return parts[()]


def _join(parts: Sequence[Any], axis: int) -> Any:
    import jax
    import numpy as np

    first, shape = parts[0], _shape(parts[0])
    at = min(axis, len(shape))
    if isinstance(first, Leaf):
        return replace(first, shape=(*shape[:at], len(parts), *shape[at:]))
    if isinstance(first, Tensor):
        leaf = _join([part.leaf for part in parts], axis)
        return Tensor(leaf, partial(_read_all, parts, at))
    if all(isinstance(part, np.ndarray | np.generic) for part in parts):
        return np.stack(parts, at)
    stack = partial(jax.numpy.stack, axis=at)
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in parts):
        return jax.eval_shape(stack, list(parts))
    return stack(list(parts))


def _read_all(parts: Sequence[Tensor], at: int) -> Any:
    """Read layers into one array, one at a time or some small ones."""
    import numpy as np

    made: Any = None
    for i, value in enumerate(in_turn(parts)):
        if made is None:
            shape = value.shape
            made = np.empty((*shape[:at], len(parts), *shape[at:]), value.dtype)
        np.moveaxis(made, at, 0)[i] = value
    return made


def _cut(path: Path, value: Any, cuts: Sequence[tuple[int, int]], last: dict[Path, Any]) -> Any:
    """Return one layer; of a leaf that is to be read, `last` keeps the one that was read last."""
    import jax
    import numpy as np

    if isinstance(value, Tensor):
        leaf = _cut(path, value.leaf, cuts, last)
        return Tensor(leaf, partial(_read_part, path, value, cuts, last))
    for at, i in cuts:
        if isinstance(value, Leaf):
            value = replace(value, shape=value.shape[:at] + value.shape[at + 1 :])
        elif isinstance(value, np.ndarray):
            value = np.asarray(np.take(value, i, at))  # a copy, so that the whole is not kept
        else:
            take = partial(jax.lax.index_in_dim, index=i, axis=at, keepdims=False)
            abstract = isinstance(value, jax.ShapeDtypeStruct)
            value = jax.eval_shape(take, value) if abstract else take(value)
    return value


def _read_part(
    path: Path, tensor: Tensor, cuts: Sequence[tuple[int, int]], last: dict[Path, Any]
) -> Any:
    if path not in last:
        last.clear()
        last[path] = tensor.read()
    return _cut(path, last[path], cuts, last)


def _shape(leaf: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = (leaf.leaf if isinstance(leaf, Tensor) else leaf).shape
    return shape
