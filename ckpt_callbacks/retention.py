"""What to keep: one decision over all checkpoints of a run.

Everything here is a pure function of the steps and their metrics. Each policy is the top of a
total order, so a checkpoint that is left out today can not come back because another one left:
pruning early changes nothing later.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ckpt_callbacks.errors import ConfigError, RecordError
from ckpt_callbacks.policy import AnyOf, Candidate, KeepPolicy, Policy, leaves, positive
from ckpt_callbacks.schedule import CustomSteps, EveryNSeconds, EveryNSteps

__all__ = [
    "BestN",
    "Decision",
    "LatestN",
    "decide",
    "explain",
    "finite",
    "narrow",
    "policy_from_json",
    "policy_to_json",
    "promote",
    "ranked_metrics",
    "ranking",
    "unmeasured",
]

_NOBODY: Mapping[str, int] = {}
"""The aliases that persons gave, where none did."""


def finite(value: object) -> float | None:
    """Return `value` as a float if it can be ranked: a real, finite number; else `None`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
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

    def explain(self, history: Sequence[Candidate], step: int) -> str:
        rank = sum(c.step > step for c in history) + 1
        return f"latest #{rank} of {len(history)}, {self} keeps {self.n}"

    def __str__(self) -> str:
        return f"LatestN({self.n})"


@dataclass(frozen=True)
class BestN(KeepPolicy):
    """Keep the `n` best steps by one metric (reason `best #1`, `best #2`, …).

    The metric is a name, or a function of all metrics of a step. NaN, infinite and missing
    values never rank; of equal values the later step is better. The newest `pending` checkpoints
    without the metric are kept too (reason `not measured yet`), since an evaluation may still
    come; `None` keeps all of those.

    Where a policy has several, each has the alias `best-<name>` and the first also `best`; in it
    all but letters, digits, `_` and `-` is `-`.

    Raises:
        ConfigError: a number is not positive, `metric` is empty, `mode` is not `min` or `max`.
    """

    n: int
    metric: str | Callable[[Mapping[str, float]], float]
    mode: Literal["min", "max"] = field(kw_only=True)
    pending: int | None = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        positive("BestN", "n", self.n)
        if not self.metric or not (isinstance(self.metric, str) or callable(self.metric)):
            raise ConfigError(
                f"BestN: metric must be the name of a metric, or a function, not {self.metric!r}"
            )
        if self.mode not in ("min", "max"):
            raise ConfigError(f"BestN: mode must be 'min' or 'max', not {self.mode!r}")
        if self.pending is not None and self.pending != 0:
            positive("BestN", "pending", self.pending)

    @property
    def name(self) -> str:
        """The name of the metric or of the function."""
        if isinstance(self.metric, str):
            return self.metric
        return getattr(self.metric, "__name__", "function").strip("<>")  # no `<lambda>`

    def value(self, candidate: Candidate) -> float | None:
        """Return what ranks a checkpoint, or `None` if it does not rank."""
        return finite(self._raw(candidate))

    def measured(self, candidate: Candidate) -> bool:
        """Return whether a checkpoint has the metric, which may be one that does not rank."""
        return self._raw(candidate) is not None

    def ranked(self, history: Iterable[Candidate], n: int | None = None) -> list[int]:
        """Return the steps that have a finite value, best first; at most `n` of them."""
        sign = 1.0 if self.mode == "max" else -1.0
        measured = [(self.value(c), c.step) for c in history]
        values = [(sign * v, step) for v, step in measured if v is not None]
        order = sorted(values, reverse=True) if n is None else heapq.nlargest(n, values)
        return [step for _, step in order]

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        best = self.ranked(history, self.n)
        reasons = {step: f"best #{rank}" for rank, step in enumerate(best, 1)}
        open_ = [c.step for c in history if self._raw(c) is None]
        newest = open_ if self.pending is None else open_[max(0, len(open_) - self.pending) :]
        return reasons | dict.fromkeys(newest, "not measured yet")

    def explain(self, history: Sequence[Candidate], step: int) -> str:
        this = next(c for c in history if c.step == step)
        ranked = self.ranked(history)
        if step in ranked:
            value = f"{self.name} {self.value(this):g}"
            return (
                f"{value} is best #{ranked.index(step) + 1} of {len(ranked)}, {self} keeps {self.n}"
            )
        raw = self._raw(this)
        if raw is None:
            return f"no {self.name} yet, {self} keeps the newest {self.pending} such"
        return f"{self.name} is {raw}, which never ranks"

    def _raw(self, candidate: Candidate) -> float | None:
        """Return the metric, which may be no number; `None` where there is none."""
        if isinstance(self.metric, str):
            return candidate.metrics.get(self.metric)
        try:
            return self.metric(candidate.metrics)
        except (KeyError, TypeError, ArithmeticError):
            return None

    def __str__(self) -> str:
        return f"BestN({self.n}, {self.name!r}, mode={self.mode!r})"


@dataclass(frozen=True, slots=True)
class Decision:
    """Which steps to keep and why, and which step each alias names."""

    kept: Mapping[int, str]
    aliases: Mapping[str, int]


def decide(
    policy: Policy,
    history: Iterable[Candidate],
    pins: Collection[int] = (),
    old: Policy | None = None,
    promoted: Mapping[str, int] = _NOBODY,
) -> Decision:
    """Decide over the complete checkpoints of a run.

    The newest one is kept under every policy (reason `newest`, when it has no other), and so are
    those that are pinned, those to which a person gave an alias (`promoted`), and what an `old`
    policy keeps that is about to be replaced.
    """
    ordered = sorted(history, key=lambda c: c.step)
    kept: dict[int, str] = {}
    for leaf in leaves(policy):
        for step, reason in leaf.keep(ordered).items() if isinstance(leaf, KeepPolicy) else ():
            named = reason
            if isinstance(leaf, BestN):
                named = reason.replace("best ", f"{_alias(policy, leaf)} ", 1)
            kept[step] = f"{kept[step]}, {named}" if step in kept else named
    for step in (c.step for c in ordered if c.step in pins):
        kept[step] = f"{kept[step]}, pinned" if step in kept else "pinned"
    there = {c.step for c in ordered}
    given = {name: step for name, step in promoted.items() if step in there}
    for name, step in given.items():
        kept[step] = f"{kept[step]}, pinned as {name}" if step in kept else f"pinned as {name}"
    if ordered:
        kept.setdefault(ordered[-1].step, "newest")
    for step in decide(old, ordered).kept if old else ():
        kept.setdefault(step, f"until {policy} is in force")
    return Decision(dict(sorted(kept.items())), promote(policy, ordered) | given)


def narrow(
    decision: Decision,
    joint: Policy,
    own: KeepPolicy | None,
    history: Iterable[Candidate],
    pins: Collection[int] = (),
    promoted: Mapping[str, int] = _NOBODY,
) -> Decision:
    """Return the part of a decision for a store that keeps less than the others.

    Of what `decision` keeps, it holds what its `own` policy keeps, and what is pinned or
    `promoted`; its aliases name the best and the newest of that.
    """
    if own is None:
        return decision
    there = sorted((c for c in history if c.step in decision.kept), key=lambda c: c.step)
    steps = ({*own.keep(there), *pins} | {*promoted.values()}) & decision.kept.keys()
    aliases = promote(joint, [c for c in there if c.step in steps])
    aliases |= {name: step for name, step in promoted.items() if step in steps}
    return Decision({s: r for s, r in decision.kept.items() if s in steps}, aliases)


def promote(policy: Policy, history: Iterable[Candidate]) -> dict[str, int]:
    """Return the step that each alias names among `history`.

    `last` is the newest step; `best` the best of the policy's first `BestN`. With several, each
    also has `best-<name>`. An alias without a candidate is left out.
    """
    ordered = sorted(history, key=lambda c: c.step)
    aliases: dict[str, int] = {}
    for best in _bests(policy):
        if ranked := best.ranked(ordered, 1):
            aliases[_alias(policy, best)] = ranked[0]
            if best is _bests(policy)[0]:
                aliases["best"] = ranked[0]
    if ordered:
        aliases["last"] = ordered[-1].step
    return aliases


def ranking(policy: Policy) -> dict[str, BestN]:
    """Return what each alias but `last` ranks by."""
    bests = {_alias(policy, best): best for best in reversed(_bests(policy))}
    return bests | ({"best": _bests(policy)[0]} if bests else {})


def explain(policy: KeepPolicy, history: Iterable[Candidate], step: int) -> str:
    """Return what each policy says of a step of `history`."""
    ordered = sorted(history, key=lambda c: c.step)
    return policy.explain(ordered, step)


def ranked_metrics(policy: Policy) -> list[str]:
    """Return the names of the metrics that the policy ranks by."""
    return list(dict.fromkeys(b.name for b in _bests(policy) if isinstance(b.metric, str)))


def unmeasured(policy: Policy, history: Iterable[Candidate]) -> list[int]:
    """Return the steps that lack a metric which the policy ranks by."""
    bests = _bests(policy)
    return [c.step for c in history if not all(best.measured(c) for best in bests)]


def _bests(policy: Policy) -> list[BestN]:
    return [leaf for leaf in leaves(policy) if isinstance(leaf, BestN)]


def _alias(policy: Policy, leaf: Policy) -> str:
    several = len(_bests(policy)) > 1
    if not several or not isinstance(leaf, BestN):
        return "best"
    return "best-" + re.sub(r"[^\w-]", "-", leaf.name)  # what all services take


@dataclass(frozen=True)
class Opaque(KeepPolicy):
    """Stands for a policy of somebody's own, of which the disk has only the text."""

    text: str

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        return dict.fromkeys((c.step for c in history), self.text)

    def __str__(self) -> str:
        return self.text


_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (LatestN, BestN, EveryNSteps, EveryNSeconds, CustomSteps)
}


def policy_to_json(policy: Policy) -> list[dict[str, Any]]:
    """Return the policy as JSON values. One of unknown type is stored by its text alone."""
    return [_leaf_to_json(leaf) for leaf in leaves(policy)]


def _leaf_to_json(leaf: Any) -> dict[str, Any]:
    name = type(leaf).__name__
    if _KINDS.get(name) is not type(leaf) or (isinstance(leaf, BestN) and callable(leaf.metric)):
        return {"policy": "custom", "text": str(leaf)}
    options = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(leaf).items()}
    return {"policy": name} | options


def policy_from_json(spec: Sequence[Mapping[str, Any]]) -> KeepPolicy:
    """Return the policy that `policy_to_json` wrote.

    Raises:
        RecordError: it names a policy that this version does not know.
    """
    policies: list[Policy] = []
    for leaf in spec:
        options = dict(leaf)
        name = options.pop("policy", None)
        if name == "custom":
            policies.append(Opaque(str(options["text"])))
        elif name in _KINDS:
            policies.append(_KINDS[name](**options))
        else:
            raise RecordError(f"unknown keep policy {name!r}; known are {', '.join(_KINDS)}")
    return AnyOf(tuple(policies))
