"""What one store holds of a run, and has to do next: the ledger of its worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_callbacks.book import Book
from ckpt_callbacks.history import with_records
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.plan import Action
from ckpt_callbacks.record import Copy, Record
from ckpt_callbacks.stores import Known, Listing, Overview

__all__ = ["Copies", "pending"]

_SAME = 0.001
"""Seconds by which the time of a save may differ where a service has rounded it."""


def pending(copy: Copy) -> Copy:
    """Return a copy on which nothing builds any more."""
    return replace(copy, state="pending", shared=False)


class Copies:
    """The copies in one store.

    Args:
        book: what is known of the run.
        store: the store's name.
    """

    def __init__(self, book: Book, store: str) -> None:
        self._book = book
        self._store = store

    def next_action(self) -> Action | None:
        """Return the first thing that the store must do, or `None`."""
        # Not within the mutex: in object storage it may take long.
        self._book.directory.check()
        with self._book.mutex:
            self._book.check_open()
            return self._book.settled().next_action(self._store)

    def actions(self) -> list[Action]:
        """Return all that the store must do, in order."""
        with self._book.mutex:
            return self._book.settled().actions(self._store)

    def overview(self) -> Overview:
        """Return what the store holds, for people."""
        book = self._book
        with book.mutex:
            return book.situation.overview(self._store, book.directory.name, book.gone)

    def with_history(self, overview: Overview) -> Overview:
        """Return an overview with what happened so far, which is read from its files."""
        history = with_records(self._book.history(), self._book.records())
        return replace(overview, history=history, evicted=self._book.directory.read_evicted())

    # Facts

    def expect(self, title: str, settings: Mapping[str, Any] | None) -> None:
        """The store is to be opened, which may not work for as long as this process lives."""
        with self._book.mutex:
            run = self._book.run
            if self._store not in run.stores:
                known = {} if settings is None else {self._store: settings}
                self._book.write_run(
                    stores={**run.stores, self._store: {"title": title}},
                    settings={**run.settings, **known},
                )

    def remember(self, refs: Mapping[str, str], settings: Mapping[str, Any] | None = None) -> None:
        """The store was opened; with `settings` another process can make it again.

        If it no longer knows what it asked to have remembered, such as its run, what it held
        is gone with it.
        """
        book, store = self._book, self._store
        with book.mutex:
            if settings is not None and book.run.settings.get(store) != settings:
                book.write_run(settings={**book.run.settings, store: settings})
            known = book.run.stores.get(store)
            if known == refs:
                return
            if known is not None:
                for step, record in book.records().items():
                    if store in record.copies:
                        self.deleted(step, f"{store} has it no longer")
                self._alias({})
            book.write_run(stores={**book.run.stores, store: dict(refs)})

    def listed(self, listing: Listing) -> None:
        """The store was asked what it holds.

        What it lists and no record knows is taken in. What it does not list is left as recorded,
        since one listing may lag behind; unless the listing is `exact`.
        """
        with self._book.mutex:
            for step, copy in listing.copies.items():
                record = self._book.record(step)
                before = record.copies.get(self._store) if record else None
                # What was staged may have been sent meanwhile; all else is known better here.
                moved = before is not None and before.state == "staged" != copy.state
                if before is None or moved or copy.state == "pending":
                    self._found(step, copy, listing.known.get(step))
            known = self._book.run.aliases.get(self._store, {})
            names = dict(listing.aliases) if listing.exact else {**known, **listing.aliases}
            if listing.exact:
                for step, record in self._book.records().items():
                    if self._store in record.copies and step not in listing.copies:
                        self._write(record, pending(record.copies[self._store]))
            if names != known:
                self._alias(names)
        self._book.changed()

    def publishing(self, step: int) -> None:
        """A copy is about to be made; cut, it leaves a part that has to go or be completed."""
        with self._book.mutex:
            record = self._book[step]
            if self._store not in record.copies:
                self._write(record, Copy("pending", ""))

    def copied(self, step: int, copy: Copy, seconds: tuple[float, ...] = ()) -> None:
        """The store holds a step; `seconds` are those of `history.Entry`."""
        with self._book.mutex:
            record = self._book[step]
            self._write(record, copy)
            self._book.note("copied", self._store, record, seconds)

    def aliased(self, name: str, step: int) -> int | None:
        """An alias moved; returns the step that it named before."""
        with self._book.mutex:
            names = self._book.run.aliases.get(self._store, {})
            self._alias({**names, name: step})
            return names.get(name)

    def deleting(self, step: int) -> None:
        """A copy is about to go. Until it is known whether it did, nothing builds on it."""
        with self._book.mutex:
            record = self._book[step]
            self._write(record, pending(record.copies[self._store]))

    def deleted(self, step: int, reason: str) -> None:
        """A copy is gone."""
        with self._book.mutex:
            record = self._book[step]
            copies = {k: v for k, v in record.copies.items() if k != self._store}
            if copies or not (record.state == "gone" or record.lost):
                self._book.write(replace(record, copies=copies))
            else:
                if record.state == "complete":  # else this was noted when its files here went
                    self._book.write_evicted(record, reason)
                self._book.forget(step)
            self._book.note("gone", self._store, record)

    def _found(self, step: int, copy: Copy, known: Known | None) -> None:
        """Take in a copy of which the records do not know, or not where it is now."""
        book, run_id = self._book, self._book.run.run_id
        record = book.record(step)
        if record is None and (known is None or self._let_go(step, known)):
            record = Record(step, "gone", run_id, 0.0)  # it stayed behind
        elif record is None and known:
            # From another disk, whose run goes on here: judged as if it were here.
            record = Record(step, "complete", run_id, known.time, known.metrics, lost=True)
            if known.pinned:
                book.write_run(pins=book.run.pins | {step})
        elif record and record.files and known and tree_digest(record.files) != known.digest:
            copy = pending(copy)  # of other bytes: it is to be replaced
        if record:
            self._write(record, copy)

    def _let_go(self, step: int, known: Known) -> bool:
        """Return whether a copy is of a checkpoint that was evicted here.

        The same step may have been saved again on another machine, at another time.
        """
        times = [gone.time for gone in self._book.gone if gone.step == step]
        return any(not known.time or abs(known.time - time) < _SAME for time in times)

    def _write(self, record: Record, copy: Copy) -> None:
        self._book.write(replace(record, copies={**record.copies, self._store: copy}))

    def _alias(self, names: Mapping[str, int]) -> None:
        self._book.write_run(aliases={**self._book.run.aliases, self._store: dict(names)})
