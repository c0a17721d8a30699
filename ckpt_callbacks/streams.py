"""Files that are bytes in memory, or come and go by a stream.

They lie in a temporary folder while they are read or written, so what is true of files is true of
them: nothing is believed, little is in memory, and a stream gets all of a file or nothing.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckpt_callbacks.errors import CkptCallbacksError, ConfigError
from ckpt_callbacks.formats import SUFFIXES

__all__ = ["file_of", "is_content", "written_to"]

_BYTES = (bytes, bytearray, memoryview)


def is_content(source: Any) -> bool:
    """Return whether something is bytes or a stream of them, of which nobody says the format."""
    return isinstance(source, (*_BYTES, io.IOBase))


@contextmanager
def file_of(owner: str, content: Any, format: str) -> Iterator[Path]:
    """Give a file that holds `content`: bytes, or what the rest of a stream has.

    Raises:
        ConfigError: it is neither, or `format` is none of a single file.
    """
    name = f"content{_suffix(owner, format)}"
    with tempfile.TemporaryDirectory() as folder, _named(Path(folder, name), "the content given"):
        with Path(folder, name).open("xb") as file:
            if isinstance(content, _BYTES):
                file.write(content)
            elif not callable(getattr(content, "read", None)):
                raise ConfigError(
                    f"{owner}: format= is for bytes and for streams of them, not for "
                    f"{type(content).__name__}: of a path, name and content tell it"
                )
            else:
                try:
                    shutil.copyfileobj(content, file)
                except TypeError as error:
                    raise ConfigError(f"{owner}: {content!r} gives no bytes: {error}") from error
        yield Path(folder, name)


@contextmanager
def written_to(owner: str, stream: Any, format: str | None) -> Iterator[Path]:
    """Give a path for a file, which `stream` gets once it was written.

    Raises:
        ConfigError: it is no stream of bytes, or `format` is none of a single file.
    """
    if isinstance(stream, io.TextIOBase) or not callable(getattr(stream, "write", None)):
        raise ConfigError(
            f"{owner}: {stream!r} is neither a path nor a stream that takes bytes, such as "
            "io.BytesIO() or a file that was opened with 'wb'"
        )
    name = f"content{_suffix(owner, format)}"
    with tempfile.TemporaryDirectory() as folder, _named(Path(folder, name), "the stream"):
        yield Path(folder, name)
        with Path(folder, name).open("rb") as file:
            shutil.copyfileobj(file, stream)


def _suffix(owner: str, format: str | None) -> str:
    """Return the suffix of a file in a format, which may be named by it: `npz`, and `npy`."""
    for suffix, name in SUFFIXES.items():
        if format in (name, suffix[1:]):
            return suffix
    raise ConfigError(
        f"{owner}: format {format!r} is none of a single file, which bytes and streams hold: "
        f"give format= one of {', '.join(dict.fromkeys(SUFFIXES.values()))}, npy"
    )


@contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """Call a file in messages by what the caller knows of it."""
    try:
        yield
    except CkptCallbacksError as error:
        raise type(error)(str(error).replace(str(path), name)) from error
