"""Checkpoints that are named by where a tracker has them, such as `mlflow:/digits@best`.

The part before the colon names an entry point in the group `ckpt_callbacks.addresses`: a function
`fetch(address, into, only)` that copies the checkpoint's files into an empty folder and returns its
record, which it has from the tracker too. So a machine with an empty disk can read a checkpoint,
verify it, and go on with its run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.manifest import seal, verify
from ckpt_callbacks.policy import KeepPolicy, Resume
from ckpt_callbacks.record import Record, RunFile
from ckpt_callbacks.retention import policy_to_json

__all__ = ["GROUP", "fetch", "is_address", "take_over"]

GROUP = "ckpt_callbacks.addresses"


def is_address(source: object) -> bool:
    """Return whether `source` is an address in a tracker and not a path."""
    return isinstance(source, str) and re.match(r"[a-z][a-z0-9_-]+:", source) is not None


def fetch(address: str, into: Path, only: Collection[str] | None = None) -> Record:
    """Copy the files of a checkpoint into the empty folder `into`, and return its record.

    Args:
        address: as the tracker's package says, with its name in front.
        into: an empty folder.
        only: the items to fetch; all that the tracker has if not given.

    Raises:
        ConfigError: nothing that is installed understands the address.
        CheckpointNotFound: there is no such checkpoint, or it has no such item.
    """
    from importlib.metadata import entry_points

    scheme = address.partition(":")[0]
    known = {point.name: point for point in entry_points(group=GROUP)}
    if scheme not in known:
        raise ConfigError(
            f"{address!r} is no address that is understood here: it begins with none of "
            f"{', '.join(f'{name}:' for name in sorted(known)) or 'the installed trackers'}"
        )
    record: Record = known[scheme].load()(address, into, only)
    return record


def take_over(directory: RunDirectory, resume: Resume, keep: KeepPolicy) -> Resume:
    """Let a directory that holds no run go on with the run of a checkpoint in a tracker.

    That is if `resume` is the address of one. The directory takes the run's id, so that its
    trackers find what they have of it. Where a run is there already, that one goes on, as after
    every other restart.

    Returns:
        What to go on from in the directory.

    Raises:
        ConfigError, CheckpointNotFound: as `fetch` has it; or the directory holds checkpoints of
            somebody else.
        CorruptCheckpoint: a file is damaged, or was not sent.
    """
    if not isinstance(resume, str) or not is_address(resume):
        return resume
    if directory.read_run() is not None:
        return "last"
    there = [int(p.name) for p in directory.root.iterdir() if p.name.isdecimal()]
    if foreign := [step for step in there if directory.read_record(step) is None]:
        raise ConfigError(
            f"{directory.root} holds checkpoints that were not saved by ckpt_callbacks "
            f"(steps {', '.join(map(str, foreign))}): choose another directory"
        )
    into = directory.trash / "taken-over"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    record = fetch(resume, into)
    verify(into, record.files)
    seal(into)
    directory.write_record(replace(record, copies={}, lost=False))
    directory.to_trash(record.step)  # of a start that was killed here
    into.rename(directory.path(record.step))
    # Last: until it is there, the next start does all of this again.
    directory.write_run(RunFile(record.owner, policy_to_json(keep)))
    return "last"
