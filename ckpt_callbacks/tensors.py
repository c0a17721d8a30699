"""The leaves of a checkpoint or a state, each read into the host's memory when it is asked for.

What reads and writes other formats and what changes the form of a model works on these, so that
little more than one leaf is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, takewhile
from typing import Any

from ckpt_callbacks.contents import Contents
from ckpt_callbacks.leaves import Leaf, Note, decode, encode, leaf_of
from ckpt_callbacks.paths import Path
from ckpt_callbacks.state import leaves_of

__all__ = ["Tensor", "Tensors", "from_array", "in_turn", "of_contents", "of_state", "to_array"]

_AHEAD = 32 * 2**20
"""Bytes of small leaves that are read together, since each read takes Orbax a while."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A leaf that is yet to be read.

    Args:
        leaf: what it is; of an array with shape and dtype.
        read: returns its value: a NumPy array, of typed keys their data as `uint32`, and of
            others the Python number, text or bytes. It may be called several times.
        place: where in a checkpoint it is, so that it can be read together with others.
    """

    leaf: Leaf
    read: Callable[[], Any]
    place: tuple[_Ahead, Path] | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of an array; 0 for what is none, and is small."""
        return self.leaf.nbytes


Tensors = Mapping[Path, Tensor]
"""By path in the state, in the order in which it is best to read them."""


def of_state(state: Any) -> dict[Path, Tensor]:
    """Return the leaves of a live state; those that save themselves are left out.

    Raises:
        StateMismatch: as `leaves_of` has it.
    """
    found: dict[Path, Tensor] = {}
    for path, value in leaves_of(state).items():
        leaf = leaf_of(value)
        if leaf and leaf.kind != "files":
            found[path] = Tensor(leaf, partial(_on_host, value))
    return found


def of_contents(contents: Contents, only: Collection[Path] | None = None) -> dict[Path, Tensor]:
    """Return the leaves of a checkpoint, or some; those that save themselves are left out."""
    reader = _Ahead(contents, only)
    return {
        path: Tensor(contents.leaves[path].leaf, partial(reader.read, path), (reader, path))
        for path in reader.targets
    }


def in_turn(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """Yield the values of leaves; small ones of one checkpoint are read together."""
    places = [tensor.place for tensor in tensors if tensor.place]
    readers = {reader for reader, _ in places}
    if len(places) == len(tensors) and len(readers) == 1:
        yield from readers.pop().in_turn([path for _, path in places])
    else:
        yield from (tensor.read() for tensor in tensors)


class _Ahead:
    """Reads leaves with the small ones that follow, while they are asked for in their order."""

    def __init__(self, contents: Contents, only: Collection[Path] | None) -> None:
        self._contents = contents
        every = contents.template()
        self.targets = {at: x for at, x in every.items() if only is None or at in only}
        self._order = {path: i for i, path in enumerate(self.targets)}
        self._next = 0
        self._read: dict[Path, Any] = {}

    def read(self, path: Path) -> Any:
        at = self._order[path]
        in_order, self._next = at == self._next, at + 1
        if path in self._read:
            return self._read.pop(path)
        if not in_order:
            return self._load([path])[path]
        self._read = self._load(self._batch(list(self.targets)[at:]))
        return self._read.pop(path)

    def in_turn(self, paths: Sequence[Path]) -> Iterator[Any]:
        """Yield the values of leaves in any order, with no more than a batch in memory."""
        while paths:
            batch = self._batch(paths)
            values, paths = self._load(batch), paths[len(batch) :]
            for path in batch:
                yield values.pop(path)

    def _batch(self, paths: Sequence[Path]) -> list[Path]:
        """Return the first of some leaves, and those that are small enough to go with it."""
        totals = accumulate(self._contents.leaves[path].leaf.nbytes for path in paths)
        fitting = sum(1 for _ in takewhile(lambda total: total <= _AHEAD, totals))
        return list(paths[: max(1, fitting)])

    def _load(self, paths: Sequence[Path]) -> dict[Path, Any]:
        return self._contents.load({p: self.targets[p] for p in paths}, "saved", numpy=True)


def to_array(tensor: Tensor) -> tuple[Any, Note]:
    """Return a leaf as an array, contiguous, and the note of what else it is; see `from_array`."""
    import numpy as np

    value, leaf = tensor.read(), tensor.leaf
    match leaf.kind:
        case "key":
            return np.ascontiguousarray(value), {"key": leaf.dtype}
        case "array":
            scalar = {"type": "scalar"} if isinstance(value, np.generic) else {}
            return np.asarray(value, order="C"), scalar
        case "str" | "bytes":
            data = value.encode() if isinstance(value, str) else value
            return np.frombuffer(data, np.uint8), {"type": leaf.kind}
        case "float":
            return np.asarray(value, np.float64), {"type": "float"}
    stored, note = encode(value)
    if isinstance(stored, str):  # a number of more than 64 bits
        return np.frombuffer(stored.encode(), np.uint8), {"type": "bigint"}
    return np.asarray(stored), note or {"type": leaf.kind}


def from_array(array: Any, note: Note | None) -> Any:
    """Return the value of a leaf that `to_array` made an array of; of typed keys their data."""
    match (note or {}).get("type"):
        case "str":
            return array.tobytes().decode()
        case "bigint":
            return int(array.tobytes())
        case "int" | "float":
            return array.item()
    return array if note and "key" in note else decode(array, note)


def _on_host(value: Any) -> Any:
    import jax
    import numpy as np

    if isinstance(value, jax.Array):
        if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        return np.asarray(value)
    return value
