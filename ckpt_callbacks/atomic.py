"""New files and folders that are there only once all of them is durable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.manifest import fsync, fsync_tree

__all__ = ["new_file", "new_folder"]


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file, which takes the place of one that is there; after an error there is none."""
    part = _beside(path)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    fsync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a path to make a folder at, which then moves to `path`; after an error there is none.

    Raises:
        ConfigError: something is there, which a folder cannot replace in one step.
    """
    if path.exists():
        raise ConfigError(f"{path} is there already: remove it first, or give another path")
    part = _beside(path)
    try:
        yield part
        fsync_tree(part)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    fsync(path.parent)


def _beside(path: Path) -> Path:
    """Return a new name in the same folder, which is made if need be, and lasts."""
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in made:
        fsync(folder.parent)
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
