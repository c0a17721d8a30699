"""When to save."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_callbacks import ConfigError, EveryNSteps


@given(st.integers(1, 20), st.lists(st.integers(0, 200), unique=True).map(sorted), st.data())
def test_saves_the_first_step_of_each_bucket_also_after_a_resume(
    n: int, steps: list[int], data: st.DataObject
) -> None:
    policy = EveryNSteps(n)
    saved: list[int] = []
    due = policy.next_due(None)
    for step in steps:
        if data.draw(st.booleans()):  # a restart: all that survives is the last saved step
            due = policy.next_due(saved[-1] if saved else None)
        if step >= due:
            saved.append(step)
            due = policy.next_due(step)

    first_of_bucket: dict[int, int] = {}
    for step in steps:
        first_of_bucket.setdefault(step // n, step)
    assert saved == list(first_of_bucket.values())


def test_step_0_is_saved() -> None:
    assert EveryNSteps(50).next_due(None) == 0


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_a_bad_interval_is_refused(n: int) -> None:
    with pytest.raises(ConfigError, match="EveryNSteps: n must be an integer of at least 1"):
        EveryNSteps(n)
