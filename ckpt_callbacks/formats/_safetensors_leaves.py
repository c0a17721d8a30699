"""Leaves as arrays of the dtypes that safetensors has, with notes of what else they are.

A note is a dict of JSON with any of

- `path`: the names from the root to the leaf, where the name of the array does not tell them;
- `dtype`: NumPy's name of a dtype that the format has not: `int2`, `int4` and their like are
  stored as `I8` or `U8` with one number a byte, `complex128` as `F64` with an axis of two more, and
  all others as the bytes they are;
- `type`: `bool`, `int`, `bigint` (of more than 64 bits, its digits), `float`, `complex`, `str`
  (UTF-8), `bytes`, or `scalar` for a scalar of NumPy;
- `key`: the implementation of typed PRNG keys, of which the data is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckpt_callbacks.errors import CorruptCheckpoint, StateMismatch
from ckpt_callbacks.formats._notes import noted
from ckpt_callbacks.formats._safetensors_header import DTYPES, Entry
from ckpt_callbacks.leaves import Leaf, Note
from ckpt_callbacks.paths import Path, show
from ckpt_callbacks.tensors import Tensor, from_array, to_array

__all__ = ["Stored", "refuse", "stored", "tensor_of"]

_KEPT = {numpy for numpy, _ in DTYPES.values()}
_SMALL = {f"{kind}{bits}": f"{kind}8" for kind in ("int", "uint") for bits in (1, 2, 4)}
_AS_OTHERS: dict[str, tuple[str, tuple[int, ...]]] = {
    **{small: (wide, ()) for small, wide in _SMALL.items()},
    **dict.fromkeys(("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"), ("uint8", ())),
    **dict.fromkeys(("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"), ("uint8", ())),
    "complex128": ("float64", (2,)),
}
"""What is stored for a dtype that the format has not: a dtype, and further axes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A leaf that is to be written.

    Args:
        path: of the leaf.
        tensor: the leaf.
        dtype: NumPy's name of a dtype of the format.
        shape: of the array in the file.
        note: what it was.
        array: the array, of what has to be read to know its shape or its note, and is small.
    """

    path: Path
    tensor: Tensor
    dtype: str
    shape: tuple[int, ...]
    note: Note
    array: Any

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        import ml_dtypes  # noqa: F401  # adds its dtypes to NumPy's
        import numpy as np

        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def data(self) -> Any:
        """Read the leaf, and return its bytes as an array of them.

        Raises:
            StateMismatch: it is not what it was said to be.
        """
        import numpy as np

        array, leaf = self.array, self.tensor.leaf
        if array is None:
            array = to_array(self.tensor)[0]
            if (array.dtype.name, array.shape) != (leaf.dtype, leaf.shape):
                raise StateMismatch(
                    f"{show(self.path)} was read as {array.dtype}{list(array.shape)}, but it was "
                    f"said to be {leaf}: it changed while it was written"
                )
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        if array.dtype.name in _SMALL:
            array = array.astype(self.dtype)
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def stored(path: Path, tensor: Tensor) -> Stored:
    """Return how a leaf is stored; large arrays are not read for it.

    Raises:
        StateMismatch: the format can not tell it.
    """
    leaf, array = tensor.leaf, None
    dtype, shape = leaf.dtype, leaf.shape
    note: Note = {}
    if leaf.kind != "array" or not shape:
        try:
            array, note = to_array(tensor)
        except ValueError as error:  # text that has no UTF-8 form, or a number of 4,300 digits
            raise StateMismatch(f"{show(path)} cannot be stored: {error}") from None
        dtype, shape = array.dtype.name, array.shape
    as_other = _as_stored(path, dtype)
    if as_other[0] != dtype:
        note = note | {"dtype": dtype}
    return Stored(path, tensor, as_other[0], (*shape, *as_other[1]), note, array)


def tensor_of(
    where: str, name: str, entry: Entry, note: Any, read: Callable[[int, int], Any]
) -> Tensor:
    """Return a leaf of a file; `read` returns the bytes from one place to another as an array.

    Raises:
        CorruptCheckpoint: its note is none, or does not fit what the header says of it.
    """
    leaf = _leaf(entry, note) if isinstance(note, dict) else None
    if leaf is None:
        raise CorruptCheckpoint(
            f"{where} is damaged: {name!r} is {entry.dtype}{list(entry.shape)}, which does not fit "
            f"the note {str(note)[:200]}"
        )

    def value() -> Any:
        import ml_dtypes  # noqa: F401  # adds its dtypes to NumPy's
        import numpy as np

        raw = read(entry.start, entry.stop)
        if entry.dtype == "bool" and raw.size and raw.max() > 1:
            raise CorruptCheckpoint(f"{where} is damaged: {name!r} holds a bool that is neither")
        dtype = np.dtype(entry.dtype)
        if raw.ctypes.data % dtype.itemsize:  # where only a copy can be aligned
            raw = raw.copy()
        array = raw.view(dtype).reshape(entry.shape)
        wanted = np.dtype(note.get("dtype", dtype))
        if wanted.name in _SMALL:
            array = array.astype(wanted)
        elif wanted != dtype:  # of which a pair of numbers may be one
            array = array.view(wanted).reshape(_shape(entry, wanted.name))
        try:
            return from_array(array, {k: note[k] for k in ("type", "key") if k in note})
        except ValueError as error:
            raise CorruptCheckpoint(
                f"{where} is damaged: {name!r} is no {note['type']}: {error}"
            ) from None

    return Tensor(leaf, value)


def refuse(path: Path, leaf: Leaf) -> None:
    """Raise if what is known of a leaf, but for its value, is what the format can not tell.

    Raises:
        StateMismatch: it is.
    """
    if leaf.kind == "array":
        _as_stored(path, leaf.dtype)


def _as_stored(path: Path, dtype: str) -> tuple[str, tuple[int, ...]]:
    if dtype in _KEPT:
        return dtype, ()
    if dtype not in _AS_OTHERS:
        raise StateMismatch(f"{show(path)} is of dtype {dtype}, which safetensors cannot hold")
    return _AS_OTHERS[dtype]


def _shape(entry: Entry, dtype: str) -> tuple[int, ...]:
    """Return the shape that an array has in the dtype that its note says."""
    return entry.shape[: len(entry.shape) - len(_AS_OTHERS[dtype][1])]


def _leaf(entry: Entry, note: Note) -> Leaf | None:
    """Return what a leaf is; nothing if its note does not fit."""
    dtype, shape = note.get("dtype", entry.dtype), entry.shape
    if not note.keys() <= {"path", "dtype", "type", "key"} or not isinstance(dtype, str):
        return None
    if "dtype" in note:
        kept, further = _AS_OTHERS.get(dtype, ("", ()))
        if entry.dtype != kept or shape[len(shape) - len(further) :] != further:
            return None
        shape = _shape(entry, dtype)
    return noted(dtype, shape, note)
