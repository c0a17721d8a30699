"""The one writer of records.

Workers hand it facts; it writes them down before anything builds on them, keeps the decision,
and answers what is to be done next. Every method takes the mutex, so all see one order of facts.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import UsageError
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.plan import Action, View, evictable, next_action
from ckpt_callbacks.policy import Candidate, KeepPolicy
from ckpt_callbacks.record import Copy, File, Gone, Record, RunFile
from ckpt_callbacks.retention import Decision, decide, explain, policy_to_json
from ckpt_callbacks.stores import Checkpoint, Listing

__all__ = ["Ledger"]

logger = logging.getLogger("ckpt_callbacks")


class Ledger:
    """The records of one run directory, owned by this process.

    Args:
        directory: already acquired.
        policy: what to keep.
        changed: called, without the mutex, after every fact that may give workers work.
    """

    def __init__(
        self,
        directory: RunDirectory,
        policy: KeepPolicy,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.policy = policy
        self._changed = changed
        self._mutex = threading.RLock()
        self._records = directory.read_records()
        self._leases: dict[int, int] = {}
        self._lost: set[int] = set()
        self._evicted: set[int] = set()
        self._closed = False
        run = directory.read_run()
        spec = policy_to_json(policy)
        self._run = replace(run, policy=spec) if run else RunFile(uuid.uuid4().hex[:12], spec)
        if run != self._run:
            directory.write_run(self._run)
        self._decision: Decision | None = None

    @property
    def run_id(self) -> str:
        """Unique and stable over restarts."""
        return self._run.run_id

    # Questions

    def newest(self) -> Record | None:
        """Return the record of the newest complete checkpoint that is there."""
        with self._mutex:
            return max(self._readable(), key=lambda r: r.step, default=None)

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
            if self._decision is None:
                self._decision = decide(self.policy, map(_candidate, self._readable()))
            return self._decision

    def next_action(self, store: str) -> Action | None:
        """Return the first thing `store` must do, or `None`.

        A checkpoint whose local files somebody removed is judged as if it were there: its copy
        in the store may be the only one left.
        """
        with self._mutex:
            self._check_open()
            copies = {s: r.copies[store] for s, r in self._records.items() if store in r.copies}
            held = frozenset(s for s, c in copies.items() if c.state != "pending")
            view = View(held, self._run.aliases.get(store, {}), frozenset(copies) - held)
            readable = self._readable()
            history = [_candidate(r) for r in self._records.values()]
            decision = self.decision()
            if lost := self._lost & held:
                there = [_candidate(self._records[step]) for step in lost]
                decision = decide(self.policy, [*map(_candidate, readable), *there])
            steps = {r.step for r in readable}
            return next_action(self.policy, history, decision, view, steps)

    def would_keep(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Return whether the policy has a place for a step that is not saved yet."""
        with self._mutex:
            history = [_candidate(r) for r in self._readable() if r.step != step]
            history.append(Candidate(step, metrics, time.time()))
            return step in self.policy.keep(sorted(history, key=lambda c: c.step))

    def explain(self, step: int) -> str:
        """Return what each policy says of a step."""
        with self._mutex:
            history = {r.step: _candidate(r) for r in self._readable()}
            if step not in history:
                history[step] = _candidate(self._records[step])
            return explain(self.policy, history.values(), step)

    def evictable(self) -> list[int]:
        """Return the local steps that may go now."""
        with self._mutex:
            complete = [r.step for r in self._readable()]
            return evictable(self.decision(), complete, self._leases)

    @contextmanager
    def reading(self, step: int) -> Iterator[Checkpoint | None]:
        """Hold a step in the directory while a store reads it; `None` if it is gone."""
        with self._mutex:
            self._check_open()
            record = self._records.get(step)
            if record is None or record.state != "complete" or step in self._lost:
                record = None
            else:
                self._leases[step] = self._leases.get(step, 0) + 1
        if record is None:
            yield None
            return
        try:
            yield Checkpoint(
                run_id=self.run_id,
                step=step,
                path=self.directory.path(step),
                metrics=record.metrics,
                files=record.files,
                digest=tree_digest(record.files),
                reason=self.decision().kept.get(step, ""),
            )
        finally:
            with self._mutex:
                self._leases[step] -= 1
                if not self._leases[step]:
                    del self._leases[step]
            self._changed()

    def remembered(self, store: str) -> Mapping[str, str]:
        """Return what a store asked to have remembered."""
        with self._mutex:
            return self._run.stores.get(store, {})

    # Facts about local checkpoints

    def saving(self, step: int, metrics: Mapping[str, float]) -> None:
        """A save is about to start.

        Where the step was saved before and its files are gone, its copies in the stores are of
        other bytes now: each store replaces its own.
        """
        with self._mutex:
            old = self._records.get(step)
            copies = {k: replace(c, state="pending") for k, c in old.copies.items()} if old else {}
            self._write(
                Record(step, "saving", self.run_id, time.time(), dict(metrics), copies=copies)
            )
            self._lost.discard(step)

    def adopt(self, step: int, files: Mapping[str, File]) -> None:
        """A checkpoint of this run was found whose record is gone."""
        self._write(Record(step, "complete", self.run_id, time.time(), files=files))

    def reported(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics up to a step that is being saved are logged, and these are its own.

        Those of an evaluation go before them.
        """
        with self._mutex:
            record = self._records[step]
            self._write(replace(record, metrics={**metrics, **record.metrics}, logged=True))

    def completed(self, step: int, files: Mapping[str, File]) -> Record:
        """A save is committed and sealed."""
        with self._mutex:
            record = replace(self._records[step], state="complete", files=files)
            self._write(record)
        self._changed()
        return record

    def lost(self, step: int) -> None:
        """The files of a complete checkpoint were removed by somebody else.

        Nothing is concluded from it: its copies elsewhere may be the only ones left.
        """
        with self._mutex:
            self._lost.add(step)

    def failed(self, step: int) -> None:
        """A save did not commit, and what it left is removed."""
        self._forget(step)

    def measured(self, step: int, metrics: Mapping[str, float]) -> bool:
        """An evaluation of a step; returns False if the step has no checkpoint."""
        with self._mutex:
            record = self._records.get(step)
            if record is None or record.state not in ("saving", "complete"):
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

    def evicting(self, step: int) -> bool:
        """The local files are about to go; returns False if they must stay after all."""
        with self._mutex:
            if step not in self.evictable():
                return False
            self._write(replace(self._records[step], state="evicting"))
            return True

    def evicted(self, step: int, reason: str) -> None:
        """The local files are gone."""
        with self._mutex:
            record = self._records[step]
            self._evicted.add(step)
            self.directory.log_evicted(Gone(step, record.time, record.metrics, reason))
            if record.copies:
                self._write(replace(record, state="gone", files={}))
            else:
                self._forget(step)
        self._changed()

    # Facts about stores

    def remember(self, store: str, refs: Mapping[str, str]) -> None:
        """A store was opened.

        If it no longer knows what it asked to have remembered, such as its run, what it held
        is gone with it.
        """
        with self._mutex:
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
                if record is None:  # the tombstone went, the copy stayed
                    record = Record(step, "gone", self.run_id, 0.0)
                if store not in record.copies:
                    self._write(replace(record, copies={**record.copies, store: copy}))
            known = self._run.aliases.get(store, {})
            names = dict(listing.aliases) if listing.exact else {**known, **listing.aliases}
            if listing.exact:
                for step, record in list(self._records.items()):
                    if store in record.copies and step not in listing.copies:
                        pending = replace(record.copies[store], state="pending")
                        self._write(replace(record, copies={**record.copies, store: pending}))
            if names != known:
                self._alias(store, names)
        self._changed()

    def publishing(self, store: str, step: int) -> None:
        """A copy is about to be made; cut, it leaves a part that has to go or be completed."""
        with self._mutex:
            record = self._records[step]
            if store not in record.copies:
                copies = {**record.copies, store: Copy("pending", "")}
                self._write(replace(record, copies=copies))

    def copied(self, store: str, step: int, copy: Copy) -> None:
        """A store holds a step."""
        with self._mutex:
            record = self._records[step]
            self._write(replace(record, copies={**record.copies, store: copy}))

    def aliased(self, store: str, name: str, step: int) -> int | None:
        """An alias moved; returns the step that it named before."""
        with self._mutex:
            names = self._run.aliases.get(store, {})
            self._alias(store, {**names, name: step})
            return names.get(name)

    def deleted(self, store: str, step: int) -> None:
        """A store's copy is gone."""
        with self._mutex:
            record = self._records[step]
            copies = {k: v for k, v in record.copies.items() if k != store}
            if copies or record.state != "gone":
                self._write(replace(record, copies=copies))
            else:
                self._forget(step)

    # Writing: first the disk, then the memory

    def close(self) -> None:
        """Refuse all further facts: the directory is about to be released."""
        with self._mutex:
            self._closed = True

    def _readable(self) -> list[Record]:
        return [
            r for s, r in self._records.items() if r.state == "complete" and s not in self._lost
        ]

    def _check_open(self) -> None:
        if self._closed:  # a worker that outlived the drain limit
            raise UsageError(f"{self.directory.root} was released; nothing more is recorded")

    def _write(self, record: Record) -> None:
        with self._mutex:
            self._check_open()
            self.directory.write_record(record)
            self._records[record.step] = record
            self._decision = None

    def _forget(self, step: int) -> None:
        with self._mutex:
            self._check_open()
            self.directory.remove_record(step)
            self._records.pop(step, None)
            self._decision = None

    def _alias(self, store: str, names: Mapping[str, int]) -> None:
        self._write_run(aliases={**self._run.aliases, store: dict(names)})

    def _write_run(
        self,
        stores: Mapping[str, Mapping[str, str]] | None = None,
        aliases: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        run = replace(
            self._run,
            stores=self._run.stores if stores is None else stores,
            aliases=self._run.aliases if aliases is None else aliases,
        )
        self._check_open()
        self.directory.write_run(run)
        self._run = run


def _candidate(record: Record) -> Candidate:
    return Candidate(record.step, record.metrics, record.time)
