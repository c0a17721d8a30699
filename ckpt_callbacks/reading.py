"""Reading checkpoints back, verified."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ckpt_callbacks import orbax_io
from ckpt_callbacks.adapters import abstract, apply, check_same
from ckpt_callbacks.addresses import fetch, is_address
from ckpt_callbacks.catalog import info_of, stores_of
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    StateMismatch,
)
from ckpt_callbacks.manifest import verify as check_files
from ckpt_callbacks.policy import Candidate, as_step
from ckpt_callbacks.record import File, Record
from ckpt_callbacks.recovery import copy_from
from ckpt_callbacks.retention import policy_from_json, promote
from ckpt_callbacks.stores import Store

__all__ = ["read", "read_alone", "restore"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")


def restore(
    source: str | os.PathLike[str],
    *,
    like: S,
    which: int | str = "last",
    only: str | Collection[str] | None = None,
    verify: bool = True,
    stores: Sequence[Store] | None = None,
) -> S:
    """Return the state `like` with the values of a checkpoint.

    Training may go on in the directory: an alias whose checkpoint is evicted while it is read is
    looked up again. A damaged checkpoint is read from a store instead that has a true copy of it.

    Args:
        source: a run directory, the folder of a single checkpoint, or an address in a tracker,
            such as `mlflow:/digits@best`; then nothing need be on this disk.
        like: a live state of the same structure. Flax NNX objects in it are changed in place.
        which: in a run directory, an alias such as `best` or `last`, or a step.
        only: items to read, such as `model`; the rest of `like` stays as it is.
        verify: check every file that is touched against its record before it is read.
        stores: where to look for another copy; the run's own, made again, if not given.

    Files of a run directory are checked against their record; a lone checkpoint has none.

    Raises:
        ConfigError: `source` is no checkpoint, no run directory and no address that a tracker
            which is installed understands, or `which` is no step.
        RecordError: a record that `which` needs is damaged.
        CheckpointNotFound: nothing there answers `which`, or the step that was named was evicted
            while it was read.
        StateMismatch: `like` has other leaves or shapes.
        CorruptCheckpoint: a file is damaged, and there is no other copy; the message names it.
    """
    names = {only} if isinstance(only, str) else only
    if isinstance(source, str) and is_address(source):
        return _from_tracker(source, like, which, names, verify=verify)
    root = Path(source).expanduser().absolute()
    if (root / "_CHECKPOINT_METADATA").is_file():
        return read(root, like, only=names)
    if not (root / ".ckpt_callbacks").is_dir():
        raise ConfigError(f"{root} is neither a run directory nor a checkpoint")
    directory = RunDirectory(root)
    which = which if isinstance(which, str) else as_step("restore", which)
    while True:
        record = _resolve(directory, which)
        try:
            files = record.files if verify else None
            state = read(directory.path(record.step), like, files, names)
        except Exception as error:
            if not _moved_on(directory, record, which):
                if not isinstance(error, CorruptCheckpoint):
                    raise
                return _from_elsewhere(directory, record, like, names, stores, error)
        else:
            if not _moved_on(directory, record, which):
                return state


def _moved_on(directory: RunDirectory, record: Record, which: int | str) -> bool:
    """Return whether the checkpoint was evicted, or replaced, since `record` was read.

    Raises:
        CheckpointNotFound: it was, and it was asked for by its step.
    """
    now = directory.read_record(record.step)
    if now and directory.is_readable(now) and now.files == record.files:
        return False
    if which == record.step:
        raise CheckpointNotFound(f"step {which} of {directory.root} was evicted while it was read")
    return True


def _from_elsewhere(
    directory: RunDirectory,
    record: Record,
    like: S,
    only: Collection[str] | None,
    stores: Sequence[Store] | None,
    error: CorruptCheckpoint,
) -> S:
    """Read a damaged checkpoint from a store that has a true copy.

    Raises:
        CorruptCheckpoint: no store has one.
    """
    import tempfile

    run = directory.open_run()
    there = stores_of(run) if stores is None else stores
    infos = [info_of(directory, run, store.name, None) for store in there]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / str(record.step)
        if not copy_from(list(zip(there, infos, strict=True)), record, copy):
            raise error
        logger.error("%s. It is read from another copy", error)
        return read(copy, like, only=only)


def _from_tracker(
    address: str, like: S, which: int | str, only: Collection[str] | None, *, verify: bool
) -> S:
    import tempfile

    if which != "last":
        raise ConfigError(f"restore: {address} names a checkpoint itself; leave out {which=}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkpoint"
        copy.mkdir()
        record = fetch(address, copy, only=only)
        items = orbax_io.item_names(copy)  # maybe fewer than were saved
        if verify:
            check_files(copy, record.files, items)
        return read(copy, like, only=only)


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
        check_files(path, files, only)
    found = orbax_io.describe(path, chosen)
    wanted = abstract(like, items)
    if only is not None:
        wanted = {name: tree for name, tree in wanted.items() if name in chosen}
    # Of an item that holds a Python bool Orbax (0.12) can not tell what is in it: whether it fits
    # is only seen when it is read.
    untold = {name for name, tree in found.items() if tree is None} & wanted.keys()
    check_same(
        {name: tree for name, tree in wanted.items() if name not in untold},
        {name: tree for name, tree in found.items() if name not in untold},
        str(path),
    )
    try:
        loaded = orbax_io.load(path, wanted)
    except Exception as error:
        if not untold:
            raise
        names = ", ".join(sorted(untold))
        raise StateMismatch(f"the state may not fit {names} of {path}: {error}") from error
    restored: S = apply(like, loaded)
    return restored


def read_alone(path: Path, like: Any, files: Mapping[str, File], preferred: Collection[str]) -> Any:
    """Return what a checkpoint that lies alone holds for inference.

    Args:
        path: a checkpoint, or a part of its items.
        like: a state with some of the items, which gets their values, or the only preferred item
            itself; if `None`, the preferred items are returned as nested dicts of arrays, a single
            one as it is.
        files: the record of its files.
        preferred: names of items, of which those that are there are taken; all if none is.

    Raises:
        CheckpointNotFound, StateMismatch, CorruptCheckpoint: as `restore` has it.
    """
    items = orbax_io.item_names(path)
    names = [name for name in items if name in preferred] or items
    if like is not None and len(names) == 1 and not abstract(like, items).keys() & set(items):
        return read(path, {names[0]: like}, files, names)[names[0]]  # that item alone
    if like is not None:
        return read(path, like, files, list(abstract(like, items)))
    check_files(path, files, names)
    found = orbax_io.load_alone(path, names)
    return found[names[0]] if len(names) == 1 else found


def _resolve(directory: RunDirectory, which: int | str) -> Record:
    """Return the record of the checkpoint that is asked for.

    By its step also where another record is damaged, which an alias might have meant.
    """
    if not isinstance(which, str):
        record = directory.read_record(which)
        if record is None or not directory.is_readable(record):
            there = ", ".join(map(str, directory.complete_records())) or "none"
            raise CheckpointNotFound(f"{directory.root} has no step {which}; it has {there}")
        return record
    complete = directory.complete_records()
    run = directory.read_run()
    policy = policy_from_json(run.policy) if run else None
    history = [Candidate(s, r.metrics) for s, r in complete.items()]
    aliases = promote(policy, history) if policy else {}
    if which not in aliases:
        there = ", ".join(map(str, complete)) or "none"
        raise CheckpointNotFound(
            f"{directory.root} has no checkpoint {which!r}; it has "
            f"{', '.join(aliases) or 'no aliases'} and steps {there}"
        )
    return complete[aliases[which]]
