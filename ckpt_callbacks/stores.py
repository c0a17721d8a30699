"""The interface between the engine and whatever holds checkpoints: stores and trackers.

A store does one blocking thing a call, on its own worker thread, and every call is idempotent:
after a crash or a lost reply the same call comes again. It decides nothing and remembers nothing
beyond what the service keeps; the records in the run directory are the memory.
Failures are exceptions; the worker reports them and tries again.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ckpt_callbacks.history import Entry
from ckpt_callbacks.policy import KeepPolicy
from ckpt_callbacks.record import Copy, File, Gone

__all__ = [
    "Checkpoint",
    "Copy",
    "Curve",
    "File",
    "Found",
    "Known",
    "Listing",
    "MetricPoint",
    "Overview",
    "Rank",
    "RunInfo",
    "Shown",
    "Store",
    "Tracker",
    "redact",
]


@dataclass(frozen=True, slots=True)
class Rank:
    """What makes a step worthy of an alias such as `best`."""

    metric: str
    mode: Literal["min", "max"]
    value: float

    def beats(self, other: Rank) -> bool:
        """Return whether this is better than `other`, which must be of the same metric."""
        better = self.value > other.value if self.mode == "max" else self.value < other.value
        return better and (self.metric, self.mode) == (other.metric, other.mode)


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
    rank: Callable[[str, int], Rank | None] = lambda alias, step: None
    """Tells what ranks a step for an alias; `None` where nothing does, as for `last`."""
    sending: bool = False
    """Whether somebody asks for all that is `staged` to be sent now."""
    drain_limit: float = 60.0
    """Seconds that `close` may take, and whatever still goes on when the process ends."""


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
    time: float = 0.0
    """Start of its save, seconds since the epoch."""
    manifest: str = ""
    """Its record as JSON text (`record.record_from_json` reads it). Kept beside the files, it lets
    a machine with an empty disk verify them."""
    address: str = ""
    """Where others find it: its path, or where it is in object storage, such as `s3://…/50`."""

    @property
    def key(self) -> str:
        """The name by which a store finds its copy again."""
        return f"{self.run_id}/{self.step}"


@dataclass(frozen=True, slots=True)
class Known:
    """What a service knows of a copy beside its files."""

    digest: str
    """As `Checkpoint.digest`."""
    time: float
    """Start of its save, seconds since the epoch."""
    metrics: Mapping[str, float]
    """Finite ones only."""
    pinned: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint that a store has, for a machine that has nothing of its run."""

    address: str
    """As `ckpt_callbacks.restore` takes it."""
    bytes: int
    """Size of its files."""
    digest: str = ""
    """As `Checkpoint.digest`; empty where the store can not tell."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What a store holds of one run."""

    copies: Mapping[int, Copy]
    """`pending` and `shared` is one whose files the store holds on this machine and has to send:
    it does so when it is asked to `put` it, even if they are no longer in the directory."""
    aliases: Mapping[str, int]
    exact: bool = False
    """Whether what is not listed is certainly not there; a service's listing may lag."""
    known: Mapping[int, Known] = field(default_factory=dict)
    """What the service knows of the copies, by step, for a directory that has no record of them."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One checkpoint that a store holds, for people."""

    step: int
    time: float
    """Start of its save, seconds since the epoch."""
    reason: str
    """Why it is kept."""
    aliases: Sequence[str]
    metrics: Mapping[str, float]
    bytes: int
    ref: str
    """The store's own name for the copy."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric that the policy ranks by, over all checkpoints that there ever were."""

    metric: str
    mode: Literal["min", "max"] | None
    """`None` for one that the policy does not rank by."""
    points: Sequence[tuple[int, float]]
    """Step and value, in order of steps; finite values only."""


@dataclass(frozen=True, slots=True)
class Overview:
    """What a store holds of a run, for people."""

    name: str
    """Name of the run directory."""
    policy: str
    rows: Sequence[Shown]
    """In order of steps."""
    curves: Sequence[Curve]
    titles: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What people call each store, by name."""
    history: Sequence[Entry] = field(default=(), compare=False)
    """What happened to all checkpoints, in order of time. It does not count where two are
    compared: what other stores do is no reason to show this one again."""
    evicted: Sequence[Gone] = field(default=(), compare=False)
    """The checkpoints that were evicted, oldest first."""


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
    reads_files: bool = True
    """Whether `put` reads the files; one that sends their address alone does not."""
    refers_here: bool = False
    """Whether what it holds says where the files are in the directory, which so have to stay."""
    keep: KeepPolicy | None = None
    """Keeps less than the others: of the steps that all keep, those that this policy keeps."""

    def settings(self) -> Mapping[str, Any] | None:
        """Return what another process needs to make this store again, as JSON values.

        They are the arguments of its factory, the entry point of its `name` in the group
        `ckpt_callbacks.stores`; no credentials. `None` if that cannot be done: then what another
        process changes is sent by the next run. It is asked before `open` too, since a store that
        is down for as long as a run lasts is sent to by another process later.
        """
        return None

    def entered(self, items: Sequence[str]) -> None:
        """A run is about to begin; called on the thread of the loop, before `open`.

        For what only that thread can tell, such as a run that the user has open there. It must
        not wait.

        Args:
            items: the names of the items that the run's checkpoints have.

        Raises:
            ConfigError: the store can do nothing with such checkpoints.
        """
        return

    def fits(self, leaves: Mapping[tuple[str, ...], Any]) -> None:
        """A run is about to begin with a state of these leaves; called after `entered`.

        Args:
            leaves: what each leaf is (`ckpt_callbacks.leaves.Leaf`), by its path; it may have no
                value yet.

        Raises:
            ConfigError: the store could make nothing of checkpoints of such a state.
        """
        return

    def find(self, run_id: str) -> Mapping[int, Found]:
        """Return all whole checkpoints that the store has of a run, by step.

        It is called after `entered` and before `open`, on a thread of its own, where the run is to
        go on from wherever its newest checkpoint is. Nothing is to be begun or changed. A store
        whose checkpoints have no address has none to give.

        Raises:
            Exception: the store can not be asked. That there are none is no error.
        """
        return {}

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
    def alias(self, name: str, step: int) -> bool | None:
        """Let `name` point to the copy of `step`, which the store holds.

        Return `False` where it is left to somebody else's copy, in a place that is shared.
        """

    @abstractmethod
    def delete(self, step: int) -> bool | None:
        """Remove the copy of `step` and free its bytes; a copy that is gone is no error.

        Return `False` where it has to stay, since somebody else has a claim to it.
        """

    def missing(self) -> str | None:
        """Return what has to be there before anything can be sent, such as an API key, or `None`.

        Only what can be told at once, without asking the service; also before `open`.
        """
        return None

    def ping(self, run: RunInfo) -> str:
        """Ask the service for a sign of life, and return in one line what answered.

        Nothing is begun or changed, and `open` need not come before.
        """
        self.open(replace(run, reading=True))
        return f"{self.title} can be read"

    def address(self, step: int, copy: Copy, remembered: Mapping[str, str]) -> str | None:
        """Return the address by which `restore` reads a copy on another machine; `None` for none.

        It is asked before `open`, too, and must not ask the service.

        Args:
            step: of the checkpoint.
            copy: as `put` or `listing` had it.
            remembered: what `open` returned.
        """
        return None

    def show(self, overview: Overview) -> None:
        """Show people what is held, where the service has a place for that.

        Called once all is as decided, when something has changed since the last time; before the
        end of a run seldom enough to take a twentieth of the time at most.
        """
        return

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

    @abstractmethod
    def log_artifact(self, path: Path, name: str) -> None:
        """Send a file of the user's, such as a plot.

        The same may come again after a lost reply; a later one of the same name replaces it.

        Args:
            path: the file, which is called as the last part of `name`. It stays there until this
                returns.
            name: where it goes below the run: parts with `/` between them, never in
                `checkpoints/`.
        """


def redact(text: str) -> str:
    """Return `text` with the user and password of URLs, and what a query keeps secret, replaced.

    Up to the last `@`, since a password may hold anything.
    """
    text = re.sub(r"://\S*@", "://***@", text)
    return re.sub(rf"(?i)([?&][\w.-]*(?:{_SECRETS})[\w.-]*=)[^&\s'\"]+", r"\1***", text)


_SECRETS = "pass|pwd|secret|token|key|sig|credential"
"""Parts of names of query parameters that are not written down."""
