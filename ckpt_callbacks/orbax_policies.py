"""Orbax's own policy objects, taken as policies of ours.

Those that mean the same as one of ours become that one, so that NaN never ranks as best and an
alias names the best. All others, also a user's own, are asked as they are. Orbax itself is not
imported: what fits its protocols is one of its policies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, runtime_checkable

from ckpt_callbacks.policy import (
    AnyOf,
    Candidate,
    KeepPolicy,
    Policy,
    SaveContext,
    SavePolicy,
    as_policy,
    leaves,
    translators,
)
from ckpt_callbacks.retention import BestN, LatestN

__all__ = ["Preservation", "SaveDecision"]


@runtime_checkable
class _PreservationPolicy(Protocol):
    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]: ...


@runtime_checkable
class _SaveDecisionPolicy(Protocol):
    def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Info:
    """What Orbax tells its policies of a checkpoint."""

    step: int
    time: datetime
    metrics: Mapping[str, float] | None = None


@dataclass(frozen=True)
class SaveDecision(SavePolicy):
    """A save-decision policy of Orbax, asked at every step.

    Of the steps that were saved before it is told the newest.
    """

    policy: _SaveDecisionPolicy

    def next_due(self, after: int | None) -> int:
        return 0 if after is None else after + 1

    def due(self, context: SaveContext) -> bool:
        from ckpt_callbacks.orbax_io import decision_context

        previous = [] if context.last is None else [_info(context.last, context.last_time)]
        return bool(
            self.policy.should_save(
                _info(context.step, context.now, context.evaluated),
                previous,
                context=decision_context(saving=context.busy, preempted=context.preempted),
            )
        )

    def __str__(self) -> str:
        return str(self.policy)


@dataclass(frozen=True)
class Preservation(KeepPolicy):
    """A preservation policy of Orbax."""

    policy: _PreservationPolicy

    def keep(self, history: Sequence[Candidate]) -> Mapping[int, str]:
        from ckpt_callbacks.orbax_io import preservation_context

        infos = [_info(c.step, c.time, c.metrics) for c in history]
        chosen = self.policy.should_preserve(infos, context=preservation_context())
        # Orbax keeps what a list that is too short does not speak of.
        chosen = [*chosen, *[True] * (len(infos) - len(chosen))]
        name = type(self.policy).__name__
        return {i.step: name for i, keep in zip(infos, chosen, strict=False) if keep}

    def __str__(self) -> str:
        return str(self.policy)


def _info(step: int, time: float, metrics: Mapping[str, float] | None = None) -> _Info:
    return _Info(step, datetime.fromtimestamp(time, UTC), metrics or None)


def _translate(value: Any) -> Policy | None:
    kind = type(value)
    name = kind.__name__ if kind.__module__.startswith("orbax.") else ""
    if name in ("AnyPreservationPolicy", "AnySavePolicy"):
        joined = [leaf for policy in value.policies for leaf in leaves(as_policy(policy))]
        return AnyOf(tuple(joined))
    if name == "LatestN" and value.n:
        return LatestN(value.n)
    if name == "BestN" and value.n:
        # Orbax sorts upwards unless `reverse`, and keeps the end of the list.
        return BestN(
            value.n,
            value.get_metric_fn,
            mode="min" if value.reverse else "max",
            pending=None if value.keep_checkpoints_without_metrics else 0,
        )
    if isinstance(value, _PreservationPolicy):
        return Preservation(value)
    if isinstance(value, _SaveDecisionPolicy):
        return SaveDecision(value)
    return None


translators.append(_translate)
