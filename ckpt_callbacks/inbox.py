"""What other processes ask of the owner of a run directory, such as to rank a late evaluation.

A request is one small file with a name of its own, written whole or not at all, so that requests
never lose each other. The owner applies it and removes it in one go under the ledger's mutex: a
kill in between means that it is applied again, first thing at the next start, with the same end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CkptCallbacksError, NewerFormat, RecordError
from ckpt_callbacks.failpoints import hit

__all__ = [
    "Inbox",
    "Measured",
    "Named",
    "Pinned",
    "Pruned",
    "Request",
    "is_attended",
    "submit",
]

logger = logging.getLogger("ckpt_callbacks")

_attended: dict[Path, threading.Thread] = {}
"""The inboxes of this process that are looked into, and the thread that does."""
FORMAT = 2
"""Version of the requests below. One of a later version is left to an owner that knows it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Another process evaluated a step."""

    step: int
    metrics: Mapping[str, float]
    time: float
    """When it was asked, seconds since the epoch: the same each time it is applied."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """A person wants to keep a step whatever the policy says, or no longer."""

    step: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Named:
    """A person gives a step an alias in every store, and wants to keep it."""

    step: int
    alias: str
    time: float
    """When it was asked, as above."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """A person has seen what is to go, and agreed."""

    steps: Sequence[int]
    keep: Sequence[Mapping[str, Any]]
    """The policy by which they go, as `policy_to_json` gives it: what it keeps by now stays."""


Request = Measured | Pinned | Named | Pruned


def submit(directory: RunDirectory, request: Request) -> Path:
    """Put a request into the inbox and return its file, which the owner removes once applied."""
    # In the order in which they were asked, as far as clocks agree.
    name = f"{time.time_ns():020d}-{os.urandom(16).hex()}.json"
    path = directory.post(name, _to_json(request))
    hit("request-written")
    return path


def is_attended(directory: RunDirectory) -> bool:
    """Return whether another thread of this process will apply what is asked now."""
    thread = _attended.get(directory.root.resolve())
    return thread is not None and thread is not threading.current_thread()


class Inbox:
    """Applies requests, on a thread of its own, every quarter of a second on a local disk.

    Args:
        directory: the owner's.
        mutex: held while one request is applied and removed.
        announce: tells of a request, once in this process, before the mutex is taken.
        apply: does what a request asks. An error of ours is logged, and the request is dropped.
    """

    def __init__(
        self,
        directory: RunDirectory,
        mutex: AbstractContextManager[Any],
        announce: Callable[[Request], None],
        apply: Callable[[Request], None],
    ) -> None:
        self._directory = directory
        self._mutex = mutex
        self._announce = announce
        self._apply = apply
        self._announced: set[str] = set()
        self._done: set[str] = set()
        self._unread: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-inbox", daemon=True)

    def start(self) -> None:
        """Begin to look, on a thread of its own."""
        _attended[self._directory.root.resolve()] = self._thread
        self._thread.start()

    def close(self) -> None:
        """Apply what is there, and stop."""
        self._stop.set()
        _attended.pop(self._directory.root.resolve(), None)
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Apply what is in the inbox, oldest first."""
        for name in self._directory.posted():
            if name not in self._done:
                self._take(self._directory.inbox / name)

    def _take(self, path: Path) -> None:
        hit("request-begins")
        request = None
        try:
            request = _from_json(self._directory.read_posted(path.name), str(path))
        except NewerFormat as error:
            logger.error("%s; it is left alone", error)
            self._done.add(path.name)
            return
        except OSError as error:  # no file at all, or in a place that does not answer now
            if path.name not in self._unread:
                logger.error("%s; it is tried again", error)
            self._unread.add(path.name)
            return
        except RecordError as error:
            logger.error("%s; it is dropped", error)
        if request and path.name not in self._announced:
            self._announce(request)
            self._announced.add(path.name)
        with self._mutex:
            try:
                if request:
                    self._apply(request)
            except CkptCallbacksError as error:
                logger.error("the request %s is dropped: %s", path.name, error)
            hit("request-applied")
            self._done.add(path.name)  # even if it can not be removed
            self._directory.withdraw(path.name)
        hit("request-removed")

    def _run(self) -> None:
        complaint = ""
        while True:
            last = self._stop.wait(self._directory.interval)
            try:
                self.look()
                complaint = ""
            except Exception as error:  # such as a full disk: it is tried again
                if str(error) != complaint:
                    logger.exception("the inbox can not be read")
                complaint = str(error)
            if last:
                return


def _to_json(request: Request) -> str:
    match request:
        case Measured(step, metrics, at):
            values = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
            return json.dumps({"format": 1, "measured": step, "metrics": values, "time": at})
        case Pinned(step, pinned):
            return json.dumps({"format": 1, "pin" if pinned else "unpin": step})
        case Named(step, alias, at):
            return json.dumps({"format": 2, "promote": step, "alias": alias, "time": at})
        case Pruned(steps, keep):
            return json.dumps({"format": 2, "prune": [*steps], "keep": [*keep]})


def _from_json(text: str, where: str) -> Request:
    try:
        match json.loads(text):
            case {"format": int(version)} if version > FORMAT:
                raise NewerFormat(f"{where} was written by a newer version of ckpt_callbacks")
            case {"measured": int(step), "metrics": dict(metrics), "time": float(at)}:
                return Measured(step, {k: float(v) for k, v in metrics.items()}, at)
            case {"pin": int(step)}:
                return Pinned(step, pinned=True)
            case {"unpin": int(step)}:
                return Pinned(step, pinned=False)
            case {"promote": int(step), "alias": str(alias), "time": float(at)}:
                return Named(step, alias, at)
            case {"prune": list(steps), "keep": list(keep)}:
                return Pruned([int(step) for step in steps], keep)
    except NewerFormat:
        raise
    except (TypeError, ValueError) as error:
        raise RecordError(f"{where} is damaged: {error}") from error
    raise RecordError(f"{where} is damaged: it is no request")
