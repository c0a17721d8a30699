"""Arrays as NumPy writes them, alone in a file or in an archive, of which nothing is trusted."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import IO, Any

from ckpt_callbacks.errors import CorruptCheckpoint

__all__ = ["Entry", "damaged", "entries_of", "problem_of"]

_DEFLATE = 1040
"""Deflate makes no byte out of fewer than this many; a file that says so lies."""
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, KeyError, TypeError,
    IndexError, AttributeError, OverflowError, NotImplementedError, RuntimeError, OSError,
    MemoryError,
)  # fmt: skip
"""What `zipfile` and `numpy` raise over bytes that are not what they should be."""


class Entry:
    """An array in a file: what it is, and its values when they are asked for."""

    def __init__(self, path: FilePath, archive: Any = None, info: Any = None) -> None:
        self._path, self._archive, self.info = path, archive, info
        with self._open() as file:
            self.shape, self.dtype, start = _header(file)
            size = start + math.prod(self.shape) * self.dtype.itemsize
            there = info.file_size if info else path.stat().st_size
        if size != there:
            raise ValueError(f"{self.dtype}{list(self.shape)} are {size} bytes, but it has {there}")

    def array(self) -> Any:
        """Return the array, of this machine's own order of bytes."""
        import numpy as np

        with self._open() as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # which also makes `zipfile` compare the checksum
                raise ValueError("it goes on after its array")
        return np.asarray(array, array.dtype.newbyteorder("="), order="C")

    def _open(self) -> IO[bytes]:
        file: IO[bytes] = self._archive.open(self.info) if self.info else self._path.open("rb")
        return file


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], Any, int]:
    """Return shape, dtype, and the length of what is before the values."""
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"it is an array of version {version}, which holds no numbers")
    try:
        shape, _, dtype = readers[version](file)
    except Exception as error:  # NumPy has no one error for what it cannot make out
        raise ValueError(f"its header is none: {error}") from error
    if dtype.hasobject:
        raise ValueError("it holds objects of Python, which are not read")
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    return shape, dtype, file.tell()


def entries_of(path: FilePath, archive: zipfile.ZipFile) -> dict[str, Entry]:
    """Return what is in an archive, by name."""
    entries: dict[str, Entry] = {}
    infos = archive.infolist()
    if not infos:
        raise ValueError("it holds nothing")
    if sum(info.compress_size for info in infos) > path.stat().st_size:
        raise ValueError("its entries lie over each other")
    for info in infos:
        name = info.filename.removesuffix(".npy")
        with damaged(path, name):
            if problem := problem_of(name):
                raise ValueError(f"the name {problem}")
            if name == info.filename or name in entries:
                raise ValueError("it is there twice" if name in entries else "it is no .npy")
            if info.comment:  # such as one that swallows the entries after it
                raise ValueError("it has a comment")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("it is compressed in a way that NumPy does not know")
            ratio = _DEFLATE if info.compress_type == zipfile.ZIP_DEFLATED else 1
            if info.file_size > info.compress_size * ratio:
                raise ValueError(f"{info.compress_size} bytes cannot be {info.file_size}")
            entries[name] = Entry(path, archive, info)
    return entries


def problem_of(name: str) -> str | None:
    """Return why a name is none for a file in an archive, if so."""
    if not name or "\0" in name or len(name.encode(errors="replace")) > 60_000:
        return "is empty, too long, or holds a zero"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is no text"
    parts = name.replace("\\", "/").split("/")
    leads = parts[0] == "" or ".." in parts or parts[0].endswith(":")
    return f"{name!r} leads out of a folder that it is unpacked in" if leads else None


@contextmanager
def damaged(path: FilePath, name: str = "") -> Iterator[None]:
    """Raise whatever shows that a file is damaged as that."""
    where = f"{path}: {name!r}" if name else str(path)
    try:
        yield
    except CorruptCheckpoint:
        raise
    except _DAMAGE as error:
        raise CorruptCheckpoint(f"{where} is damaged: {error}") from error
