"""Flax's own files: `flax.serialization.to_bytes` and `msgpack_serialize`.

A tree of maps in MessagePack, with arrays as extensions of it. Of a file no more is read at a time
than one leaf, which Flax, that reads all of it, does not offer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, BinaryIO

from ckpt_callbacks.atomic import new_file
from ckpt_callbacks.errors import ConfigError, StateMismatch
from ckpt_callbacks.extras import require
from ckpt_callbacks.formats._msgpack_read import (
    ARRAY,
    CHUNKED,
    COMPLEX,
    DEEPEST,
    DTYPES,
    SCALAR,
    leaves_in,
)
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.paths import Path, show
from ckpt_callbacks.state import put
from ckpt_callbacks.tensors import Tensor, Tensors

__all__ = ["matches", "read", "write"]

_CHUNK = 2**30
"""Bytes of an array from which on Flax stores it in parts, as MessagePack would not take it."""
_PYTHON = {"bool": bool, "bytes": bytes, "complex": complex, "float": float, "int": int, "str": str}
_MAPS = {*range(0x81, 0x90), 0xDE, 0xDF}
_TEXTS = {*range(0xA0, 0xC0), 0xD9}


def matches(path: FilePath) -> bool:
    """Return whether a file has the usual suffix, or begins with a map that has names."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(6)
    names = start[{0xDE: 3, 0xDF: 5}.get(start[0], 1) :] if start else b""
    return path.suffix == ".msgpack" or bool(names and start[0] in _MAPS and names[0] in _TEXTS)


def read(path: FilePath) -> tuple[Tensors, dict[str, Any]]:
    """Return the leaves; the items of a list have the names `0`, `1`, as Flax has them itself.

    Raises:
        CorruptCheckpoint: it is damaged, or holds what Flax does not write.
    """
    return leaves_in(path), {}


def write(
    path: FilePath,
    tensors: Tensors,
    metadata: Mapping[str, Any],
    *,
    like: Any = None,
    **options: Any,
) -> None:
    """Write a file as Flax does, byte for byte; the metadata has no place in it.

    Args:
        path: of the file.
        tensors: the leaves.
        metadata: is left out.
        like: the state that `from_bytes` is to read the file into. It asks for all nodes, also
            for those without leaves such as `optax.EmptyState`, which are known from here only.
        options: none.

    Raises:
        StateMismatch: a leaf is none that Flax can hold, or lies below another one, or where `like`
            has nothing.
        MissingExtra: there is no msgpack, or no Flax for `like`.
    """
    if options:
        raise ConfigError(f"a msgpack file has no option {', '.join(options)}: it has like")
    require("msgpack", extra="flax", who=f"writing {path}")
    tree: dict[str, Any] = {}
    empty = dict(_empty_nodes(like)) if like is not None else {}
    for names, node in empty.items():
        put(tree, names, node)
    for names, tensor in tensors.items():
        _check(names, tensor.leaf, tensors, empty)
        if names:
            put(tree, names, tensor)
    with new_file(path) as file:
        _write(file, tensors.get((), tree), ())


def _check(path: Path, leaf: Leaf, tensors: Tensors, empty: Collection[Path]) -> None:
    why = None
    if any(path[:i] in tensors for i in range(len(path))):
        why = "lies below another leaf"
    elif above := [path[:i] for i in range(len(path)) if path[:i] in empty]:
        why = f"is not in like, which has nothing at {show(above[0])}"
    elif CHUNKED in path:
        why = f"has the name {CHUNKED}, by which Flax marks arrays in parts"
    elif len(path) > DEEPEST:
        why = f"is nested more than {DEEPEST} deep"
    elif leaf.kind == "key":
        why = (
            "holds typed PRNG keys, which Flax cannot store: put jax.random.key_data(keys) in its "
            "place, and jax.random.wrap_key_data(data) after reading"
        )
    elif leaf.kind == "array" and leaf.dtype not in DTYPES:
        why = f"is of dtype {leaf.dtype}, which Flax cannot store"
    if why:
        raise StateMismatch(f"the leaf at {show(path)} {why}")


def _empty_nodes(like: Any) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    require("flax", extra="flax", who="a msgpack file with like=")
    from flax.serialization import to_state_dict

    def walk(node: Any, path: Path) -> Iterator[tuple[Path, dict[str, Any] | None]]:
        children = node.items() if isinstance(node, dict) else ()
        for name, child in children:
            yield from walk(child, (*path, name))
        if path and (node is None or (isinstance(node, dict) and not children)):
            yield path, node

    yield from walk(to_state_dict(like), ())


def _write(file: BinaryIO, node: dict[str, Any] | Tensor | None, path: Path) -> None:
    """Write a node; no more than one leaf of it is in memory at a time."""
    import msgpack
    import numpy as np

    if isinstance(node, dict):
        file.write(msgpack.Packer().pack_map_header(len(node)))
        for name, child in node.items():
            _write_value(file, name, (*path, name))
            _write(file, child, (*path, name))
        return
    if node is None:
        file.write(msgpack.packb(None))
        return
    value = node.read()
    if node.leaf.kind != "array":
        _write_value(file, _PYTHON[node.leaf.kind](value), path)
        return
    array = np.asarray(value)
    # Flax stores the name of a dtype without its byte order.
    array = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    step = max(1, _CHUNK // array.itemsize)
    if array.nbytes <= _CHUNK:
        _write_array(file, array, SCALAR if isinstance(value, np.generic) else ARRAY)
        return
    flat = array.reshape(-1)
    starts = range(0, flat.size, step)
    file.write(msgpack.Packer().pack_map_header(3))
    file.write(b"".join(map(msgpack.packb, (CHUNKED, True, "shape"))))
    file.write(msgpack.packb({str(i): n for i, n in enumerate(array.shape)}))
    file.write(msgpack.packb("chunks"))
    file.write(msgpack.Packer().pack_map_header(len(starts)))
    for i, start in enumerate(starts):
        file.write(msgpack.packb(str(i)))
        _write_array(file, flat[start : start + step], ARRAY)


def _write_array(file: BinaryIO, array: Any, code: int) -> None:
    import msgpack
    import numpy as np

    n = array.nbytes
    size = 0 if n < 2**8 else 1 if n < 2**16 else 2
    head = b"\x93" + msgpack.packb(array.shape) + msgpack.packb(array.dtype.name)
    head += bytes([0xC4 + size]) + n.to_bytes(1 << size, "big")
    data = array.reshape(-1).view(np.uint8)
    if len(head) + n < 2**16:
        file.write(msgpack.packb(msgpack.ExtType(code, head + data.tobytes())))
    else:
        file.write(b"\xc9" + (len(head) + n).to_bytes(4, "big") + bytes([code]) + head)
        file.write(data.data)


def _write_value(file: BinaryIO, value: Any, path: Path) -> None:
    import msgpack

    if isinstance(value, complex):
        value = msgpack.ExtType(COMPLEX, msgpack.packb((value.real, value.imag)))
    try:
        file.write(msgpack.packb(value))
    except (OverflowError, ValueError) as error:  # such as a number of more than 64 bits
        raise StateMismatch(
            f"the leaf at {show(path)} cannot be stored in a msgpack file: {error}"
        ) from error
