"""What to keep: one decision over all checkpoints of a run.

Everything here is a pure function of the steps and their metrics. Each policy is the top of a
total order, so a checkpoint that is left out today can not come back because another one left:
pruning early changes nothing later.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from ckpt_callbacks.errors import ConfigError, RecordError
from ckpt_callbacks.schedule import positive

__all__ = [
    "BestN",
    "Candidate",
    "Decision",
    "KeepPolicy",
    "LatestN",
    "Union",
    "decide",
    "finite",
    "policy_from_json",
    "policy_to_json",
    "promote",
]


class Candidate(NamedTuple):
    """One complete checkpoint, as far as retention is concerned."""

    step: int
    metrics: Mapping[str, float]


def finite(value: object) -> float | None:
    """Return `value` as a float if it can be ranked: a real, finite number; else `None`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


class KeepPolicy(ABC):
    """Says which steps to keep and why. Policies are joined with `|`."""

    @abstractmethod
    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        """Return the steps to keep, each with its reason. `history` is sorted by step."""

    def __or__(self, other: KeepPolicy) -> Union:
        """Keep what either policy keeps."""
        if not isinstance(other, KeepPolicy):
            return NotImplemented
        return Union((*leaves(self), *leaves(other)))


@dataclass(frozen=True, slots=True)
class LatestN(KeepPolicy):
    """Keep the `n` newest steps (reason `latest #1`, `latest #2`, …).

    Raises:
        ConfigError: `n` is not a positive integer.
    """

    n: int

    def __post_init__(self) -> None:
        positive("LatestN", "n", self.n)

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        newest = [c.step for c in reversed(history[-self.n :])]
        return {step: f"latest #{rank}" for rank, step in enumerate(newest, 1)}

    def __str__(self) -> str:
        return f"LatestN({self.n})"


@dataclass(frozen=True, slots=True)
class BestN(KeepPolicy):
    """Keep the `n` best steps by one metric (reason `best #1`, `best #2`, …).

    NaN, infinite and missing values never rank; of equal values the later step is better.
    The newest `pending` checkpoints without the metric are kept too (reason `not measured yet`),
    since an evaluation may still come; `None` keeps all of those.

    Raises:
        ConfigError: a number is not positive, `metric` is empty, `mode` is not `min` or `max`.
    """

    n: int
    metric: str
    mode: Literal["min", "max"] = field(kw_only=True)
    pending: int | None = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        positive("BestN", "n", self.n)
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"BestN: metric must be the name of a metric, not {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"BestN: mode must be 'min' or 'max', not {self.mode!r}")
        if self.pending is not None and self.pending != 0:
            positive("BestN", "pending", self.pending)

    def ranked(self, history: Iterable[Candidate]) -> list[int]:
        """Return the steps that have a finite value, best first."""
        sign = 1.0 if self.mode == "max" else -1.0
        measured = [(finite(c.metrics.get(self.metric)), c.step) for c in history]
        order = sorted(((sign * v, step) for v, step in measured if v is not None), reverse=True)
        return [step for _, step in order]

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        best = self.ranked(history)[: self.n]
        reasons = {step: f"best #{rank}" for rank, step in enumerate(best, 1)}
        open_ = [c.step for c in history if self.metric not in c.metrics]
        newest = open_ if self.pending is None else open_[max(0, len(open_) - self.pending) :]
        return reasons | dict.fromkeys(newest, "not measured yet")

    def __str__(self) -> str:
        return f"BestN({self.n}, {self.metric!r}, mode={self.mode!r})"


@dataclass(frozen=True, slots=True)
class Union(KeepPolicy):
    """Keep what any of several policies keeps; made with `|`."""

    policies: tuple[KeepPolicy, ...]

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        kept: dict[int, str] = {}
        for policy in self.policies:
            for step, reason in policy.keep(history).items():
                kept[step] = f"{kept[step]}, {reason}" if step in kept else reason
        return kept

    def __str__(self) -> str:
        return " | ".join(map(str, self.policies))


def leaves(policy: KeepPolicy) -> tuple[KeepPolicy, ...]:
    """Return the policies that `policy` joins, or just itself."""
    return policy.policies if isinstance(policy, Union) else (policy,)


@dataclass(frozen=True, slots=True)
class Decision:
    """Which steps to keep and why, and which step each alias names."""

    kept: Mapping[int, str]
    aliases: Mapping[str, int]


def decide(policy: KeepPolicy, history: Iterable[Candidate]) -> Decision:
    """Decide over the complete checkpoints of a run.

    The newest one is kept under every policy (reason `newest`, when it has no other).
    """
    ordered = sorted(history, key=lambda c: c.step)
    kept = dict(policy.keep(ordered))
    if ordered:
        kept.setdefault(ordered[-1].step, "newest")
    return Decision(dict(sorted(kept.items())), promote(policy, ordered))


def promote(policy: KeepPolicy, history: Iterable[Candidate]) -> dict[str, int]:
    """Return the step that each alias names among `history`.

    `last` is the newest step; `best` the best of the policy's first `BestN`.
    An alias without a candidate is left out.
    """
    ordered = sorted(history, key=lambda c: c.step)
    aliases: dict[str, int] = {}
    best = next((p for p in leaves(policy) if isinstance(p, BestN)), None)
    if best and (ranked := best.ranked(ordered)):
        aliases["best"] = ranked[0]
    if ordered:
        aliases["last"] = ordered[-1].step
    return aliases


@dataclass(frozen=True, slots=True)
class Opaque(KeepPolicy):
    """Stands for a policy of somebody's own, of which the disk has only the text."""

    text: str

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        return dict.fromkeys((c.step for c in history), self.text)

    def __str__(self) -> str:
        return self.text


_KINDS: dict[str, type[LatestN | BestN]] = {"LatestN": LatestN, "BestN": BestN}


def policy_to_json(policy: KeepPolicy) -> list[dict[str, Any]]:
    """Return the policy as JSON values. One of unknown type is stored by its text alone."""
    return [
        {"policy": type(leaf).__name__} | asdict(leaf)
        if isinstance(leaf, LatestN | BestN)
        else {"policy": "custom", "text": str(leaf)}
        for leaf in leaves(policy)
    ]


def policy_from_json(spec: Sequence[Mapping[str, Any]]) -> KeepPolicy:
    """Return the policy that `policy_to_json` wrote.

    Raises:
        RecordError: it names a policy that this version does not know.
    """
    policies: list[KeepPolicy] = []
    for leaf in spec:
        options = dict(leaf)
        name = options.pop("policy", None)
        if name == "custom":
            policies.append(Opaque(str(options["text"])))
            continue
        if name not in _KINDS:
            raise RecordError(f"unknown keep policy {name!r}; known are {', '.join(_KINDS)}")
        policies.append(_KINDS[name](**options))
    return policies[0] if len(policies) == 1 else Union(tuple(policies))
