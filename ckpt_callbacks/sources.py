"""Where a checkpoint is: in a run directory, elsewhere on this disk, or in a tracker."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ckpt_callbacks import orbax_io, publication
from ckpt_callbacks.addresses import fetch, is_address
from ckpt_callbacks.catalog import info_of, stores_of
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint
from ckpt_callbacks.manifest import verify as check_files
from ckpt_callbacks.nearby import nearby
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.policy import Candidate, as_step
from ckpt_callbacks.progress import growing
from ckpt_callbacks.record import File, Record
from ckpt_callbacks.recovery import copy_from, not_here
from ckpt_callbacks.remote import is_bucket, open_directory
from ckpt_callbacks.retention import policy_from_json, promote
from ckpt_callbacks.situation import is_away
from ckpt_callbacks.stores import Store, redact
from ckpt_callbacks.text import listed, suggestion

__all__ = ["Reader", "visit"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")
Files = Mapping[str, File]
Reader = Callable[[Path, Record | None, Files], S]
"""Gets a checkpoint, its record if it has one, and those files that are yet to be checked."""


def visit(
    owner: str,
    source: str | os.PathLike[str],
    which: int | str,
    reader: Reader[S],
    only: Selection | None = None,
    stores: Sequence[Store] | None = None,
    *,
    verify: bool = True,
    weights: Callable[[Path], S] | None = None,
) -> S:
    """Return what `reader` makes of a checkpoint; `owner` asks for it.

    Where a tracker has its weights alone, as a file, it is what `weights` makes of their folder.
    The other arguments, and what is raised, are those of `restore`.
    """
    if isinstance(which, str) and which.isdecimal():  # as a command line has it
        which = int(which)
    if isinstance(source, str) and is_address(source):
        return _from_tracker(owner, source, reader, which, only, weights, verify=verify)
    if not is_bucket(source):
        root = Path(source).expanduser().absolute()
        if not (root / ".ckpt_callbacks").is_dir():
            return reader(_of_others(root, which), None, {})
    directory = open_directory(source)
    if is_bucket(source):
        directory.open_run()
    which = which if isinstance(which, str) else as_step(owner, which)
    return _from_run(directory, which, reader, only, stores, verify=verify)


def _from_run(
    directory: RunDirectory,
    which: int | str,
    reader: Reader[S],
    only: Selection | None,
    stores: Sequence[Store] | None,
    *,
    verify: bool,
) -> S:
    while True:
        record = _resolve(directory, which)
        if record.lost:
            return _from_elsewhere(directory, record, reader, stores, not_here(directory, record))
        try:
            with directory.lend(record, only, check=verify) as (path, files):
                state = reader(path, record, files)
        except Exception as error:
            if not _moved_on(directory, record, which):
                if not isinstance(error, CorruptCheckpoint):
                    raise
                return _from_elsewhere(directory, record, reader, stores, error)
        else:
            if not _moved_on(directory, record, which):
                return state


def _of_others(root: Path, which: int | str) -> Path:
    """Return the checkpoint at `root`, which is one or holds some by their step.

    Raises:
        ConfigError: it is neither.
        CheckpointNotFound: it has no such step.
    """
    if orbax_io.is_item(root):
        raise ConfigError(
            f"{root} is a part of the checkpoint {root.parent}: give that, and only={root.name!r}"
        )
    if orbax_io.is_checkpoint(root):
        return root
    steps = orbax_io.steps(root)
    if not steps:
        raise ConfigError(f"{root} is neither a run directory nor a checkpoint{nearby(root)}")
    step = max(steps) if which == "last" else which
    if step not in steps:
        hint = suggestion(which, (), list(steps))
        if isinstance(which, str):
            hint = (
                f". Only a run directory has aliases: `ckpt-callbacks adopt {root} NEW` makes one "
                "that ranks them by the metrics that Orbax has stored"
            )
        raise CheckpointNotFound(
            f"{root} has no checkpoint {which!r}: it is a directory of Orbax with the steps "
            f"{listed(list(steps))}{hint}"
        )
    return steps[int(step)]


def _moved_on(directory: RunDirectory, record: Record, which: int | str) -> bool:
    """Return whether the checkpoint went, or was replaced, since `record` was read.

    Raises:
        CheckpointNotFound: it was, and it was asked for by its step.
    """
    now = directory.read_record(record.step)
    if now and directory.is_readable(now) and now.files == record.files:
        return False
    if which == record.step and not (now and is_away(now)):
        raise CheckpointNotFound(f"step {which} of {directory} was evicted while it was read")
    return True


def _from_elsewhere(
    directory: RunDirectory,
    record: Record,
    reader: Reader[S],
    stores: Sequence[Store] | None,
    error: CorruptCheckpoint | CheckpointNotFound,
) -> S:
    """Read a checkpoint that is damaged or not here from a store that has a true copy.

    Raises:
        CorruptCheckpoint, CheckpointNotFound: `error`, since no store has one.
    """
    import tempfile

    run = directory.open_run()
    there = stores_of(run) if stores is None else stores
    infos = [info_of(directory, run, store.name, None) for store in there]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / str(record.step)
        pairs = list(zip(there, infos, strict=True))
        if not record.files or not copy_from(pairs, record, copy):
            raise error
        if isinstance(error, CorruptCheckpoint):
            logger.error("%s. It is read from another copy", error)
        return reader(copy, record, {})


def _from_tracker(
    owner: str,
    address: str,
    reader: Reader[S],
    which: int | str,
    only: Selection | None,
    weights: Callable[[Path], S] | None,
    *,
    verify: bool,
) -> S:
    import tempfile

    if which != "last":
        raise ConfigError(f"{owner}: {address} names a checkpoint itself; leave out {which=}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkpoint"
        copy.mkdir()
        with growing(f"fetching {redact(address)}", copy.parent):
            record = fetch(address, copy, only=only)
        if (copy / publication.MANIFEST).exists():
            if weights is None:
                raise CheckpointNotFound(
                    f"{owner}: of {address} there are only the weights, as a file, which "
                    "`load_params` and `export` read: the checkpoint itself was not sent, and is "
                    "not on this machine"
                )
            return weights(publication.verified(copy))
        if verify:  # maybe fewer items than were saved
            check_files(copy, record.files, orbax_io.item_names(copy))
        return reader(copy, record, {})


def _resolve(directory: RunDirectory, which: int | str) -> Record:
    """Return the record of the checkpoint that is asked for.

    By its step also where another record is damaged, which an alias might have meant.
    """
    if not isinstance(which, str):
        record = directory.read_record(which)
        if record is None or not (directory.is_readable(record) or is_away(record)):
            steps = list(directory.known_records())
            raise CheckpointNotFound(
                f"{directory} has no step {which}; it has {listed(steps)}"
                f"{suggestion(which, (), steps)}"
            )
        return record
    complete = directory.known_records()
    run = directory.read_run()
    policy = policy_from_json(run.policy) if run else None
    history = [Candidate(s, r.metrics) for s, r in complete.items()]
    aliases = promote(policy, history) if policy else {}
    aliases |= {n: step for n, step in (run.named if run else {}).items() if step in complete}
    if which not in aliases:
        raise CheckpointNotFound(
            f"{directory} has no checkpoint {which!r}; it has "
            f"{', '.join(aliases) or 'no aliases'} and steps {listed(list(complete))}"
            f"{suggestion(which, aliases)}"
        )
    return complete[aliases[which]]
