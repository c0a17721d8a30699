"""Items in checkpoints of others that Orbax does not have as a tree of arrays: JSON, and Equinox's.

A custom handler of Orbax (v0) may store a model as `eqx.tree_serialise_leaves` does.
"""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Any

from ckpt_callbacks.paths import Path
from ckpt_callbacks.state import leaves_of, names_of

__all__ = ["equinox_file", "values_of"]

_JSON = ("metadata", "data.json")
"""Names that Orbax's handlers of JSON give their file, v0 and v1."""


def values_of(folder: FilePath, part: Any) -> dict[Path, Any] | None:
    """Return the leaves of an item by path, or `None` if nothing here can read it.

    Args:
        folder: of the item.
        part: what the state has in its place, without which a file of Equinox has no names.

    Raises:
        CorruptCheckpoint: it is Equinox's, and damaged.
        StateMismatch: it is Equinox's and does not fit `part`.
    """
    import jax
    import numpy as np

    for path in filter(FilePath.is_file, (folder / name for name in _JSON)):
        values = json.loads(path.read_text(encoding="utf-8"))
        return {names_of(k): v for k, v in jax.tree_util.tree_flatten_with_path(values)[0]}
    file = equinox_file(folder)
    if file is None or part is None:
        return None
    from ckpt_callbacks.formats._equinox_file import read_into

    leaves = leaves_of(read_into(file, part))
    return {at: np.asarray(x) if isinstance(x, jax.Array) else x for at, x in leaves.items()}


def equinox_file(folder: FilePath) -> FilePath | None:
    """Return the file in an item that Equinox wrote, if there is one."""
    files = list(folder.glob("*.eqx"))
    return files[0] if len(files) == 1 else None
