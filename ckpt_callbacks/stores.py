"""The interface between the engine and whatever holds checkpoints: stores and trackers.

A store does one blocking thing a call, on its own worker thread, and every call is idempotent:
after a crash or a lost reply the same call comes again. It decides nothing and remembers nothing
beyond what the service keeps; the records in the run directory are the memory.
Failures are exceptions; the worker reports them and tries again.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_callbacks.policy import KeepPolicy
from ckpt_callbacks.record import Copy, File

__all__ = [
    "Checkpoint",
    "Copy",
    "File",
    "Listing",
    "MetricPoint",
    "RunInfo",
    "Store",
    "Tracker",
    "redact",
]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The run that a store is opened for."""

    run_id: str
    """Unique and stable over restarts: the key by which a store finds what it made before."""
    name: str
    """Name of the run directory, for people."""
    config: Mapping[str, Any]
    """As given to `Callbacks.run`; JSON values."""
    scratch: Path
    """A folder inside the run directory that belongs to this store alone."""
    remembered: Mapping[str, str]
    """What `open` returned last time; empty on the first."""
    reading: bool = False
    """Whether only `listing` and `get` will follow: nothing is to be begun or changed."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint in the run directory. It stays there until `put` returns."""

    run_id: str
    step: int
    path: Path
    metrics: Mapping[str, float]
    """May hold NaN and infinities."""
    files: Mapping[str, File]
    digest: str
    """Digest of the list of files; equal for equal checkpoints."""
    reason: str
    """Why it is kept, such as `best #1, latest #2`."""

    @property
    def key(self) -> str:
        """The name by which a store finds its copy again."""
        return f"{self.run_id}/{self.step}"


@dataclass(frozen=True, slots=True)
class Listing:
    """What a store holds of one run, complete copies only."""

    copies: Mapping[int, Copy]
    aliases: Mapping[str, int]
    exact: bool = False
    """Whether what is not listed is certainly not there; a service's listing may lag."""


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """The metrics of one `on_step` or `on_eval`."""

    step: int
    time: float
    """Seconds since the epoch, stable over retries."""
    values: Mapping[str, float]
    """May hold NaN and infinities."""


class Store(ABC):
    """Holds copies of checkpoints."""

    name: str
    """Lower-case letters; the key in records and events."""
    title: str
    """For people, such as `MLflow`."""
    put_moves_aliases: bool
    """Whether `put` itself moves the aliases it is given."""
    keep: KeepPolicy | None = None
    """Keeps less than the others: of the steps that all keep, those that this policy keeps."""

    def settings(self) -> Mapping[str, Any] | None:
        """Return what another process needs to make this store again, as JSON values.

        They are the arguments of its factory, the entry point of its `name` in the group
        `ckpt_callbacks.stores`; no credentials. `None` if that cannot be done: then what another
        process changes is sent by the next run.
        """
        return None

    @abstractmethod
    def open(self, run: RunInfo) -> Mapping[str, str]:
        """Begin or continue `run`; return what must be remembered for the next time."""

    @abstractmethod
    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        """Copy a checkpoint and return when it is complete, or held until it can be sent.

        What a call that was cut left of the same checkpoint is completed; a copy of other bytes
        under the same step is replaced.

        `aliases` move to it next. A store with `put_moves_aliases` does that here;
        the others ignore them and wait for `alias`.
        """

    @abstractmethod
    def listing(self) -> Listing | None:
        """Return what the store holds of this run, or `None` if it cannot be asked."""

    @abstractmethod
    def get(self, step: int, into: Path) -> None:
        """Copy the files of a step into the empty folder `into`.

        Raises:
            CheckpointNotFound: the store holds no complete copy.
        """

    @abstractmethod
    def alias(self, name: str, step: int) -> None:
        """Let `name` point to the copy of `step`, which the store holds."""

    @abstractmethod
    def delete(self, step: int) -> None:
        """Remove the copy of `step` and free its bytes; a copy that is gone is no error."""

    @abstractmethod
    def close(self, status: str) -> None:
        """End the run as `finished`, `failed`, `killed` or `preempted`."""

    @abstractmethod
    def hint(self) -> str:
        """Return one line that says how a person opens what the store holds."""


class Tracker(Store):
    """A store that also takes metrics."""

    @abstractmethod
    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Send points in order. The same points may come again after a lost reply."""


def redact(text: str) -> str:
    """Return `text` with the user and password of URLs replaced.

    Up to the last `@`, since a password may hold anything.
    """
    return re.sub(r"://\S*@", "://***@", text)
