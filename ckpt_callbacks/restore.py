"""Reading checkpoints back, verified."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from ckpt_callbacks import orbax_io
from ckpt_callbacks.adapters import abstract, apply, check_same
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError
from ckpt_callbacks.manifest import verify
from ckpt_callbacks.policy import Candidate
from ckpt_callbacks.record import File
from ckpt_callbacks.retention import policy_from_json, promote

__all__ = ["read", "restore"]

S = TypeVar("S")


def restore(
    source: str | os.PathLike[str],
    *,
    like: S,
    which: int | str = "last",
    only: str | Collection[str] | None = None,
) -> S:
    """Return the state `like` with the values of a checkpoint.

    Args:
        source: a run directory, or the folder of a single checkpoint.
        like: a live state of the same structure. Flax NNX objects in it are changed in place.
        which: in a run directory, `best`, `last`, or a step.
        only: items to read, such as `model`; the rest of `like` stays as it is.

    Files of a run directory are checked against their record; a lone checkpoint has none.

    Raises:
        ConfigError: `source` is no checkpoint and no run directory.
        CheckpointNotFound: nothing there answers `which`.
        StateMismatch: `like` has other leaves or shapes.
        CorruptCheckpoint: a file is damaged; the message names it.
    """
    root = Path(source).expanduser().absolute()
    names = {only} if isinstance(only, str) else only
    if (root / "_CHECKPOINT_METADATA").is_file():
        return read(root, like, only=names)
    if not (root / ".ckpt_callbacks").is_dir():
        raise ConfigError(f"{root} is neither a run directory nor a checkpoint")
    directory = RunDirectory(root)
    step = _resolve(directory, which)
    record = directory.read_records()[step]
    return read(directory.path(step), like, files=record.files, only=names)


def read(
    path: Path,
    like: S,
    files: Mapping[str, File] | None = None,
    only: Collection[str] | None = None,
) -> S:
    """Return `like` with the values of the checkpoint at `path`, checked against `files`.

    Structure and shapes are compared before any array is read, and nothing is read of a file
    before its digest was checked.
    """
    items = orbax_io.item_names(path)
    if absent := set(only or ()) - set(items):
        raise CheckpointNotFound(
            f"{path} has no item {', '.join(sorted(absent))}; it has {', '.join(items)}"
        )
    chosen = [name for name in items if only is None or name in only]
    if files is not None:
        verify(path, files, only)
    found = orbax_io.describe(path, chosen)
    wanted = abstract(like, items)
    if only is not None:
        wanted = {name: tree for name, tree in wanted.items() if name in chosen}
    check_same(wanted, found, str(path))
    restored: S = apply(like, orbax_io.load(path, wanted))
    return restored


def _resolve(directory: RunDirectory, which: int | str) -> int:
    records = directory.read_records().items()
    complete = {s: r for s, r in records if r.state == "complete" and directory.is_committed(s)}
    there = ", ".join(map(str, complete)) or "none"
    if isinstance(which, int):
        if which not in complete:
            raise CheckpointNotFound(f"{directory.root} has no step {which}; it has {there}")
        return which
    run = directory.read_run()
    policy = policy_from_json(run.policy) if run else None
    history = [Candidate(s, r.metrics) for s, r in complete.items()]
    aliases = promote(policy, history) if policy else {}
    if which not in aliases:
        raise CheckpointNotFound(
            f"{directory.root} has no checkpoint {which!r}; it has "
            f"{', '.join(aliases) or 'no aliases'} and steps {there}"
        )
    return aliases[which]
