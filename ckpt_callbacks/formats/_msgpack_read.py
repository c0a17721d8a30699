"""Flax's msgpack files: what they hold and where, found without reading an array.

All lengths that a file claims are checked against its size before anything is done with them.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path as FilePath
from typing import Any, BinaryIO

from ckpt_callbacks.errors import CorruptCheckpoint
from ckpt_callbacks.formats._held import Held
from ckpt_callbacks.leaves import Leaf, leaf_of
from ckpt_callbacks.paths import Path, show
from ckpt_callbacks.tensors import Tensor

__all__ = ["ARRAY", "CHUNKED", "COMPLEX", "DEEPEST", "DTYPES", "SCALAR", "leaves_in"]

ARRAY, COMPLEX, SCALAR = 1, 2, 3
"""Types of Flax's extensions."""
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {
    "bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint2", "uint4", "uint8", "uint16",
    "uint32", "uint64", "float16", "float32", "float64", "bfloat16", "complex64", "complex128",
    "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
}  # fmt: skip
DEEPEST = 200
"""Names of a path, of which Python could not follow many more."""
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
"""Formats of `struct`."""
_SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2),
    0xC9: ("ext", 4), 0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4), 0xDC: ("list", 2),
    0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
"""What a byte begins, and how many bytes tell its length."""
_SHORT = (("map", 0x80, 0x90), ("list", 0x90, 0xA0), ("str", 0xA0, 0xC0))


def leaves_in(path: FilePath) -> dict[Path, Tensor]:
    """Return the leaves of a file.

    Raises:
        CorruptCheckpoint: it is damaged, or holds what Flax does not write.
    """
    held = Held(path)
    with held.open() as file:
        reader = _Reader(held, file)
        found = reader.tree(())
        if rest := reader.size - file.tell():
            raise reader.damaged(f"{rest} bytes follow its end")
    return found


class _Reader:
    def __init__(self, held: Held, file: BinaryIO) -> None:
        self.held, self.file = held, file
        self.size = held.size

    def damaged(self, what: str) -> CorruptCheckpoint:
        at = self.file.tell()
        return CorruptCheckpoint(f"{self.held.path} is no whole msgpack file: {what} (byte {at})")

    def take(self, n: int) -> bytes:
        if n > self.size - self.file.tell():
            raise self.damaged(f"it ends where {n} bytes should follow")
        return self.file.read(n)

    def head(self) -> tuple[str, Any]:
        """Return what comes next: a `value` with it, or what has a length with that."""
        byte = self.take(1)[0]
        if byte < 0x80 or byte >= 0xE0:
            return "value", byte if byte < 0x80 else byte - 0x100
        for kind, first, end in _SHORT:
            if first <= byte < end:
                return kind, byte - first
        if byte in _CONSTANTS:
            return "value", _CONSTANTS[byte]
        if form := _NUMBERS.get(byte):
            return "value", struct.unpack(f">{form}", self.take(struct.calcsize(form)))[0]
        if byte in _SIZED:
            kind, width = _SIZED[byte]
            return kind, int.from_bytes(self.take(width), "big")
        if 0xD4 <= byte <= 0xD8:
            return "ext", 1 << (byte - 0xD4)
        raise self.damaged(f"0x{byte:x} begins nothing")

    def tree(self, at: Path) -> dict[Path, Tensor]:
        """Return the leaves of what comes next, by their paths below it."""
        kind, value = self.head()
        if len(at) > DEEPEST:
            raise self.damaged(f"it is nested more than {DEEPEST} deep")
        match kind:
            case "map" | "list":
                found: dict[Path, Tensor] = {}
                names: set[str] = set()
                for i in range(value):
                    name = self.name() if kind == "map" else str(i)
                    if name in names:
                        raise self.damaged(f"{show((*at, name))} is there twice")
                    names.add(name)
                    below = self.tree((*at, name))
                    found |= {(name, *path): tensor for path, tensor in below.items()}
                return {(): self.joined(found, at)} if CHUNKED in names else found
            case "ext":
                return {(): self.extension(value)}
            case "str" | "bin":
                value = self.text(value) if kind == "str" else self.take(value)
        leaf = leaf_of(value)
        return {(): Tensor(leaf, partial(_same, value))} if leaf else {}

    def name(self) -> str:
        kind, value = self.head()
        if kind == "str":
            return self.text(value)
        if kind != "value" or type(value) is not int:
            raise self.damaged("a name is neither text nor a whole number")
        return str(value)

    def text(self, n: int) -> str:
        try:
            return self.take(n).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("text is no UTF-8") from error

    def expect(self, *kinds: str) -> Any:
        kind, value = self.head()
        if kind not in kinds or (kind == "value" and type(value) not in (int, float)):
            raise self.damaged(f"there is a {kind} where a {kinds[0]} should be")
        return value

    def extension(self, size: int) -> Tensor:
        code = self.take(1)[0]
        end = self.file.tell() + size
        if code == COMPLEX:
            if self.expect("list") != 2:
                raise self.damaged("a complex number has not two parts")
            value = complex(self.expect("value"), self.expect("value"))
            tensor = Tensor(Leaf("complex"), partial(_same, value))
        elif code in (ARRAY, SCALAR):
            tensor = self.array(scalar=code == SCALAR)
        else:
            raise self.damaged(f"an extension is of type {code}, which Flax does not write")
        if self.file.tell() != end:
            raise self.damaged("an extension has another length than what is in it")
        return tensor

    def array(self, *, scalar: bool) -> Tensor:
        if self.expect("list") != 3:
            raise self.damaged("an array has not three parts")
        shape = tuple(self.expect("value") for _ in range(self.expect("list")))
        name = self.take(self.expect("str", "bin")).decode(errors="replace")
        n = self.expect("bin", "str")
        if name not in DTYPES:
            raise self.damaged(f"{name[:40]!r} is no dtype of an array")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise self.damaged(f"{shape} is no shape")
        dtype, start = _dtype(name), self.file.tell()
        if n > self.size - start or n != math.prod(shape) * dtype.itemsize:
            raise self.damaged(f"an array of {name}{list(shape)} has {n} bytes or fewer")
        if scalar and shape:
            raise self.damaged(f"a scalar has the shape {shape}")
        self.file.seek(n, os.SEEK_CUR)
        read = partial(_array, self.held, start, n, name, shape)
        return Tensor(Leaf("array", shape, name), partial(_item, read) if scalar else read)

    def joined(self, found: dict[Path, Tensor], at: Path) -> Tensor:
        """Return an array that is stored in parts."""
        count = sum(path[0] == "shape" for path in found)
        lengths = [found.get(("shape", str(i))) for i in range(count)]
        parts = [found.get(("chunks", str(i))) for i in range(len(found) - count - 1)]
        arrays = [part for part in parts if part and part.leaf.kind == "array"]
        shape = tuple(int(x.read()) for x in lengths if x and x.leaf.kind == "int")
        dtypes = {part.leaf.dtype for part in arrays}
        total = sum(math.prod(part.leaf.shape) for part in arrays)
        whole = len(arrays) == len(parts) and len(shape) == count and len(dtypes) == 1
        if not whole or min(shape, default=0) < 0 or math.prod(shape) != total:
            raise self.damaged(f"the parts of {show(at)} do not make up an array")
        return Tensor(Leaf("array", shape, dtypes.pop()), partial(_joined, arrays, shape))


def _same(value: Any) -> Any:
    return value


def _dtype(name: str) -> Any:
    import jax

    return jax.numpy.dtype(name)


def _array(held: Held, start: int, n: int, name: str, shape: tuple[int, ...]) -> Any:
    import numpy as np

    with held.open() as file:
        data = np.fromfile(file, np.uint8, n, offset=start)
    try:
        return data.view(_dtype(name)).reshape(shape)
    except ValueError as error:  # NumPy has no such shape
        raise CorruptCheckpoint(f"{held.path} holds no {name}{list(shape)}: {error}") from error


def _item(read: Callable[[], Any]) -> Any:
    return read()[()]


def _joined(parts: list[Tensor], shape: tuple[int, ...]) -> Any:
    import numpy as np

    joined = np.concatenate([part.read().reshape(-1) for part in parts])
    return joined.reshape(shape)
