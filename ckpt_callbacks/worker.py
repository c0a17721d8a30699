"""One worker a store: does what the plan says next, until nothing is left to do."""

from __future__ import annotations

import logging
import re
import threading

from ckpt_callbacks.events import Evicted, Mirrored, MirrorFailed, Promoted
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.metrics import MetricLog
from ckpt_callbacks.plan import Action, Alias, Delete, Publish
from ckpt_callbacks.stores import RunInfo, Store, Tracker

__all__ = ["Worker", "redact"]

logger = logging.getLogger("ckpt_callbacks")

FIRST_RETRY, LONGEST_RETRY = 0.5, 60.0
"""Seconds between attempts: doubled from the first up to the longest."""


def redact(text: str) -> str:
    """Return `text` with the user and password of URLs replaced."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


class Worker:
    """Brings one store to what the ledger decides, on a thread of its own.

    Nothing that the store raises reaches the loop: it is an event, once for each new failure,
    and the same work is tried again.
    """

    def __init__(
        self, store: Store, info: RunInfo, ledger: Ledger, log: MetricLog, hooks: Hooks
    ) -> None:
        self.store = store
        self._info = info
        self._ledger = ledger
        self._log = log
        self._hooks = hooks
        self._wake = threading.Event()
        self._finishing = threading.Event()
        self._abandoned = threading.Event()
        self._status = ""
        self._doing = "open"
        self.failure: str | None = None
        """What went wrong last, or `None` since the last success."""
        self._thread = threading.Thread(target=self._run, name=f"ckpt-{store.name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be something new to do."""
        self._wake.set()

    def finish(self, status: str) -> None:
        """Do what is left, close the store, and stop."""
        self._status = status
        self._finishing.set()
        self._wake.set()

    def join(self, timeout: float) -> bool:
        """Wait for the end after `finish`; at the limit give up and return False."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._abandoned.set()
            return False
        return self.failure is None

    def _run(self) -> None:
        opened, retry = False, FIRST_RETRY
        while not self._abandoned.is_set():
            self._wake.clear()
            try:
                if not opened:
                    self._open()
                    opened = True
                busy = self._step()
                if not busy and self._finishing.is_set():
                    self._doing = "close"
                    self.store.close(self._status)
                    self.failure = None
                    return
            except Exception as error:
                self._report(error)
                # New work does not make a sick store well, but the end of the run is urgent.
                sooner = self._abandoned if self._finishing.is_set() else self._finishing
                sooner.wait(retry)
                retry = min(2 * retry, LONGEST_RETRY)
            else:
                self.failure, retry = None, FIRST_RETRY
                if not busy:
                    self._wake.wait()

    def _open(self) -> None:
        self._doing = "open"
        refs = {"title": self.store.title, **self.store.open(self._info)}
        self._ledger.remember(self.store.name, refs)
        self._doing = "list"
        if listing := self.store.list():
            self._ledger.listed(self.store.name, listing)

    def _step(self) -> bool:
        """Do one thing; return False if nothing was left to do."""
        if isinstance(self.store, Tracker):
            self._doing = "log metrics"
            points, offset = self._log.unsent(self.store.name)
            if points:
                self.store.log_metrics(points)
                self._log.sent(self.store.name, offset)
        action = self._ledger.next_action(self.store.name)
        if action is None:
            return isinstance(self.store, Tracker) and bool(points)
        self._doing = str(action)
        self._perform(action)
        return True

    def _perform(self, action: Action) -> None:
        name, ledger = self.store.name, self._ledger
        match action:
            case Publish(step, aliases):
                with ledger.reading(step) as checkpoint:
                    if checkpoint is None:
                        return
                    copy = self.store.put(checkpoint, aliases)
                    ledger.copied(name, step, copy)
                self._hooks.emit(Mirrored(name, step, copy.state, copy.ref))
                if self.store.put_moves_aliases:
                    for alias in aliases:
                        self._promoted(alias, step)
            case Alias(alias, step):
                self.store.alias(alias, step)
                self._promoted(alias, step)
            case Delete(step):
                self.store.delete(step)
                ledger.deleted(name, step)
                self._hooks.emit(Evicted(name, step, f"not kept by {ledger.policy}"))

    def _promoted(self, alias: str, step: int) -> None:
        previous = self._ledger.aliased(self.store.name, alias, step)
        self._hooks.emit(Promoted(self.store.name, alias, step, previous))

    def _report(self, error: Exception) -> None:
        text = redact(f"{type(error).__name__}: {error}")
        failure = f"{self._doing}: {text}"
        if failure != self.failure:
            logger.warning("%s: could not %s: %s", self.store.title, self._doing, text)
            self._hooks.emit(MirrorFailed(self.store.name, self._doing, text))
        self.failure = failure
