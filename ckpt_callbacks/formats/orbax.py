"""Orbax's own checkpoints without anything of ours, for those who have Orbax alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from ckpt_callbacks import orbax_io
from ckpt_callbacks.atomic import new_folder
from ckpt_callbacks.contents import Contents
from ckpt_callbacks.errors import CkptCallbacksError, ConfigError, CorruptCheckpoint, StateMismatch
from ckpt_callbacks.leaves import encode
from ckpt_callbacks.paths import dotted, show
from ckpt_callbacks.state import ROOT, put
from ckpt_callbacks.tensors import Tensor, Tensors, of_contents

__all__ = ["matches", "read", "write"]

_SAME = (None, {"type": "scalar"}, {"type": "bool"}, {"type": "complex"})
"""Notes without which a leaf still has its value: it becomes an array without dimensions."""


def matches(path: FilePath) -> bool:
    """Return whether a folder is a checkpoint, or an item of one that is a tree of arrays."""
    return path.is_dir() and orbax_io.is_checkpoint(path)


def read(path: FilePath) -> tuple[Tensors, dict[str, Any]]:
    """Return the leaves and the custom metadata; `path` may also be an item in a checkpoint.

    Raises:
        CorruptCheckpoint: it is damaged, or holds no tree of arrays.
    """
    path = path.absolute()  # Orbax takes no other
    root = path.parent if orbax_io.is_item(path) else path
    with _damage_of(path):
        contents = Contents(root)
        tensors = of_contents(contents)
        if root != path:
            folders = dict(zip(contents.items, contents.folders, strict=True))
            above = 0 if folders.get(ROOT) == path.name else 1
            tensors = {
                names[above:]: tensor
                for names, tensor in tensors.items()
                if contents.leaves[names].item == path.name
            }
        if not tensors:
            raise CorruptCheckpoint(f"{path} holds no tree of arrays that Orbax has written")
        return {
            names: Tensor(tensor.leaf, partial(_read, path, tensor))
            for names, tensor in tensors.items()
        }, orbax_io.metadata(root)


def write(
    path: FilePath,
    tensors: Tensors,
    metadata: Mapping[str, Any],
    *,
    item: str = orbax_io.WHOLE,
    **options: Any,
) -> None:
    """Write a checkpoint that is one pytree of nested dicts, all of which is in memory.

    Orbax takes no array that is yet to be read: a save of it has all of them at once.

    Args:
        path: of the folder.
        tensors: the leaves.
        metadata: JSON that Orbax keeps with the checkpoint.
        item: the folder in it to put the tree in. Without one, all of Orbax's functions but
            `load_checkpointables` read it from `path`: `v1.load`, and v0's
            `StandardCheckpointer` and `PyTreeCheckpointer`. With one, those of v0 take
            `path / item`; `CheckpointManager` reads it as an item if `path` ends with the step,
            and MaxText if the item is `items`.
        options: none.

    Raises:
        StateMismatch: a leaf is none that Orbax can hold, or two have the same name in it.
        ConfigError: `path` is there already, or `item` is no name for a folder of Orbax.
    """
    if options:
        raise ConfigError(f"an Orbax checkpoint has no option {', '.join(options)}: it has item")
    if item and (item == "metrics" or not re.fullmatch(r"\w[\w-]*", item)):
        raise ConfigError(
            f"item must be a name of letters, digits, _ and -, and not metrics, not {item!r}"
        )
    tree: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for names, tensor in tensors.items():
        name = dotted(names)
        if name in seen:
            raise StateMismatch(f"Orbax has one name for {seen[name]} and {show(names)}: {name}")
        if any(names[:i] in tensors for i in range(len(names))):
            raise StateMismatch(f"the leaf at {show(names)} lies below another leaf")
        seen[name] = show(names)
        put(tree, names or ("leaf",), _plain(tensor, seen[name]))
    with new_folder(path.absolute()) as part:
        orbax_io.save_plain(part, item, tree, metadata)


@contextmanager
def _damage_of(path: FilePath) -> Iterator[None]:
    try:
        yield
    except CkptCallbacksError:
        raise
    except Exception as error:  # whatever Orbax and TensorStore raise
        raise CorruptCheckpoint(f"{path} is damaged, Orbax cannot read it: {error}") from error


def _read(path: FilePath, tensor: Tensor) -> Any:
    with _damage_of(path):
        return tensor.read()


def _plain(tensor: Tensor, name: str) -> Any:
    """Return a leaf as Orbax stores it by itself."""
    value, leaf = tensor.read(), tensor.leaf
    if leaf.kind == "key" and value.size:
        import jax

        try:
            return jax.random.wrap_key_data(value, impl=leaf.dtype)
        except ValueError as error:
            raise StateMismatch(
                f"the leaf at {name} is {leaf}, and JAX knows no such keys: {error}"
            ) from error
    stored, note = encode(value)
    if note not in _SAME or (leaf.kind == "key"):
        raise StateMismatch(f"the leaf at {name} is {leaf}, which Orbax cannot store")
    return stored
