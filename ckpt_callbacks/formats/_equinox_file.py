"""What a file of `eqx.tree_serialise_leaves` holds: a line of JSON maybe, and arrays of NumPy.

All that the file claims is checked before an array is read, and pickles are not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, BinaryIO

from ckpt_callbacks.errors import CorruptCheckpoint, StateMismatch
from ckpt_callbacks.extras import require
from ckpt_callbacks.paths import show
from ckpt_callbacks.state import names_of

__all__ = ["Array", "arrays", "fitted", "header", "is_stored"]

_MAGIC = b"\x93NUMPY"
_LONGEST_LINE = 2**24
_KINDS = {bool: "b", int: "iu", float: "f", complex: "c"}
"""The dtypes in which a Python number is stored."""


@dataclass(frozen=True, slots=True)
class Array:
    """An array in a file: its header, and where its data begins."""

    shape: tuple[int, ...]
    dtype: Any
    fortran: bool
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)


def header(path: FilePath, file: BinaryIO) -> Any:
    """Read the first line if it is one, and return what it says."""
    start = file.read(len(_MAGIC))
    file.seek(0)
    if start in (_MAGIC, b""):
        return None
    line = file.readline(_LONGEST_LINE)
    try:
        if not line.endswith(b"\n"):
            raise ValueError("it does not end")
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{path} begins with neither an array nor a line of JSON: {error}"
        ) from error


def arrays(path: FilePath, file: BinaryIO) -> Iterator[Array]:
    """Yield the arrays from here to the end of the file, whose data are not read."""
    import numpy as np

    size = os.fstat(file.fileno()).st_size
    versions = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    while (start := file.tell()) < size:
        try:
            shape, fortran, dtype = versions[np.lib.format.read_magic(file)](file)
        except Exception as error:  # NumPy has no one error for what it cannot make out
            raise CorruptCheckpoint(f"{path} has no array at byte {start}: {error}") from error
        array = Array(shape, dtype, fortran, file.tell())
        if dtype.hasobject:
            raise CorruptCheckpoint(f"{path} holds a pickle at byte {start}, which is not read")
        plain = dtype.kind in "biufcV" and not (dtype.names or dtype.subdtype)
        if not plain or not all(type(n) is int and n >= 0 for n in shape):
            raise CorruptCheckpoint(f"{path} has {dtype}{list(shape)} at byte {start}: no array")
        if array.nbytes > size - array.start:
            raise CorruptCheckpoint(
                f"{path} ends within the array at byte {start}: {array.nbytes} bytes should "
                f"follow its header, and {size - array.start} do"
            )
        file.seek(array.nbytes, os.SEEK_CUR)
        yield array


def is_stored(leaf: Any) -> bool:
    """Return whether Equinox writes a leaf, or has one in the file for it."""
    import jax
    import numpy as np

    array = isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
    return array or isinstance(leaf, tuple(_KINDS)) or hasattr(leaf, "__jax_array__")


def fitted(path: FilePath, file: BinaryIO, stored: Array, leaf: Any, name: str) -> Any:
    """Return an array of a file, which is open, as what the module has in its place.

    Raises:
        StateMismatch: it does not fit there; a number also if Equinox would cut it to fit.
    """
    import jax
    import numpy as np

    def differs(what: str, ours: Any, theirs: Any) -> StateMismatch:
        return StateMismatch(f"{path}: {name} has the {what} {theirs} there, and {ours} in like")

    shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", None)
    native = stored.dtype.newbyteorder("=")
    half = dtype == jax.numpy.bfloat16 and native == np.dtype("V2")  # NumPy knows no such dtype
    # JAX cannot tell of a host's array that it is wide; Equinox would cut the values to fit.
    wide = isinstance(leaf, jax.ShapeDtypeStruct) and _cut(native) == dtype != native
    kinds = next((kind for t, kind in _KINDS.items() if isinstance(leaf, t)), "")
    if stored.shape != shape:
        raise differs("shape", shape, stored.shape)
    if dtype is None and native.kind not in kinds:
        raise differs("dtype", type(leaf).__name__, native)
    if dtype is not None and not (half or wide) and dtype not in (stored.dtype, native):
        raise differs("dtype", dtype, native)
    file.seek(stored.start)
    data = np.fromfile(file, np.uint8, stored.nbytes)
    array = data.view(stored.dtype).reshape(shape, order="F" if stored.fortran else "C")
    if dtype is None:
        return type(leaf)(array.item())
    array = array.view(dtype) if half else array.astype(native if wide else dtype, copy=False)
    if isinstance(leaf, np.generic):
        return array[()]
    return array if wide or isinstance(leaf, np.ndarray) else jax.numpy.asarray(array)


def _cut(dtype: Any) -> Any:
    """Return the dtype that an array has on a device, as JAX is set."""
    import jax

    return dtype if dtype.kind == "V" else jax.dtypes.canonicalize_dtype(dtype)


def read_into(path: FilePath, like: Any, filter_spec: Any = None) -> Any:
    """Return `like` with the leaves of a file.

    Args:
        path: of the file.
        like: a module, or an abstract one with a `jax.ShapeDtypeStruct` for each array.
        filter_spec: as Equinox has it. With one that pickles, it would run code: it is the
            caller's to answer for; and damage cannot be told from what does not fit.

    Raises:
        CorruptCheckpoint: the file is damaged, or holds a pickle.
        StateMismatch: it does not fit `like`; the message names the leaf.
    """
    import jax

    with path.open("rb") as file:
        header(path, file)
        if filter_spec is not None:
            return _filtered(path, file, like, filter_spec)
        stored = list(arrays(path, file))
        flat, treedef = jax.tree_util.tree_flatten_with_path(like)
        count = sum(is_stored(leaf) for _, leaf in flat)
        if len(stored) != count:
            raise StateMismatch(f"{path} has {len(stored)} leaves, and the module {count}")
        rest = iter(stored)
        new = [
            fitted(path, file, next(rest), leaf, show(names_of(keys))) if is_stored(leaf) else leaf
            for keys, leaf in flat
        ]
    return jax.tree_util.tree_unflatten(treedef, new)


def _filtered(path: FilePath, file: BinaryIO, like: Any, filter_spec: Any) -> Any:
    require("equinox", extra="equinox", who="filter_spec")
    import equinox

    try:
        new = equinox.tree_deserialise_leaves(file, like, filter_spec=filter_spec)
    except (RuntimeError, ValueError, TypeError, EOFError) as error:
        raise StateMismatch(f"{path} does not fit like with its filter_spec: {error}") from error
    if file.read(1):
        raise StateMismatch(f"{path} has more leaves than like with its filter_spec")
    return new
