"""safetensors: one file, or the folder of shards with an index that Hugging Face reads.

The file is what the library of that name writes, byte for byte but for the metadata, so all that
reads such files reads these. Reading maps the file: an array costs what of it is used.

What the metadata of a file holds, each as text:

``format``
    ``pt``, which transformers asks for: arrays as they are. A string of the user's replaces it.
names of the user's metadata
    those whose values are strings, for other readers.
``ckpt_callbacks.metadata``
    JSON of all of the user's metadata.
``ckpt_callbacks.naming``
    how leaves are named; see `ckpt_callbacks.formats.naming`.
``ckpt_callbacks.leaves``
    JSON: by name of an array the note of what its leaf is, if it is more than the array; see
    `ckpt_callbacks.formats._safetensors_leaves`.

A shard has the notes of its own arrays, and is a whole file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, BinaryIO

from ckpt_callbacks.atomic import new_file, new_folder
from ckpt_callbacks.errors import ConfigError, StateMismatch
from ckpt_callbacks.formats._safetensors_header import METADATA, build, is_text
from ckpt_callbacks.formats._safetensors_leaves import Stored, refuse, stored
from ckpt_callbacks.formats._safetensors_reader import (
    ABOUT,
    INDEX,
    NAMING,
    NOTES,
    SUFFIX,
    loads,
    main_file,
    read,
)
from ckpt_callbacks.formats.naming import names_of, split
from ckpt_callbacks.paths import Path
from ckpt_callbacks.tensors import Tensors

__all__ = ["check", "dumps", "loads", "matches", "read", "write"]

_SHARD = 5 * 10**9
"""Bytes of the arrays of one shard, as Hugging Face has it."""


def matches(path: FilePath) -> bool:
    """Return whether a file or a folder that exists is in this format, by name and content."""
    if path.is_dir():
        return main_file(path) is not None
    if path.name.endswith((SUFFIX, INDEX)):
        return True
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= path.stat().st_size - 8


def write(
    path: FilePath,
    tensors: Tensors,
    metadata: Mapping[str, Any],
    *,
    max_shard_size: int | None = None,
    naming: str = "dots",
    **options: Any,
) -> None:
    """Write the leaves so that `path` is there only once all of it is durable.

    Each leaf is read and written in turn, in the order given.

    Args:
        path: a file whose name ends in ``.safetensors``, or a folder: of ``model.safetensors`` or,
            if that is too large, of shards and their index.
        tensors: the leaves.
        metadata: what else to keep: JSON by name.
        max_shard_size: bytes of the arrays of a shard; 5 GB if not given.
        naming: how leaves are called; see `ckpt_callbacks.formats.naming`.
        options: none.

    Raises:
        StateMismatch: a leaf cannot be told in this format, or two have the same name in it.
        ConfigError: an option is none of this format, or `path` exists.
    """
    if options:
        raise ConfigError(
            f"safetensors has no option {', '.join(options)}: it has max_shard_size and naming"
        )
    path = path.absolute()
    whole = path.suffix == SUFFIX
    if max_shard_size is not None and (whole or not _is_size(max_shard_size)):
        raise ConfigError(
            f"max_shard_size must be bytes, and path a folder for the shards: it is "
            f"{max_shard_size!r}, and path {path}"
        )
    if path.exists():
        raise ConfigError(f"{path} exists: give another path, or move it away")
    leaves = _plan(tensors, naming)
    text = _metadata(metadata, naming)
    if whole:
        with new_file(path) as file:
            _fill(file, leaves, text)
        return
    with new_folder(path) as folder:
        folder.mkdir()
        _write_shards(folder, leaves, text, max_shard_size or _SHARD)


def dumps(tensors: Tensors, metadata: Mapping[str, Any], *, naming: str = "dots") -> bytes:
    """Return the content of the file that `write` writes.

    Raises:
        StateMismatch, ConfigError: as `write`.
    """
    file = io.BytesIO()
    _fill(file, _plan(tensors, naming), _metadata(metadata, naming))
    return file.getvalue()


def check(tensors: Tensors, naming: str = "dots") -> dict[Path, str]:
    """Return the name of each leaf; no value is read, which may be one that cannot be told.

    Raises:
        StateMismatch: a leaf cannot be told in this format, or two have the same name in it.
    """
    names = names_of(tensors, naming)
    for path, name in names.items():
        if name == METADATA or not is_text(name):
            raise StateMismatch(f"{path}: safetensors cannot name it {name!r}: rename it")
        refuse(path, tensors[path].leaf)
    return names


def _plan(tensors: Tensors, naming: str) -> dict[str, Stored]:
    """Return how each leaf is stored, by its name and in the order given."""
    plan: dict[str, Stored] = {}
    for path, name in check(tensors, naming).items():
        leaf = stored(path, tensors[path])
        if split(name, naming) != path:
            leaf.note["path"] = list(path)
        plan[name] = leaf
    return plan


def _metadata(metadata: Mapping[str, Any], naming: str) -> dict[str, str]:
    try:
        about = json.dumps(dict(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata must be JSON by name: {error}") from None
    plain = {k: v for k, v in metadata.items() if is_text(k) and is_text(v) and k != NOTES}
    return {"format": "pt"} | plain | {ABOUT: about, NAMING: naming}


def _fill(file: BinaryIO, leaves: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Write a file: its header first, and then each leaf to its place, in the order given."""
    notes = {name: leaf.note for name, leaf in leaves.items() if leaf.note}
    more = {NOTES: json.dumps(notes, sort_keys=True)} if notes else {}
    arrays = {name: (leaf.dtype, leaf.shape) for name, leaf in leaves.items()}
    start, entries = build(arrays, {**metadata, **more})
    file.write(start)
    for name, leaf in leaves.items():
        file.seek(entries[name].start)
        file.write(leaf.data().data)


def _write_shards(
    folder: FilePath, leaves: Mapping[str, Stored], text: Mapping[str, str], size: int
) -> None:
    shards = _shards(leaves, size)
    if len(shards) == 1:
        with (folder / f"model{SUFFIX}").open("xb") as file:
            _fill(file, leaves, text)
        return
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        shard = f"model-{i:05}-of-{len(shards):05}{SUFFIX}"
        where |= dict.fromkeys(names, shard)
        with (folder / shard).open("xb") as file:
            _fill(file, {name: leaves[name] for name in names}, text)
    total = sum(leaf.nbytes for leaf in leaves.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / f"model{INDEX}").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(leaves: Mapping[str, Stored], size: int) -> list[list[str]]:
    """Return the names for each shard, in the order given: at most `size` bytes, or one leaf."""
    shards: list[list[str]] = [[]]
    taken = 0
    for name, leaf in leaves.items():
        if shards[-1] and taken + leaf.nbytes > size:
            shards.append([])
            taken = 0
        shards[-1].append(name)
        taken += leaf.nbytes
    return shards


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
