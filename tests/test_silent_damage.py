"""What is lost or changed silently elsewhere is an error here, or comes back as it was."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpt_callbacks as cc
from saved import save, tree_digest


def comes_back(root: Path, state: Any, like: Any) -> None:
    """Check that every leaf, restored into a state with other values, is the one that was saved."""
    saved = tree_digest(state)
    assert tree_digest(like) != saved

    assert tree_digest(cc.restore(save(root, state), like=like)) == saved


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}, r"a\.b"),
        ({"m": {"a.b": {"c": 1}, "a": {"b.c": 2}}}, r"m\.a\.b\.c"),
        ({"m": {"x": {1: jnp.ones(1)}, "x.1": jnp.zeros(1)}}, r"m\.x\.1"),
        ({"m": [{"x": 1}], "m.0": {"x": 2}}, r"m\.0\.x"),
    ],
)
def test_leaves_that_orbax_would_store_as_one_are_refused(
    tmp_path: Path, state: Any, name: str
) -> None:
    with pytest.raises(cc.StateMismatch, match=f"two leaves have the name '{name}'"):
        save(tmp_path / "run", state)

    assert not list(tmp_path.glob("run/[0-9]*"))


@pytest.mark.parametrize("state", [{0: 1, "0": 2}, {"m": {0: jnp.ones(1), "0": jnp.zeros(1)}}])
def test_keys_that_have_no_order_are_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(cc.StateMismatch, match="Keys of one dict must be of one type"):
        save(tmp_path / "run", state)


def test_a_fresh_optimizer_does_not_cast_the_moments_of_a_trained_one(tmp_path: Path) -> None:
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1)
    params = {"w": jnp.linspace(0.1, 1, 6, dtype=jnp.bfloat16), "b": jnp.ones(3)}
    fresh = {"params": params, "opt_state": tx.init(params)}
    grads = jax.tree.map(lambda x: x / 3, params)
    _, trained = tx.update(grads, fresh["opt_state"], params)
    dtypes = jax.tree.map(lambda x: x.dtype, (fresh["opt_state"], trained))
    assert dtypes[0] != dtypes[1], "this optimizer no longer changes a dtype: find another one"

    comes_back(tmp_path / "run", {"params": params, "opt_state": trained}, fresh)


KEYS = {
    "threefry": lambda: jax.random.key(7),
    "rbg": lambda: jax.random.key(7, impl="rbg"),
    "unsafe_rbg": lambda: jax.random.key(7, impl="unsafe_rbg"),
    "raw": lambda: jax.random.PRNGKey(7),
    "raw rbg": lambda: jax.random.PRNGKey(7, impl="rbg"),
    "batch": lambda: jax.random.split(jax.random.key(7), (2, 3)),
}


@pytest.mark.parametrize("there", KEYS)
def test_keys_come_back_as_they_were_or_not_at_all(tmp_path: Path, there: str) -> None:
    saved = {"key": KEYS[there]()}
    root = save(tmp_path / "run", saved)

    assert tree_digest(cc.restore(root)) == tree_digest(saved)
    for here, make in KEYS.items():
        like = {"key": make()}
        before = tree_digest(like)
        if here == there:
            assert tree_digest(cc.restore(root, like=like)) == tree_digest(saved)
            continue
        with pytest.raises(cc.StateMismatch, match="key: "):
            cc.restore(root, like=like)
        assert tree_digest(like) == before


class Net(nnx.Module):
    def __init__(self, *widths: int, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairwise(widths)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize(
    "widths", [(3, 5, 2), (3, 4), (3, 4, 2, 2)], ids=["shapes", "unknown", "missing"]
)
def test_an_nnx_model_is_not_touched_by_a_checkpoint_that_does_not_fit(
    tmp_path: Path, widths: tuple[int, ...]
) -> None:
    """`nnx.update` takes any shape, ignores what is missing and adds what is unknown."""
    save(tmp_path / "run", {"model": Net(3, 4, 2)})
    model = Net(*widths, seed=1)
    before, objects = tree_digest(nnx.state(model)), list(model.layers)
    graph = nnx.graphdef(model)

    with pytest.raises(cc.StateMismatch, match="model/layers/"):
        cc.restore(tmp_path / "run", like={"model": model})

    assert tree_digest(nnx.state(model)) == before
    assert nnx.graphdef(model) == graph
    assert list(model.layers) == objects


class Counted(eqx.Module):
    mlp: eqx.nn.MLP
    step: int
    rate: float
    done: bool


def test_numbers_in_an_equinox_module_are_no_less_than_arrays(tmp_path: Path) -> None:
    """`eqx.filter(module, eqx.is_array)` leaves them out, and the step begins at 0 again."""

    def make(seed: int) -> Counted:
        key = jax.random.key(seed)
        return Counted(eqx.nn.MLP(2, 1, 3, 1, key=key), seed, seed / 3, bool(seed))

    comes_back(tmp_path / "run", make(41), make(0))
    assert cc.restore(tmp_path / "run", like=make(0)).step == 41


ODD = {
    "empty": lambda v: {"a": np.zeros((0, 2)), "b": jnp.zeros((3, 0), jnp.bfloat16), "c": v},
    "numpy scalars": lambda v: {
        t.__name__: t(v) for t in (np.int32, np.int64, np.uint64, np.float32, np.float64, np.bool_)
    },
    "uint4": lambda v: {"x": jnp.full(5, v, jnp.uint4), "y": jnp.full((3, 3), v, jnp.uint2)},
    "int4": lambda v: {"x": jnp.full(5, -v, jnp.int4)},
    "large": lambda v: {"a": v * 2**70, "b": -v * 2**63, "c": v * 2**63, "d": v * 10**400},
    "text": lambda v: {"a": "größer" * v, "b": b"\x00\xff" * v, "c": v > 1, "d": complex(v, -0.0)},
    "float": lambda v: {"a": float("nan") if v > 1 else 0.0, "b": -0.0 * v, "c": v * 5e-324},
    "wide": lambda v: {"f": np.array([v * 1e300]), "i": np.array([v * 2**40]), "c": np.array([1j])},
    "none": lambda v: {"a": None, "b": {"c": None, "d": v}, "e": ()},
    "weak": lambda v: {"a": jnp.asarray(v * 1.5), "b": jax.jit(lambda: v * 2.0)()},
}


@pytest.mark.parametrize("kind", ODD)
def test_leaves_that_orbax_refuses_or_changes_come_back(tmp_path: Path, kind: str) -> None:
    comes_back(tmp_path / "run", ODD[kind](2), ODD[kind](1))


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (np.array([1e300, 0.1]), jnp.ones(2)),
        (np.array([2**40, 1]), jnp.ones(2, jnp.int32)),
        (np.array([2**63], np.uint64), jnp.ones(1, jnp.uint32)),
        (np.array([0.1 + 0.1j]), jnp.ones(1, jnp.complex64)),
        (np.float64(0.1), jnp.float32(0)),
        (np.array([0.1]), jax.ShapeDtypeStruct((1,), np.float64)),
    ],
    ids=str,
)
def test_64_bits_of_numpy_stay_numpy_where_jax_would_cut_them(
    tmp_path: Path, saved: Any, like: Any
) -> None:
    assert not jax.config.jax_enable_x64
    root = save(tmp_path / "run", {"x": saved})

    for options in ({"like": {"x": like}}, {"like": {"x": like}, "as_numpy": True}, {}):
        restored = cc.restore(root, **options)["x"]
        assert type(restored) is type(saved)
        assert tree_digest(np.asarray(restored)[None]) == tree_digest(np.asarray(saved)[None])


def test_64_bits_from_a_device_are_not_cut_to_32_unasked(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        saved = jnp.array([1e300, 0.1])
    assert saved.dtype == np.float64
    root = save(tmp_path / "run", {"x": saved})

    with pytest.raises(cc.StateMismatch, match=r"x: .* which JAX would cut to 32 bits"):
        cc.restore(root, like={"x": jnp.ones(2)})

    assert cc.restore(root, like={"x": np.ones(2)})["x"].tolist() == [1e300, 0.1]
    cast = cc.restore(root, like={"x": jnp.ones(2)}, dtype="cast")["x"]
    assert cast.dtype == np.float32


class Policy:
    """What can be called and is neither a pytree nor anything that an adapter knows."""

    def __init__(self) -> None:
        self.w = jnp.ones(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w * x


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (Policy(), "Policy that holds arrays"),
        (partial(jnp.add, jnp.ones(2)), "partial that holds arrays"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "MaskedArray of dtype float64"),
        (np.zeros(2, [("a", "f4"), ("b", "i4")]), r"ndarray of dtype \[\('a'"),
        (np.zeros(2, jax.dtypes.float0), "ndarray of dtype"),
    ],
    ids=["callable", "partial", "masked", "records", "float0"],
)
def test_arrays_that_would_be_lost_are_refused_before_the_first_step(
    tmp_path: Path, leaf: Any, message: str
) -> None:
    with pytest.raises(cc.StateMismatch, match=f"the leaf at policy is a {message}"):
        save(tmp_path / "run", {"policy": leaf, "step": 1})


def test_functions_are_no_arrays(tmp_path: Path) -> None:
    functions = {
        "function": jnp.add,
        "jitted": jax.jit(jnp.sin),
        "jvp": jax.nn.relu,
        "partial": partial(jax.nn.leaky_relu, negative_slope=0.1),
        "class": np.ndarray,
        "tx": optax.adam(optax.linear_schedule(1.0, 0.0, 10)),
    }
    root = save(tmp_path / "run", {**functions, "step": 3})

    assert cc.restore(root, like={**functions, "step": 0}) == {**functions, "step": 3}
