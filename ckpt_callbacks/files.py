"""The files of a checkpoint as its record has them, by path below it.

They are by far the most of a record. Whoever looks at thousands of records, such as a listing or
the start of a run, hardly asks for one: they are made out of the text once somebody does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["File", "WrittenFiles", "apart", "files_from_json"]

_SIZE = re.compile(r'"size":(\d+)')  # of no name, in which JSON would escape the quotes


@dataclass(frozen=True, slots=True)
class File:
    """One file of a checkpoint: size in bytes and digest (`xxh3:` and 32 hex digits)."""

    size: int
    digest: str


class WrittenFiles(Mapping[str, File]):
    """The files in a text that is just what was written.

    Args:
        text: a JSON object.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _files(self) -> dict[str, File]:
        return files_from_json(json.loads(self._text))

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(map(int, _SIZE.findall(self._text)))

    def __getitem__(self, name: str) -> File:
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __bool__(self) -> bool:
        return self._text != "{}"

    def __repr__(self) -> str:
        return repr(self._files)


def apart(text: str) -> tuple[str, WrittenFiles | None]:
    """Return the text of a record without its files, and those; all of it if it has none.

    The text must be just what was written, which has the files before the copies.
    """
    before, begin, rest = text.partition('"files":{')
    inside, end, after = rest.partition('},"copies":')
    if not (begin and end):
        return text, None
    return f'{before}"copies":{after}', WrittenFiles(f"{{{inside}}}")


def files_from_json(values: Any) -> dict[str, File]:
    """Return the files in JSON values.

    Raises:
        KeyError, TypeError, AttributeError: they are something else.
    """
    return {name: _file(value["size"], value["digest"]) for name, value in values.items()}


def _file(size: object, digest: object) -> File:
    if type(size) is not int or type(digest) is not str:
        raise TypeError(f"expected a size and a digest, found {size!r} and {digest!r}")
    return File(size, digest)
