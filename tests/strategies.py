"""Hypothesis strategies shared by the tests of pure code."""

import math

from hypothesis import strategies as st

from ckpt_callbacks.retention import BestN, Candidate, KeepPolicy, LatestN, Union

values = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf]),  # ties and traps are likely
    st.floats(allow_nan=True),
)
metrics = st.dictionaries(st.sampled_from(["loss", "accuracy"]), values)
histories = st.dictionaries(st.integers(0, 60), metrics, max_size=12).map(
    lambda steps: [Candidate(step, found) for step, found in sorted(steps.items())]
)
leaf_policies = st.one_of(
    st.builds(LatestN, st.integers(1, 4)),
    st.builds(
        BestN,
        st.integers(1, 4),
        st.sampled_from(["loss", "accuracy"]),
        mode=st.sampled_from(["min", "max"]),
        pending=st.sampled_from([0, 1, 2, None]),
    ),
)


def _join(leaves: list[KeepPolicy]) -> KeepPolicy:
    return leaves[0] if len(leaves) == 1 else Union(tuple(leaves))


policies = st.lists(leaf_policies, min_size=1, max_size=3).map(_join)
