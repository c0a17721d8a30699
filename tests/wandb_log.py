"""Reads a `.wandb` file of W&B's client: its log format holds protobuf records in chunks.

The format is LevelDB's log: blocks of 32 KiB, each chunk with a CRC, a length and a type.
The client has no public reader, and the private one it had is gone since 0.31.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, CHUNK_HEADER = 32 * 1024, 7, struct.Struct("<IHB")
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a file, up to a tail that was cut."""
    content = path.read_bytes()
    at, parts = FILE_HEADER, b""
    while at + CHUNK_HEADER.size <= len(content):
        if BLOCK - at % BLOCK < CHUNK_HEADER.size:  # too short for a header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(content, at)
        at += CHUNK_HEADER.size
        parts += content[at : at + length]
        at += length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@dataclass
class Logged:
    """An artifact record."""

    name: str
    aliases: set[str]
    metadata: dict[str, Any]
    files: dict[str, str]
    """Path in the artifact to the local path of the held file."""


def logs(folder: Path) -> list[Path]:
    """Return the logs of all starts of a run, oldest first."""
    return sorted(folder.rglob("*.wandb"), key=lambda p: p.parent.name)


def artifacts(folder: Path) -> list[Logged]:
    """Return all artifact records below `folder`, in order."""
    return [
        Logged(
            r.artifact.name,
            set(r.artifact.aliases),
            json.loads(r.artifact.metadata),
            {c.path: c.local_path for c in r.artifact.manifest.contents},
        )
        for log in logs(folder)
        for r in records(log)
        if r.WhichOneof("record_type") == "artifact"
    ]


def aliases(folder: Path) -> dict[str, int]:
    """Return the step that the latest record of each alias names."""
    return {alias: a.metadata["step"] for a in artifacts(folder) for alias in a.aliases}


def history(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics, in order."""
    return [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for log in logs(folder)
        for r in records(log)
        if r.WhichOneof("record_type") == "history"
    ]
