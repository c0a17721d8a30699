"""When to save."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_callbacks import ConfigError, CustomSteps, EveryNSeconds, EveryNSteps, LatestN
from ckpt_callbacks.policy import NEVER, SaveContext, SavePolicy, as_policy

steps = st.lists(st.integers(0, 200), unique=True).map(sorted)


def saved(policy: SavePolicy, taken: list[int], restart: set[int], seconds: float = 1) -> list[int]:
    """Return the steps that a loop saves, which a restart at some steps must not change.

    Each step takes `seconds`.
    """
    last: int | None = None
    last_time, found = -math.inf, list[int]()
    gate = policy.next_due(None)
    for now, step in enumerate(taken):
        if step in restart:  # all that survives is the last saved step
            gate = policy.next_due(last)
        if step >= gate:
            context = SaveContext(step, last, now=now * seconds, last_time=last_time)
            if policy.due(context):
                found.append(step)
                last, last_time = step, now * seconds
            gate = policy.next_due(step)
            assert gate > step
    return found


@given(st.integers(1, 20), steps, st.sets(st.integers(0, 200)))
def test_saves_the_first_step_of_each_bucket_also_after_a_resume(
    n: int, taken: list[int], restart: set[int]
) -> None:
    first_of_bucket: dict[int, int] = {}
    for step in taken:
        first_of_bucket.setdefault(step // n, step)

    assert saved(EveryNSteps(n), taken, restart) == list(first_of_bucket.values())


@given(st.sets(st.integers(0, 200)), steps, st.sets(st.integers(0, 200)))
def test_saves_exactly_the_listed_steps(
    listed: set[int], taken: list[int], restart: set[int]
) -> None:
    assert saved(CustomSteps(listed), taken, restart) == [s for s in taken if s in listed]


def test_saves_once_the_time_has_passed() -> None:
    assert saved(EveryNSeconds(10), list(range(40)), set(), seconds=3) == [
        0,
        4,
        8,
        12,
        16,
        20,
        24,
        28,
        32,
        36,
    ]


@given(st.integers(1, 20), st.sets(st.integers(0, 200)), steps)
def test_joined_policies_save_what_any_saves(n: int, listed: set[int], taken: list[int]) -> None:
    joined = saved(EveryNSteps(n) | CustomSteps(listed), taken, set())

    assert set(joined) >= set(saved(CustomSteps(listed), taken, set()))
    buckets = {step // n for step in taken}
    assert {step // n for step in joined} == buckets


def test_a_function_is_asked_at_every_step() -> None:
    def powers(context: SaveContext) -> bool:
        return context.step > 0 and context.step & (context.step - 1) == 0

    policy = EveryNSteps(100) | powers
    assert saved(policy, list(range(40)), set()) == [0, 1, 2, 4, 8, 16, 32]


def test_what_keeps_only_never_saves() -> None:
    assert as_policy(LatestN(1) | CustomSteps([3])).next_due(3) == NEVER  # type: ignore[attr-defined]


def test_step_0_is_saved() -> None:
    assert EveryNSteps(50).next_due(None) == 0


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_a_bad_interval_is_refused(n: int) -> None:
    with pytest.raises(ConfigError, match="EveryNSteps: n must be an integer of at least 1"):
        EveryNSteps(n)
