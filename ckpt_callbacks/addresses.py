"""Checkpoints that are named by where a tracker has them, such as `mlflow:/digits@best`.

The part before the colon names an entry point in the group `ckpt_callbacks.addresses`: a function
`fetch(address, into, *, only, tracker, go_on)`, as the one below, that copies the checkpoint's
files into an empty folder and returns its record, which it has from the tracker too. So a machine
with an empty disk can read a checkpoint, verify it, and go on with its run.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_callbacks import publication
from ckpt_callbacks.bucket import is_bucket
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError, UsageError
from ckpt_callbacks.manifest import seal, verify
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.policy import KeepPolicy, Resume
from ckpt_callbacks.progress import growing
from ckpt_callbacks.record import Record, RunFile
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.stores import Store, redact
from ckpt_callbacks.text import suggestion

__all__ = [
    "GROUP",
    "bring",
    "brought",
    "fetch",
    "install",
    "is_address",
    "refuse_foreign",
    "take_over",
]

logger = logging.getLogger("ckpt_callbacks")

GROUP = "ckpt_callbacks.addresses"


def is_address(source: object) -> bool:
    """Return whether `source` is an address in a tracker, and no path or place in a bucket."""
    matches = isinstance(source, str) and re.match(r"[a-z][a-z0-9_-]+:", source) is not None
    return matches and not is_bucket(source)


def fetch(
    address: str,
    into: Path,
    *,
    only: Selection | None = None,
    tracker: Store | None = None,
    go_on: bool = False,
) -> Record:
    """Copy the files of a checkpoint into the empty folder `into`, and return its record.

    Where it is a reference to what is not on this machine, its published weights are copied
    instead, with their `weights.json`; see `ckpt_callbacks.published`.

    Args:
        address: as the tracker's package says, with its name in front.
        into: an empty folder.
        only: the leaves that are wanted: `only.items` says which items to fetch; all if not given.
        tracker: the one of the run that has this name, if there is one: its server is asked.
        go_on: whether the checkpoint's run is to go on from it.

    Raises:
        ConfigError: nothing that is installed understands the address.
        CheckpointNotFound: there is no such checkpoint, or it has no such item.
        UsageError: its run is to go on, but has newer checkpoints.
    """
    from importlib.metadata import entry_points

    scheme = address.partition(":")[0]
    known = {point.name: point for point in entry_points(group=GROUP)}
    if scheme not in known:
        raise ConfigError(
            f"{address!r} is no address that is understood here: it begins with none of "
            f"{', '.join(f'{name}:' for name in sorted(known)) or 'the installed trackers'}"
            f"{suggestion(scheme, known)}"
        )
    function = known[scheme].load()
    try:
        record: Record = function(address, into, only=only, tracker=tracker, go_on=go_on)
    except OSError as error:  # of the network, or of this machine's disk
        raise CheckpointNotFound(f"{address} can not be fetched: {redact(str(error))}") from None
    return record


def take_over(
    directory: RunDirectory, resume: Resume, keep: KeepPolicy, stores: Sequence[Store]
) -> Resume:
    """Let a directory that holds no run go on with the run of a checkpoint in a tracker.

    That is if `resume` is the address of one. The directory takes the run's id, so that its
    trackers find what they have of it. Where a run is there already, that one goes on, as after
    every other restart.

    Returns:
        What to go on from in the directory.

    Raises:
        ConfigError, CheckpointNotFound, UsageError: as `bring` has it; or the directory holds
            checkpoints of somebody else.
        CorruptCheckpoint: a file is damaged.
    """
    if not isinstance(resume, str) or not is_address(resume):
        return resume
    if directory.read_run() is not None:
        return "last"
    refuse_foreign(directory)
    tracker = next((s for s in stores if resume.startswith(f"{s.name}:")), None)
    with growing(f"fetching {redact(resume)}", brought(directory).parent):
        record = bring(directory, resume, tracker)
    install(directory, record)
    # Last: until it is there, the next start does all of this again.
    directory.write_run(RunFile(record.owner, policy_to_json(keep)))
    logger.warning(
        "%s is new: the run of %s goes on there, after step %d", directory, resume, record.step
    )
    return "last"


def refuse_foreign(directory: RunDirectory) -> None:
    """Refuse a directory with checkpoints that have no record.

    Raises:
        ConfigError: there are some.
    """
    if foreign := [step for step in directory.folders() if directory.read_record(step) is None]:
        raise ConfigError(
            f"{directory} holds checkpoints that were not saved by ckpt_callbacks "
            f"(steps {', '.join(map(str, foreign))}): choose another directory"
        )


def bring(
    directory: RunDirectory, address: str, tracker: Store | None, *, go_on: bool = True
) -> Record:
    """Fetch a checkpoint into the directory's trash folder, verify it, and return its record.

    Raises:
        ConfigError, CheckpointNotFound, UsageError: as `fetch` has it; or only a part of the
            checkpoint was sent.
        CorruptCheckpoint: a file is damaged.
    """
    into = brought(directory)
    shutil.rmtree(into.parent, ignore_errors=True)
    into.mkdir(parents=True)
    record = fetch(address, into, tracker=tracker, go_on=go_on)
    if (into / publication.MANIFEST).exists():
        raise UsageError(
            f"of {address} there are only the weights, as a file, so no run can go on from it: "
            "`load_params` reads them, and `ckpt-callbacks export` writes them"
        )
    if any(not (into / name).exists() for name in record.files):
        items = ", ".join(sorted(p.name for p in into.iterdir() if p.is_dir()))
        raise UsageError(
            f"{address} holds a part of the checkpoint only ({items}), since no more was sent, so "
            "no run can go on from it: `restore` and `ckpt-callbacks export` read it from there"
        )
    verify(into, record.files)
    seal(into)
    return replace(record, copies={}, lost=False)


def install(directory: RunDirectory, record: Record) -> None:
    """Put the checkpoint that was brought where the run goes on from it."""
    directory.write_record(record)
    directory.remove_uncommitted(record.step)
    directory.take_in(record.step, brought(directory))


def brought(directory: RunDirectory) -> Path:
    """Return the folder for a checkpoint from a tracker; what is on its way lies beside it."""
    return directory.trash / "taken-over" / "checkpoint"
