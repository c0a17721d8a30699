"""A part of a state is restored by reading that part, as the operating system counts it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import ckpt_callbacks as cc
from saved import save, tree_digest


def read_so_far() -> int:
    """Return the bytes that all calls of this process have read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def new_state(name: str, more: int, width: int = 512) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 2)
    params = {f"layer{i}": jax.random.normal(key, (width, width)) for i, key in enumerate(keys)}
    others = {f"other{i}": {"x": jnp.full(3, i)} for i in range(more)}
    return {name: params, "opt_state": optax.adam(0.1).init(params), **others}


@pytest.mark.parametrize(("name", "more"), [("params", 0), ("model", 0), ("params", 12)])
def test_weights_alone_take_a_third_of_the_bytes_verified(
    tmp_path: Path, name: str, more: int
) -> None:
    state = new_state(name, more)
    root = save(tmp_path / "run", state)
    like = jax.tree.map(jnp.zeros_like, state)
    read = {}
    for _ in range(2):  # the first time modules are read too
        for only in (None, "params"):
            before = read_so_far()
            restored = cc.restore(root, like=like, only=only)
            read[only] = read_so_far() - before
            expected = state if only is None else {**like, name: state[name]}
            assert tree_digest(restored) == tree_digest(expected)

    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert read[None] >= 2 * total, "not all was counted: once to verify it, and once to load it"
    assert read["params"] <= 0.4 * read[None]
