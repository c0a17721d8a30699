"""The history of a run on disk, `history.jsonl`: a line an entry, only ever appended.

Nothing is decided by it, so it is not synced to disk, what cannot be written is left out, and a
line that a kill or a full disk cut is skipped. There are two files of 4 MiB at most, which is about
70,000 entries each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ckpt_callbacks.history import Entry, entry_from_json, entry_to_json

__all__ = ["HistoryFile", "entries_in"]

logger = logging.getLogger("ckpt_callbacks")

MOST_BYTES = 4 << 20
"""Size at which a file is full: it becomes the older one, in whose place it is."""


class HistoryFile:
    """The file of entries.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "history.jsonl"
        self._older = folder / "history.1.jsonl"

    def note(self, entry: Entry) -> None:
        """Add an entry."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                # The end of a line before it too, since a kill may have cut the last one.
                file.write(f"\n{entry_to_json(entry)}\n")
                full = file.tell() > MOST_BYTES
            if full:
                self._path.replace(self._older)
        except OSError as error:  # such as a full disk
            logger.debug("%s lacks an entry: %s", self._path, error)

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first, but for those that are damaged."""
        found: list[Entry] = []
        for path in (self._older, self._path):
            with suppress(FileNotFoundError):
                found += entries_in(path.read_bytes())
        return found


def entries_in(content: bytes) -> Iterator[Entry]:
    """Yield the entries of a file, but for those that are damaged."""
    for line in content.decode(errors="replace").splitlines():
        with suppress(ValueError, TypeError, OverflowError):
            if line:
                yield entry_from_json(line)
