"""Files whose arrays are read after what is said of them, all from one version of the file."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import BinaryIO

from ckpt_callbacks.errors import CorruptCheckpoint

__all__ = ["Held"]


class Held:
    """A file that stays the same one, also once a newer one was put in its place.

    Opened by its name again, the arrays of the newer one would be taken for those of which the
    header of the older one tells: of checkpoints of one model nobody would notice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self._state = self._now()

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._state[0]

    def open(self) -> BinaryIO:
        """Return the file, at its beginning.

        Raises:
            CorruptCheckpoint: somebody has written to it meanwhile.
        """
        if self._now() != self._state:
            raise CorruptCheckpoint(f"{self.path} was changed while it was read")
        file = os.fdopen(self._fd, "rb", closefd=False)
        file.seek(0)
        return file

    def _now(self) -> tuple[int, int]:
        now = os.fstat(self._fd)
        return now.st_size, now.st_mtime_ns
