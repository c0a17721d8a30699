"""One worker a store: does what the plan says next, until nothing is left to do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from ckpt_callbacks.artifacts import Artifact, Spool
from ckpt_callbacks.events import Evicted, Mirrored, MirrorFailed, Promoted
from ckpt_callbacks.failpoints import hit
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.metrics import MetricLog
from ckpt_callbacks.plan import Action, Alias, Delete, Publish
from ckpt_callbacks.situation import Situation
from ckpt_callbacks.stores import Overview, RunInfo, Store, Tracker, redact
from ckpt_callbacks.timing import Timed, TimedCalls, untimed

__all__ = ["Worker"]

logger = logging.getLogger("ckpt_callbacks")

FIRST_RETRY, LONGEST_RETRY = 0.5, 60.0
"""Seconds between attempts: doubled from the first up to the longest."""

SHOWING = 1 / 20
"""Most of a worker's time that it spends on what people are shown, while a run goes on."""

_ALWAYS = ("log metrics", "plan", "show", "close")
_LOG_FILE = "log file "
"""These, and what begins so, are tried until they work; all else may drop out of the plan."""

_LONGEST_TEXT = 500
"""Characters of an error that are told."""

T = TypeVar("T")

_threads: dict[int, threading.Thread] = {}
"""The thread that uses a store, by the store's id, while it runs: two at a time must not."""


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str
    at: float
    """When it was, on the monotonic clock."""
    pause: float
    """Seconds until it is tried again."""


def _brief(error: Exception) -> str:
    """Return what an error says, in one line; a proxy may have answered with a whole page."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


class Worker:
    """Brings one store to what the ledger decides, on a thread of its own.

    Nothing that the store raises reaches the loop: it is an event, once for each new failure,
    and the same work is tried again.
    """

    def __init__(
        self,
        store: Store,
        info: RunInfo,
        ledger: Ledger,
        log: MetricLog,
        files: Spool,
        hooks: Hooks,
        timed: Timed = untimed,
    ) -> None:
        self.store = store
        # Also where it is a plain store, of which nothing else is called.
        self._call = cast(Tracker, TimedCalls(store, store.name, timed))
        self._info = info
        self._ledger = ledger
        self._copies = ledger.copies(store.name)
        self._log = log
        self._files = files
        self._hooks = hooks
        self._wake = threading.Event()
        self._finishing = threading.Event()
        self._abandoned = threading.Event()
        self._done = threading.Event()
        self._status = ""
        self._opened = False
        self._shown: Overview | None = None
        self._seen: Situation | None = None
        self._show_at = 0.0
        """Not before, on the monotonic clock."""
        self._failures: dict[str, _Failure] = {}
        self._before = _threads.get(id(store))
        self._thread = threading.Thread(target=self._run, name=f"ckpt-{store.name}", daemon=True)

    def start(self) -> None:
        """Begin to work, on a thread of its own."""
        _threads[id(self.store)] = self._thread
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
        """Wait for the end after `finish`; return whether the thread has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def done(self) -> bool:
        """Whether everything was done and the store closed."""
        return self._done.is_set()

    def abandon(self) -> None:
        """Do nothing more once the call that is under way returns."""
        self._abandoned.set()
        self._finishing.set()
        self._wake.set()

    def _run(self) -> None:
        if self._before:  # a call of an earlier run that outlived its drain limit
            self._before.join()
        try:
            self._work()
        finally:
            if _threads.get(id(self.store)) is self._thread:
                del _threads[id(self.store)]

    def _work(self) -> None:
        while not self._abandoned.is_set():
            self._wake.clear()
            # Before the round: what came with the word to finish may have come during it.
            finishing = self._finishing.is_set()
            busy = self._round()
            idle = not busy and self._failures.keys() <= {"close"}
            if idle and finishing and self._try("close", self._close):
                self._done.set()
                return
            if not busy:
                pauses = [self._due(failure) for failure in self._failures.values()]
                if self._show_at and self._ledger.situation is not self._seen:
                    pauses.append(self._show_at)
                self._wake.wait(max(0.0, min(pauses) - time.monotonic()) if pauses else None)

    def _round(self) -> bool:
        """Do one thing of each kind; return whether anything was done."""
        if not self._opened:
            self._opened = self._try("open", self._open) is not None
            return self._opened
        # What a store refuses of one kind holds back nothing of another.
        logged = self._try("log metrics", self._log_metrics)
        if not self._abandoned.is_set():
            logged = self._log_file() or logged
        if self._abandoned.is_set():
            return False
        # A policy may be the user's own function, and raise.
        action = self._try("plan", self._copies.next_action)
        for known in self._planned() - {str(action)}:
            del self._failures[known]
        acted = action and self._try(str(action), lambda: self._act(action))
        if logged or acted is not None or self._abandoned.is_set():
            return True
        if self._finishing.is_set() or time.monotonic() >= self._show_at:
            self._show_at = 0.0
            if not self._planned() and "plan" not in self._failures:
                self._try("show", self._show)
        return False

    def _planned(self) -> set[str]:
        """Return those actions of the plan that have failed."""
        return {k for k in self._failures if k not in _ALWAYS and not k.startswith(_LOG_FILE)}

    def _try(self, what: str, call: Callable[[], T]) -> T | None:
        """Return what `call` does, or `None` if it failed, lately or now; told once.

        What failed rests for a while, longer each time; the rest goes on.
        """
        last = self._failures.get(what)
        if last and time.monotonic() < self._due(last):
            return None
        try:
            result = call()
        except Exception as error:
            text = redact(f"{type(error).__name__}: {_brief(error)}")
            if (last is None or last.text != text) and not self._abandoned.is_set():
                logger.warning("%s: could not %s: %s", self.store.title, what, text)
                self._hooks.emit(MirrorFailed(self.store.name, what, text))
            pause = min(2 * last.pause, LONGEST_RETRY) if last else FIRST_RETRY
            self._failures[what] = _Failure(text, time.monotonic(), pause)
            return None
        self._failures.pop(what, None)
        return result

    def _due(self, failure: _Failure) -> float:
        """Return when to try again; at the end of the run soon, since that is urgent."""
        pause = FIRST_RETRY if self._finishing.is_set() else failure.pause
        return failure.at + pause

    @property
    def failure(self) -> str | None:
        """What does not work at the moment, or `None`."""
        texts = [failure.text for failure in list(self._failures.values())]
        return "; ".join(dict.fromkeys(texts)) or None

    def _open(self) -> bool:
        self._introduce()
        refs = {"title": self.store.title, **self._call.open(self._info)}
        self._copies.remember(refs, self.store.settings())
        self._list()
        return True

    def _introduce(self) -> None:
        """Let another process know of the store, even if it can not be opened now."""
        try:
            settings = self.store.settings()
        except Exception:  # it may know only once it is open
            settings = None
        self._copies.expect(self.store.title, settings)

    def _close(self) -> bool:
        self._call.close(self._status)
        return True

    def _log_metrics(self) -> bool:
        """Send the next metrics; return whether there were any."""
        if not isinstance(self.store, Tracker):
            return False
        points, offset = self._log.unsent(self.store.name)
        if points:
            self._call.log_metrics(points)
            hit("metrics-sent")
            self._log.sent(self.store.name, offset)
            hit("record-sent")
        return bool(points)

    def _log_file(self) -> bool:
        """Send the next file that the tracker lacks; return whether one was sent."""
        if not isinstance(self.store, Tracker):
            return False
        waiting: set[str] = set()
        for artifact in self._files.lacking(self.store.name):
            what = f"{_LOG_FILE}{artifact.name!r}"
            before = self._failures.get(what)
            # One that is refused, maybe for good, holds back none but the later ones of its name.
            if artifact.name not in waiting:
                if self._try(what, partial(self._send, artifact)):
                    return True
                if self._failures.get(what) is not before:
                    return False  # just now; the others have to wait for the next round
            waiting.add(artifact.name)
        return False

    def _send(self, artifact: Artifact) -> bool:
        self._call.log_artifact(artifact.path, artifact.name)
        hit("artifact-sent")
        self._files.sent(self.store.name, artifact)
        return True

    def _show(self) -> bool:
        """Show people what the store holds, if it is not what they were shown last.

        It takes the longer the longer the run is, so it rests after that.
        """
        situation = self._ledger.situation
        if situation is not self._seen:
            begun = time.monotonic()
            overview = self._copies.overview()
            if overview != self._shown:
                self._call.show(self._copies.with_history(overview))
                self._shown = overview
            self._seen = situation
            ended = time.monotonic()
            self._show_at = ended + (ended - begun) / SHOWING
        return True

    def _act(self, action: Action) -> bool:
        if str(action) in self._failures:
            # The store may not hold what it is known to hold: a person may have deleted it.
            self._list()
            if self._copies.next_action() != action:
                return True
        return self._perform(action)

    def _list(self) -> None:
        if listing := self._call.listing():
            self._copies.listed(listing)

    def _perform(self, action: Action) -> bool:
        name, ledger, copies = self.store.name, self._ledger, self._copies
        match action:
            case Publish(step, aliases):
                with ledger.reading(step, name, files=self.store.reads_files) as checkpoint:
                    if checkpoint is None:
                        return False
                    hit("publish-begins")
                    copies.publishing(step)
                    hit("record-pending")
                    begun = time.monotonic()
                    copy = self._call.put(checkpoint, aliases)
                    took = time.monotonic() - begun
                    hit("published")
                    copies.copied(step, copy, (took,))
                    hit("record-copied")
                self._hooks.emit(Mirrored(name, step, copy.state, copy.ref))
                if self.store.put_moves_aliases:
                    for alias in aliases:
                        self._promoted(alias, step)
            case Alias(alias, step):
                hit("alias-begins")
                moved = self._call.alias(alias, step) is not False
                hit("alias-moved")
                self._promoted(alias, step, moved=moved)
            case Delete(step):
                reason = ledger.situation.explain(step)
                copies.deleting(step)
                hit("delete-begins")
                gone = self._call.delete(step) is not False
                hit("deleted")
                copies.deleted(step, reason)
                hit("record-deleted")
                if gone:
                    self._hooks.emit(Evicted(name, step, reason))
        return True

    def _promoted(self, alias: str, step: int, *, moved: bool = True) -> None:
        previous = self._copies.aliased(alias, step)
        hit("record-aliased")
        if moved:  # else it is left to the copy of another run, for good or until ours is better
            self._hooks.emit(Promoted(self.store.name, alias, step, previous))
