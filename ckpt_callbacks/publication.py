"""Where a copy of a checkpoint has the weights that a tracker published with it.

They lie beside the checkpoint::

    weights/           `model.safetensors`, or shards and their index
    weights.json       how it was made, and size and digest of each file
"""

from __future__ import annotations

import json
from pathlib import Path

from ckpt_callbacks.errors import RecordError
from ckpt_callbacks.manifest import verify
from ckpt_callbacks.record import File

__all__ = ["FOLDER", "MANIFEST", "files_of", "verified"]

FOLDER = "weights"
"""Where a copy has the file, or its shards."""
MANIFEST = "weights.json"
"""Where it has size and digest of them."""


def files_of(text: str, where: str) -> dict[str, File]:
    """Return the files that `weights.json` names; `where` names it in errors.

    Raises:
        RecordError: it is damaged.
    """
    try:
        files = json.loads(text)["files"]
        return {str(n): File(int(f["size"]), str(f["digest"])) for n, f in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def verified(copy: Path) -> Path:
    """Return the folder of the weights in a copy that is on this disk, once they were checked.

    Raises:
        CorruptCheckpoint: a file is damaged.
        RecordError: their manifest is.
    """
    manifest = copy / MANIFEST
    verify(copy / FOLDER, files_of(manifest.read_text(encoding="utf-8"), str(manifest)))
    return copy / FOLDER
