"""One leaf of a state: what it is, how it is stored, and how it comes back.

Orbax stores arrays of most dtypes, numbers and text. What it does not (0.12) is stored as
something that it does, with a *note* of what it was, so that every leaf comes back as it was:
the same type, dtype, shape and bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

__all__ = [
    "KEY_DATA",
    "DType",
    "Leaf",
    "Note",
    "decode",
    "encode",
    "found",
    "is_files",
    "is_function",
    "leaf_of",
    "missing",
    "unsavable",
]

DType = Literal["saved", "cast", "error"]
"""What decides the dtype: the checkpoint, the state given, or both have to agree."""
Note = dict[str, Any]
"""JSON that says of a stored leaf what it was: `type`, `dtype`, `shape` or `key`."""

KEY_DATA = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
"""Of implementations of typed keys, the length of the last axis of their data."""
_STORED_AS_BYTES = (
    *("int1", "uint1", "uint2", "uint4"),
    *("float6_e2m3fn", "float6_e3m2fn", "float8_e4m3"),
)
"""What TensorStore (0.1.86) has no dtype for."""
_WIDE = ("float64", "int64", "uint64", "complex128")
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a leaf is.

    Args:
        kind: `array`, `key` (typed PRNG keys), `files` (what saves itself), or the name of a
            Python type: `bool`, `int`, `float`, `complex`, `str`, `bytes`.
        shape: of an array or of keys; of files the number of processes that each saved a part.
        dtype: of an array its dtype, of keys the name of their implementation.
        on_device: whether it was saved from a device.
    """

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    on_device: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        if self.kind not in ("array", "key"):
            return self.kind
        name = f"key<{self.dtype}>" if self.kind == "key" else self.dtype
        return f"{name}[{', '.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        """Bytes of an array in memory; 0 for what is none."""
        import jax

        if self.kind != "array":
            return 0
        return math.prod(self.shape) * jax.dtypes.itemsize_bits(_dtype(self.dtype)) // 8


def loses_bits(leaf: Leaf) -> bool:
    """Return whether JAX, as it is set, would cut the values of an array to 32 bits."""
    import jax

    return leaf.dtype in _WIDE and not jax.config.jax_enable_x64  # type: ignore[attr-defined]


def is_files(leaf: Any) -> bool:
    """Return whether a leaf saves itself: Orbax's `StatefulCheckpointable`."""
    kind: Any = type(leaf)
    return _saves_itself(kind)


@cache
def _saves_itself(kind: Any) -> bool:
    from inspect import iscoroutinefunction

    return all(iscoroutinefunction(getattr(kind, name, None)) for name in ("save", "load"))


def is_function(leaf: Any) -> bool:
    """Return whether a leaf can be called and, as far as can be seen, holds no arrays."""
    import jax

    if not callable(leaf) or is_files(leaf):
        return False
    if isinstance(leaf, type):
        return True
    held = [getattr(leaf, "__dict__", {})]
    if isinstance(leaf, partial):
        held += [leaf.args, leaf.keywords]
    try:
        return not any(map(_is_array, jax.tree_util.tree_leaves(held)))
    except Exception:  # it is not for JAX to look into
        return True


def leaf_of(value: Any) -> Leaf | None:
    """Return what a leaf of a state is; `None` for what can not be saved."""
    import numpy as np

    if isinstance(value, np.ma.MaskedArray):  # of which Orbax would store all but the mask
        return None
    if _is_array(value):
        kind, dtype = _kind_and_name(value.dtype)
        return Leaf(kind, tuple(value.shape), dtype) if kind else None
    for known in (bool, complex, float, int, str, bytes):
        if isinstance(value, known):
            return Leaf(known.__name__)
    return Leaf("files") if is_files(value) else None


@cache
def _kind_and_name(dtype: Any) -> tuple[str, str]:
    """Return of a dtype `array` or `key`, and its name; nothing if Orbax can not store it."""
    import numpy as np

    if impl := key_impl(dtype):
        return "key", impl
    dtype = np.dtype(dtype)
    # `W` are complex numbers of 16-bit floats, which neither JAX nor TensorStore have.
    odd = dtype.kind in "OUSMmW" or dtype in (np.longdouble, np.clongdouble)
    return ("", "") if odd or issubclass(dtype.type, np.void) else ("array", dtype.name)


def found(stored: Any, note: Note | None, *, on_device: bool = False) -> Leaf:
    """Return what a leaf of a checkpoint is, by Orbax's metadata and our note of it."""
    note = note or {}
    if "key" in note:
        shape = note.get("shape", stored.shape)
        return Leaf("key", tuple(shape[:-1]), note["key"])
    if note.get("type", "scalar") != "scalar":
        return Leaf(note["type"])
    if not hasattr(stored, "dtype"):
        return Leaf(type(stored).__name__)
    dtype = note.get("dtype") or _dtype(stored.dtype).name
    return Leaf("array", tuple(note.get("shape", stored.shape)), dtype, on_device)


def unsavable(value: Any) -> str | None:
    """Return why a leaf can not be saved, if so."""
    if leaf_of(value) is None:
        if callable(value):
            return f"is a {type(value).__qualname__} that holds arrays, which cannot be saved"
        dtype = getattr(value, "dtype", None)
        what = f"a {type(value).__qualname__}" + (f" of dtype {dtype}" if dtype is not None else "")
        return f"is {what}, which cannot be saved"
    return None


def missing(value: Any) -> str | None:
    """Return why a leaf that could be saved has nothing to save, if so."""
    import jax

    if isinstance(value, jax.ShapeDtypeStruct):
        return "is abstract: it has a shape and a dtype, but no values"
    if isinstance(value, jax.Array) and value.is_deleted():
        return "was donated or deleted: give the new state, not one that a later step consumed"
    return None


def encode(value: Any) -> tuple[Any, Note | None]:
    """Return a leaf as Orbax stores it, and the note of what it was, if there is need of one."""
    import numpy as np

    if _is_array(value):
        scalar = isinstance(value, np.generic)
        note = {"type": "scalar"} if scalar else {}
        return _encoded_array(np.asarray(value) if scalar else value, note)
    match value:
        case bool() | complex():  # for a bool Orbax has no metadata
            return np.asarray(value), {"type": type(value).__name__}
        case int():
            number = int(value)  # of an enumeration too
            return (number, None) if number in _INT64 else (str(number), {"type": "int"})
        case float() | str():
            return (float if isinstance(value, float) else str)(value), None
        case bytes():
            return _encoded_array(np.frombuffer(value, np.uint8), {"type": "bytes"})
    return value, None  # it saves itself


def _encoded_array(array: Any, note: Note) -> tuple[Any, Note | None]:
    import numpy as np

    kind, dtype = _kind_and_name(array.dtype)
    if kind == "key":
        import jax

        note = {"key": dtype}
        if array.size:
            return array, note
        array = jax.random.key_data(array)
        dtype = array.dtype.name
    if not array.size:
        return np.zeros(1, np.uint8), note | {"shape": list(array.shape), "dtype": dtype}
    if dtype in _STORED_AS_BYTES:
        return _as(array, np.uint8), note | {"dtype": dtype}
    return array, note or None


def decode(loaded: Any, note: Note | None) -> Any:
    """Return a leaf as it was before `encode`; arrays stay where they were loaded to."""
    import numpy as np

    note = note or {}
    if "shape" in note:
        loaded = np.zeros(note["shape"], _dtype(note["dtype"]))
    elif "dtype" in note:
        loaded = _as(loaded, _dtype(note["dtype"]))
    if "key" in note and "shape" in note:
        import jax

        return jax.random.wrap_key_data(loaded, impl=note["key"])
    match note.get("type"):
        case "scalar":
            return loaded[()]
        case "bytes":
            return loaded.tobytes()
        case "bool" | "complex":
            return loaded.item()
        case "int":
            return int(loaded)
    return loaded


def key_impl(dtype: Any) -> str | None:
    """Return the implementation of typed PRNG keys, such as `threefry2x32`."""
    import jax

    if not jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    # The dtype of a key names its implementation by a short tag: `key<fry>`.
    tag = str(dtype)[len("key<") : -1]
    return {"fry": "threefry2x32", "urbg": "unsafe_rbg"}.get(tag, tag)


def wanted_type(wanted: Any, value: Any) -> Any:
    """Return a Python number as the enumeration that the state has in its place."""
    from enum import Enum

    same = isinstance(wanted, Enum) and isinstance(value, int | str)
    return type(wanted)(value) if same else value


def _as(array: Any, dtype: Any) -> Any:
    """Return whole numbers of less than a byte as bytes, and others as the bytes they are."""
    small = "int" in str(array.dtype) and "int" in str(dtype)
    return array.astype(dtype) if small else array.view(dtype)


def _is_array(value: Any) -> bool:
    import jax
    import numpy as np

    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _dtype(dtype: Any) -> Any:
    """Return a NumPy dtype, also for the names of JAX's own such as `bfloat16`."""
    import jax

    return jax.numpy.dtype(dtype)
