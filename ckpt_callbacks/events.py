"""What happens in a run, as values.

Every event is frozen and is the only argument of its hook, so new fields never break a plugin.
On which thread each is emitted is said in `ckpt_callbacks.hookspecs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Eval",
    "Event",
    "Evicted",
    "MirrorFailed",
    "Mirrored",
    "Promoted",
    "RunEnded",
    "RunStarted",
    "SaveFailed",
    "Saved",
    "Step",
]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run was opened and its directory recovered; no step has been taken."""

    directory: Path | None
    """Run directory; `None` without an `OrbaxCheckpoint`."""
    resumed_from: int | None
    """Step of the checkpoint that `run.state` restores, or `None` for a fresh start."""
    next_step: int
    """First step the loop should take."""


@dataclass(frozen=True, slots=True, init=False)
class Step:
    """The loop finished a step. A plugin gets only those its `every=` asks for."""

    step: int
    state: Any
    """The state as the loop gave it. Its buffers may be donated to the next step."""
    metrics: Mapping[str, Any]
    """As given to `on_step`: values may still be on the device."""

    # As the generated one, in two thirds of its time: there may be one of these a step.
    def __init__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        _set_step(self, step)
        _set_state(self, state)
        _set_metrics(self, metrics)


_set_step: Any = vars(Step)["step"].__set__
_set_state: Any = vars(Step)["state"].__set__
_set_metrics: Any = vars(Step)["metrics"].__set__


@dataclass(frozen=True, slots=True)
class Eval:
    """The loop measured a step."""

    step: int
    metrics: Mapping[str, float]
    """Host floats."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is complete: committed by Orbax, synced to disk, digests recorded."""

    step: int
    path: Path
    metrics: Mapping[str, float]
    bytes: int
    """Size of all files."""
    seconds: float
    """From the start of the save until the record was written."""


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """A save did not complete. What it left on disk was removed; older checkpoints stand."""

    step: int
    error: str


@dataclass(frozen=True, slots=True)
class Mirrored:
    """A store holds a copy of a checkpoint."""

    store: str
    step: int
    state: str
    """`confirmed` by the store, or `staged` on this machine until it can be sent."""
    ref: str
    """The store's own name for the copy."""


@dataclass(frozen=True, slots=True)
class MirrorFailed:
    """A store refused or did not answer. It is tried again; this is emitted once a failure."""

    store: str
    action: str
    """What was tried, such as `publish step 100` or `log metrics`."""
    error: str


@dataclass(frozen=True, slots=True)
class Promoted:
    """In a store, an alias now names another step."""

    store: str
    alias: str
    step: int
    previous: int | None


@dataclass(frozen=True, slots=True)
class Evicted:
    """A copy is gone from a store; `store` is `local` for the run directory."""

    store: str
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The loop left the `with` block and the drain is over."""

    status: str
    """`finished`, `failed` (an exception), `killed` (Ctrl-C) or `preempted` (SIGTERM)."""
    unsent: Mapping[str, str]
    """What each store still lacks, by store name; empty when all is sent."""


Event = (
    RunStarted
    | Step
    | Eval
    | Saved
    | SaveFailed
    | Mirrored
    | MirrorFailed
    | Promoted
    | Evicted
    | RunEnded
)
"""Any of the above."""
