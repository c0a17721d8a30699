"""What a policy would remove from a run directory, seen before anything is done."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.policy import KeepPolicy, as_keep, leaves
from ckpt_callbacks.record import Record
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.retention import (
    Opaque,
    explain,
    policy_from_json,
    policy_to_json,
    ranked_metrics,
)
from ckpt_callbacks.situation import Situation, candidate
from ckpt_callbacks.text import suggestion

__all__ = ["Goes", "PrunePlan", "plan_prune"]

_EXPLAINED = 500
"""Of how many it is said how far each is from staying, which takes time for each."""


@dataclass(frozen=True, slots=True)
class Goes:
    """A checkpoint that goes."""

    step: int
    reason: str
    """What the policy says of it."""
    bytes: int
    """Size of its files in the directory."""
    where: Sequence[str]
    """`local` if it is in the directory, and the names of the stores that have a copy."""


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What `prune` removes."""

    keep: KeepPolicy
    """By which policy."""
    goes: Sequence[Goes]
    """In order of steps."""
    kept: Mapping[int, str]
    """The steps that stay, each with its reason."""

    @property
    def bytes(self) -> int:
        """What becomes free in the directory."""
        return sum(gone.bytes for gone in self.goes)


def plan_prune(directory: str | os.PathLike[str], keep: KeepPolicy | None = None) -> PrunePlan:
    """Return what `prune` would do.

    Raises:
        ConfigError: it is no run directory, `keep` is no policy that can be written down, or it
            ranks by a metric that no checkpoint has.
        RecordError: a record in it cannot be read.
    """
    run_directory = open_directory(directory)
    run = run_directory.open_run()
    policy = as_keep("prune", keep) or policy_from_json(run.policy)
    if keep is not None and any(
        isinstance(leaf, Opaque) for leaf in leaves(policy_from_json(policy_to_json(policy)))
    ):
        raise ConfigError(f"prune: {policy} is a function, of which other processes know nothing")
    records = run_directory.known_records()
    if keep is not None:
        _refuse_unmeasured(policy, records.values())
    situation = Situation(records, run, policy, {})
    kept = situation.kept_by(policy)
    known = sorted(situation.known, key=lambda record: record.step)
    history = [candidate(record) for record in known]
    leaving = [r for r in known if r.step not in kept]
    few = len(leaving) <= _EXPLAINED
    goes = [
        Goes(
            r.step,
            explain(policy, history, r.step) if few else f"{policy} does not keep it",
            0 if r.lost else r.bytes,
            [run_directory.kind] * (not r.lost) + sorted(r.copies),
        )
        for r in leaving
    ]
    return PrunePlan(policy, goes, kept)


def _refuse_unmeasured(keep: KeepPolicy, records: Collection[Record]) -> None:
    """Refuse what would remove all but the newest, since it ranks by a name that is misspelt."""
    measured = {name for record in records for name in record.metrics}
    for name in ranked_metrics(keep) if records else ():
        if name not in measured:
            there = ", ".join(sorted(measured)) or "none"
            raise ConfigError(
                f"prune: no checkpoint has the metric {name!r}, by which {keep} ranks; the metrics "
                f"are {there}{suggestion(name, measured)}"
            )
