"""States in, leaves out, the same states back."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpt_callbacks as cc
from ckpt_callbacks import StateMismatch, frameworks
from ckpt_callbacks.adapters import adapter_of
from ckpt_callbacks.state import apply, capture, check, leaves_of


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


@dataclasses.dataclass(frozen=True)
class Settings:
    """No pytree to JAX."""

    rate: float
    table: dict[str, Any]
    apply: Callable[[Any], Any] = len


def nnx_state(seed: int) -> dict[str, Any]:
    model = Net(seed)
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)}


def eqx_state(seed: int) -> State:
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(seed))
    optimizer = optax.chain(optax.clip(1.0), optax.adam(0.1))
    return State(model, optimizer.init(eqx.filter(model, eqx.is_array)), jax.random.key(seed), seed)


def dataclass_state(seed: int) -> dict[str, Any]:
    return {"settings": Settings(seed / 2, {"w": jnp.full(2, seed), "more": Settings(seed, {})})}


def nnx_pure_state(seed: int) -> Any:
    return nnx.state(Net(seed), nnx.Param)


def bytes_of(state: Any) -> dict[tuple[str, ...], bytes]:
    return {
        path: np.asarray(jax.random.key_data(x) if is_key(x) else x).tobytes()
        for path, x in leaves_of(state).items()
    }


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("make", [nnx_state, eqx_state, dataclass_state, nnx_pure_state])
def test_leaves_taken_from_one_state_can_be_given_to_another(make: Any) -> None:
    source, target = make(1), make(2)
    assert bytes_of(source) != bytes_of(target)

    result = apply(target, leaves_of(source))

    assert bytes_of(result) == bytes_of(source)
    assert type(result) is type(target)


def test_nnx_objects_are_changed_in_place() -> None:
    target = nnx_state(2)
    model = target["model"]

    result = apply(target, leaves_of(nnx_state(1)))

    assert result["model"] is model
    assert bytes_of(model) == bytes_of(nnx_state(1)["model"])


def test_a_state_of_nnx_and_a_dataclass_are_made_anew() -> None:
    target = nnx_pure_state(2)
    before = bytes_of(target)

    assert bytes_of(apply(target, leaves_of(nnx_pure_state(1)))) != before
    assert bytes_of(target) == before

    settings = dataclass_state(2)
    assert apply(settings, leaves_of(dataclass_state(1)))["settings"].rate == 0.5
    assert settings["settings"].rate == 1.0


def test_functions_stay_those_of_the_live_state() -> None:
    target = eqx_state(2)

    result = apply(target, leaves_of(eqx_state(1)))

    assert result.model.activation is target.model.activation


def test_leaves_that_are_not_given_stay() -> None:
    target = nnx_state(2)
    kept = bytes_of(target)
    new = {p: x for p, x in leaves_of(nnx_state(1)).items() if p[0] == "optimizer"}

    result = bytes_of(apply(target, new))

    assert {p for p in kept if result[p] == kept[p]} >= {p for p in kept if p[0] == "model"}
    assert result.items() >= bytes_of({"optimizer": nnx_state(1)["optimizer"]}).items()


def test_top_level_children_become_items() -> None:
    assert set(capture(nnx_state(0)).items) == {"model", "optimizer"}
    assert check(eqx_state(0)) == ["model", "optimizer", "state"]  # state: key and step


def test_a_lone_module_and_many_children_are_one_item() -> None:
    assert check(nnx_state(0)["model"]) == ["state"]
    assert check({f"layer{i}": {"w": jnp.ones(2)} for i in range(9)}) == ["state"]


def test_weights_are_an_item_of_their_own_beside_many_children() -> None:
    others = {f"layer{i}": {"w": jnp.ones(2)} for i in range(9)}

    assert check({**others, "params": {"w": jnp.ones(2)}}) == ["params", "state"]
    assert check({"state": {"a": jnp.ones(2)}, "model": {"w": jnp.ones(2)}}) == ["model", "state"]


def test_weights_in_a_lone_object_are_an_item_of_their_own() -> None:
    both = nnx.ModelAndOptimizer(Net(0), optax.adam(0.1))

    assert check(both) == ["model", "opt_state", "state"]  # state: the step


def test_a_reserved_or_odd_name_is_no_item() -> None:
    assert check({"metrics": {"a": jnp.ones(2)}}) == ["state"]
    assert check({"a/b": {"a": jnp.ones(2)}, "c": {"d": jnp.ones(2)}}) == ["state"]


def test_sowed_values_are_no_state() -> None:
    model = nnx_state(0)["model"]
    before = bytes_of(model)
    model.hidden = nnx.Intermediate(jnp.ones(3))  # what `sow` leaves behind

    assert bytes_of(model) == before
    assert bytes_of(nnx.state(model)) == before


def test_two_leaves_of_one_name_are_refused() -> None:
    """Orbax would store one of them and restore it as both."""
    with pytest.raises(StateMismatch, match=r"two leaves have the name 'a\.b': a/b and a\.b"):
        capture({"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}})


def test_all_leaves_that_cannot_be_saved_are_named() -> None:
    state = {
        "model": {"x": object(), "y": np.array(["text"]), "w": jnp.ones(1)},
        "when": np.datetime64("2026-01-01"),
        "wide": np.ones(2, np.longdouble),
        "names": {"a", "b"},
    }

    with pytest.raises(StateMismatch) as error:
        check(state)

    assert str(error.value) == (
        "the leaf at model/x is a object, which cannot be saved\n"
        "  the leaf at model/y is a ndarray of dtype <U4, which cannot be saved\n"
        "  the leaf at names is a set, which cannot be saved\n"
        "  the leaf at when is a datetime64 of dtype datetime64[D], which cannot be saved\n"
        f"  the leaf at wide is a ndarray of dtype {np.dtype(np.longdouble)}, which cannot be "
        "saved\n"
        "Leave it out of the state, or register a StateAdapter for what holds it"
    )


def test_a_state_without_data_is_refused() -> None:
    with pytest.raises(StateMismatch, match="holds nothing to save"):
        capture({"a": None, "f": len})


def test_an_abstract_state_is_no_state_to_save() -> None:
    state = jax.eval_shape(lambda: {"w": jnp.ones(2)})

    assert check(state) == ["state"]
    with pytest.raises(StateMismatch, match="w is abstract"):
        capture(state)


class Tank:
    """An object of a library that JAX knows nothing of."""

    def __init__(self, level: float) -> None:
        self.level = jnp.asarray(level)


class TankAdapter:
    def matches(self, node: Any) -> bool:
        return isinstance(node, Tank)

    def capture(self, node: Tank) -> Any:
        return {"level": node.level}

    def apply(self, node: Tank, values: Any) -> Tank:
        node.level = values["level"]
        return node


@pytest.fixture
def tank_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_callbacks.adapters._registered", [])
    cc.register_adapter(TankAdapter())


@pytest.mark.usefixtures("tank_adapter")
def test_an_adapter_that_was_registered_handles_its_nodes(tmp_path: Path) -> None:
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    )
    with callbacks.run({"tanks": [Tank(1.5), Tank(2.5)]}) as run:
        run.on_step(0, run.state)
    mine = {"tanks": [Tank(0.0), Tank(0.0)]}

    restored = cc.restore(tmp_path / "run", like=mine)

    assert [float(tank.level) for tank in mine["tanks"]] == [1.5, 2.5]
    assert restored["tanks"][0] is mine["tanks"][0]


@pytest.mark.parametrize("wrong", [TankAdapter, object(), Tank(1.0)])
def test_what_is_no_adapter_is_refused(wrong: Any) -> None:
    with pytest.raises(cc.ConfigError, match="matches, capture and apply"):
        cc.register_adapter(wrong)


def test_no_library_is_imported_for_its_adapter() -> None:
    import subprocess
    import sys

    code = (
        "import sys, ckpt_callbacks.state as s; s.check({'a': 1})\n"
        "print([m for m in ('flax', 'keras', 'equinox', 'grain', 'flashbax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout == "[]\n"
    assert adapter_of(Net(0)) is frameworks.ADAPTERS[0]
