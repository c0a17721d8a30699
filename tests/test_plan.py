"""What a store does next: promised at every action of every plan."""

from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

import strategies
from ckpt_callbacks.plan import (
    Action,
    Alias,
    Delete,
    Publish,
    View,
    evictable,
    next_action,
    plan,
    targets,
)
from ckpt_callbacks.policy import Candidate, KeepPolicy
from ckpt_callbacks.retention import BestN, Decision, LatestN, decide

History = list[Candidate]


@st.composite
def situations(draw: st.DrawFn) -> tuple[KeepPolicy, History, View, set[int]]:
    """A history, what a store happens to hold of it, and what can be read locally."""
    policy, history = draw(strategies.policies), draw(strategies.histories)
    steps = [c.step for c in history]
    some = st.sets(st.sampled_from(steps)) if steps else st.just(set[int]())
    held = draw(some)
    names = st.sampled_from(["best", "last"])
    aliases = (
        draw(st.dictionaries(names, st.sampled_from(sorted(held)))) if held else dict[str, int]()
    )
    return policy, history, View(frozenset(held), aliases), set(steps)


@st.composite
def oddities(draw: st.DrawFn) -> tuple[KeepPolicy, History, Decision, View, set[int]]:
    """Anything: a decision of another policy, aliases that name nothing, copies no one knows."""
    history = draw(strategies.histories)
    steps = st.sampled_from([c.step for c in history] + [61, 62])
    names = st.sampled_from(["best", "best-loss", "best-accuracy", "last", "mine"])
    left_out = draw(st.sets(steps))
    decision = decide(draw(strategies.policies), [c for c in history if c.step not in left_out])
    if draw(st.booleans()):
        kept = dict(decision.kept) | dict.fromkeys(draw(st.sets(steps, max_size=3)), "odd")
        decision = Decision(kept, draw(st.dictionaries(names, steps)))
    view = View(
        frozenset(draw(st.sets(steps))),
        draw(st.dictionaries(names, steps)),
        frozenset(draw(st.sets(steps))),
    )
    return draw(strategies.policies), history, decision, view, draw(st.sets(steps))


def first_action(
    policy: KeepPolicy,
    history: History,
    decision: Decision,
    view: View,
    readable: Collection[int],
) -> Action | None:
    """What `next_action` promises, said once more and as plainly as it goes."""
    held = [c for c in history if c.step in view.held]
    for name, step in targets(policy, held, decision).items():
        if view.aliases.get(name) != step:
            return Alias(name, step)
    for step in sorted(view.held | view.begun):
        if step not in decision.kept and step not in view.aliases.values():
            return Delete(step)
    for step in sorted(decision.kept):
        if step not in view.held and step in readable:
            new = [c for c in history if c.step == step]
            aliases = targets(policy, [*held, *new], decision)
            return Publish(step, tuple(n for n, s in aliases.items() if s == step))
    return None


@given(st.one_of(oddities(), situations().map(lambda s: (*s[:2], decide(*s[:2]), *s[2:]))))
def test_a_plan_is_the_first_action_again_and_again(
    situation: tuple[KeepPolicy, History, Decision, View, set[int]],
) -> None:
    policy, history, decision, view, readable = situation

    for action in plan(policy, history, decision, view, readable):
        assert action == first_action(policy, history, decision, view, readable)
        assert action == next_action(policy, history, decision, view, readable)
        view = view.after(action)

    assert first_action(policy, history, decision, view, readable) is None
    assert next_action(policy, history, decision, view, readable) is None


@given(situations())
def test_a_finished_plan_leaves_the_kept_steps_and_nothing_to_do(
    situation: tuple[KeepPolicy, History, View, set[int]],
) -> None:
    policy, history, view, readable = situation
    decision = decide(policy, history)

    for action in plan(policy, history, decision, view, readable):
        view = view.after(action)

    assert next_action(policy, history, decision, view, readable) is None
    assert decision.kept.keys() <= view.held
    # What is held beyond that is named by an alias that has no better candidate.
    assert view.held - decision.kept.keys() <= set(view.aliases.values())
    assert {n: view.aliases[n] for n in decision.aliases} == decision.aliases


@given(situations())
def test_at_every_instant_each_alias_names_a_copy(
    situation: tuple[KeepPolicy, History, View, set[int]],
) -> None:
    policy, history, view, readable = situation

    for action in plan(policy, history, decide(policy, history), view, readable):
        if isinstance(action, Alias):
            assert action.step in view.held
        if isinstance(action, Delete):
            assert action.step not in view.aliases.values()
        view = view.after(action)

        assert set(view.aliases.values()) <= view.held


@given(situations())
def test_a_store_that_has_a_copy_always_has_one(
    situation: tuple[KeepPolicy, History, View, set[int]],
) -> None:
    policy, history, view, readable = situation
    had = bool(view.held)

    for action in plan(policy, history, decide(policy, history), view, readable):
        view = view.after(action)
        assert view.held or not had


@given(situations())
def test_a_publish_names_the_aliases_that_follow(
    situation: tuple[KeepPolicy, History, View, set[int]],
) -> None:
    policy, history, view, readable = situation

    for action in plan(policy, history, decide(policy, history), view, readable):
        view = view.after(action)
        if isinstance(action, Publish):
            held = [c for c in history if c.step in view.held]
            now = targets(policy, held, decide(policy, history))
            assert set(action.aliases) == {n for n, s in now.items() if s == action.step}


def test_old_copies_go_before_new_ones_come() -> None:
    """Uploads slower than saves: aliases and deletions do not wait for the queue."""
    history = [Candidate(s, {}) for s in (10, 20, 30, 40)]
    view = View(frozenset({10, 20}), {"last": 10})

    actions = plan(LatestN(2), history, decide(LatestN(2), history), view, {30, 40})

    assert [str(a) for a in actions] == [
        "move alias 'last' to step 20",
        "delete step 10",
        "publish step 30",
        "move alias 'last' to step 30",
        "delete step 20",
        "publish step 40",
        "move alias 'last' to step 40",
    ]


def test_what_is_decided_goes_before_what_a_store_still_holds() -> None:
    """A copy that is no longer wanted may be better, after a change of the policy."""
    policy = BestN(1, "loss", mode="max")
    history = [Candidate(0, {"loss": 0.5}), Candidate(1, {"loss": 0.1})]
    decision = decide(policy, history[1:])

    actions = plan(policy, history, decision, View(frozenset({0}), {"last": 0}), {1})

    assert actions[-1] == Delete(0)
    assert Alias("best", 1) in actions


def test_a_step_that_is_not_on_disk_is_not_published() -> None:
    history = [Candidate(1, {}), Candidate(2, {})]

    assert plan(LatestN(2), history, decide(LatestN(2), history), View(frozenset(), {}), {2}) == [
        Publish(2, ("last",)),
        Alias("last", 2),
    ]


def test_a_step_that_is_being_read_is_not_evicted() -> None:
    decision = decide(LatestN(1), [Candidate(s, {}) for s in (1, 2, 3)])

    assert evictable(decision, [3, 2, 1], []) == [1, 2]
    assert evictable(decision, [3, 2, 1], [1]) == [2]
