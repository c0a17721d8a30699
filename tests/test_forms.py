"""The forms of a model, any to any: with or without training state, stacked or layer by layer."""

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks.contents import Contents
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.state import leaves_of
from ckpt_callbacks.tensors import Tensor, of_contents, of_state
from saved import save
from states.case import describe

WIDTH, LAYERS = 4, 3
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "lion": lambda: optax.lion(1e-3),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "every 2": lambda: optax.MultiSteps(optax.adamw(1e-2), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
}
TREATS_BY_SHAPE = {
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "muon": lambda: optax.contrib.muon(1e-2),
}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_params(seed: int = 0) -> Any:
    key = iter(jax.random.split(jax.random.key(seed), 2 * LAYERS + 1))

    def layer() -> Any:
        kernel = jax.random.normal(next(key), (WIDTH, WIDTH))
        return {"mlp": {"kernel": kernel, "bias": jax.random.normal(next(key), (WIDTH,))}}

    decoder = {f"layers_{i}": layer() for i in range(LAYERS)}
    return {"decoder": decoder, "head": jax.random.normal(next(key), (WIDTH, 2))}


def loss(params: Any, batch: Any) -> Any:
    for i in range(LAYERS):
        layer = params["decoder"][f"layers_{i}"]["mlp"]
        batch = jnp.tanh(batch @ layer["kernel"] + layer["bias"])
    return jnp.mean((batch @ params["head"]) ** 2)


def train(state: State, tx: Any, steps: int) -> State:
    @jax.jit
    def update(state: State) -> State:
        batch = jax.random.normal(jax.random.key(state.step), (8, WIDTH))
        grads = jax.grad(loss)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

    for _ in range(steps):
        state = update(state)
    return state


def make_state(tx: Any) -> State:
    params = make_params()
    return train(State(jnp.int32(0), params, tx.init(params)), tx, 3)


def bits(state: Any) -> dict[Any, str]:
    return {path: describe(leaf) for path, leaf in leaves_of(state).items()}


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert bits(actual) == bits(expected)


def read(tensors: Any) -> dict[Any, Any]:
    return {path: tensor.read() for path, tensor in tensors.items()}


def unread(state: Any) -> dict[Any, Tensor]:
    """Return the leaves of a state, none of which may be read."""

    def fail() -> None:
        pytest.fail("nothing is read of what is refused")

    return {path: Tensor(tensor.leaf, fail) for path, tensor in of_state(state).items()}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_stacked_as_its_optimizer_would_begin(name: str, axis: int) -> None:
    tx = OPTIMIZERS[name]()
    state = make_state(tx)

    for known in (None, tx):
        stacked = cc.stack(state, axis=axis, tx=known)

        kernels = [state.params["decoder"][f"layers_{i}"]["mlp"]["kernel"] for i in range(LAYERS)]
        biases = [state.params["decoder"][f"layers_{i}"]["mlp"]["bias"] for i in range(LAYERS)]
        mlp = stacked.params["decoder"]["layers"]["mlp"]
        assert describe(mlp["kernel"]) == describe(jnp.stack(kernels, axis))
        assert describe(mlp["bias"]) == describe(jnp.stack(biases, axis))
        assert stacked.params["decoder"].keys() == {"layers"}
        begun = tx.init(stacked.params)
        assert jax.tree.structure(stacked.opt_state) == jax.tree.structure(begun)
        assert jax.tree.map(jnp.shape, stacked.opt_state) == jax.tree.map(jnp.shape, begun)
        back = cc.unstack(stacked, axis=axis, tx=known)
        assert_same(back, state)
        assert_same(cc.stack(back, axis=axis), stacked)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_there_and_back_as_if_nothing_had_happened(name: str) -> None:
    tx = OPTIMIZERS[name]()
    state = make_state(tx)

    back = cc.unstack(cc.stack(state, axis=1, tx=tx), axis=1, tx=tx)

    assert_same(train(back, tx, 3), train(state, tx, 3))


def test_any_form_becomes_any_other() -> None:
    tx = optax.adamw(1e-2)
    training = make_state(tx)
    scanned = cc.stack(training)
    served, scanned_served = {"params": training.params}, {"params": scanned.params}

    assert_same(cc.strip(training), served)
    assert_same(cc.strip(scanned), scanned_served)
    assert_same(cc.strip(served), served)
    assert_same(cc.stack(served), scanned_served)
    assert_same(cc.unstack(scanned_served), served)
    assert_same(cc.stack(cc.strip(training)), scanned_served)
    assert_same(cc.unstack(cc.strip(scanned)), served)
    assert_same(cc.strip(cc.unstack(scanned)), served)


@pytest.mark.parametrize("axis", [0, 1])
def test_leaves_of_a_checkpoint_become_the_same(axis: int) -> None:
    tx = optax.adamw(1e-2)
    state = make_state(tx)
    stacked = cc.stack(state, axis=axis)

    for actual, expected in [
        (cc.stack(of_state(state), axis=axis, tx=tx), stacked),
        (cc.unstack(of_state(stacked), axis=axis, tx=tx), state),
        (cc.unstack(cc.stack(of_state(state), axis=axis), axis=axis), state),
        (cc.strip(of_state(state)), {"params": state.params}),
    ]:
        leaves = of_state(expected)
        assert {p: t.leaf for p, t in actual.items()} == {p: t.leaf for p, t in leaves.items()}
        assert {p: describe(v) for p, v in read(actual).items()} == {
            p: describe(v) for p, v in read(leaves).items()
        }


def test_each_leaf_is_read_once_and_only_when_it_is_asked_for() -> None:
    state = make_state(optax.adamw(1e-2))
    counted: list[Any] = []

    def counting(tensors: Any) -> Any:
        def reader(path: Any, tensor: Tensor) -> Tensor:
            return Tensor(tensor.leaf, lambda: counted.append(path) or tensor.read())

        return {path: reader(path, tensor) for path, tensor in tensors.items()}

    parts = counting(of_state(state))
    stacked = cc.stack(parts)
    assert not counted
    read(stacked)
    assert sorted(counted) == sorted(parts)

    counted.clear()
    whole = counting(of_state(cc.stack(state)))
    layers = cc.unstack(whole)
    assert not counted
    read(layers)
    assert counted == list(whole)


def test_no_more_than_one_stacked_leaf_is_kept() -> None:
    kept: list[weakref.ref[Any]] = []

    def reader() -> Any:
        value = np.ones((LAYERS, WIDTH), np.float32)
        kept.append(weakref.ref(value))
        return value

    leaf = Leaf("array", (LAYERS, WIDTH), "float32")
    layers = cc.unstack({("layers", name): Tensor(leaf, reader) for name in "abc"})
    values = read(layers)

    assert len(values) == 3 * LAYERS
    assert [ref() is None for ref in kept] == [True, True, False]


DTYPES = ["float32", "bfloat16", "float16", "int8", "bool", "float8_e4m3fn", "uint32", "complex64"]


@st.composite
def layered(draw: st.DrawFn) -> Any:
    """Return alike layers, each with arrays of NumPy or of JAX, and typed keys."""
    count = draw(st.integers(1, 12))
    forms = draw(
        st.dictionaries(
            st.sampled_from(["kernel", "bias", "scale", "experts"]),
            st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
            min_size=1,
        )
    )
    host = draw(st.booleans())
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)

    def array(dtype: str, shape: list[int]) -> Any:
        value = rng.integers(0, 2 if dtype == "bool" else 100, shape).astype(jnp.dtype(dtype))
        return np.asarray(value) if host else jnp.asarray(value)

    layers = [{name: array(*form) for name, form in forms.items()} for _ in range(count)]
    keys = jax.random.split(jax.random.key(seed), count)
    for layer, key in zip(layers, keys, strict=True):
        layer["key"] = key
    return layers


@settings(deadline=None, max_examples=25)  # each new shape takes JAX longer
@given(layered(), st.integers(0, 4))
def test_layers_of_any_kind_come_back(layers: Any, axis: int) -> None:
    for state, group in [
        ({f"block{i}": layer for i, layer in enumerate(layers)}, "block{}"),
        ({"layers": layers}, "layers/{}"),
    ]:
        stacked = cc.stack(state, group, axis)
        tensors = cc.stack(of_state(state), group, axis)

        top = "block" if group == "block{}" else "layers"
        for name, whole in stacked[top].items():
            at = min(axis, layers[0][name].ndim)
            assert whole.shape[at] == len(layers)
            for i, layer in enumerate(layers):
                if name != "key":
                    part = np.asarray(np.take(np.asarray(whole), i, at))
                    assert describe(part) == describe(np.asarray(layer[name]))
        assert_same(cc.unstack(stacked, group, axis), state)
        assert {p: t.leaf for p, t in tensors.items()} == {
            p: t.leaf for p, t in of_state(stacked).items()
        }
        back = read(cc.unstack(tensors, group, axis))
        expected = read(of_state(state))
        assert {p: describe(v) for p, v in back.items()} == {
            p: describe(v) for p, v in expected.items()
        }


@pytest.mark.parametrize("name", TREATS_BY_SHAPE)
@pytest.mark.parametrize("form", [lambda x: x, unread], ids=["live", "tensors"])
@pytest.mark.parametrize("known", [False, True], ids=["", "tx"])
def test_an_optimizer_that_treats_weights_by_shape_is_refused(
    name: str, form: Callable[[Any], Any], known: bool
) -> None:
    tx = TREATS_BY_SHAPE[name]()
    params = make_params()
    state = form(State(jnp.int32(0), params, tx.init(params)))
    stacked = cc.stack({"params": params})["params"]
    other = form(State(jnp.int32(0), stacked, tx.init(stacked)))
    options = {"tx": tx} if known else {}

    with pytest.raises(cc.StateMismatch, match=r"begin with tx\.init"):
        cc.stack(state, **options)
    with pytest.raises(cc.StateMismatch, match=r"begin with tx\.init"):
        cc.unstack(other, **options)


def test_what_is_not_like_the_target_is_refused_with_the_reason() -> None:
    tx = TREATS_BY_SHAPE["adafactor"]()
    params = make_params()
    state = State(jnp.int32(0), params, tx.init(params))
    stacked = cc.stack({"params": params})["params"]
    target = jax.eval_shape(lambda: State(jnp.int32(0), stacked, tx.init(stacked)))

    with pytest.raises(cc.StateMismatch, match=r"(?s)v_row/\S* is float32\[.*begin with tx\.init"):
        cc.stack(state, like=target)


def test_an_optimizer_of_parts_is_stacked_if_it_would_begin_so() -> None:
    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "bias" if "bias" in str(path) else "rest", params
        )

    parts = {"bias": optax.adam(1e-2), "rest": optax.adamw(1e-2)}
    tx = optax.multi_transform(parts, labels)
    state = make_state(tx)

    stacked = cc.stack(state, tx=tx)

    assert jax.tree.structure(stacked.opt_state) == jax.tree.structure(tx.init(stacked.params))
    assert_same(cc.unstack(stacked, tx=tx), state)
    assert_same(cc.stack(state, like=jax.eval_shape(lambda: stacked)), stacked)
    with pytest.raises(cc.StateMismatch, match="does not treat all weights alike"):
        cc.stack(state)
    with pytest.raises(cc.StateMismatch, match="no part of the state is one of tx="):
        cc.stack(state, tx=optax.adamw(1e-2))
    with pytest.raises(cc.StateMismatch, match=r"not that of like=: step is int32\[\]"):
        cc.stack(state, like={"params": stacked.params})


def test_what_is_abstract_or_traced_becomes_so() -> None:
    tx = optax.adamw(1e-2)
    state = make_state(tx)
    abstract = jax.eval_shape(lambda: state)
    expected = jax.eval_shape(lambda: cc.stack(state, axis=1))

    traced = jax.eval_shape(partial(cc.stack, axis=1, tx=tx), abstract)

    assert traced == expected
    assert cc.stack(abstract, axis=1) == expected
    assert cc.unstack(expected, axis=1) == abstract
    assert jax.eval_shape(partial(cc.unstack, axis=1), expected) == abstract


def test_groups_are_stacked_within_groups_and_beside_each_other() -> None:
    def block(i: int) -> Any:
        experts = {
            f"expert_{j}": {"w": jnp.full((2, 5), 10 * i + j), "scale": jnp.int32(i)}
            for j in range(3)
        }
        return {"experts": experts, "gate": jnp.full((2,), i)}

    state = {
        "dense_layers_0": {"w": jnp.ones(3)},
        **{f"moe_layers_{i}": block(i) for i in range(4)},
    }
    groups = ("dense_layers", "moe_layers", "experts/expert_{}")

    stacked = cc.stack(state, groups, 1)

    whole = stacked["moe_layers"]["experts"]["expert"]["w"]
    assert jax.tree.map(jnp.shape, stacked) == {
        "dense_layers": {"w": (3, 1)},
        "moe_layers": {"experts": {"expert": {"w": (2, 4, 3, 5), "scale": (3, 4)}}, "gate": (2, 4)},
    }
    assert (
        whole[0, :, :, 0] == jnp.array([[10 * i + j for j in range(3)] for i in range(4)])
    ).all()
    assert_same(cc.unstack(stacked, groups, 1), state)
    tensors = cc.stack(of_state(state), groups, 1)
    assert np.array_equal(tensors["moe_layers", "experts", "expert", "w"].read(), whole)
    assert {p: describe(v) for p, v in read(cc.unstack(tensors, groups, 1)).items()} == {
        p: describe(np.asarray(v)) for p, v in leaves_of(state).items()
    }


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)


def test_nnx_states_are_stacked() -> None:
    tx = optax.adamw(1e-2)
    model = Model(0)
    weights = nnx.state(model, nnx.Param)
    state = {"model": weights, "opt_state": tx.init(weights)}

    stacked = cc.stack(state, "layers/{}", tx=tx)

    assert stacked["model"]["layers"]["linear"]["kernel"].shape == (LAYERS, WIDTH, WIDTH)
    begun = tx.init(stacked["model"])
    assert jax.tree.structure(stacked["opt_state"]) == jax.tree.structure(begun)
    back = cc.unstack(stacked, "layers/{}", tx=tx)
    assert_same(back, state)
    nnx.update(model, back["model"])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    whole = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    assert_same(cc.unstack(cc.stack(whole, "layers/{}"), "layers/{}"), whole)
    with pytest.raises(cc.StateMismatch, match=r"give its state, such as nnx.state\(model\)"):
        cc.stack({"model": model}, "layers/{}")


class Perceptron(eqx.Module):
    layers: Any
    head: eqx.nn.Linear
    activation: Any = jax.nn.relu

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0), LAYERS)
        self.layers = [eqx.nn.Linear(WIDTH, WIDTH, key=key) for key in keys]
        self.head = eqx.nn.Linear(WIDTH, 2, key=keys[0])


def test_equinox_modules_are_stacked() -> None:
    tx = optax.adamw(1e-2)
    model = Perceptron()
    state = {"model": model, "opt_state": tx.init(eqx.filter(model, eqx.is_array))}

    stacked = cc.stack(state, "layers/{}", tx=tx)

    keys = jax.random.split(jax.random.key(0), LAYERS)
    made = eqx.filter_vmap(lambda key: eqx.nn.Linear(WIDTH, WIDTH, key=key))(keys)
    assert_same(stacked["model"].layers, made)
    begun = tx.init(eqx.filter(stacked["model"], eqx.is_array))
    assert jax.tree.structure(stacked["opt_state"]) == jax.tree.structure(begun)
    assert_same(cc.unstack(stacked, "layers/{}", tx=tx), state)


def test_containers_stay_what_they_are() -> None:
    layers = {f"layers_{i}": {"w": jnp.full(2, i)} for i in range(LAYERS)}
    for kind in (FrozenDict, OrderedDict, partial(defaultdict, list)):
        state = {"a": kind({**layers, "b": {"c": jnp.ones(1)}}), "none": None}

        assert_same(cc.unstack(cc.stack(state)), state)
        assert type(cc.stack(state)["a"]) is type(state["a"])
    ordered = cc.unstack(cc.stack({"z": 1, **layers, "a": 2}))
    assert list(ordered) == ["z", *layers, "a"]


def test_a_train_state_keeps_its_functions() -> None:
    tx = optax.adamw(1e-2)
    state = TrainState.create(apply_fn=loss, params=make_params(), tx=tx)

    stacked = cc.stack(state, tx=state.tx)

    assert (stacked.apply_fn, stacked.tx) == (loss, tx)
    expected = TrainState.create(apply_fn=loss, params=stacked.params, tx=tx)
    assert_same(stacked, expected)
    assert_same(cc.unstack(stacked), state)
    assert_same(cc.strip(state), {"params": state.params})


def test_layers_with_other_functions_are_refused() -> None:
    layers = [{"f": jnp.tanh, "w": jnp.ones(2)}, {"f": jnp.sin, "w": jnp.ones(2)}]

    with pytest.raises(cc.StateMismatch, match="layers/0 and layers/1 are built differently"):
        cc.stack({"layers": layers}, "layers/{}")
    same = {"layers": [layers[0], {**layers[1], "f": jnp.tanh}]}
    assert cc.stack(same, "layers/{}")["layers"]["f"] is jnp.tanh


def test_boxes_that_name_their_axes_are_refused() -> None:
    boxed = {f"layers_{i}": {"w": nn.Partitioned(jnp.ones((2, 2)), ("in", "out"))} for i in (0, 1)}

    with pytest.raises(cc.StateMismatch, match="Partitioned that names its axes"):
        cc.stack(boxed)
    assert cc.stack(nn.meta.unbox(boxed))["layers"]["w"].shape == (2, 2, 2)


def test_a_frozen_part_of_an_optimizer_without_leaves_is_kept() -> None:
    params = make_params()
    mask = {"decoder": False, "head": True}
    tx = optax.masked(optax.adam(1e-2), mask)
    state = State(jnp.int32(0), params, tx.init(params))

    stacked = cc.stack(state, tx=tx)

    assert jax.tree.structure(stacked.opt_state) == jax.tree.structure(tx.init(stacked.params))
    assert_same(cc.unstack(stacked, tx=tx), state)


def test_leaves_are_read_from_a_checkpoint_no_more_than_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(optax.adamw(1e-2))
    stacked = cc.stack(state, axis=1)
    one = max(leaf.nbytes for leaf in jax.tree.leaves(state))
    monkeypatch.setattr("ckpt_callbacks.tensors._AHEAD", one)  # as if leaves were large
    loaded: list[Any] = []
    load = Contents.load
    monkeypatch.setattr(
        Contents,
        "load",
        lambda self, wanted, *a, **k: loaded.extend(wanted) or load(self, wanted, *a, **k),
    )

    for saved, convert, expected in [
        (state, cc.stack, stacked),
        (stacked, cc.unstack, state),
    ]:
        root = save(tmp_path / convert.__name__, saved)
        leaves = of_contents(Contents(cc.find(root, 0).path))
        made = convert(leaves, axis=1)
        loaded.clear()
        values = read(made)

        assert {p: describe(v) for p, v in values.items()} == {
            p: describe(v) for p, v in read(of_state(expected)).items()
        }
        ahead = len(loaded) - len(leaves)
        assert 0 <= ahead <= 3, "small leaves that follow the first ones were read ahead"


def test_a_checkpoint_as_maxtext_has_it_is_taken_apart(tmp_path: Path) -> None:
    tx = optax.adamw(1e-2)
    params = {"params": make_params()}
    state = {"step": jnp.int32(7), "params": params, "opt_state": tx.init(params)}
    scanned = cc.stack(state, "decoder/layers_{}", axis=1, tx=tx)
    with ocp.CheckpointManager(tmp_path / "checkpoints", item_names=("items",)) as manager:
        manager.save(7, args=ocp.args.Composite(items=ocp.args.PyTreeSave(scanned)))

    restored = cc.restore(tmp_path / "checkpoints", like=jax.eval_shape(lambda: scanned))
    named = cc.restore(tmp_path / "checkpoints")

    assert_same(restored, scanned)
    assert_same(cc.unstack(restored, "decoder/layers_{}", axis=1, tx=tx), state)
    assert_same(cc.unstack(cc.strip(named), axis=1), {"params": params})
    tensors = of_contents(Contents(tmp_path / "checkpoints" / "7"))
    assert {p: describe(v) for p, v in read(cc.unstack(cc.strip(tensors), axis=1)).items()} == {
        p: describe(v) for p, v in read(of_state({"params": params})).items()
    }


def test_small_layers_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {f"layers_{i}": {"w": jnp.full(4, i), "b": jnp.full(4, -i)} for i in range(12)}
    root = save(tmp_path / "run", {"params": layers})
    loads: list[int] = []
    load = Contents.load

    def counted(self: Contents, wanted: Any, *more: Any, **options: Any) -> Any:
        loads.append(len(wanted))
        return load(self, wanted, *more, **options)

    monkeypatch.setattr(Contents, "load", counted)
    leaves = cc.stack(of_contents(Contents(cc.find(root, 0).path)), axis=1)
    found = {path: tensor.read() for path, tensor in leaves.items()}

    assert loads == [12, 12]
    expected = cc.stack({"params": layers}, axis=1)["params"]["layers"]
    assert found["params", "layers", "w"].tolist() == expected["w"].tolist()
    assert found["params", "layers", "b"].tolist() == expected["b"].tolist()
    loads.clear()
    monkeypatch.setattr("ckpt_callbacks.tensors._AHEAD", 3 * 16)  # bytes of three
    assert leaves["params", "layers", "w"].read().tolist() == expected["w"].tolist()
    assert loads == [3, 3, 3, 3]


W = np.ones((2, 3), np.float32)


@pytest.mark.parametrize("group", [3, None, ["layers", 3], b"layers"])
def test_what_is_no_pattern_is_told(group: Any) -> None:
    for function in (cc.stack, cc.unstack):
        with pytest.raises(cc.ConfigError, match="group must be a pattern such as"):
            function({"layers_0": {"w": W}}, group=group)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"layers_0": {"w": W}, "layers_2": {"w": W}}, "has the numbers 0, 2: they must be 0, 1"),
        ({"layers_1": {"w": W}}, "has the numbers 1"),
        (
            {"layers_0": {"w": W}, "layers_1": {"w": W, "b": W}},
            r"layers_0/b is not there, and layers_1/b is float32\[2, 3\]",
        ),
        (
            {"layers_0": {"w": W}, "layers_1": {"w": W.T}},
            r"layers_0/w is float32\[2, 3\], and layers_1/w is float32\[3, 2\]",
        ),
        (
            {"layers_0": {"w": W}, "layers_1": {"w": W.astype("int8")}},
            r"layers_0/w is float32\[2, 3\], and layers_1/w is int8\[2, 3\]",
        ),
        ({"layers_0": {"w": 1.5}, "layers_1": {"w": 2.5}}, "layers_0/w is no array but float"),
        ({"layers_0": {"w": W}, "layers": {"w": W}}, "layers is in the way"),
        ({"layers": {"w": W}}, "nothing is named layers_{}: layers is stacked already"),
        ({"blocks_0": {"w": W}}, "nothing is named layers_{}; the names with a number are blocks_"),
    ],
)
def test_what_cannot_be_stacked_is_told(state: Any, message: str) -> None:
    for form in (state, unread(state)):
        with pytest.raises(cc.StateMismatch, match=message):
            cc.stack(form)


def test_a_list_with_other_things_beside_its_layers_is_refused() -> None:
    with pytest.raises(cc.StateMismatch, match="layers/scale is in the way"):
        cc.stack({"layers": {"0": {"w": W}, "scale": W}}, "layers/{}")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"layers_0": {"w": W}}, "nothing is named layers: there is one entry a layer already"),
        ({"layers": [{"w": W}]}, "layers has one entry a layer: layers/0/w"),
        ({"layers": {"w": W, "b": np.ones(3)}}, r"3 long in layers/b, .*, and 2 in layers/w"),
        ({"layers": {"w": np.ones(())}}, "has no axis of layers"),
        ({"layers": {"w": np.ones((0, 2))}}, "is 0 long"),
        ({"layers": {"w": 3}}, "layers/w is no array but int"),
        ({"layers": {"w": W}, "layers_1": {"w": W}}, "layers_1 is in the way"),
    ],
)
def test_what_cannot_be_unstacked_is_told(state: Any, message: str) -> None:
    for form in (state, unread(state)):
        with pytest.raises(cc.StateMismatch, match=message):
            cc.unstack(form)


@pytest.mark.parametrize("group", ["", "{}", "_{}", "layers_{}_x", "{}_{}", "/{}", (), "a_{}/b"])
def test_what_is_no_group_is_refused(group: Any) -> None:
    with pytest.raises(cc.ConfigError, match="group"):
        cc.stack({"layers_0": {"w": W}}, group)


@pytest.mark.parametrize("axis", [-1, True, "0"])
def test_what_is_no_axis_is_refused(axis: Any) -> None:
    with pytest.raises(cc.ConfigError, match="axis must be 0 or more"):
        cc.unstack({"layers": {"w": W}}, axis=axis)


def test_weights_are_found_by_name() -> None:
    state = {"params": {"w": W}, "batch_stats": {"mean": W}, "opt_state": {"mu": W}}

    assert cc.strip(state, also="batch_stats").keys() == {"params", "batch_stats"}
    assert cc.strip(of_state(state), ["batch_stats"]).keys() == {
        ("params", "w"),
        ("batch_stats", "mean"),
    }
    for form in (state, of_state(state)):
        with pytest.raises(cc.StateMismatch, match="named ema; there is batch_stats, opt_state"):
            cc.strip(form, also="ema")
    actor = {"actor": {"w": W}, "step": 1}
    with pytest.raises(cc.StateMismatch, match="named model, params or weights; there is actor"):
        cc.strip(actor)
    assert cc.strip(actor, also="actor") == {"actor": actor["actor"]}
    with pytest.raises(cc.StateMismatch, match="there is nothing"):
        cc.strip(of_state(jnp.ones(2)))


def test_layers_that_are_lists_are_told_from_lists_of_layers() -> None:
    state = {f"layers_{i}": (jnp.full((3, 3), i), jnp.full(3, i)) for i in range(3)}

    stacked = cc.stack(state)

    assert_same(cc.unstack(stacked, "layers_{}"), state)
    with pytest.raises(cc.StateMismatch, match="if it is a layer that is a list, name it 'layers_"):
        cc.unstack(stacked)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    numbers = [7, 10, 2, 0, 11, 1, 9, 3, 8, 4, 6, 5]
    state = {f"layers_{i}": np.full(2, i) for i in numbers}

    for stacked in (cc.stack(state)["layers"], cc.stack(of_state(state))[("layers",)].read()):
        assert stacked[:, 0].tolist() == list(range(12))


def test_a_lone_array_has_no_form() -> None:
    for convert in (cc.stack, cc.unstack, cc.strip):
        with pytest.raises(cc.StateMismatch, match="nothing"):
            convert(W)


def test_a_name_in_front_narrows_a_group() -> None:
    state = {"encoder": {"layers_0": {"w": W}}, "decoder": {"layers_0": {"w": W}}}

    stacked = cc.stack(state, "decoder/layers_{}")

    assert jax.tree.map(np.shape, stacked) == {
        "encoder": {"layers_0": {"w": (2, 3)}},
        "decoder": {"layers": {"w": (1, 2, 3)}},
    }
    assert Leaf("array", (1, 2, 3), "float32") == of_state(stacked)["decoder", "layers", "w"].leaf
    assert_same(cc.unstack(stacked, "decoder/layers_{}"), state)
