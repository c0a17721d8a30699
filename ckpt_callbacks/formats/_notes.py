"""What notes may say of arrays in a file: that they were values of Python, scalars, or keys.

`tensors.to_array` makes these notes, and a file of anybody may hold others, which fit no array.
"""

from __future__ import annotations

from ckpt_callbacks.leaves import KEY_DATA, Leaf, Note

__all__ = ["noted"]

_PYTHON = {
    "scalar": (None, 0),
    "bool": ("bool", 0),
    "int": ("int64", 0),
    "bigint": ("uint8", 1),
    "float": ("float64", 0),
    "complex": ("complex128", 0),
    "str": ("uint8", 1),
    "bytes": ("uint8", 1),
}
"""The dtype, if it is a certain one, and the number of axes of the array for each `type`."""


def noted(dtype: str, shape: tuple[int, ...], note: Note) -> Leaf | None:
    """Return what the leaf of an array is; nothing if the note of it does not fit.

    Args:
        dtype: NumPy's name of it, after what the note says of dtypes was done.
        shape: of the array, after the same.
        note: with `type` or `key`, or neither.
    """
    if "key" in note:
        impl = note["key"]
        known = isinstance(impl, str) and "type" not in note and dtype == "uint32" and shape
        fits = known and KEY_DATA.get(impl, shape[-1]) == shape[-1]
        return Leaf("key", shape[:-1], impl) if fits else None
    if "type" not in note:
        return Leaf("array", shape, dtype)
    kind = note["type"]
    wanted, axes = _PYTHON.get(kind, ("", -1)) if isinstance(kind, str) else ("", -1)
    if wanted not in (None, dtype) or len(shape) != axes:
        return None
    return Leaf("array", shape, dtype) if kind == "scalar" else Leaf(kind.removeprefix("big"))
