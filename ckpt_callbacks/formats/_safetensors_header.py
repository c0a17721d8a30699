"""The header of a safetensors file, which says what is where in it. No array is touched here.

A file is the length of the header (8 bytes, little-endian), the header (JSON, padded with spaces
to a multiple of 8 bytes), and the arrays: without holes, those of wide dtypes first, and by name
among those of one dtype.

Nothing in a file is believed: all that a header says is checked before anything is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_callbacks.errors import CorruptCheckpoint, StateMismatch

__all__ = ["DTYPES", "METADATA", "Entry", "Header", "build", "is_text", "json_of", "parse"]

DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
"""NumPy's name and the bytes of each dtype of the format, in the format's order. Those of less
than a byte (`F4`, `F6_E2M3`, `F6_E3M2`) are not among them: NumPy has no packed arrays."""
METADATA = "__metadata__"
"""What no array can be called."""

_NAMES = {numpy: name for name, (numpy, _) in DTYPES.items()}
_ORDER = {name: i for i, name in enumerate(DTYPES)}
_MAX_HEADER = 100_000_000
"""Bytes; other readers refuse more too."""
_MAX_AXES = 64
_MAX_BYTES = 2**63


@dataclass(frozen=True, slots=True)
class Entry:
    """An array in a file.

    Args:
        dtype: NumPy's name of it.
        shape: of the array.
        start: where in the file its bytes begin.
        stop: where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says: the arrays by name, in the order of the file, and text by name."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def build(
    arrays: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """Return the first bytes of a file, up to its arrays, and where each array goes.

    Args:
        arrays: by name the NumPy dtype, which has to be one of the format's, and the shape.
        metadata: text that can be encoded.

    Raises:
        StateMismatch: the header would be larger than readers accept.
    """
    order = sorted(arrays, key=lambda name: (-_ORDER[_NAMES[arrays[name][0]]], name))
    fields: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name in order:
        dtype, shape = arrays[name]
        begin, end = end, end + math.prod(shape) * DTYPES[_NAMES[dtype]][1]
        places[name] = begin, end
        fields[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise StateMismatch(
            f"the header of a safetensors file for these {len(arrays)} leaves and their metadata "
            f"takes {len(text)} bytes, and readers refuse more than {_MAX_HEADER}"
        )
    first = 8 + len(text)
    entries = {
        name: Entry(*arrays[name], first + begin, first + end)
        for name, (begin, end) in places.items()
    }
    return len(text).to_bytes(8, "little") + text, entries


def parse(where: str, size: int, read: Callable[[int, int], bytes]) -> Header:
    """Return what the header of a file says, once all of it was checked.

    Args:
        where: name of the file, for messages.
        size: bytes of the file.
        read: returns the bytes from one place up to another.

    Raises:
        CorruptCheckpoint: the header is damaged, or does not fit the size of the file.
    """
    text = _text(where, size, read)
    fields = json_of(where, "its header", text)
    if not isinstance(fields, dict):
        raise CorruptCheckpoint(f"{where} is damaged: its header is no object of JSON")
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(map(is_text, metadata.values())):
        raise CorruptCheckpoint(f"{where} is damaged: {METADATA} holds something else than text")
    if not all(map(is_text, [*fields, *metadata])):
        raise CorruptCheckpoint(f"{where} is damaged: a name in its header is no valid text")
    first = 8 + len(text)
    entries = [(name, _entry(where, name, field, first)) for name, field in fields.items()]
    entries.sort(key=lambda item: (item[1].start, item[1].stop))
    end = first
    for name, entry in entries:
        if entry.start != end:
            what = "overlaps what is before it" if entry.start < end else "has a hole before it"
            raise CorruptCheckpoint(
                f"{where} is damaged: array {name!r} is said to begin at byte {entry.start}, but "
                f"{what}, which ends at byte {end}"
            )
        end = entry.stop
    if end != size:
        cut = "it was cut short" if end > size else "something was added to it"
        raise CorruptCheckpoint(
            f"{where} is damaged: its arrays are said to end at byte {end}, and it has {size} "
            f"bytes: {cut}"
        )
    return Header(dict(entries), metadata)


def json_of(where: str, what: str, text: bytes) -> Any:
    """Return what a text says as JSON.

    Raises:
        CorruptCheckpoint: it is none, is no UTF-8, or has a name twice.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CorruptCheckpoint(f"{where} is damaged: {what} has {name!r} twice")
            found[name] = value
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except CorruptCheckpoint:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON, or a trap for parsers
        raise CorruptCheckpoint(f"{where} is damaged: {what} cannot be read: {error}") from None


def is_text(value: Any) -> bool:
    """Return whether a value is text that has a UTF-8 form: half of a surrogate pair has none."""
    return isinstance(value, str) and (
        value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    )


def _text(where: str, size: int, read: Callable[[int, int], bytes]) -> bytes:
    start = read(0, min(size, 9))
    if not start.endswith(b"{") or len(start) < 9:
        if start[:1] == b"\x80" or start[:2] == b"PK":
            raise CorruptCheckpoint(
                f"{where} is no safetensors file: it begins as a pickle or a zip of pickles does, "
                "which is not opened, since a pickle can run any code"
            )
        raise CorruptCheckpoint(
            f"{where} is no safetensors file: expected the length of a header and '{{' in the "
            f"first 9 of its {size} bytes, and there is {start!r}"
        )
    length = int.from_bytes(start[:8], "little")
    if length > min(_MAX_HEADER, size - 8):
        raise CorruptCheckpoint(
            f"{where} is damaged: its header is said to take {length} bytes, and at most "
            f"{min(_MAX_HEADER, size - 8)} can be"
        )
    return read(8, 8 + length)


def _entry(where: str, name: str, field: Any, first: int) -> Entry:
    """Return what a header says of one array; `first` is where the first of all begins."""
    if not isinstance(field, dict):
        field = {}
    dtype, shape, offsets = map(field.get, ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptCheckpoint(
            f"{where} cannot be read: array {name!r} has dtype {dtype!r}, which is none of "
            f"{', '.join(DTYPES)}"
        )
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise CorruptCheckpoint(f"{where} is damaged: array {name!r} has shape {_cut(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CorruptCheckpoint(
            f"{where} is damaged: array {name!r} has data_offsets {_cut(offsets)}"
        )
    numpy, itemsize = DTYPES[dtype]
    begin, end = offsets
    # NumPy counts the bytes of an empty array as if its empty axes were not there.
    widest = math.prod(axis for axis in shape if axis) * itemsize
    if end - begin != math.prod(shape) * itemsize or widest >= _MAX_BYTES:
        raise CorruptCheckpoint(
            f"{where} is damaged: array {name!r} of dtype {dtype} and shape {_cut(shape)} is said "
            f"to take {end - begin} bytes"
        )
    return Entry(numpy, tuple(shape), first + begin, first + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < _MAX_BYTES for n in value
    )


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"
