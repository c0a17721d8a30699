"""What to keep: promised for every history and every policy."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies
from ckpt_callbacks import ConfigError, RecordError
from ckpt_callbacks.policy import Candidate, KeepPolicy, leaves
from ckpt_callbacks.retention import (
    BestN,
    LatestN,
    decide,
    explain,
    narrow,
    policy_from_json,
    policy_to_json,
    promote,
)
from ckpt_callbacks.schedule import CustomSteps, EveryNSeconds, EveryNSteps

History = list[Candidate]


@st.composite
def pinned_histories(draw: st.DrawFn) -> tuple[History, set[int]]:
    """A history, and steps that are pinned; one of them may be gone."""
    history = draw(strategies.histories)
    return history, draw(st.sets(st.sampled_from([*(c.step for c in history), 61])))


def losses(*values: float | None) -> History:
    return [Candidate(s, {} if v is None else {"loss": v}) for s, v in enumerate(values)]


@given(strategies.policies, strategies.histories)
def test_keeps_a_subset_and_never_nothing(policy: KeepPolicy, history: History) -> None:
    kept = decide(policy, history).kept

    assert kept.keys() <= {c.step for c in history}
    assert bool(kept) == bool(history)
    assert all(kept.values())  # each with its reason


@given(strategies.policies, strategies.histories)
def test_the_newest_is_kept_under_every_policy(policy: KeepPolicy, history: History) -> None:
    if history:
        assert history[-1].step in decide(policy, history).kept


@given(strategies.policies, strategies.histories)
def test_deciding_twice_changes_nothing(policy: KeepPolicy, history: History) -> None:
    once = decide(policy, history)
    survivors = [c for c in history if c.step in once.kept]

    assert decide(policy, survivors).kept.keys() == once.kept.keys()


@given(strategies.policies, strategies.histories, st.data())
def test_pruning_early_changes_nothing_later(
    policy: KeepPolicy, history: History, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(history)))
    old, new = history[:cut], history[cut:]
    kept = decide(policy, old).kept
    pruned = [c for c in old if c.step in kept]

    assert decide(policy, pruned + new) == decide(policy, history)


@given(strategies.policies, strategies.histories, st.randoms())
def test_order_of_the_history_is_irrelevant(
    policy: KeepPolicy, history: History, random: st.DataObject
) -> None:
    shuffled = list(history)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert decide(policy, shuffled) == decide(policy, history)


@given(strategies.policies, strategies.policies, strategies.histories)
def test_a_union_keeps_what_either_keeps(
    one: KeepPolicy, other: KeepPolicy, history: History
) -> None:
    joined = decide(one | other, history).kept.keys()

    assert joined == decide(one, history).kept.keys() | decide(other, history).kept.keys()


@given(strategies.policies, strategies.histories)
def test_aliases_name_kept_steps(policy: KeepPolicy, history: History) -> None:
    decision = decide(policy, history)

    assert set(decision.aliases.values()) <= decision.kept.keys()
    if history:
        assert decision.aliases["last"] == history[-1].step


@given(strategies.policies, strategies.policies, pinned_histories())
def test_what_is_pinned_stays(
    policy: KeepPolicy, own: KeepPolicy, drawn: tuple[History, set[int]]
) -> None:
    """Whatever the policy says, also one that a store has of its own."""
    history, pinned = drawn
    there = pinned & {c.step for c in history}
    without, decision = decide(policy, history), decide(policy, history, pinned)

    assert decision.kept.keys() == without.kept.keys() | there
    assert decision.aliases == without.aliases
    assert there <= narrow(decision, policy, own, history, pinned).kept.keys()


@given(strategies.policies, strategies.policies, pinned_histories())
def test_what_an_old_policy_keeps_stays_too(
    policy: KeepPolicy, old: KeepPolicy, drawn: tuple[History, set[int]]
) -> None:
    history, pinned = drawn
    new, both = decide(policy, history, pinned), decide(policy, history, pinned, old)

    assert both.kept.keys() == new.kept.keys() | decide(old, history).kept.keys()
    assert both.aliases == new.aliases


@given(strategies.histories, st.sampled_from(["min", "max"]))
def test_best_is_the_best_finite_value(history: History, mode: str) -> None:
    policy = BestN(1, "loss", mode=mode)  # type: ignore[arg-type]
    measured = [c for c in history if "loss" in c.metrics]
    real = [(c.metrics["loss"], c.step) for c in measured if math.isfinite(c.metrics["loss"])]

    best = promote(policy, history).get("best")

    if not real:
        assert best is None
    else:
        extreme = (min if mode == "min" else max)(value for value, _ in real)
        assert best == max(step for value, step in real if value == extreme)


def test_reasons_carry_ranks() -> None:
    policy = LatestN(2) | BestN(2, "loss", mode="min")

    assert decide(policy, losses(3, 1, 2, 5, 4)).kept == {
        1: "best #1",
        2: "best #2",
        3: "latest #2",
        4: "latest #1",
    }


def test_two_reasons_for_one_step() -> None:
    policy = LatestN(1) | BestN(1, "loss", mode="min")

    assert decide(policy, losses(3, 1)).kept == {1: "latest #1, best #1"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, True, "0.1"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_no_number_is_never_best(bad: float | None, mode: str) -> None:
    policy = BestN(1, "loss", mode=mode, pending=0)  # type: ignore[arg-type]

    decision = decide(policy, losses(0.3, bad, 0.2, bad, 0.4))

    assert decision.aliases["best"] == (2 if mode == "min" else 4)
    assert decision.kept.keys() == {decision.aliases["best"], 4}


def test_of_equal_values_the_later_step_is_better() -> None:
    assert promote(BestN(1, "loss", mode="min"), losses(1, 1, 2))["best"] == 1
    assert promote(BestN(1, "loss", mode="max"), losses(2, 2, 1))["best"] == 1


def test_the_newest_unmeasured_ones_are_kept() -> None:
    history = losses(1, None, None, 2, None)

    assert set(decide(BestN(1, "loss", mode="min"), history).kept) == {0, 4}
    assert set(decide(BestN(1, "loss", mode="min", pending=2), history).kept) == {0, 2, 4}
    assert set(decide(BestN(1, "loss", mode="min", pending=None), history).kept) == {0, 1, 2, 4}


def test_without_a_policy_reason_the_newest_is_kept_as_newest() -> None:
    assert decide(BestN(1, "loss", mode="min"), losses(1, 2)).kept == {0: "best #1", 1: "newest"}


@given(strategies.policies)
def test_a_policy_survives_the_disk(policy: KeepPolicy) -> None:
    assert leaves(policy_from_json(json.loads(json.dumps(policy_to_json(policy))))) == leaves(
        policy
    )


def test_several_metrics_have_an_alias_each() -> None:
    policy = LatestN(1) | BestN(1, "loss", mode="min") | BestN(1, "accuracy", mode="max")
    history = [
        Candidate(0, {"loss": 0.1, "accuracy": 0.5}),
        Candidate(1, {"loss": 0.2, "accuracy": 0.9}),
        Candidate(2, {"loss": 0.3, "accuracy": 0.1}),
    ]

    decision = decide(policy, history)

    assert decision.aliases == {"best": 0, "best-loss": 0, "best-accuracy": 1, "last": 2}
    assert decision.kept == {0: "best-loss #1", 1: "best-accuracy #1", 2: "latest #1"}


def test_a_metric_may_be_a_function() -> None:
    def gap(metrics: dict[str, float]) -> float:
        return metrics["val"] - metrics["train"]

    policy = BestN(1, gap, mode="min", pending=0)
    history = [Candidate(0, {"val": 3, "train": 1}), Candidate(1, {"val": 2, "train": 1})]

    assert decide(policy, [*history, Candidate(2, {"val": 1})]).kept == {1: "best #1", 2: "newest"}
    assert str(policy) == "BestN(1, 'gap', mode='min')"


def test_milestones_stay() -> None:
    history = [Candidate(s, {}, time=10.0 * s) for s in range(0, 100, 9)]

    assert set(EveryNSteps(30).keep(history)) == {0, 36, 63, 90}
    assert set(EveryNSeconds(300).keep(history)) == {0, 36, 72}
    assert set(CustomSteps([9, 10, 27]).keep(history)) == {9, 27}


def test_a_function_is_a_policy() -> None:
    def odd(history: History) -> list[int]:
        return [c.step for c in history if c.step % 2] + [77]

    assert decide(LatestN(1) | odd, losses(1, 2, 3)).kept == {1: "odd", 2: "latest #1"}
    assert decide(odd | LatestN(1), losses(1, 2, 3)).kept == {1: "odd", 2: "latest #1"}


def test_what_is_no_policy_cannot_be_joined() -> None:
    with pytest.raises(ConfigError, match="3 is no policy"):
        LatestN(1) | 3


@given(strategies.policies, strategies.histories)
def test_every_step_is_explained(policy: KeepPolicy, history: History) -> None:
    for candidate in history:
        assert explain(policy, history, candidate.step)


def test_an_explanation_gives_rank_value_and_limit() -> None:
    policy = LatestN(1) | BestN(1, "loss", mode="min") | EveryNSteps(10)

    assert explain(policy, losses(0.1, 0.5, math.nan, None), 1) == (
        "latest #3 of 4, LatestN(1) keeps 1; "
        "loss 0.5 is best #2 of 2, BestN(1, 'loss', mode='min') keeps 1; "
        "not the first in its bucket of 10 steps"
    )
    assert "loss is nan, which never ranks" in explain(policy, losses(0.1, math.nan, 1), 1)
    assert "no loss yet" in explain(policy, losses(0.1, None, 1), 1)


def test_an_unknown_policy_on_disk_is_refused() -> None:
    with pytest.raises(RecordError, match="unknown keep policy 'OldestN'"):
        policy_from_json([{"policy": "OldestN", "n": 1}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatestN(0), "LatestN: n must be an integer of at least 1, not 0"),
        (lambda: LatestN(True), "not True"),
        (lambda: BestN(1, "", mode="min"), "metric must be the name of a metric, or a function"),
        (lambda: BestN(1, "loss", mode="lowest"), "mode must be 'min' or 'max', not 'lowest'"),
        (lambda: BestN(1, "loss", mode="min", pending=-1), "pending"),
        (lambda: EveryNSeconds(0), "seconds must be a positive number, not 0"),
        (lambda: CustomSteps([1, -2]), "a step must be an integer from 0, not -2"),
    ],
)
def test_bad_arguments_say_what_is_wrong(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
