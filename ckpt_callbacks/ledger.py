"""The one writer of records.

Workers hand it facts; it writes them down before anything builds on them, and answers what is to be
done next. Every method takes the mutex, so all see one order of facts.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound, RecordError, UsageError
from ckpt_callbacks.history import LOCAL, Entry, What, with_records
from ckpt_callbacks.history_file import HistoryFile
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.plan import Action
from ckpt_callbacks.policy import Candidate, KeepPolicy
from ckpt_callbacks.record import (
    ADOPTED,
    Change,
    Copy,
    File,
    Gone,
    Promotion,
    Record,
    RunFile,
    record_to_json,
)
from ckpt_callbacks.retention import Decision, policy_to_json
from ckpt_callbacks.situation import Situation, candidate, is_waiting
from ckpt_callbacks.stores import Checkpoint, Known, Listing, Overview, Rank

__all__ = ["Ledger"]

logger = logging.getLogger("ckpt_callbacks")


class Ledger:
    """The records of one run directory, owned by this process.

    Args:
        directory: already acquired.
        policy: what to keep.
        changed: called after every fact that may give workers work; it must not wait.
        stores: the stores of this run by name, each with the policy of its own that it may have.
        now: seconds since the epoch.
        all_here: whether `stores` are all that the run has; else a changed policy has to wait.
        config: the hyper-parameters of the run; those that are known stay if there are none.
        here: of what is kept, what the directory holds once the stores have the rest.
    """

    def __init__(
        self,
        directory: RunDirectory,
        policy: KeepPolicy,
        changed: Callable[[], None] = lambda: None,
        stores: Mapping[str, KeepPolicy | None] | None = None,
        now: Callable[[], float] = time.time,
        *,
        all_here: bool = True,
        config: Mapping[str, Any] | None = None,
        here: KeepPolicy | None = None,
    ) -> None:
        self.directory = directory
        self.policy = policy
        self._here = here
        self._changed = changed
        self._stores = stores or {}
        self._all_here = all_here
        self._now = now
        self.mutex = self._mutex = threading.RLock()
        self._records = directory.read_records(self._quarantine)
        self._leases: dict[int, int] = {}
        self._evicted: set[int] = set()
        self._history = HistoryFile(directory.meta)
        self._gone = [Candidate(g.step, g.metrics, g.time) for g in directory.read_evicted()]
        self._closed = False
        run = directory.read_run()
        spec = policy_to_json(policy)
        self._run = run or RunFile(os.urandom(6).hex(), spec)
        self._situation: Situation | None = None
        # As it will be read; infinities, which JSON does not know, are there for people only.
        config = json.loads(json.dumps(config or self._run.config), parse_constant=str)
        new = replace(self._run, policy=spec, change=self._begin_change(spec), config=config)
        if run != new:
            directory.write_run(new)
        self._run, self._situation = new, None

    @property
    def run_id(self) -> str:
        """Unique and stable over restarts."""
        return self._run.run_id

    # Questions

    @property
    def situation(self) -> Situation:
        """What is known now, and all that follows from it."""
        with self._mutex:
            if self._situation is None:
                records, run = dict(self._records), self._run
                self._situation = Situation(records, run, self.policy, self._stores, self._here)
            return self._situation

    def newest(self) -> Record | None:
        """Return the record of the newest complete checkpoint that is there."""
        return max(self.situation.readable, key=lambda r: r.step, default=None)

    @property
    def run(self) -> RunFile:
        """What is known of the run as a whole."""
        return self._run

    def leaving(self) -> dict[int, str]:
        """Return the steps that go once a changed policy is in force, and what it says of each."""
        return self.situation.leaving()

    def unmeasured(self) -> list[int]:
        """Return the complete steps that lack a metric which the policy ranks by."""
        return self.situation.unmeasured()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints that are there."""
        return sorted(r.step for r in self.situation.readable)

    def counted(self) -> list[int]:
        """Return the steps that are judged: those, and the ones that were let go."""
        return sorted(r.step for r in self.situation.counted)

    def known(self) -> list[int]:
        """Return the steps of all complete checkpoints, also of those in stores alone."""
        return sorted(r.step for r in self.situation.known)

    def record(self, step: int) -> Record | None:
        """Return the record of a step."""
        with self._mutex:
            return self._records.get(step)

    def records(self) -> dict[int, Record]:
        """Return all records by step."""
        with self._mutex:
            return dict(self._records)

    def decision(self) -> Decision:
        """Return what to keep, over the complete checkpoints that are there."""
        with self._mutex:
            self._settle_change()
            return self.situation.decision

    def next_action(self, store: str) -> Action | None:
        """Return the first thing `store` must do, or `None`."""
        with self._mutex:
            self._check_open()
            self._settle_change()
            return self.situation.next_action(store)

    def actions(self, store: str) -> list[Action]:
        """Return all that `store` must do, in order."""
        with self._mutex:
            self._settle_change()
            return self.situation.actions(store)

    def would_keep(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Return whether the policy has a place for a step that is not saved yet."""
        return self.situation.would_keep(Candidate(step, metrics, self._now()))

    def explain(self, step: int) -> str:
        """Return what each policy says of a step, or why it was discarded."""
        return self.situation.explain(step)

    def evictable(self) -> list[int]:
        """Return the local steps that may go now."""
        with self._mutex:
            self._settle_change()
            return self.situation.evictable(self._leases)

    def spare(self) -> list[int]:
        """Return the local steps that are kept, and that the directory may leave to the stores."""
        with self._mutex:
            return self.situation.spare(self._leases)

    def rank(self, alias: str, step: int) -> Rank | None:
        """Return what ranks a step for an alias, or `None` if nothing does."""
        return self.situation.rank(alias, step)

    def overview(self, store: str) -> Overview:
        """Return what a store holds, for people."""
        with self._mutex:
            return self.situation.overview(store, self.directory.name, self._gone)

    def with_history(self, overview: Overview) -> Overview:
        """Return an overview with what happened so far, which is read from its files."""
        history = with_records(self._history.entries(), self.records())
        return replace(overview, history=history, evicted=self.directory.read_evicted())

    @contextmanager
    def reading(self, step: int, store: str, *, files: bool = True) -> Iterator[Checkpoint | None]:
        """Hold a step in the directory while a store reads it; `None` if it is gone.

        Without `files` those may be elsewhere, such as in object storage.
        """
        with self._mutex:
            self._check_open()
            record = self._records.get(step)
            lost = record is not None and record.lost and not is_waiting(record, store)
            if record is None or record.state != "complete" or lost:
                record = None
            else:
                self._leases[step] = self._leases.get(step, 0) + 1
        if record is None:
            yield None
            return
        try:
            with self.directory.lend(record) if files else nullcontext():
                yield Checkpoint(
                    run_id=self.run_id,
                    step=step,
                    path=self.directory.path(step),
                    metrics=record.metrics,
                    files=record.files,
                    digest=tree_digest(record.files),
                    reason=self.decision().kept.get(step, ""),
                    time=record.time,
                    manifest=record_to_json(replace(record, copies={})),
                    address=self.directory.address(step),
                )
        finally:
            with self._mutex:
                self._leases[step] -= 1
                if not self._leases[step]:
                    del self._leases[step]
            self._changed()

    # Facts about local checkpoints

    def saving(self, step: int, metrics: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
        """A save is about to start.

        Where the step was saved before and its files are gone, its copies in the stores are of
        other bytes now: each store replaces its own.
        """
        with self._mutex:
            old = self._records.get(step)
            copies = {k: _pending(c) for k, c in old.copies.items()} if old else {}
            self._write(
                Record(
                    step=step,
                    state="saving",
                    owner=self.run_id,
                    time=self._now(),
                    metrics=dict(metrics),
                    copies=copies,
                    metadata=dict(metadata),
                )
            )
            self._evicted.discard(step)

    def adopt(
        self,
        step: int,
        files: Mapping[str, File],
        metrics: Mapping[str, float] | None = None,
        saved: float | None = None,
    ) -> None:
        """A checkpoint of this run was found whose record is gone, or comes from elsewhere."""
        when = self._now() if saved is None else saved
        self._write(Record(step, "complete", self.run_id, when, metrics or {}, files=files))

    def reported(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics up to a step that is being saved are logged, and these are its own.

        Those of an evaluation go before them.
        """
        with self._mutex:
            record = self._records[step]
            self._write(replace(record, metrics={**metrics, **record.metrics}, logged=True))

    def completed(
        self, step: int, files: Mapping[str, File], seconds: tuple[float, ...] = ()
    ) -> Record:
        """A save is committed and sealed; `seconds` are those of `history.Entry`."""
        with self._mutex:
            record = replace(self._records[step], state="complete", files=files)
            self._write(record)
            self._note("saved", LOCAL, record, seconds)
        self._changed()
        return record

    def lost(self, step: int, *, lost: bool = True) -> None:
        """The files of a complete checkpoint were removed by somebody else, or are back.

        Nothing is concluded from it: its copies elsewhere may be the only ones left.
        """
        with self._mutex:
            self._write(replace(self._records[step], lost=lost))
            self._note("gone" if lost else "saved", LOCAL, self._records[step])

    def failed(self, step: int) -> None:
        """A save did not commit, and what it left is removed."""
        self._forget(step)

    def measured(self, step: int, metrics: Mapping[str, float]) -> bool:
        """An evaluation of a step; returns False if the step has no checkpoint."""
        with self._mutex:
            record = self._records.get(step)
            live = record is not None and record.state in ("saving", "complete")
            if record is None or not live or record.discarded:
                if step in self._evicted:
                    logger.warning(
                        "step %d was evicted before this evaluation of it came, so it can not be "
                        "best: BestN(..., pending=) keeps more steps that are not measured yet",
                        step,
                    )
                return False
            self._write(replace(record, metrics={**record.metrics, **metrics}))
        self._changed()
        return True

    def was_evicted(self, step: int) -> bool:
        """Return whether a step was evicted since the directory was opened."""
        return step in self._evicted

    def pin(self, step: int, *, pinned: bool) -> None:
        """Keep a step whatever the policy says, or no longer.

        Raises:
            CheckpointNotFound: there is no such checkpoint to pin.
        """
        with self._mutex:
            steps = self.known()
            if pinned and step not in steps:
                there = ", ".join(map(str, steps)) or "none"
                raise CheckpointNotFound(f"step {step} can not be pinned: the steps are {there}")
            run = self._run
            pins = run.pins | {step} if pinned else run.pins - {step}
            self._write_run(pins=pins, promoted=run.promoted if pinned else _without(run, {step}))
        self._changed()

    def promote(self, step: int, alias: str, when: float) -> None:
        """Give a step an alias in every store, and keep it for as long as it has it.

        Raises:
            CheckpointNotFound: there is no such checkpoint.
        """
        with self._mutex:
            steps = self.known()
            if step not in steps:
                there = ", ".join(map(str, steps)) or "none"
                raise CheckpointNotFound(f"step {step} can not be {alias!r}: the steps are {there}")
            self._write_run(promoted={**self._run.promoted, alias: Promotion(step, when)})
        self._changed()

    def prune(self, steps: Collection[int], keep: KeepPolicy) -> None:
        """Let those of `steps` go everywhere that `keep` does not keep; it is no policy for later.

        What is pinned, promoted or the newest by now stays.
        """
        with self._mutex:
            kept, there = self.situation.kept_by(keep), {*self.known()}
            if goes := there & {*steps} - kept.keys():
                self.discard(goes, f"pruned: {keep} does not keep it")

    def discard(self, steps: Collection[int], reason: str) -> None:
        """From now on complete checkpoints do not count: they leave every store by the plan.

        The newest first, so that a kill on the way leaves no gap.
        """
        with self._mutex:
            for step in sorted(steps, reverse=True):
                self._write(replace(self._records[step], discarded=reason))
            self._write_run(pins=self._run.pins - set(steps), promoted=_without(self._run, steps))
        self._changed()

    def went_back(self, step: int | None) -> None:
        """The run goes on from `step`, -1 for the start, although it had come further.

        `None` once its metrics are marked. A kill before that must not lose it.
        """
        self._write_run(rewound=step)

    def entered(self, status: str) -> None:
        """The loop was entered (`running`) or left, as `RunEnded` has it."""
        self._write_run(status=status)

    def evicting(self, step: int) -> bool:
        """The local files are about to go; returns False if they must stay after all."""
        with self._mutex:
            if self._records[step].state == "evicting":  # it failed on the way
                return True
            if step not in self.evictable():
                return False
            self._write(replace(self._records[step], state="evicting"))
            return True

    def let_go(self, step: int) -> bool:
        """The local files are about to go, since stores have them; returns False if they stay."""
        with self._mutex:
            if step not in self.spare():
                return False
            self.lost(step)
            return True

    def evicted(self, step: int, reason: str) -> None:
        """The local files are gone."""
        with self._mutex:
            record = self._records[step]
            if step not in self._evicted:
                self.directory.log_evicted(Gone(step, record.time, record.metrics, reason))
                self._gone.append(candidate(record))
                self._evicted.add(step)
            if record.copies:
                self._write(replace(record, state="gone", files={}))
            else:
                self._forget(step)
            self._note("gone", LOCAL, record)
        self._changed()

    # Facts about stores

    def expect(self, store: str, title: str, settings: Mapping[str, Any] | None) -> None:
        """A store is to be opened, which may not work for as long as this process lives."""
        with self._mutex:
            if store not in self._run.stores:
                known = {} if settings is None else {store: settings}
                self._write_run(
                    stores={**self._run.stores, store: {"title": title}},
                    settings={**self._run.settings, **known},
                )

    def remember(
        self, store: str, refs: Mapping[str, str], settings: Mapping[str, Any] | None = None
    ) -> None:
        """A store was opened; with `settings` another process can make it again.

        If it no longer knows what it asked to have remembered, such as its run, what it held
        is gone with it.
        """
        with self._mutex:
            if settings is not None and self._run.settings.get(store) != settings:
                self._write_run(settings={**self._run.settings, store: settings})
            known = self._run.stores.get(store)
            if known == refs:
                return
            if known is not None:
                for step, record in list(self._records.items()):
                    if store in record.copies:
                        self.deleted(store, step)
                self._alias(store, {})
            self._write_run(stores={**self._run.stores, store: dict(refs)})

    def listed(self, store: str, listing: Listing) -> None:
        """A store was asked what it holds.

        What it lists and no record knows is taken in. What it does not list is left as recorded,
        since one listing may lag behind; unless the listing is `exact`.
        """
        with self._mutex:
            for step, copy in listing.copies.items():
                record = self._records.get(step)
                before = record.copies.get(store) if record else None
                # What was staged may have been sent meanwhile; all else is known better here.
                moved = before is not None and before.state == "staged" != copy.state
                if before is None or moved or copy.state == "pending":
                    self._found(store, step, copy, listing.known.get(step))
            known = self._run.aliases.get(store, {})
            names = dict(listing.aliases) if listing.exact else {**known, **listing.aliases}
            if listing.exact:
                for step, record in list(self._records.items()):
                    if store in record.copies and step not in listing.copies:
                        pending = _pending(record.copies[store])
                        self._write(replace(record, copies={**record.copies, store: pending}))
            if names != known:
                self._alias(store, names)
        self._changed()

    def _found(self, store: str, step: int, copy: Copy, known: Known | None) -> None:
        """Take in a copy of which the records do not know, or not where it is now."""
        record = self._records.get(step)
        if record is None and (known is None or any(step == gone.step for gone in self._gone)):
            record = Record(step, "gone", self.run_id, 0.0)  # it stayed behind
        elif record is None and known:
            # From another disk, whose run goes on here: judged as if it were here.
            record = Record(step, "complete", self.run_id, known.time, known.metrics, lost=True)
            if known.pinned:
                self._write_run(pins=self._run.pins | {step})
        elif record and record.files and known and tree_digest(record.files) != known.digest:
            copy = _pending(copy)  # of other bytes: it is to be replaced
        if record:
            self._write(replace(record, copies={**record.copies, store: copy}))

    def publishing(self, store: str, step: int) -> None:
        """A copy is about to be made; cut, it leaves a part that has to go or be completed."""
        with self._mutex:
            record = self._records[step]
            if store not in record.copies:
                copies = {**record.copies, store: Copy("pending", "")}
                self._write(replace(record, copies=copies))

    def copied(self, store: str, step: int, copy: Copy, seconds: tuple[float, ...] = ()) -> None:
        """A store holds a step; `seconds` are those of `history.Entry`."""
        with self._mutex:
            record = self._records[step]
            self._write(replace(record, copies={**record.copies, store: copy}))
            self._note("copied", store, record, seconds)

    def aliased(self, store: str, name: str, step: int) -> int | None:
        """An alias moved; returns the step that it named before."""
        with self._mutex:
            names = self._run.aliases.get(store, {})
            self._alias(store, {**names, name: step})
            return names.get(name)

    def deleting(self, store: str, step: int) -> None:
        """A copy is about to go. Until it is known whether it did, nothing builds on it."""
        with self._mutex:
            record = self._records[step]
            copy = _pending(record.copies[store])
            self._write(replace(record, copies={**record.copies, store: copy}))

    def deleted(self, store: str, step: int) -> None:
        """A store's copy is gone."""
        with self._mutex:
            record = self._records[step]
            copies = {k: v for k, v in record.copies.items() if k != store}
            if copies or not (record.state == "gone" or record.lost):
                self._write(replace(record, copies=copies))
            else:
                self._forget(step)
            self._note("gone", store, record)

    # Writing: first the disk, then the memory

    def close(self) -> None:
        """Refuse all further facts: the directory is about to be released."""
        with self._mutex:
            self._closed = True

    def _quarantine(self, path: Path, error: RecordError) -> None:
        """Move a damaged record out of the way; it is made again from what is on disk."""
        logger.error("%s; it is moved to %s", error, self.directory.set_aside(path))

    def _settle_change(self) -> None:
        """Let a changed policy be in force once its first decision is whole."""
        change = self._run.change
        may = change and self._all_here and not self._closed
        if change and may and self.situation.change_is_whole(change):
            self._write_run(change=None)
            logger.info("the changed keep policy %s is in force", self.policy)
            self._changed()

    def _begin_change(self, spec: list[dict[str, Any]]) -> Change | None:
        """Return the change of policy under way: it waits until the first decision is whole."""
        known, old = self._run.change, list(self._run.policy)
        if not (readable := self.situation.readable):
            return None
        if old == spec or self._run.status == ADOPTED:  # that policy was nobody's choice
            return known
        earlier = [leaf for leaf in known.policy if leaf not in old] if known else []
        return Change([*earlier, *old], max(r.step for r in readable))

    def _check_open(self) -> None:
        if self._closed:  # a worker that outlived the drain limit
            raise UsageError(f"{self.directory} was released; nothing more is recorded")

    def _write(self, record: Record) -> None:
        with self._mutex:
            self._check_open()
            self.directory.write_record(record)
            self._records[record.step] = record
            self._situation = None

    def _note(
        self, what: What, store: str, record: Record, seconds: tuple[float, ...] = ()
    ) -> None:
        entry = Entry(self._now(), what, store, record.step, record.bytes, seconds)
        self._history.note(entry)

    def _forget(self, step: int) -> None:
        with self._mutex:
            self._check_open()
            self.directory.remove_record(step)
            self._records.pop(step, None)
            self._situation = None

    def _alias(self, store: str, names: Mapping[str, int]) -> None:
        self._write_run(aliases={**self._run.aliases, store: dict(names)})

    def _write_run(self, **changes: Any) -> None:
        with self._mutex:
            self._check_open()
            run = replace(self._run, **changes)
            if run != self._run:
                self.directory.write_run(run)
                self._run = run
                self._situation = None


def _without(run: RunFile, steps: Collection[int]) -> dict[str, Promotion]:
    """Return the aliases that persons gave, but for those of `steps`."""
    return {name: given for name, given in run.promoted.items() if given.step not in steps}


def _pending(copy: Copy) -> Copy:
    """Return a copy on which nothing builds any more."""
    return replace(copy, state="pending", shared=False)
