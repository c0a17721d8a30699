"""A run that goes on wherever its newest checkpoint is: in its directory, or in a tracker.

On a machine that never saw the run the directory is empty; on one that saw it long ago it is
behind. Either way the newest whole checkpoint is brought here, and the directory goes on from it
as if it had always been here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ckpt_callbacks.addresses import bring, brought, install, refuse_foreign
from ckpt_callbacks.arrival import arriving
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    RecordError,
    UsageError,
)
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.policy import ANYWHERE, KeepPolicy, Resume
from ckpt_callbacks.record import Record, RunFile
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.stores import Found, Store, redact

__all__ = ["check_run_id", "name_run"]

logger = logging.getLogger("ckpt_callbacks")


def check_run_id(run_id: object) -> None:
    """Check what is to name a run in all stores.

    Raises:
        ConfigError: it is no name that all of them take.
    """
    if not isinstance(run_id, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", run_id):
        raise ConfigError(
            "run: run_id must be up to 64 letters, digits, '_', '-' and '.', of which the first is "
            f"a letter or digit, not {run_id!r}"
        )


def name_run(
    directory: RunDirectory,
    run_id: str | None,
    resume: Resume,
    keep: KeepPolicy,
    stores: Sequence[Store],
) -> Resume:
    """Let the directory be that of the run `run_id`, and bring what `resume="anywhere"` finds.

    Returns:
        What to go on from in the directory.

    Raises:
        ConfigError: it is the directory of another run, or of somebody else.
        CheckpointNotFound: the newest one is in a store that does not give it; or nothing was
            found, and not all could be asked or read, so it is not known whether the run has begun.
    """
    if run_id is None:
        return resume
    run = directory.read_run()
    if run and run.run_id != run_id:
        raise ConfigError(
            f"{directory.root} holds the run {run.run_id}, not {run_id}: give it another "
            f"directory, or run_id={run.run_id!r}"
        )
    if run is None:
        refuse_foreign(directory)
    if resume == ANYWHERE:
        _find_newest(directory, run_id, run, keep, stores)
        resume = "last"
    if directory.read_run() is None:
        directory.write_run(RunFile(run_id, policy_to_json(keep)))
    return resume


@dataclass(frozen=True, slots=True)
class _Candidate:
    step: int
    found: Found
    store: Store
    is_newest: bool
    """Whether its store has no newer one."""

    def __str__(self) -> str:
        return f"step {self.step} of {self.store.title}"


@dataclass(frozen=True, slots=True)
class _Silent:
    store: Store
    why: str

    def __str__(self) -> str:
        return f"{self.store.title}: {self.why}"


def _find_newest(
    directory: RunDirectory,
    run_id: str,
    run: RunFile | None,
    keep: KeepPolicy,
    stores: Sequence[Store],
) -> None:
    """Bring the newest whole checkpoint of a run to the directory, if it is not there.

    All stores are asked at the same time. Of two that have the same step the one that was given
    first is taken, and the other one where that copy is damaged; the directory's own is taken
    before both.
    """
    records = directory.read_records(_ignored)
    here = _newest_in(directory, records)
    there, silent = _ask(stores, run_id)
    newer = sorted(
        (c for c in there if c.step > here and not _is_to_go(records.get(c.step), c.store)),
        key=lambda c: -c.step,
    )
    found, failed, absent = _first_whole(directory, newer)
    if found:
        candidate, record = found
        here = candidate.step
        _go_on_from(directory, run_id, run, keep, record, there)
        logger.warning(
            "%s %s: run %s goes on there after step %d, which was fetched from %s",
            directory.root,
            "is behind" if run else "is new",
            run_id,
            here,
            candidate.store.title,
        )
    elif absent:
        instead = (
            f"resume='last' goes on from step {here}, which is here"
            if here >= 0
            else "to go on without it, delete it there"
        )
        raise CheckpointNotFound(
            f"run {run_id} can not go on in {directory.root}: {'; '.join(failed)}. Start again "
            f"when step {absent} can be fetched; {instead}"
        )
    elif here < 0:
        _refuse_to_begin(directory, run_id, failed, silent)
    elif failed:
        logger.error("newer checkpoints could not be read: the run goes on from step %d", here)
    for quiet in silent:
        logger.warning(
            "%s could not be asked for run %s: %s. If it has a checkpoint after step %d, the run "
            "goes on without that one",
            quiet.store.title,
            run_id,
            quiet.why,
            here,
        )


def _first_whole(
    directory: RunDirectory, candidates: Sequence[_Candidate]
) -> tuple[tuple[_Candidate, Record] | None, list[str], int | None]:
    """Return the first checkpoint that could be brought here, and what is wrong with the others.

    A step whose copies are all damaged is passed over. One that a store has just listed and does
    not give may be had tomorrow, and nothing older is taken instead: that step is returned.
    """
    failed: list[str] = []
    absent: int | None = None
    for candidate in candidates:
        if absent is not None and candidate.step < absent:
            break
        try:
            return (candidate, _fetched(directory, candidate)), failed, None
        except (CorruptCheckpoint, CheckpointNotFound, RecordError, UsageError) as error:
            failed.append(f"{candidate}: {error}")
            logger.error("%s. Another copy is looked for", failed[-1])
            if isinstance(error, CheckpointNotFound):
                absent = candidate.step
    return None, failed, absent


def _refuse_to_begin(
    directory: RunDirectory, run_id: str, failed: Sequence[str], silent: Sequence[_Silent]
) -> None:
    """Refuse to begin a run that has begun, or may have.

    Raises:
        CheckpointNotFound: some of its checkpoints can not be read, or a store can not be asked.
    """
    if failed:
        raise CheckpointNotFound(
            f"run {run_id} can not go on in {directory.root}: no copy of its checkpoints can be "
            f"read ({'; '.join(failed)}). To begin anew, give it another run_id"
        )
    if silent:
        raise CheckpointNotFound(
            f"{directory.root} holds no checkpoint of run {run_id}, and whether a tracker does is "
            f"not known, since it could not be asked ({'; '.join(map(str, silent))}). Start again "
            "when it answers; resume='last' begins without asking"
        )


def _is_to_go(here: Record | None, store: Store) -> bool:
    """Return whether a store is still to delete its copy, since the run went back before it."""
    if here is None or not (here.state == "gone" or here.discarded):
        return False
    return store.name in here.copies


def _newest_in(directory: RunDirectory, records: Mapping[int, Record]) -> int:
    """Return the newest step that the run can go on from without anybody's help, or -1."""
    steps = [
        step
        for step, record in records.items()
        if directory.is_committed(step)
        and not record.discarded
        # A save that was killed after its commit is completed when the directory is opened.
        and (record.state == "complete" or (record.state == "saving" and record.logged))
    ]
    return max(steps, default=-1)


def _ignored(path: object, error: RecordError) -> None:
    """Leave a damaged record to the ledger, which moves it out of the way and says so."""


def _ask(stores: Sequence[Store], run_id: str) -> tuple[list[_Candidate], list[_Silent]]:
    """Return all whole checkpoints that stores have of a run, and the stores that do not answer."""
    candidates: list[_Candidate] = []
    silent: list[_Silent] = []
    with ThreadPoolExecutor(max(len(stores), 1), "ckpt-ask") as pool:
        asked = [(store, pool.submit(store.find, run_id)) for store in stores]
    for store, answer in asked:
        try:
            found = answer.result()
        except Exception as error:  # whatever a service's client raises
            silent.append(_Silent(store, redact(f"{type(error).__name__}: {error}")))
            continue
        newest = max(found, default=-1)
        candidates += [_Candidate(s, f, store, s == newest) for s, f in found.items()]
    return candidates, silent


def _fetched(directory: RunDirectory, candidate: _Candidate) -> Record:
    """Return the record of a checkpoint that was brought here and is whole.

    Raises:
        CorruptCheckpoint, CheckpointNotFound, RecordError, UsageError: it can not be had.
    """
    # Beside the folder that is filled, a client may have one of its own.
    with arriving(str(candidate), candidate.found.bytes, brought(directory).parent):
        return bring(directory, candidate.found.address, candidate.store, go_on=candidate.is_newest)


def _go_on_from(
    directory: RunDirectory,
    run_id: str,
    run: RunFile | None,
    keep: KeepPolicy,
    record: Record,
    there: Sequence[_Candidate],
) -> None:
    """Let the directory hold a checkpoint that was brought, as the newest one of the run.

    Where the directory holds the run already, that went on elsewhere, and what was known here of
    the stores holds no longer. Nor do steps that this machine took and no store had when the run
    went on from an earlier one: where it took them again, those count. This comes first, since the
    next start does it again after a kill.
    """
    if run:
        for step, known in directory.read_records(_ignored).items():
            if known.state == "gone":
                directory.remove_record(step)
            elif _was_taken_again(known, [c.found.digest for c in there if c.step == step]):
                logger.warning("step %d was saved again elsewhere, and is removed here", step)
                directory.to_trash(step)
                directory.remove_record(step)
            elif known.copies:
                directory.write_record(replace(known, copies={}))
        directory.write_run(replace(run, stores={}, aliases={}, settings={}))
    install(directory, record)
    if run is None:  # last, as in `take_over`
        directory.write_run(RunFile(run_id, policy_to_json(keep)))


def _was_taken_again(here: Record, digests: Sequence[str]) -> bool:
    """Return whether all copies of a step in stores are of other bytes than what is here."""
    known = bool(here.files and digests) and all(digests)
    return known and tree_digest(here.files) not in digests
