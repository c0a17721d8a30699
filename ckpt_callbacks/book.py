"""What is known of a run: its records and its run file, in memory and on disk.

Only the ledger writes here. What changes is on disk before it is in memory, and changes under the
mutex, so all see one order of facts.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import RecordError, UsageError
from ckpt_callbacks.history import Entry, What
from ckpt_callbacks.history_file import HistoryFile
from ckpt_callbacks.policy import Candidate, KeepPolicy
from ckpt_callbacks.record import ADOPTED, Change, Gone, Record, RunFile
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.situation import Situation, candidate

__all__ = ["Book"]

logger = logging.getLogger("ckpt_callbacks")


class Book:
    """What is known of the run of one directory; the arguments are those of `Ledger`."""

    def __init__(
        self,
        directory: RunDirectory,
        policy: KeepPolicy,
        changed: Callable[[], None],
        stores: Mapping[str, KeepPolicy | None],
        now: Callable[[], float],
        *,
        all_here: bool,
        config: Mapping[str, Any] | None,
        here: KeepPolicy | None,
    ) -> None:
        self.directory = directory
        self.policy = policy
        self.changed = changed
        self.now = now
        self.mutex = threading.RLock()
        self.gone = [Candidate(g.step, g.metrics, g.time) for g in directory.read_evicted()]
        """The checkpoints that were evicted, oldest first."""
        self.evicted: set[int] = set()
        """The steps that were evicted since the directory was opened, and not saved again."""
        self._here, self._stores, self._all_here = here, stores, all_here
        self._records = directory.read_records(self._quarantine)
        self._history = HistoryFile(directory.meta)
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
    def run(self) -> RunFile:
        """What is known of the run as a whole."""
        return self._run

    @property
    def situation(self) -> Situation:
        """What is known now, and all that follows from it."""
        with self.mutex:
            if self._situation is None:
                records, run = dict(self._records), self._run
                self._situation = Situation(records, run, self.policy, self._stores, self._here)
            return self._situation

    def settled(self) -> Situation:
        """Return the situation, with a changed policy in force if its first decision is whole."""
        change = self._run.change
        may = change and self._all_here and not self._closed
        if change and may and self.situation.change_is_whole(change):
            self.write_run(change=None)
            logger.info("the changed keep policy %s is in force", self.policy)
            self.changed()
        return self.situation

    def __getitem__(self, step: int) -> Record:
        """Return the record of a step that has one."""
        with self.mutex:
            return self._records[step]

    def record(self, step: int) -> Record | None:
        """Return the record of a step."""
        with self.mutex:
            return self._records.get(step)

    def mentions(self, step: int) -> bool:
        """Return whether a step has a record, or was evicted; this waits for nobody."""
        return step in self._records or step in self.evicted

    def records(self) -> dict[int, Record]:
        """Return all records by step."""
        with self.mutex:
            return dict(self._records)

    def history(self) -> list[Entry]:
        """Return what was noted so far, oldest first."""
        return self._history.entries()

    def close(self) -> None:
        """Refuse all further facts: the directory is about to be released."""
        with self.mutex:
            self._closed = True

    def check_open(self) -> None:
        """Check that facts are still taken.

        Raises:
            UsageError: they are not.
        """
        if self._closed:  # a worker that outlived the drain limit
            raise UsageError(f"{self.directory} was released; nothing more is recorded")

    def write(self, record: Record) -> None:
        """Replace a record."""
        with self.mutex:
            self.check_open()
            self.directory.write_record(record)
            self._records[record.step] = record
            self._situation = None

    def forget(self, step: int) -> None:
        """Remove a record."""
        with self.mutex:
            self.check_open()
            self.directory.remove_record(step)
            self._records.pop(step, None)
            self._situation = None

    def write_run(self, **changes: Any) -> None:
        """Replace some of the run file."""
        with self.mutex:
            self.check_open()
            run = replace(self._run, **changes)
            if run != self._run:
                self.directory.write_run(run)
                self._run = run
                self._situation = None

    def write_evicted(self, record: Record, reason: str) -> None:
        """Remember a checkpoint that was evicted, once, whatever becomes of its record."""
        with self.mutex:
            if (step := record.step) not in self.evicted:
                self.directory.log_evicted(Gone(step, record.time, record.metrics, reason))
                self.gone.append(candidate(record))
                self.evicted.add(step)

    def note(self, what: What, store: str, record: Record, seconds: tuple[float, ...] = ()) -> None:
        """Add to the history, by which nothing is decided."""
        self._history.note(Entry(self.now(), what, store, record.step, record.bytes, seconds))

    def _quarantine(self, path: Path, error: RecordError) -> None:
        """Move a damaged record out of the way; it is made again from what is on disk."""
        logger.error("%s; it is moved to %s", error, self.directory.set_aside(path))

    def _begin_change(self, spec: list[dict[str, Any]]) -> Change | None:
        """Return the change of policy under way: it waits until the first decision is whole."""
        known, old = self._run.change, list(self._run.policy)
        if not (readable := self.situation.readable):
            return None
        if old == spec or self._run.status == ADOPTED:  # that policy was nobody's choice
            return known
        earlier = [leaf for leaf in known.policy if leaf not in old] if known else []
        return Change([*earlier, *old], max(r.step for r in readable))
