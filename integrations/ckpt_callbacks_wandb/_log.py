"""Reads W&B's own log of a run: what is in there will be sent, what is not is lost.

The client writes records to a `.wandb` file some time after it was called, and has no call that
waits for it. The file is LevelDB's log format: a header of 7 bytes, then blocks of 32 KiB, each
with chunks of CRC, length, type and data; a record is one chunk or several. The records are
protobuf messages of `wandb.proto`, which the client ships; 0.31 has no reader of its own.
"""

from __future__ import annotations

import json
import logging
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["LOG_SECONDS", "Artifact", "Log", "Row", "Saved"]

logger = logging.getLogger("ckpt_callbacks")

_BLOCK, _FILE_HEADER, _CHUNK_HEADER = 32 * 1024, 7, struct.Struct("<IHB")
_FULL, _LAST = 1, 4
_POLL_SECONDS = 0.02

LOG_SECONDS = 60.0
"""How long to wait for something to arrive in W&B's log before trying again."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact with its aliases, as logged."""

    name: str
    aliases: frozenset[str]
    metadata: dict[str, Any]
    files: dict[str, str]
    """Path in the artifact to the path of the file on this machine."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of metrics."""

    items: dict[str, str]
    """Each value as JSON text: of a long run few are looked at."""

    @property
    def values(self) -> dict[str, Any]:
        """The values by name."""
        return {name: json.loads(text) for name, text in self.items.items()}


@dataclass(frozen=True, slots=True)
class Saved:
    """Files that were saved with the run, in its folder `files`."""

    names: frozenset[str]


@dataclass
class Log:
    """One `.wandb` file, read as it grows."""

    path: Path
    _at: int = field(default=_FILE_HEADER, repr=False)
    _damaged: bool = field(default=False, repr=False)

    @property
    def is_online(self) -> bool:
        """Whether the server got it as it grew."""
        return not self.path.parent.name.startswith("offline-")

    @property
    def is_synced(self) -> bool:
        """Whether a person sent it with `wandb sync`, which leaves this mark."""
        return self.path.with_name(f"{self.path.name}.synced").exists()

    def new(self) -> Iterator[Artifact | Row | Saved]:
        """Yield what came since the last call; an incomplete end is left for the next."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            at, parts = self._at, b""
            while True:
                if _BLOCK - at % _BLOCK < _CHUNK_HEADER.size:  # too short for a header: padding
                    at += _BLOCK - at % _BLOCK
                file.seek(at)
                header = file.read(_CHUNK_HEADER.size)
                if len(header) < _CHUNK_HEADER.size:
                    return
                crc, length, kind = _CHUNK_HEADER.unpack(header)
                data = file.read(length)
                if len(data) < length:
                    return
                if zlib.crc32(data, zlib.crc32(bytes([kind]))) != crc:
                    self._tell_damaged()
                    return
                at += len(header) + length
                parts += data
                if kind in (_FULL, _LAST):
                    self._at = at
                    if found := _parse(parts):
                        yield found
                    parts = b""

    def _tell_damaged(self) -> None:
        """Say once that the rest of the file can not be read, such as after a power cut."""
        if not self._damaged:
            self._damaged = True
            logger.warning("%s is damaged at byte %d: the rest is left out", self.path, self._at)

    def follow(self, seconds: float) -> Iterator[Artifact | Row | Saved]:
        """Yield what comes, waiting for more.

        Raises:
            TimeoutError: nothing came for `seconds`.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for found in self.new():
                yield found
                deadline = time.monotonic() + seconds
            time.sleep(_POLL_SECONDS)  # a file has no event to wait for
        raise TimeoutError(f"W&B wrote nothing to {self.path} for {seconds:.0f} s")


def _parse(content: bytes) -> Artifact | Row | Saved | None:
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    record.ParseFromString(content)
    match record.WhichOneof("record_type"):
        case "artifact":
            logged = record.artifact
            return Artifact(
                logged.name,
                frozenset(logged.aliases),
                json.loads(logged.metadata or "{}"),
                {c.path: c.local_path for c in logged.manifest.contents},
            )
        case "history":
            items = record.history.item
            return Row({"/".join(i.nested_key) or i.key: i.value_json for i in items})
        case "files":
            return Saved(frozenset(file.path for file in record.files.files))
        case _:
            return None
