"""What is done when a run directory is opened, before the first step.

First what an earlier process began is finished, whatever the point where it stopped; then the
checkpoint to go on from is chosen and checked.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    UsageError,
)
from ckpt_callbacks.failpoints import hit
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.manifest import seal, verify
from ckpt_callbacks.policy import Resume
from ckpt_callbacks.progress import growing
from ckpt_callbacks.record import Record
from ckpt_callbacks.stores import RunInfo, Store, redact

__all__ = ["choose", "copy_from", "not_here", "recover", "refuse_others"]

logger = logging.getLogger("ckpt_callbacks")

Repair = Callable[[Record, Path], bool]
"""Fills a folder with a checkpoint from elsewhere; returns whether it could."""


def recover(ledger: Ledger) -> None:
    """Finish what an earlier process began, whatever the point where it stopped.

    Where the end of the run is gone, since it was discarded or somebody removed it, the ledger
    is told that the run went back.
    """
    directory = ledger.directory
    before = max(ledger.counted(), default=-1)
    lost = _find_lost(ledger)
    newest = max(ledger.counted(), default=-1)
    discarded = [s for s, r in ledger.records().items() if r.discarded and r.state == "complete"]
    # Those that were pruned are older than what stays.
    back = [s for s in discarded if s > newest]
    if back or (lost and newest != before):
        ledger.went_back(newest)
    for step, record in ledger.records().items():
        committed = directory.is_committed(step)
        if record.state == "saving" and record.logged and committed:
            ledger.completed(step, directory.commit(step))
        elif record.state == "saving":
            directory.remove_uncommitted(step)
            directory.to_trash(step)
            ledger.failed(step)
        elif record.state == "evicting" or step in discarded:
            directory.to_trash(step)
            ledger.evicted(step, record.discarded or "its eviction was completed after a kill")
    _adopt(ledger)
    try:
        directory.empty_trash()
    except OSError:
        logger.exception("%s can not be emptied", directory.trash)


def _find_lost(ledger: Ledger) -> bool:
    """Note which checkpoints somebody else removed; return whether there are new ones."""
    directory = ledger.directory
    found = False
    for step, record in ledger.records().items():
        there = directory.is_committed(step)
        if record.state != "complete" or record.discarded or record.lost != there:
            continue
        if not there and directory.fetched(step).is_dir():
            directory.fetched(step).rename(directory.path(step))  # what `_ensure_whole` began
            continue
        ledger.lost(step, lost=not there)
        if not there:
            found = True
            logger.warning("step %d was removed from %s by somebody else", step, directory)
    return found


def _adopt(ledger: Ledger) -> None:
    """Take in checkpoints of this run whose record is gone.

    Raises:
        ConfigError: there are checkpoints that this run did not save.
    """
    directory = ledger.directory
    unknown = [step for step in directory.folders() if ledger.record(step) is None]
    foreign: list[int] = []
    for step in filter(directory.is_committed, unknown):
        if directory.saved_by(step) == ledger.run_id:
            ledger.adopt(step, directory.commit(step))
        else:
            foreign.append(step)
    _refuse(directory, foreign)


def refuse_others(directory: RunDirectory) -> None:
    """Refuse a folder of Orbax's before anything is written into it.

    Raises:
        ConfigError: it holds checkpoints, and no run of ours.
    """
    if directory.is_of_others():
        _refuse(directory, list(filter(directory.is_committed, directory.folders())))


def _refuse(directory: RunDirectory, steps: list[int]) -> None:
    if steps:
        raise ConfigError(
            f"{directory} holds checkpoints that were not saved by ckpt_callbacks "
            f"(steps {', '.join(map(str, steps))}): choose another directory, into which "
            "cc.adopt can take them"
        )


def choose(
    ledger: Ledger,
    resume: Resume,
    discard_newer: bool,
    repair: Repair,
    compare: Callable[[Path], None] = lambda path: None,
) -> Record | None:
    """Return the checkpoint to go on from.

    Its files are checked; a damaged one is repaired from another true copy. Without such a copy
    `last` goes back to the newest older one that is whole, and says so.

    Raises:
        CheckpointNotFound: there is no such step, or it is in a store that does not give it back.
        CorruptCheckpoint: the step that was named is damaged everywhere.
        UsageError: it is older than the newest, and `discard_newer` is not given.
        StateMismatch: newer ones are to go, and the state does not fit it.
    """
    if not ledger.known():
        if isinstance(resume, int):
            raise CheckpointNotFound(
                f"{ledger.directory} holds no checkpoint, so a run can not go on from step {resume}"
            )
        return None
    if resume == "last":
        return _newest_whole(ledger, repair)
    chosen = _named(ledger, resume)
    step = chosen.step if chosen else -1
    if newer := [s for s in ledger.counted() if s > step]:
        if not discard_newer:
            raise UsageError(_choices(ledger, step, newer))
        if chosen:
            _ensure_whole(ledger, chosen, repair)
            compare(ledger.directory.path(step))
        newer = [s for s in ledger.known() if s > step]
        where = f"step {step}" if chosen else "the start"
        logger.warning("going back to %s: steps %s go", where, ", ".join(map(str, newer)))
        ledger.discard(newer, f"discarded: the run went back to {where}")
        ledger.went_back(step)
    elif chosen:
        _ensure_whole(ledger, chosen, repair)
    return chosen


def _named(ledger: Ledger, resume: Resume) -> Record | None:
    if resume is None:
        return None
    situation, there = ledger.situation, ledger.known()
    step = situation.decide(situation.known).aliases.get("best") if resume == "best" else resume
    if step not in there:
        raise CheckpointNotFound(
            f"{ledger.directory} has no checkpoint {resume!r} to go on from; it has steps "
            f"{', '.join(map(str, there))}"
        )
    return ledger.record(step)


def _choices(ledger: Ledger, step: int, newer: list[int]) -> str:
    root = str(ledger.directory)
    what = f"go on from step {step}" if step >= 0 else "start over"
    return (
        f"a run in {root} can not {what}: it holds newer checkpoints (steps "
        f"{', '.join(map(str, newer))}). Go on from the newest with resume='last', or give "
        "discard_newer=True once to remove the newer ones everywhere, or choose a new directory"
        + (f" and start from cc.restore({root!r}, like=state, which={step})" * (step >= 0))
    )


def _newest_whole(ledger: Ledger, repair: Repair) -> Record | None:
    """Return the newest checkpoint of which a true copy is to be had, and bring it here.

    Raises:
        CheckpointNotFound: there are only such in stores that do not give them back.
    """
    damaged: dict[int, CorruptCheckpoint] = {}
    absent: list[CheckpointNotFound] = []
    for step in reversed(ledger.counted()):
        record = ledger.record(step)
        assert record  # noqa: S101  # for the type checker: it is one of the ledger's steps
        try:
            _ensure_whole(ledger, record, repair)
        except CorruptCheckpoint as error:
            damaged[step] = error
            continue
        except CheckpointNotFound as error:
            absent.append(error)
            continue
        if absent:
            ledger.went_back(step)
            for missing in absent:
                logger.error("%s. The run goes on from step %d", missing, step)
        _set_aside(ledger, damaged, step, f"the run goes on from step {step}")
        return record
    if absent:  # what would be lost by starting over may be there again tomorrow
        raise absent[0]
    _set_aside(ledger, damaged, -1, "the run starts over")
    return None


def _set_aside(
    ledger: Ledger, damaged: dict[int, CorruptCheckpoint], back_to: int, then: str
) -> None:
    """Take damaged checkpoints out of the run; their files stay for a person to look at."""
    if not damaged:
        return
    ledger.went_back(back_to)
    ledger.discard(damaged.keys(), "discarded: its files are damaged")
    for step, error in damaged.items():
        where = ledger.directory.set_aside(ledger.directory.path(step))
        logger.error("%s. It is moved to %s, and %s", error, where, then)
        ledger.evicted(step, f"damaged: {error}")


def _ensure_whole(ledger: Ledger, record: Record, repair: Repair) -> None:
    """Check every file of a checkpoint, and replace it if it is damaged and there is a copy.

    Raises:
        CorruptCheckpoint: it is damaged, and no true copy is to be had.
    """
    directory = ledger.directory
    if record.lost:
        _fetch_back(ledger, record, repair)
        return
    try:
        directory.bring(record)
    except CorruptCheckpoint as error:
        new = directory.fetching(record.step)
        if not repair(record, new):
            raise
        logger.error("%s. It is repaired from another copy", error)
        seal(new)
        directory.put_in_place(record.step, new)


def _fetch_back(ledger: Ledger, record: Record, repair: Repair) -> None:
    """Bring a checkpoint back that is in a store alone.

    Raises:
        CheckpointNotFound: no store gives a true copy.
    """
    new = ledger.directory.fetching(record.step)
    if not record.files or not repair(record, new):
        raise not_here(ledger.directory, record)
    seal(new)
    hit("copy-brought")
    ledger.directory.take_in(record.step, new)
    hit("copy-taken-in")
    ledger.lost(record.step, lost=False)


def not_here(directory: RunDirectory, record: Record) -> CheckpointNotFound:
    """Return what to raise where a checkpoint is in a store alone that does not give it."""
    where = ", ".join(f"{name} ({copy.ref})" for name, copy in record.copies.items())
    if record.files:
        return CheckpointNotFound(
            f"step {record.step} is not in {directory} any more, and no store gives it back: "
            f"{where}"
        )
    return CheckpointNotFound(
        f"step {record.step} was saved on another machine and never was in {directory}: give "
        f"its address in {where} to restore it"
    )


def copy_from(stores: Iterable[tuple[Store, RunInfo]], record: Record, into: Path) -> bool:
    """Fetch a checkpoint from the first store with a true copy of it; return whether one has.

    A copy that shares its bytes with the directory is none: the same damage is in both.
    """
    for store, info in stores:
        copy = record.copies.get(store.name)
        if copy is None or copy.shared or copy.state != "confirmed":
            continue
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        try:
            store.open(replace(info, reading=True))
            what = f"fetching step {record.step} from {store.title}"
            with growing(what, into.parent, total=record.bytes):
                store.get(record.step, into)
            verify(into, record.files)
        except Exception as error:
            text = redact(f"{type(error).__name__}: {error}")
            logger.warning("%s: could not fetch step %d: %s", store.title, record.step, text)
        else:
            return True
    return False
