"""What every policy is: pure, and joined with `|`.

A policy says when to save, what to keep, or both. One that serves on both sides means the same
on both.
"""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

from ckpt_callbacks.errors import ConfigError

__all__ = [
    "ANYWHERE",
    "NEVER",
    "AnyOf",
    "Candidate",
    "Custom",
    "KeepPolicy",
    "Policy",
    "Resume",
    "SaveContext",
    "SavePolicy",
    "as_keep",
    "as_policy",
    "as_step",
    "leaves",
    "positive",
    "translators",
]

Resume = int | str | None
"""The checkpoint to go on from: a step, `last` (the newest complete one), `best`, `anywhere` (the
newest one here or in a tracker), the address of one in a tracker, or none."""
ANYWHERE = "anywhere"
NEVER = 1 << 62
"""A step that no loop reaches."""


class Candidate(NamedTuple):
    """One complete checkpoint, as far as retention is concerned."""

    step: int
    metrics: Mapping[str, float]
    time: float = 0.0
    """Start of its save, seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class SaveContext:
    """What a save policy may know when it is asked, after a step."""

    step: int
    last: int | None = None
    """Newest step saved so far, also by an earlier process."""
    now: float = 0.0
    """Seconds of a clock that never goes back."""
    last_time: float = 0.0
    """When the last save began, or the run, on the same clock."""
    evaluated: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the evaluation of this step; empty if there was none."""
    would_keep: Callable[[], bool] = lambda: True
    """Whether the keep policy has a place for this step, going by `evaluated`."""
    busy: bool = False
    """Whether a save is in flight."""
    preempted: bool = False
    """Whether the process was told to end soon."""


class Policy:
    """Base of all policies. Its text is what other processes know of one of your own."""

    def __str__(self) -> str:
        return _plain(repr(self))

    def __or__(self, other: Any) -> AnyOf:
        """Join with another policy, or with a function (see `Custom`)."""
        return AnyOf((*leaves(self), *leaves(as_policy(other))))

    def __ror__(self, other: Any) -> AnyOf:
        """Join with a function that stands in front."""
        return AnyOf((*leaves(as_policy(other)), *leaves(self)))


class SavePolicy(Policy, ABC):
    """Says when to save."""

    watches_evaluations = False
    """Whether it is asked at every step that was evaluated, besides those of `next_due`."""
    by_steps = False
    """Whether its answers follow from the steps alone: where there are several processes, each
    then answers for itself, and else process 0 tells the others at every step."""

    @abstractmethod
    def next_due(self, after: int | None) -> int:
        """Return the first step at which a save may be due.

        `after` is the newest step that was saved, or asked about in vain; `None` at first.
        Steps before the answer cost nothing.
        """

    @abstractmethod
    def due(self, context: SaveContext) -> bool:
        """Return whether to save this step."""

    def at_end(self, status: str) -> bool:
        """Return whether to save the last step when the loop was left with `status`.

        `status` is `finished`, `failed` (an exception) or `killed` (Ctrl-C).
        """
        return False


class KeepPolicy(Policy, ABC):
    """Says which steps to keep and why."""

    @abstractmethod
    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        """Return the steps to keep, each with its reason. `history` is sorted by step."""

    def explain(self, history: Sequence[Candidate], step: int) -> str:
        """Return in one line why it keeps `step`, or why not."""
        return self.keep(history).get(step) or f"{self} does not keep it"


@dataclass(frozen=True)
class Custom(SavePolicy, KeepPolicy):
    """A policy made of one function.

    To save: `function(context)` returns whether to save a step, and is asked at every one.
    To keep: `function(history)` returns the steps to keep, of a list of `Candidate`.
    """

    function: Callable[[Any], Any]

    def next_due(self, after: int | None) -> int:
        return 0 if after is None else after + 1

    def due(self, context: SaveContext) -> bool:
        return bool(self.function(context))

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        known = {c.step for c in history}
        chosen: Iterable[int] = self.function(list(history))
        return {step: str(self) for step in chosen if step in known}

    def __str__(self) -> str:
        name: str = getattr(self.function, "__name__", "")
        if name == "<lambda>":  # two of them are told apart by where they are
            code = self.function.__code__
            return f"lambda in {PurePath(code.co_filename).name}:{code.co_firstlineno}"
        return name or _plain(repr(self.function))


def _plain(text: str) -> str:
    """Return the text of an object without its address, which another process has not."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


@dataclass(frozen=True)
class AnyOf(SavePolicy, KeepPolicy):
    """Several policies joined with `|`: saves when any of them does, keeps what any keeps."""

    policies: tuple[Policy, ...]

    @property
    def watches_evaluations(self) -> bool:  # type: ignore[override]
        return any(p.watches_evaluations for p in self._saving())

    @property
    def by_steps(self) -> bool:  # type: ignore[override]
        return all(p.by_steps for p in self._saving())

    def next_due(self, after: int | None) -> int:
        return min((p.next_due(after) for p in self._saving()), default=NEVER)

    def due(self, context: SaveContext) -> bool:
        return any(p.due(context) for p in self._saving())

    def at_end(self, status: str) -> bool:
        return any(p.at_end(status) for p in self._saving())

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        kept: dict[int, str] = {}
        for policy in self._keeping():
            for step, reason in policy.keep(history).items():
                kept[step] = f"{kept[step]}, {reason}" if step in kept else reason
        return kept

    def explain(self, history: Sequence[Candidate], step: int) -> str:
        return "; ".join(p.explain(history, step) for p in self._keeping())

    def _saving(self) -> list[SavePolicy]:
        return [p for p in self.policies if isinstance(p, SavePolicy)]

    def _keeping(self) -> list[KeepPolicy]:
        return [p for p in self.policies if isinstance(p, KeepPolicy)]

    def __str__(self) -> str:
        return " | ".join(map(str, self.policies))


def leaves(policy: Policy) -> tuple[Policy, ...]:
    """Return the policies that `policy` joins, or just itself."""
    return policy.policies if isinstance(policy, AnyOf) else (policy,)


translators: list[Callable[[Any], Policy | None]] = []
"""Each makes a policy of an object of another library, or returns `None` for all else."""


def as_policy(value: Any) -> Policy:
    """Return a policy as it is, and one of Orbax or a function as one.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, Policy):
        return value
    for translate in translators:
        if policy := translate(value):
            return policy
    if callable(value) and not isinstance(value, type):
        return Custom(value)
    raise ConfigError(f"{value!r} is no policy: give one such as LatestN(2), or a function")


def as_keep(owner: str, value: Any) -> KeepPolicy | None:
    """Return `value` as a keep policy, and `None` as it is.

    Raises:
        ConfigError: it is no policy that says what to keep; the message begins with `owner`.
    """
    if value is None:
        return None
    policy = as_policy(value)
    if wrong := [leaf for leaf in leaves(policy) if not isinstance(leaf, KeepPolicy)]:
        raise ConfigError(f"{owner}: keep takes a policy such as LatestN(2), not {wrong[0]}")
    return policy if isinstance(policy, KeepPolicy) else AnyOf((policy,))


def as_step(owner: str, value: Any) -> int:
    """Return a step as a Python integer, from any integer such as one of NumPy.

    Raises:
        ConfigError: it is none, or negative; the message begins with `owner`.
    """
    try:
        step = operator.index(value)
    except TypeError:
        step = -1
    if step < 0 or isinstance(value, bool):
        shown = repr(value)[:80]  # not a whole state, given in its place
        raise ConfigError(f"{owner}: a step must be an integer from 0, not {shown}")
    return step


def positive(owner: str, name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{owner}: {name} must be an integer of at least 1, not {value!r}")
