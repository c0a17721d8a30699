"""NumPy's `.npz`, and `.npy` for a single array.

`np.load` reads what is written here. An array is named by its path, joined with dots. What NumPy
has no dtype for is there as whole numbers of the same size: `bfloat16` as `uint16`, `float8_…` as
`uint8`, `int4` as `int8`. Text and bytes are there as `uint8`, other values of Python as arrays
without a dimension, typed PRNG keys as their data. What each of them is says the array of bytes
`__ckpt_callbacks__.json`, with the metadata and the names::

    {"version": 1, "metadata": {…}, "leaves": {"model.w": {"dtype": "bfloat16"}, "model.b": {}}}

where `path` has the names of a leaf of which one holds a dot. Of files of others the names are
split at slashes if there are any, and at dots if not. Nothing is unpickled.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from ckpt_callbacks.atomic import new_file
from ckpt_callbacks.errors import ConfigError, CorruptCheckpoint, StateMismatch
from ckpt_callbacks.formats._notes import noted
from ckpt_callbacks.formats.npy import Entry, damaged, entries_of, problem_of
from ckpt_callbacks.leaves import Leaf, Note, leaf_of
from ckpt_callbacks.paths import Path, dotted, show
from ckpt_callbacks.tensors import Tensor, Tensors, from_array, to_array

__all__ = ["NOTES", "matches", "read", "write"]

NOTES = "__ckpt_callbacks__.json"
"""Name of the array of bytes that says what the others are."""

_VERSION = 1
_ALONE = ("leaf",)
"""Path of the array in a `.npy` file, which has no name for it."""


def matches(path: FilePath) -> bool:
    """Return whether it is a file of NumPy, by its name, so that a damaged one is told as that."""
    return path.suffix in (".npz", ".npy") and path.is_file()


def read(path: FilePath) -> tuple[Tensors, dict[str, Any]]:
    """Return the leaves, of which no array was read yet, and the metadata.

    Raises:
        CorruptCheckpoint: it is damaged, or made to do harm; the message names file and entry.
    """
    if path.suffix == ".npy":
        with damaged(path):
            return {_ALONE: _tensor(path, Entry(path), {})}, {}
    with damaged(path):
        archive = zipfile.ZipFile(path)  # stays open while a leaf can still be read
        entries = entries_of(path, archive)
        about = _about(path, entries.pop(NOTES, None))
    notes = about["leaves"]
    if notes is not None and notes.keys() != entries.keys():
        raise CorruptCheckpoint(
            f"{path} is damaged: {_first(notes.keys() ^ entries.keys())!r} is either in {NOTES} or "
            "in the file, not in both"
        )
    apart = "/" if notes is None and any("/" in name for name in entries) else "."
    tensors: dict[Path, Tensor] = {}
    for name, entry in entries.items():
        with damaged(path, name):
            note = dict((notes or {}).get(name, {}))
            at = tuple(note.pop("path", name.split(apart)))
            if at in tensors or not all(isinstance(part, str) for part in at):
                raise ValueError(f"its path {at} is none, or another one's")
            tensors[at] = _tensor(path, entry, note)
    return tensors, about["metadata"]


def write(path: FilePath, tensors: Tensors, metadata: Mapping[str, Any], **options: Any) -> None:
    """Write the leaves so that `path` is there only once all of it is durable.

    One leaf is in memory at a time.

    Raises:
        StateMismatch: the name of a leaf cannot be one in a file, or two have the same; or, of a
            `.npy` file, it is not one array of a dtype that NumPy has.
        ConfigError: there are no options in this format.
    """
    if options:
        raise ConfigError(f"{path.name}: NumPy's format takes no options: {', '.join(options)}")
    if path.suffix == ".npy":
        _write_alone(path, tensors)
        return
    names = _names(path, tensors)
    notes: dict[str, Note] = {}
    with new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for at, tensor in tensors.items():
            array, note = _stored(tensor)
            _add(archive, names[at], array)
            split = tuple(names[at].split("."))
            notes[names[at]] = note | ({} if split == at else {"path": list(at)})
        about = {"version": _VERSION, "metadata": dict(metadata), "leaves": notes}
        _add(archive, NOTES, _bytes(json.dumps(about).encode()))


def _about(path: FilePath, entry: Entry | None) -> dict[str, Any]:
    """Return what a file says of its leaves, `None` for those of others, and its metadata."""
    if entry is None:
        return {"leaves": None, "metadata": {}}
    with damaged(path, NOTES):
        about = json.loads(entry.array().tobytes())
        if about["version"] != _VERSION:
            raise ValueError(f"its version is {about['version']}; known is {_VERSION}")
        if not all(isinstance(n, dict) for n in (*about["leaves"].values(), about["metadata"])):
            raise TypeError("it is not as it is written")
    return dict(about)


def _tensor(path: FilePath, entry: Entry, note: Note) -> Tensor:
    """Return a leaf whose note, if any, fits the array."""
    import jax

    dtype = entry.dtype
    if not note.keys() <= {"type", "dtype", "key"}:
        raise ValueError(f"it is said to be {note}, which is nothing known")
    if named := note.get("dtype"):
        dtype = jax.numpy.dtype(named)
        if not _is_foreign(dtype) or _host_dtype(dtype) != entry.dtype:
            raise ValueError(f"{entry.dtype} is said to be {named}")
    # One that NumPy has itself, and is neither text nor a point in time.
    if not _is_foreign(dtype) and dtype.kind not in "biufc":
        raise ValueError(f"it is of dtype {dtype}, which is none of numbers")
    if (leaf := noted(dtype.name, entry.shape, note)) is None:
        raise ValueError(f"{entry.dtype}{list(entry.shape)} is said to be {note}, which it is not")
    return Tensor(leaf, partial(_value, path, entry, note, leaf))


def _value(path: FilePath, entry: Entry, note: Note, leaf: Leaf) -> Any:
    name = entry.info.filename if entry.info else path.name
    with damaged(path, name):
        value = from_array(entry.array(), note)
        if "key" not in note and leaf_of(value) != leaf:
            raise ValueError(f"it is {leaf_of(value)} and no longer {leaf}")
    return value


def _stored(tensor: Tensor) -> tuple[Any, Note]:
    """Return a leaf as an array that NumPy can write, and the note of what it was."""
    array, note = to_array(tensor)
    if not _is_foreign(array.dtype):
        return array, note
    host, named = _host_dtype(array.dtype), {"dtype": array.dtype.name}
    small = "int" in array.dtype.name  # of less than a byte
    return (array.astype(host) if small else array.view(host)), note | named


def _is_foreign(dtype: Any) -> bool:
    """Return whether a dtype is one that was added to NumPy, which writes none of those."""
    return bool(dtype.isbuiltin == 2)


def _host_dtype(dtype: Any) -> Any:
    """Return the dtype of NumPy that stands for one that was added to it."""
    import numpy as np

    return np.dtype(f"{'int' if dtype.name.startswith('int') else 'uint'}{8 * dtype.itemsize}")


def _write_alone(path: FilePath, tensors: Tensors) -> None:
    import numpy as np

    arrays = [_stored(tensor) for tensor in tensors.values()] if len(tensors) == 1 else []
    if not arrays or arrays[0][1]:
        what = ", ".join(f"{show(at)} ({t.leaf})" for at, t in list(tensors.items())[:3])
        raise StateMismatch(
            f"{path.name} can hold one array of a dtype that NumPy has, and nothing else, but this "
            f"is {what}{' and more' * (len(tensors) > 3)}: choose one with only=, or name it .npz"
        )
    with new_file(path) as file:
        np.lib.format.write_array(file, arrays[0][0], allow_pickle=False)


def _add(archive: zipfile.ZipFile, name: str, array: Any) -> None:
    import numpy as np

    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)


def _bytes(text: bytes) -> Any:
    import numpy as np

    return np.frombuffer(text, np.uint8)


def _names(path: FilePath, tensors: Tensors) -> dict[Path, str]:
    """Return the names of leaves in a file.

    Raises:
        StateMismatch: some cannot be, or are the same.
    """
    names: dict[Path, str] = {}
    taken: dict[str, Path] = {NOTES: (NOTES,)}
    problems: list[str] = []
    for at in tensors:
        name = names[at] = dotted(at or _ALONE)
        if problem := problem_of(name):
            problems.append(f"{show(at)!r}: the name {problem}")
        elif name in taken:
            problems.append(f"{show(at)!r} and {show(taken[name])!r} would both be {name!r}")
        taken[name] = at
    if problems:
        raise StateMismatch(
            f"{path.name} can not hold these leaves:\n  " + "\n  ".join(problems[:20])
        )
    return names


def _first(names: Any) -> str:
    return str(min(names))
