"""What a store must do next: the ordered difference between the decision and what it holds.

A worker takes the first action, does it, and asks again, so a restart, a retry, a late metric
and a changed policy all run through this one function.

The order keeps every alias on a complete copy at every instant: aliases move only among copies
that the store holds, what an alias names is never deleted, and a copy that is no longer wanted
goes as soon as no alias names it. (So an alias that has no candidate any more, since the policy
lost its `BestN`, stays where it is, with its copy.) Publishing comes after that settling, one
step at a time and oldest first, so that slow uploads hold back neither aliases nor deletions,
and a queued upload that the policy no longer wants simply is not planned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt_callbacks.policy import Candidate, KeepPolicy
from ckpt_callbacks.retention import Decision, promote

__all__ = [
    "Action",
    "Alias",
    "Delete",
    "Publish",
    "View",
    "evictable",
    "next_action",
    "plan",
    "targets",
]


@dataclass(frozen=True, slots=True)
class Publish:
    """Copy a step to the store."""

    step: int
    aliases: tuple[str, ...]
    """Names that will move to it once it is complete; some stores set them in the same call."""

    def __str__(self) -> str:
        return f"publish step {self.step}"


@dataclass(frozen=True, slots=True)
class Alias:
    """Let an alias name a step that the store holds."""

    name: str
    step: int

    def __str__(self) -> str:
        return f"move alias {self.name!r} to step {self.step}"


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the store's copy of a step."""

    step: int

    def __str__(self) -> str:
        return f"delete step {self.step}"


Action = Publish | Alias | Delete


@dataclass(frozen=True, slots=True)
class View:
    """What a store holds of one run."""

    held: frozenset[int]
    """Steps of which it has a whole copy."""
    aliases: Mapping[str, int]
    begun: frozenset[int] = frozenset()
    """Steps of which it may have a part, from a copy that was cut."""

    def after(self, action: Action) -> View:
        """Return the view once `action` is done."""
        match action:
            case Publish(step):
                return replace(self, held=self.held | {step}, begun=self.begun - {step})
            case Alias(name, step):
                return replace(self, aliases={**self.aliases, name: step})
            case Delete(step):
                return replace(self, held=self.held - {step}, begun=self.begun - {step})


def targets(policy: KeepPolicy, held: Sequence[Candidate], decision: Decision) -> dict[str, int]:
    """Return the step that each alias should name in a store that holds `held`.

    As decided where the store has that step; until then the best of what it has.
    """
    there = {c.step for c in held}
    decided = {name: step for name, step in decision.aliases.items() if step in there}
    return {**promote(policy, held), **decided}


def next_action(
    policy: KeepPolicy,
    history: Sequence[Candidate],
    decision: Decision,
    view: View,
    readable: Collection[int],
) -> Action | None:
    """Return the first thing the store must do, or `None` when it is as decided.

    Args:
        policy: ranks the copies that the store holds, for its aliases.
        history: every step that exists somewhere, with its metrics.
        decision: what to keep, over the complete local checkpoints.
        view: what the store holds.
        readable: steps that can be copied from the run directory.
    """
    held = [c for c in history if c.step in view.held]
    for name, step in targets(policy, held, decision).items():
        if view.aliases.get(name) != step:
            return Alias(name, step)
    named = set(view.aliases.values())
    for step in sorted(view.held | view.begun):
        if step not in decision.kept and step not in named:
            return Delete(step)
    for step in sorted(decision.kept):
        if step not in view.held and step in readable:
            new = [c for c in history if c.step == step]
            aliases = targets(policy, [*held, *new], decision)
            return Publish(step, tuple(n for n, s in aliases.items() if s == step))
    return None


def plan(
    policy: KeepPolicy,
    history: Sequence[Candidate],
    decision: Decision,
    view: View,
    readable: Collection[int],
) -> list[Action]:
    """Return all actions, in order, that make the store as decided."""
    actions: list[Action] = []
    while action := next_action(policy, history, decision, view, readable):
        actions.append(action)
        view = view.after(action)
    return actions


def evictable(decision: Decision, complete: Collection[int], leased: Collection[int]) -> list[int]:
    """Return the local steps that may go, oldest first.

    All stores follow the same decision, so a step it does not keep is wanted by none;
    a leased step is being read and waits.
    """
    return [s for s in sorted(complete) if s not in decision.kept and s not in leased]
