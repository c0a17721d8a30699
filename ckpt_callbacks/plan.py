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

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
    return next(_actions(policy, history, decision, view, readable), None)


def plan(
    policy: KeepPolicy,
    history: Sequence[Candidate],
    decision: Decision,
    view: View,
    readable: Collection[int],
) -> list[Action]:
    """Return all actions, in order, that make the store as decided."""
    return list(_actions(policy, history, decision, view, readable))


def _actions(
    policy: KeepPolicy,
    history: Sequence[Candidate],
    decision: Decision,
    view: View,
    readable: Collection[int],
) -> Iterator[Action]:
    """Yield the actions in order, each as if those before it were done.

    What a publish costs goes by the number of aliases, not of copies. Its rivals are the steps
    that should be named: a better one was passed over by an alias that follows the decision, and
    does so for good. And only what an alias named just before can have become unwanted.
    """
    aliases, there = dict(view.aliases), view.held | view.begun
    wanted = targets(policy, [c for c in history if c.step in view.held], decision)
    yield from _settle(wanted, aliases, there, decision)
    known = {c.step: c for c in history}
    for step in sorted((decision.kept.keys() & readable) - view.held):
        rivals = {*wanted.values(), step}
        wanted = targets(policy, [known[s] for s in rivals if s in known], decision)
        yield Publish(step, tuple(n for n, s in wanted.items() if s == step))
        yield from _settle(wanted, aliases, there.intersection(aliases.values()), decision)


def _settle(
    wanted: Mapping[str, int], aliases: dict[str, int], copies: Iterable[int], decision: Decision
) -> Iterator[Action]:
    """Yield the moves of `aliases`, which is updated, and the deletes among `copies`."""
    for name, step in wanted.items():
        if aliases.get(name) != step:
            yield Alias(name, step)
            aliases[name] = step
    named = set(aliases.values())
    for step in sorted(s for s in copies if s not in decision.kept and s not in named):
        yield Delete(step)


def evictable(decision: Decision, complete: Collection[int], leased: Collection[int]) -> list[int]:
    """Return the local steps that may go, oldest first.

    All stores follow the same decision, so a step it does not keep is wanted by none;
    a leased step is being read and waits.
    """
    return [s for s in sorted(complete) if s not in decision.kept and s not in leased]
