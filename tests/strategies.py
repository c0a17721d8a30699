"""Hypothesis strategies shared by the tests of pure code."""

import math

from hypothesis import strategies as st

from ckpt_callbacks.policy import AnyOf, Candidate, KeepPolicy
from ckpt_callbacks.retention import BestN, LatestN
from ckpt_callbacks.schedule import CustomSteps, EveryNSeconds, EveryNSteps

values = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf]),  # ties and traps are likely
    st.floats(allow_nan=True),
)
metrics = st.dictionaries(st.sampled_from(["loss", "accuracy"]), values)
entries = st.tuples(metrics, st.floats(0, 1000))
histories = st.dictionaries(st.integers(0, 60), entries, max_size=12).map(
    lambda steps: [Candidate(step, *entry) for step, entry in sorted(steps.items())]
)
leaf_policies = st.one_of(
    st.builds(LatestN, st.integers(1, 4)),
    st.builds(EveryNSteps, st.integers(1, 30)),
    st.builds(EveryNSeconds, st.floats(1, 300)),
    st.builds(CustomSteps, st.sets(st.integers(0, 60), max_size=4)),
    st.builds(
        BestN,
        st.integers(1, 4),
        st.sampled_from(["loss", "accuracy"]),
        mode=st.sampled_from(["min", "max"]),
        pending=st.sampled_from([0, 1, 2, None]),
    ),
)


def _join(leaves: list[KeepPolicy]) -> KeepPolicy:
    return leaves[0] if len(leaves) == 1 else AnyOf(tuple(leaves))


policies = st.lists(leaf_policies, min_size=1, max_size=3).map(_join)
