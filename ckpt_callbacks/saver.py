"""From a state in the loop to a complete checkpoint, and out again.

The loop's thread captures the state and starts Orbax; a thread of our own waits for the commit,
seals the files, writes the record, and evicts what lost its place.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_callbacks import orbax_io
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.events import Evicted, Saved, SaveFailed
from ckpt_callbacks.extras import ahead
from ckpt_callbacks.failpoints import hit
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.metrics import host_floats
from ckpt_callbacks.processes import Processes
from ckpt_callbacks.sharing import as_global
from ckpt_callbacks.state import capture
from ckpt_callbacks.timing import Timed, untimed

__all__ = ["Saver"]

logger = logging.getLogger("ckpt_callbacks")


@dataclass(frozen=True, slots=True)
class _InFlight:
    step: int
    pending: orbax_io.PendingSave
    metrics: Mapping[str, Any]
    started: float
    waited: float
    """Seconds that the loop was held up."""


class Saver:
    """Saves one checkpoint at a time and evicts.

    Args:
        ledger: gets the facts.
        hooks: get the events.
        flush: writes down all metrics that the loop has logged so far.
        failed: gets step and error of every save that fails, before its event.
        timed: stands around the parts of a save.
        processes: those that save together with this one, if there are any.
    """

    def __init__(
        self,
        ledger: Ledger,
        hooks: Hooks,
        flush: Callable[[], None],
        failed: Callable[[int, BaseException], None] = lambda step, error: None,
        timed: Timed = untimed,
        processes: Processes | None = None,
    ) -> None:
        self._processes = processes
        self._timed = timed
        self._flush = flush
        self._failed = failed
        self._ledger = ledger
        self._hooks = hooks
        self._work: queue.SimpleQueue[_InFlight | threading.Event | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._stopping = False
        self._complaint = ""
        self._thread = threading.Thread(target=self._run, name="ckpt-saver", daemon=True)

    def start(self) -> None:
        """Begin to work, on a thread of its own."""
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return not self._idle.is_set()

    @ahead()
    def save(
        self,
        step: int,
        state: Any,
        evaluated: Mapping[str, float],
        metrics: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> Exception | None:
        """Start to save; waits first for a save that is still in flight.

        Returns when the state may be donated or changed. What kept it from starting is returned,
        and to be given to `report`: the caller may hold what a listener needs.
        """
        self._idle.wait()
        started = time.monotonic()
        path = self._ledger.directory.path(step)
        try:
            with self._timed("capture"):
                captured = capture(state)
            if path.exists():
                raise ConfigError(f"{path} exists and is not of this run")
            hit("save-begins")
            with self._timed("record of the save"):
                self._ledger.saving(step, evaluated, metadata)
            hit("record-saving")
        except Exception as error:
            return self._agreed(step, error)
        if refused := self._agreed(step, None):
            return refused
        try:
            items = as_global(captured.items) if self._processes else captured.items
            about = {"run": self._ledger.run_id, "leaves": captured.notes}
            with self._timed("Orbax's call"):
                pending = orbax_io.save(path, items, about)
        except Exception as error:
            self._discard(step)
            return error
        except BaseException:  # Ctrl-C
            self._discard(step)
            raise
        hit("orbax-started")
        self._idle.clear()
        waited = time.monotonic() - started
        self._work.put(_InFlight(step, pending, metrics, started, waited))
        return None

    def _agreed(self, step: int, error: Exception | None) -> Exception | None:
        """Return why a step is not saved, in this process or for the sake of another one."""
        if self._processes is None:
            return error
        refused: Exception | None = None
        try:
            refused = self._processes.before_save(step, error)
        except BaseException:
            if error is None:
                self._discard(step)
            raise
        if refused and error is None:
            self._discard(step)
        return refused

    def report(self, step: int, error: Exception) -> None:
        """Tell of a save that did not begin."""
        self._failed(step, error)
        self._tell(step, error)

    def _tell(self, step: int, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        logger.error("the checkpoint of step %d could not be saved: %s", step, text)
        self._hooks.emit(SaveFailed(step, text))

    def wake(self) -> None:
        """Look again at what may be evicted."""
        self._work.put(None)

    def wait(self) -> None:
        """Wait until no save is in flight; a listener on this object's thread does not wait."""
        if threading.current_thread() is not self._thread:
            self._idle.wait()

    def settle(self) -> None:
        """Wait until what was saved is told of, and what lost its place is evicted."""
        if threading.current_thread() is not self._thread:
            done = threading.Event()
            self._work.put(done)
            done.wait()

    def close(self) -> None:
        """Finish what is in flight, evict what may go, and stop."""
        self._stopping = True
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            work = self._work.get()
            if isinstance(work, _InFlight):
                self._finish(work)
            try:
                self.evict()
                self._complaint = ""
            except Exception as error:
                if str(error) != self._complaint:
                    logger.exception("could not evict; it is tried again")
                self._complaint = str(error)
            if isinstance(work, threading.Event):
                work.set()
            if self._stopping and self._work.empty():
                return

    def _finish(self, save: _InFlight) -> None:
        ledger, path = self._ledger, self._ledger.directory.path(save.step)
        try:
            # Before the commit counts: a run goes on after this step, and would never log again
            # what was still in memory.
            self._flush()
            metrics, _ = host_floats(save.metrics)  # the buffer tells of those it can not read
            ledger.reported(save.step, metrics)
            hit("metrics-recorded")
        except Exception:
            logger.exception("the metrics of step %d are not in its record", save.step)
        try:
            with self._timed("waiting for the commit"):
                save.pending.result()
            hit("orbax-committed")
            with self._timed("digests and fsync"):
                files = ledger.directory.commit(save.step)
            hit("files-sealed")
            committed = time.monotonic() - save.started - save.waited
            record = ledger.completed(save.step, files, (save.waited, committed))
            hit("record-complete")
        except Exception as error:
            self._discard(save.step)
            self._failed(save.step, error)  # before whoever waits goes on
            self._idle.set()
            self._tell(save.step, error)
            return
        # The loop may save again; a listener may take its time, or call the run.
        self._idle.set()
        seconds = time.monotonic() - save.started
        self._hooks.emit(Saved(save.step, path, record.metrics, record.bytes, seconds))

    def _discard(self, step: int) -> None:
        """Remove what a failed save left behind."""
        try:
            self._ledger.directory.remove_uncommitted(step)
            self._ledger.directory.to_trash(step)
            self._ledger.failed(step)
        except Exception:  # such as a directory that has become read-only
            logger.exception("step %d left files behind; the next run removes them", step)

    def evict(self) -> None:
        """Evict what may go now; on this object's own thread once it was started."""
        ledger, directory = self._ledger, self._ledger.directory
        for step in ledger.evictable():
            reason = ledger.situation.explain(step)
            hit("eviction-begins")
            if ledger.evicting(step):
                hit("record-evicting")
                directory.to_trash(step)
                hit("moved-to-trash")
                ledger.evicted(step, reason)
                hit("record-evicted")
                self._hooks.emit(Evicted("local", step, reason))
        for step in ledger.spare():
            hit("leaving-begins")
            if ledger.let_go(step):
                hit("record-left")
                directory.to_trash(step)
                hit("left-for-trash")
                self._hooks.emit(Evicted("local", step, "the stores that keep it have it"))
        directory.empty_trash()
        hit("trash-emptied")
