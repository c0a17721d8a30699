"""The one writer of records.

The saver, the workers and the engine hand it facts; it writes them down before anything builds on
them, and answers what is to be done next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from ckpt_callbacks.book import Book
from ckpt_callbacks.copies import Copies, pending
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.history import LOCAL
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.policy import Candidate, KeepPolicy
from ckpt_callbacks.record import File, Promotion, Record, RunFile, record_to_json
from ckpt_callbacks.retention import Decision
from ckpt_callbacks.situation import Situation, is_waiting
from ckpt_callbacks.stores import Checkpoint, Rank

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
        self._book = book = Book(
            directory,
            policy,
            changed,
            stores or {},
            now,
            all_here=all_here,
            config=config,
            here=here,
        )
        self.directory, self.policy, self.mutex = directory, policy, book.mutex
        self.record, self.records, self.close = book.record, book.records, book.close
        self._leases: dict[int, int] = {}

    @property
    def run(self) -> RunFile:
        """What is known of the run as a whole."""
        return self._book.run

    @property
    def run_id(self) -> str:
        """Unique and stable over restarts."""
        return self._book.run.run_id

    @property
    def situation(self) -> Situation:
        """What is known now, and all that follows from it."""
        return self._book.situation

    def copies(self, store: str) -> Copies:
        """Return what a store holds, and has to do next."""
        return Copies(self._book, store)

    # Questions

    def newest(self) -> Record | None:
        """Return the record of the newest complete checkpoint that is there."""
        return max(self.situation.readable, key=lambda r: r.step, default=None)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints that are there."""
        return sorted(r.step for r in self.situation.readable)

    def counted(self) -> list[int]:
        """Return the steps that are judged: those, and the ones that were let go."""
        return sorted(r.step for r in self.situation.counted)

    def known(self) -> list[int]:
        """Return the steps of all complete checkpoints, also of those in stores alone."""
        return sorted(r.step for r in self.situation.known)

    def decision(self) -> Decision:
        """Return what to keep, over the complete checkpoints that are there."""
        with self.mutex:
            return self._book.settled().decision

    def would_keep(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Return whether the policy has a place for a step that is not saved yet."""
        return self.situation.would_keep(Candidate(step, metrics, self._book.now()))

    def evictable(self) -> list[int]:
        """Return the local steps that may go now."""
        with self.mutex:
            return self._book.settled().evictable(self._leases)

    def spare(self) -> list[int]:
        """Return the local steps that are kept, and that the directory may leave to the stores."""
        with self.mutex:
            return self.situation.spare(self._leases)

    def rank(self, alias: str, step: int) -> Rank | None:
        """Return what ranks a step for an alias, or `None` if nothing does."""
        return self.situation.rank(alias, step)

    def was_evicted(self, step: int) -> bool:
        """Return whether a step was evicted since the directory was opened."""
        return step in self._book.evicted

    @contextmanager
    def reading(self, step: int, store: str, *, files: bool = True) -> Iterator[Checkpoint | None]:
        """Hold a step in the directory while a store reads it; `None` if it is gone.

        Without `files` those may be elsewhere, such as in object storage.
        """
        with self.mutex:
            self._book.check_open()
            record = self._book.record(step)
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
            with self.mutex:
                self._leases[step] -= 1
                if not self._leases[step]:
                    del self._leases[step]
            self._book.changed()

    # Facts

    def saving(self, step: int, metrics: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
        """A save is about to start.

        Where the step was saved before and its files are gone, its copies in the stores are of
        other bytes now: each store replaces its own.
        """
        with self.mutex:
            old = self._book.record(step)
            copies = {k: pending(c) for k, c in old.copies.items()} if old else {}
            self._book.write(
                Record(
                    step=step,
                    state="saving",
                    owner=self.run_id,
                    time=self._book.now(),
                    metrics=dict(metrics),
                    copies=copies,
                    metadata=dict(metadata),
                )
            )
            self._book.evicted.discard(step)

    def adopt(
        self,
        step: int,
        files: Mapping[str, File],
        metrics: Mapping[str, float] | None = None,
        saved: float | None = None,
    ) -> None:
        """A checkpoint of this run was found whose record is gone, or comes from elsewhere."""
        when = self._book.now() if saved is None else saved
        self._book.write(Record(step, "complete", self.run_id, when, metrics or {}, files=files))

    def reported(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics up to a step that is being saved are logged, and these are its own.

        Those of an evaluation go before them.
        """
        with self.mutex:
            record = self._book[step]
            self._book.write(replace(record, metrics={**metrics, **record.metrics}, logged=True))

    def completed(
        self, step: int, files: Mapping[str, File], seconds: tuple[float, ...] = ()
    ) -> Record:
        """A save is committed and sealed; `seconds` are those of `history.Entry`."""
        with self.mutex:
            record = replace(self._book[step], state="complete", files=files)
            self._book.write(record)
            self._book.note("saved", LOCAL, record, seconds)
        self._book.changed()
        return record

    def lost(self, step: int, *, lost: bool = True) -> None:
        """The files of a complete checkpoint were removed by somebody else, or are back.

        Nothing is concluded from it: its copies elsewhere may be the only ones left.
        """
        with self.mutex:
            self._book.write(replace(self._book[step], lost=lost))
            self._book.note("gone" if lost else "saved", LOCAL, self._book[step])

    def failed(self, step: int) -> None:
        """A save did not commit, and what it left is removed."""
        self._book.forget(step)

    def measured(self, step: int, metrics: Mapping[str, float]) -> bool:
        """An evaluation of a step; returns False if the step has no checkpoint."""
        if not self._book.mentions(step):
            return False  # as most, without the mutex: it is held while object storage is written
        with self.mutex:
            record = self._book.record(step)
            live = record is not None and record.state in ("saving", "complete")
            if record is None or not live or record.discarded:
                if step in self._book.evicted:
                    logger.warning(
                        "step %d was evicted before this evaluation of it came, so it can not be "
                        "best: BestN(..., pending=) keeps more steps that are not measured yet",
                        step,
                    )
                return False
            self._book.write(replace(record, metrics={**record.metrics, **metrics}))
        self._book.changed()
        return True

    def pin(self, step: int, *, pinned: bool) -> None:
        """Keep a step whatever the policy says, or no longer.

        Raises:
            CheckpointNotFound: there is no such checkpoint to pin.
        """
        with self.mutex:
            if pinned:
                self._check_known(step, "pinned")
            run = self.run
            pins = run.pins | {step} if pinned else run.pins - {step}
            promoted = run.promoted if pinned else _without(run, {step})
            self._book.write_run(pins=pins, promoted=promoted)
        self._book.changed()

    def promote(self, step: int, alias: str, when: float) -> None:
        """Give a step an alias in every store, and keep it for as long as it has it.

        Raises:
            CheckpointNotFound: there is no such checkpoint.
        """
        with self.mutex:
            self._check_known(step, repr(alias))
            self._book.write_run(promoted={**self.run.promoted, alias: Promotion(step, when)})
        self._book.changed()

    def prune(self, steps: Collection[int], keep: KeepPolicy) -> None:
        """Let those of `steps` go everywhere that `keep` does not keep; it is no policy for later.

        What is pinned, promoted or the newest by now stays.
        """
        with self.mutex:
            kept, there = self.situation.kept_by(keep), {*self.known()}
            if goes := there & {*steps} - kept.keys():
                self.discard(goes, f"pruned: {keep} does not keep it")

    def discard(self, steps: Collection[int], reason: str) -> None:
        """From now on complete checkpoints do not count: they leave every store by the plan.

        The newest first, so that a kill on the way leaves no gap.
        """
        with self.mutex:
            for step in sorted(steps, reverse=True):
                self._book.write(replace(self._book[step], discarded=reason))
            run = self.run
            self._book.write_run(pins=run.pins - set(steps), promoted=_without(run, steps))
        self._book.changed()

    def went_back(self, step: int | None) -> None:
        """The run goes on from `step`, -1 for the start, although it had come further.

        `None` once its metrics are marked. A kill before that must not lose it.
        """
        self._book.write_run(rewound=step)

    def entered(self, status: str) -> None:
        """The loop was entered (`running`) or left, as `RunEnded` has it."""
        self._book.write_run(status=status)

    def evicting(self, step: int) -> bool:
        """The local files are about to go; returns False if they must stay after all."""
        with self.mutex:
            if self._book[step].state == "evicting":  # it failed on the way
                return True
            if step not in self.evictable():
                return False
            self._book.write(replace(self._book[step], state="evicting"))
            return True

    def let_go(self, step: int) -> bool:
        """The local files are about to go, since stores have them; returns False if they stay."""
        with self.mutex:
            if step not in self.spare():
                return False
            self.lost(step)
            return True

    def evicted(self, step: int, reason: str) -> None:
        """The local files are gone."""
        with self.mutex:
            record = self._book[step]
            self._book.write_evicted(record, reason)
            if record.copies:
                self._book.write(replace(record, state="gone", files={}))
            else:
                self._book.forget(step)
            self._book.note("gone", LOCAL, record)
        self._book.changed()

    def _check_known(self, step: int, what: str) -> None:
        steps = self.known()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointNotFound(f"step {step} can not be {what}: the steps are {there}")


def _without(run: RunFile, steps: Collection[int]) -> dict[str, Promotion]:
    """Return the aliases that persons gave, but for those of `steps`."""
    return {name: given for name, given in run.promoted.items() if given.step not in steps}
