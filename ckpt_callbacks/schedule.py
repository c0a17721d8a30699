"""Policies over steps and time, which serve on both sides, and those that watch evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.policy import NEVER, Candidate, KeepPolicy, SaveContext, SavePolicy, positive

__all__ = ["AtEnd", "CustomSteps", "EveryNSeconds", "EveryNSteps", "OnEval", "OnImprovement"]


@dataclass(frozen=True)
class EveryNSteps(SavePolicy, KeepPolicy):
    """The first step in each bucket of `n` steps: 0, n, 2n, … when none is left out.

    Step 0 is the first step of the first bucket, so it is saved. A loop that skips a multiple
    of `n` saves at the next step it takes, and a resumed run goes on in the bucket where it
    stopped. To keep, it is the first checkpoint in each bucket.

    Raises:
        ConfigError: `n` is not a positive integer.
    """

    by_steps = True
    n: int

    def __post_init__(self) -> None:
        positive("EveryNSteps", "n", self.n)

    def next_due(self, after: int | None) -> int:
        return 0 if after is None else (after // self.n + 1) * self.n

    def due(self, context: SaveContext) -> bool:
        return context.last is None or context.step // self.n > context.last // self.n

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        first: dict[int, int] = {}
        for candidate in history:
            first.setdefault(candidate.step // self.n, candidate.step)
        return {step: f"first of {bucket * self.n}+" for bucket, step in first.items()}

    def explain(self, history: Sequence[Candidate], step: int) -> str:
        kept = self.keep(history).get(step)
        return kept or f"not the first in its bucket of {self.n} steps"

    def __str__(self) -> str:
        return f"EveryNSteps({self.n})"


@dataclass(frozen=True)
class EveryNSeconds(SavePolicy, KeepPolicy):
    """A step once `seconds` have passed since the last one, on a clock that never goes back.

    Which steps that are depends on how fast they are. To keep, it is each checkpoint whose save
    began at least `seconds` after that of the one kept before it, or before that one, which only
    a clock that was moved back can do.

    Raises:
        ConfigError: `seconds` is not a positive number.
    """

    seconds: float

    def __post_init__(self) -> None:
        if not isinstance(self.seconds, int | float) or not 0 < self.seconds < math.inf:
            raise ConfigError(
                f"EveryNSeconds: seconds must be a positive number, not {self.seconds!r}"
            )

    def next_due(self, after: int | None) -> int:
        return 0 if after is None else after + 1

    def due(self, context: SaveContext) -> bool:
        return context.now - context.last_time >= self.seconds

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        kept: dict[int, str] = {}
        last = -math.inf
        for candidate in history:
            if not 0 <= candidate.time - last < self.seconds:
                kept[candidate.step] = f"{self.seconds:g} s later"
                last = candidate.time
        return kept

    def __str__(self) -> str:
        return f"EveryNSeconds({self.seconds:g})"


@dataclass(frozen=True)
class CustomSteps(SavePolicy, KeepPolicy):
    """Exactly the steps that are listed.

    Raises:
        ConfigError: one of them is not an integer from 0.
    """

    by_steps = True
    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        listed = frozenset(steps)
        if odd := [s for s in listed if not isinstance(s, int) or isinstance(s, bool) or s < 0]:
            raise ConfigError(f"CustomSteps: a step must be an integer from 0, not {odd[0]!r}")
        object.__setattr__(self, "steps", listed)

    def next_due(self, after: int | None) -> int:
        return min((s for s in self.steps if after is None or s > after), default=NEVER)

    def due(self, context: SaveContext) -> bool:
        return context.step in self.steps

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        return {c.step: "listed" for c in history if c.step in self.steps}

    def explain(self, history: Sequence[Candidate], step: int) -> str:
        return "listed" if step in self.steps else "not a listed step"

    def __str__(self) -> str:
        return f"CustomSteps({sorted(self.steps)})"


@dataclass(frozen=True)
class OnEval(SavePolicy):
    """Save every step that was evaluated before `on_step` came."""

    watches_evaluations = True

    def next_due(self, after: int | None) -> int:
        return NEVER

    def due(self, context: SaveContext) -> bool:
        return bool(context.evaluated)

    def __str__(self) -> str:
        return "OnEval()"


@dataclass(frozen=True)
class OnImprovement(OnEval):
    """Save an evaluated step only if the keep policy has a place for it.

    What would be evicted at once is not written at all.
    (A policy with `LatestN` has a place for every step.)
    """

    def due(self, context: SaveContext) -> bool:
        return bool(context.evaluated) and context.would_keep()

    def __str__(self) -> str:
        return "OnImprovement()"


@dataclass(frozen=True)
class AtEnd(SavePolicy):
    """Save the last step that `on_step` was given, when the loop is left: done, or by Ctrl-C.

    Args:
        errors: also when an exception ends it.

    A state whose buffers were donated to a later step is gone and is not saved (`SaveFailed`).
    """

    by_steps = True
    errors: bool = False

    def next_due(self, after: int | None) -> int:
        return NEVER

    def due(self, context: SaveContext) -> bool:
        return False

    def at_end(self, status: str) -> bool:
        return self.errors or status != "failed"

    def __str__(self) -> str:
        return "AtEnd(errors=True)" if self.errors else "AtEnd()"
