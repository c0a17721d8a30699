"""What is known of a run at one moment, and all that follows from it.

Pure: the records, the run file and the policies go in; what to keep, what each store has to do, and
what to tell people come out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckpt_callbacks.plan import Action, Delete, View, evictable, next_action, plan
from ckpt_callbacks.policy import Candidate, KeepPolicy
from ckpt_callbacks.record import Change, Record, RunFile
from ckpt_callbacks.retention import (
    Decision,
    decide,
    explain,
    narrow,
    policy_from_json,
    ranking,
    unmeasured,
)
from ckpt_callbacks.stores import Curve, Overview, Rank, Shown

__all__ = ["Situation", "candidate", "is_away", "is_waiting"]

_Inputs = tuple[KeepPolicy, list[Candidate], Decision, View, set[int]]

_MOST_GONE = 2000
"""Evicted checkpoints of which people are shown the metrics, so that a long run sends no more with
each save than a short one."""


def candidate(record: Record) -> Candidate:
    """Return a record as policies see it."""
    return Candidate(record.step, record.metrics, record.time)


def is_waiting(record: Record, store: str) -> bool:
    """Return whether a store holds the files of a checkpoint itself, and has to send them yet."""
    copy = record.copies.get(store)
    return copy is not None and copy.state == "pending" and copy.shared


def _stride(count: int) -> int:
    """Return a power of two by which `count` things are at most `_MOST_GONE` and seldom others."""
    return int(1 << (max(0, count - 1) // _MOST_GONE).bit_length())


def _has(record: Record, store: str) -> bool:
    """Return whether a store has confirmed its copy."""
    copy = record.copies.get(store)
    return copy is not None and copy.state == "confirmed"


def _has_own(record: Record, store: str) -> bool:
    """Return whether a store has all bytes of a checkpoint as a copy of its own."""
    return _has(record, store) and not record.copies[store].shared


def _is_elsewhere(record: Record) -> bool:
    """Return whether any store has."""
    return any(_has_own(record, store) for store in record.copies)


def is_away(record: Record) -> bool:
    """Return whether a checkpoint counts that is in a store, and not in the directory."""
    counts = record.state == "complete" and not record.discarded
    return counts and record.lost and _is_elsewhere(record)


@dataclass(frozen=True)
class Situation:
    """What is known of a run; it does not change."""

    records: Mapping[int, Record]
    run: RunFile
    policy: KeepPolicy
    """What to keep; `run.change` says what is to be kept until it is in force."""
    stores: Mapping[str, KeepPolicy | None]
    """By name, each with the policy of its own that it may have."""
    here: KeepPolicy | None = None
    """Of what is kept, what the directory holds once the stores have the rest; all if `None`."""

    @cached_property
    def complete(self) -> list[Record]:
        """The complete checkpoints in the directory."""
        return [r for r in self.records.values() if r.state == "complete" and not r.lost]

    @cached_property
    def readable(self) -> list[Record]:
        """Those that count."""
        return [r for r in self.complete if not r.discarded]

    @cached_property
    def known(self) -> list[Record]:
        """Those, and the ones that are in stores alone."""
        return [*self.readable, *filter(is_away, self.records.values())]

    @cached_property
    def counted(self) -> list[Record]:
        """Those that are judged: in the directory, or let go since stores have them."""
        return self.readable if self.here is None else self.known

    @cached_property
    def decision(self) -> Decision:
        """What to keep, over the complete checkpoints that count."""
        return self.decide(self.counted)

    def decide(self, records: Iterable[Record]) -> Decision:
        """Return what to keep of `records`."""
        change = self.run.change
        old = policy_from_json(change.policy) if change else None
        return decide(self.policy, map(candidate, records), self.run.pins, old, self.run.named)

    def next_action(self, store: str) -> Action | None:
        """Return the first thing that a store must do, or `None`."""
        return next_action(*self._inputs(store, self._decision_for(store)))

    def actions(self, store: str) -> list[Action]:
        """Return all that a store must do, in order."""
        return plan(*self._inputs(store, self._decision_for(store)))

    def evictable(self, leased: Collection[int]) -> list[int]:
        """Return the local steps that may go now; those that are `leased` are being read.

        The newest that counts stays, also where a newer one is in stores alone.
        """
        begun = [r.step for r in self.records.values() if r.state == "evicting"]
        unwanted = evictable(self.decision, [r.step for r in self.complete], leased)
        return begun + [step for step in unwanted if step != self._newest]

    def spare(self, leased: Collection[int]) -> list[int]:
        """Return the local steps that are kept, and that the directory may leave to the stores.

        That is when every store that is to hold a step has confirmed it, and one of them has bytes
        of its own. The newest stays, and while a changed policy is not in force all do.
        """
        if self.here is None or self.run.change or not self.readable:
            return []
        history = [candidate(r) for r in self.counted]
        own = narrow(self.decision, self.policy, self.here, history, self.run.pinned).kept
        stay = {*own, *leased, self._newest}
        rest = [r for r in self.readable if r.step in self.decision.kept and r.step not in stay]
        if not rest:
            return []
        wanted = {store: self._inputs(store, self._decision_for(store))[2] for store in self.stores}
        return sorted(
            r.step
            for r in rest
            if _is_elsewhere(r)
            and all(_has(r, s) for s, decision in wanted.items() if r.step in decision.kept)
        )

    def leaving(self) -> dict[int, str]:
        """Return the steps that go once a changed policy is in force, and what it says of each."""
        if not self.run.change:
            return {}
        kept = self._new_decision().kept
        return {s: self.explain(s) for s in self.decision.kept if s not in kept}

    def change_is_whole(self, change: Change) -> bool:
        """Return whether a newer checkpoint is complete and every store is as newly decided."""
        if all(r.step <= change.since for r in self.readable):
            return False
        new = self._new_decision()
        plans = [plan(*self._inputs(store, new)) for store in self.stores]
        return all(isinstance(action, Delete) for actions in plans for action in actions)

    def would_keep(self, new: Candidate) -> bool:
        """Return whether the policy has a place for a step that is not saved yet."""
        history = [candidate(r) for r in self.counted if r.step != new.step]
        return new.step in self.policy.keep(sorted([*history, new], key=lambda c: c.step))

    def kept_by(self, keep: KeepPolicy) -> Mapping[int, str]:
        """Return the steps that would be kept by another policy, each with its reason."""
        run = self.run
        history = map(candidate, self.known)
        kept = dict(decide(keep, history, run.pins, promoted=run.named).kept)
        if self._newest is not None:
            kept.setdefault(self._newest, "newest in the directory")
        return kept

    def unmeasured(self) -> list[int]:
        """Return the complete steps that lack a metric which the policy ranks by."""
        return sorted(unmeasured(self.policy, map(candidate, self.counted)))

    def explain(self, step: int) -> str:
        """Return what each policy says of a step, or why it was discarded."""
        if reason := self.records[step].discarded:
            return reason
        history = {r.step: candidate(r) for r in [self.records[step], *self.counted]}
        return explain(self.policy, history.values(), step)

    def rank(self, alias: str, step: int) -> Rank | None:
        """Return what ranks a step for an alias, or `None` if nothing does.

        What a person named does, by when that was: among several runs the latest word counts.
        """
        if given := self.run.promoted.get(alias):
            return Rank("promoted", "max", given.time) if given.step == step else None
        best, record = ranking(self.policy).get(alias), self.records.get(step)
        value = best.value(candidate(record)) if best and record else None
        return Rank(best.name, best.mode, value) if best and value is not None else None

    def view(self, store: str) -> View:
        """Return what a store holds."""
        copies = {s: r.copies[store] for s, r in self.records.items() if store in r.copies}
        held = frozenset(s for s, c in copies.items() if c.state != "pending")
        return View(held, self.run.aliases.get(store, {}), frozenset(copies) - held)

    def overview(self, store: str, name: str, gone: Sequence[Candidate]) -> Overview:
        """Return what a store holds, for people.

        Args:
            store: by name.
            name: of the run.
            gone: the checkpoints that were evicted; of very many some are left out.
        """
        decision, view = self._decision_for(store), self.view(store)
        gone = gone[:: _stride(len(gone))]
        rows = [
            Shown(
                step=step,
                time=record.time,
                reason=decision.kept.get(step, ""),
                aliases=tuple(n for n, s in view.aliases.items() if s == step),
                metrics=record.metrics,
                bytes=record.bytes,
                ref=record.copies[store].ref,
            )
            for step, record in sorted(self.records.items())
            if step in view.held
        ]
        titles = {name: known.get("title", name) for name, known in self.run.stores.items()}
        return Overview(name, str(self.policy), rows, self.curves(gone), titles)

    def curves(self, gone: Sequence[Candidate]) -> tuple[Curve, ...]:
        """Return the metrics that the policy ranks by, over all checkpoints there ever were."""
        past = {c.step: c for c in [*gone, *map(candidate, self.records.values())]}
        found = {
            best.name: Curve(
                best.name,
                best.mode,
                tuple((s, v) for s in sorted(past) if (v := best.value(past[s])) is not None),
            )
            for best in ranking(self.policy).values()
        }
        return tuple(found.values())

    @property
    def _newest(self) -> int | None:
        """The newest step in the directory that counts."""
        return max((r.step for r in self.readable), default=None)

    def _new_decision(self) -> Decision:
        """Return what to keep once the changed policy is in force."""
        run = self.run
        return decide(self.policy, map(candidate, self.counted), run.pins, promoted=run.named)

    def _decision_for(self, store: str) -> Decision:
        """Return what to keep, with the steps of which only `store` has a copy.

        A checkpoint whose local files somebody removed is judged as if it were there: its copy
        in the store may be the only one left.
        """
        held = self.view(store).held
        lost = [r for s, r in self.records.items() if r.lost and not r.discarded and s in held]
        if lost := lost + self._waiting(store):
            judged = {r.step: r for r in [*self.counted, *lost]}
            return self.decide(judged.values())
        return self.decision

    def _waiting(self, store: str) -> list[Record]:
        """Return the steps that a store can send although their local files are gone."""
        return [r for r in self.records.values() if r.lost and is_waiting(r, store)]

    def _only_in(self, store: str, decision: Decision) -> dict[int, str]:
        """Return the kept steps that left the directory since `store` has them, with the reasons.

        Of several stores that have one it is the first. It stays there, though the store's own
        policy may want it no longer.
        """
        stay: dict[int, str] = {}
        for step, reason in decision.kept.items():
            there = [s for s in sorted(self.stores) if _has_own(self.records[step], s)]
            if self.records[step].lost and there[:1] == [store]:
                stay[step] = reason
        return stay

    def _inputs(self, store: str, decision: Decision) -> _Inputs:
        """Return what the plan of a store depends on."""
        history = [candidate(r) for r in self.records.values()]
        run = self.run
        own = narrow(decision, self.policy, self.stores.get(store), history, run.pins, run.named)
        if self.here is not None and own is not decision:
            own = Decision({**self._only_in(store, decision), **own.kept}, own.aliases)
        readable = {r.step for r in [*self.readable, *self._waiting(store)]}
        return self.policy, history, own, self.view(store), readable
