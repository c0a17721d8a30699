"""States in, leaves out, the same states back."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ckpt_callbacks import StateMismatch
from ckpt_callbacks.adapters import abstract, apply, capture, check_same


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class State(NamedTuple):
    model: eqx.nn.MLP
    optimizer: Any
    key: jax.Array
    step: int


def nnx_state(seed: int) -> dict[str, Any]:
    model = Net(seed)
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)}


def eqx_state(seed: int) -> State:
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(seed))
    optimizer = optax.chain(optax.clip(1.0), optax.adam(0.1))
    return State(model, optimizer.init(eqx.filter(model, eqx.is_array)), jax.random.key(seed), seed)


def leaves_of(state: Any) -> list[tuple[str, bytes]]:
    return [
        (str(path), np.asarray(jax.random.key_data(x) if is_key(x) else x).tobytes())
        for path, x in jax.tree_util.tree_leaves_with_path(capture(state))
    ]


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("make", [nnx_state, eqx_state])
def test_what_is_captured_can_be_applied(make: Any) -> None:
    source, target = make(1), make(2)
    assert leaves_of(source) != leaves_of(target)

    result = apply(target, capture(source))

    assert leaves_of(result) == leaves_of(source)


def test_nnx_objects_are_changed_in_place() -> None:
    target = nnx_state(2)
    model = target["model"]

    result = apply(target, capture(nnx_state(1)))

    assert result["model"] is model
    assert leaves_of({"m": model}) == leaves_of({"m": nnx_state(1)["model"]})


def test_functions_stay_those_of_the_live_state() -> None:
    target = eqx_state(2)

    result = apply(target, capture(eqx_state(1)))

    assert result.model.activation is target.model.activation


def test_top_level_children_become_items() -> None:
    assert set(capture(nnx_state(0))) == {"model", "optimizer"}
    assert set(capture(eqx_state(0))) == {"model", "optimizer", "state"}  # state: key and step


def test_a_lone_module_and_many_children_are_one_item() -> None:
    assert set(capture(nnx_state(0)["model"])) == {"state"}
    assert set(capture({f"layer{i}": {"w": jnp.ones(2)} for i in range(9)})) == {"state"}


def test_a_reserved_or_odd_name_is_no_item() -> None:
    assert set(capture({"metrics": {"a": jnp.ones(2)}})) == {"state"}
    assert set(capture({"a/b": {"a": jnp.ones(2)}, "c": {"d": jnp.ones(2)}})) == {"state"}


def test_sowed_values_are_no_state() -> None:
    model = nnx_state(0)["model"]
    before = leaves_of(model)
    model.hidden = nnx.Intermediate(jnp.ones(3))  # what `sow` leaves behind

    assert leaves_of(model) == before


def test_two_leaves_of_one_name_are_refused() -> None:
    """Orbax would store one of them and restore it as both."""
    with pytest.raises(StateMismatch, match=r"two leaves have the name 'a\.b'"):
        capture({"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}})


@pytest.mark.parametrize("leaf", [object(), b"bytes", 1j, np.array(["text"])])
def test_a_leaf_that_cannot_be_saved_is_named(leaf: object) -> None:
    with pytest.raises(StateMismatch, match=f"the leaf at model/x is a {type(leaf).__name__}"):
        capture({"model": {"x": leaf}})


def test_a_state_without_data_is_refused() -> None:
    with pytest.raises(StateMismatch, match="holds nothing to save"):
        capture({"a": None, "f": len})


def test_all_differences_are_told_at_once() -> None:
    found = capture({"m": {"w": jnp.ones((2, 3)), "old": jnp.ones(1)}, "o": {"c": jnp.ones(1)}})
    live = {"m": {"w": jnp.ones((3, 2)), "new": jnp.ones(1)}, "o": {"c": jnp.ones(1)}}

    with pytest.raises(StateMismatch) as error:
        check_same(abstract(live, found), found, "runs/5")

    assert "runs/5" in str(error.value)
    assert "m/new: not in the checkpoint" in str(error.value)
    assert "m/old: not in the state" in str(error.value)
    assert "m/w: shape (3, 2) in the state, (2, 3) in the checkpoint" in str(error.value)


def test_a_part_of_a_state_finds_its_place_in_the_whole() -> None:
    whole = capture(eqx_state(1))

    part = abstract({"model": eqx_state(2).model}, whole)

    check_same(part, {"model": whole["model"]}, "")
