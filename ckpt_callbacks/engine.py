"""All that runs behind the loop for one run directory, wired together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ckpt_callbacks import orbax_io
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.manifest import seal
from ckpt_callbacks.metrics import MetricBuffer, MetricLog
from ckpt_callbacks.policy import KeepPolicy
from ckpt_callbacks.record import Record
from ckpt_callbacks.saver import Saver
from ckpt_callbacks.stores import RunInfo, Store, Tracker
from ckpt_callbacks.worker import Worker

__all__ = ["Engine"]

logger = logging.getLogger("ckpt_callbacks")


class Engine:
    """Owns the directory, its ledger, the saver, and one worker a store.

    Raises:
        ConfigError: the directory cannot be written, or holds foreign checkpoints.
        DirectoryLocked: somebody else owns it.
        RecordError: what is in it cannot be read.
    """

    def __init__(
        self,
        directory: RunDirectory,
        keep: KeepPolicy,
        stores: Sequence[Store],
        config: Mapping[str, Any],
        hooks: Hooks,
    ) -> None:
        self.directory = directory
        self._saver: Saver | None = None
        self._workers: list[Worker] = []
        # Undone in reverse, whatever has happened: threads stop before what they use goes.
        self._exit = ExitStack()
        directory.acquire()
        self._exit.callback(directory.release)
        with self._exit:
            self.ledger = Ledger(directory, keep, self._wake)
            self._exit.callback(self.ledger.close)
            rewound = _recover(self.ledger)
            self.resumed: Record | None = self.ledger.newest()
            last = self.resumed.step if self.resumed else None
            self._log = log = MetricLog(directory.meta, math.inf if rewound else last)
            self._exit.callback(log.close)
            self._buffer = buffer = MetricBuffer(log, self._wake)
            self._exit.callback(buffer.close)
            self._saver = saver = Saver(self.ledger, hooks, buffer.flush)
            saver.start()
            self._exit.callback(saver.close)
            for store in stores:
                info = RunInfo(
                    run_id=self.ledger.run_id,
                    name=directory.root.name,
                    config=config,
                    scratch=directory.scratch(store.name),
                    remembered=self.ledger.remembered(store.name),
                )
                worker = Worker(store, info, self.ledger, log, hooks)
                worker.start()
                self._workers.append(worker)
                self._exit.callback(worker.abandon)
            self._exit = self._exit.pop_all()
        self.save = saver.save
        self.wait = saver.wait
        self.log = buffer.append
        self._wake()

    def close(self, status: str, limit: float) -> dict[str, str]:
        """Finish all work, waiting at most `limit` seconds for the stores.

        Returns what each store still lacks, by name.
        """
        with self._exit:
            self.wait()
            self._buffer.close()
            unsent = self._drain(status, limit)
            trackers = [w.store.name for w in self._workers if isinstance(w.store, Tracker)]
            try:
                self._log.compact(trackers)
            except OSError:
                logger.exception("%s can not be emptied", self.directory.meta)
        return unsent

    def _wake(self) -> None:
        for worker in self._workers:
            worker.wake()
        if self._saver:
            self._saver.wake()

    def _drain(self, status: str, limit: float) -> dict[str, str]:
        for worker in self._workers:
            worker.finish(status)
        deadline = time.monotonic() + limit
        unsent: dict[str, str] = {}
        for worker in self._workers:
            if not worker.join(max(0.0, deadline - time.monotonic())):
                unsent[worker.store.name] = worker.failure or "still busy"
                logger.warning(
                    "%s does not have everything after %.0f s (%s). It is kept in %s: "
                    "the next run there sends it.",
                    worker.store.title,
                    limit,
                    unsent[worker.store.name],
                    self.directory.root,
                )
        return unsent


def _recover(ledger: Ledger) -> bool:
    """Finish what an earlier process began, whatever the point where it stopped.

    Returns whether somebody removed checkpoints, and with them the end of the run.
    """
    directory = ledger.directory
    for step, record in ledger.records().items():
        committed = directory.is_committed(step)
        if record.state == "saving" and record.logged and committed:
            ledger.completed(step, seal(directory.path(step)))
        elif record.state == "saving":
            directory.remove_uncommitted(step)
            directory.to_trash(step)
            ledger.failed(step)
        elif record.state == "evicting":
            directory.to_trash(step)
            ledger.evicted(step, "its eviction was completed after a kill")
        elif record.state == "complete" and not committed:
            ledger.lost(step)
            logger.warning("step %d was removed from %s by somebody else", step, directory.root)
    _adopt(ledger)
    try:
        directory.empty_trash()
    except OSError:
        logger.exception("%s can not be emptied", directory.trash)
    complete = [s for s, r in ledger.records().items() if r.state == "complete"]
    newest = ledger.newest()
    return bool(complete) and (newest is None or newest.step < max(complete))


def _adopt(ledger: Ledger) -> None:
    """Take in checkpoints of this run whose record is gone.

    Raises:
        ConfigError: there are checkpoints that this run did not save.
    """
    directory = ledger.directory
    names = [p.name for p in directory.root.iterdir() if p.name.isdecimal()]
    unknown = sorted(int(name) for name in names if ledger.record(int(name)) is None)
    foreign: list[int] = []
    for step in filter(directory.is_committed, unknown):
        if orbax_io.metadata(directory.path(step)).get("run") == ledger.run_id:
            ledger.adopt(step, seal(directory.path(step)))
        else:
            foreign.append(step)
    if foreign:
        raise ConfigError(
            f"{directory.root} holds checkpoints that were not saved by ckpt_callbacks "
            f"(steps {', '.join(map(str, foreign))}): choose another directory"
        )
