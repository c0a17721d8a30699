"""Weights from whatever holds them, in the form that a model has them."""

import logging
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_callbacks as cc
from foreign import standard
from saved import save, tree_digest


def params(value: float = 1.0, dtype: Any = jnp.float32) -> dict[str, Any]:
    def layer(i: int) -> dict[str, Any]:
        return {"kernel": jnp.full((2, 3), value + i, dtype), "bias": jnp.full(3, value, dtype)}

    return {"layers": {str(i): layer(i) for i in range(2)}, "head": {"kernel": jnp.ones((3, 1))}}


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    state = {"params": params(), "opt_state": {"mu": jnp.zeros(3)}, "step": 3}
    return save(tmp_path / "run", state)


SOURCES = {
    "a run": lambda root: root,
    "a checkpoint": lambda root: root / "0",
    "a file": lambda root: cc.export(root, "all.npz"),
    "a file of weights": lambda root: cc.export(root, "params.npz", only="params"),
    "a file of bare weights": lambda _: cc.export(params(), "bare.npz"),
    "a file wrapped twice": lambda _: cc.export({"params": {"params": params()}}, "twice.npz"),
    "another's checkpoint": lambda root: theirs(root.parent / "theirs", params()),
    "another's, wrapped": lambda root: theirs(root.parent / "wrapped", {"model": params()}),
    "a live state": lambda _: {"params": params(), "step": 3},
}


def theirs(path: Path, tree: Any) -> Path:
    standard(path, tree)
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_from_every_source_into_every_model(source: str, root: Path) -> None:
    there = SOURCES[source](root)

    assert tree_digest(cc.load_params(there)) == tree_digest(on_host(params()))
    bare = jax.eval_shape(lambda: params(0))
    for wrap in (
        lambda tree: tree,
        lambda tree: {"params": tree},
        lambda tree: {"model": {"params": tree}},
        lambda tree: {"params": tree, "opt_state": {"nu": jnp.ones(2)}},  # whose rest stays
    ):
        for like in (wrap(params(0)), wrap(bare)):
            loaded = cc.load_params(there, like)
            assert tree_digest(loaded) == tree_digest(wrap(params()))


def test_what_is_chosen_comes_and_the_rest_stays(root: Path) -> None:
    for like in ({"model": params(0)}, params(0)):
        loaded = cc.load_params(root, like, only=["params/layers", "!**/bias"])
        (model,) = loaded.values() if "model" in loaded else (loaded,)
        assert float(model["layers"]["1"]["kernel"][0, 0]) == 2
        assert float(model["layers"]["1"]["bias"][0]) == 0
    assert set(cc.load_params(root, only="opt_state")["opt_state"]) == {"mu"}
    assert set(cc.load_params(root, only=None)) == {"params", "opt_state", "step"}
    averages = save(root.parent / "ema", {"params": params(), "ema": params(9)})
    loaded = cc.load_params(averages, {"ema": params(0)}, only="ema")
    assert tree_digest(loaded["ema"]) == tree_digest(params(9))
    with pytest.raises(cc.CheckpointNotFound, match="'params/x' matches nothing"):
        cc.load_params(root, params(0), only="params/x")


def test_weights_with_what_belongs_to_them(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {"params": params(), "batch_stats": {"mean": jnp.ones(2)}, "opt_state": {"n": 1}}
    run = save(root.parent / "norm", state)
    like = {"params": params(0), "batch_stats": {"mean": jnp.zeros(2)}, "step": 5}

    loaded = cc.load_params(run, like, only=["params", "batch_stats"])

    assert tree_digest(loaded) == tree_digest({**state, "step": 5, "opt_state": {}})
    assert not caplog.messages
    abstract = jax.eval_shape(lambda: {"params": params(), "batch_stats": {"mean": jnp.ones(2)}})
    cc.load_params(run, abstract)
    assert caplog.messages == [f"{run}: nothing was loaded for batch_stats, which stays abstract"]


def test_what_may_be_weights_is_not_left_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"model": {"w": np.ones(2)}, "lm_head": {"w": np.ones(2)}, "step": 3}
    run = save(tmp_path / "llama", state)

    file = cc.export(run, "llama.safetensors")

    assert set(cc.load_params(file)) == {"w"}
    (told,) = caplog.messages
    assert told == (
        f"{file}: model is taken for its weights, and the rest is left as it is: lm_head; "
        "only=None takes everything"
    )
    like = {"model": {"w": np.zeros(2)}, "lm_head": {"w": np.zeros(2)}, "step": 0}
    cc.load_params(file, like)
    assert "the state: model is taken" in caplog.messages[-1]
    caplog.clear()
    assert tree_digest(cc.load_params(file, like, only=None)) == tree_digest(state)
    assert cc.load_params(file, like, only="model")["lm_head"]["w"].tolist() == [0, 0]
    assert not caplog.messages


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "msgpack", "eqx"])
def test_of_a_file_of_others_everything_is_taken(
    suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"model": {"w": np.ones(2)}, "lm_head": {"w": np.ones(2)}}
    zeros = jax.tree.map(np.zeros_like, state)
    options: Any = {"like": state} if suffix == "eqx" else {}
    file = cc.export(state, f"theirs.{suffix}", **options)

    if suffix != "eqx":
        assert tree_digest(cc.load_params(file)) == tree_digest(state)
    assert tree_digest(cc.load_params(file, zeros)) == tree_digest(state)
    if suffix != "eqx":
        training = {**zeros, "opt_state": {"nu": np.zeros(3)}}
        loaded = cc.load_params(file, training)
        assert tree_digest(loaded) == tree_digest({**training, **state})
        wrapped = cc.load_params(file, {"params": zeros})
        assert tree_digest(wrapped["params"]) == tree_digest(state)
        assert not caplog.messages
        own = {"model": zeros, "opt_state": {"nu": np.zeros(3)}}
        assert tree_digest(cc.load_params(file, own)["model"]) == tree_digest(state)
        with pytest.raises(cc.StateMismatch, match="the checkpoint has lm_head/w, model/w"):
            cc.load_params(file, zeros["model"])
        assert tree_digest(cc.load_params(file, zeros["model"], only="model")) == tree_digest(
            state["model"]
        )


def test_params_are_what_a_file_of_others_calls_its_weights() -> None:
    state = {"params": {"w": np.ones(2)}, "opt_state": {"nu": np.ones(2)}}
    assert set(cc.load_params(cc.export(state, "train_state.msgpack"))) == {"w"}


def test_an_item_is_read_by_its_checkpoint(root: Path) -> None:
    for read in (cc.load_params, cc.restore, cc.inspect):
        with pytest.raises(cc.ConfigError, match=r"is a part of the checkpoint .*only='params'"):
            read(root / "0" / "params")


def test_names_of_others_are_changed_before(root: Path) -> None:
    def rename(tensors: Any) -> Any:
        return {tuple(n.replace("weight", "kernel") for n in p): t for p, t in tensors.items()}

    weights = {"layer": {"weight": np.ones(2, np.float32)}}
    like = {"params": {"layer": {"kernel": jnp.zeros(2)}}}
    loaded = cc.load_params(cc.export(weights, "hf.npz"), like, transform=rename)
    assert loaded["params"]["layer"]["kernel"].tolist() == [1, 1]


def test_models_of_frameworks(root: Path) -> None:
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    run = save(root.parent / "nnx", {"model": module, "optimizer": optimizer(module)})
    expected = nnx.state(module, nnx.Param)
    sources = (run, cc.export(run, "nnx.npz"), theirs(root.parent / "state", nnx.state(module)))
    for source in sources:
        fresh = nnx.Linear(2, 3, rngs=nnx.Rngs(2))
        assert cc.load_params(source, fresh) is fresh
        assert tree_digest(nnx.state(fresh, nnx.Param)) == tree_digest(expected)
        empty = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(2)))
        assert tree_digest(nnx.state(cc.load_params(source, empty))) == tree_digest(expected)

    mlp = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(1))
    file = cc.export(mlp, "mlp.npz")
    like = eqx.filter_eval_shape(eqx.nn.MLP, 2, 1, 4, 1, key=jax.random.key(2))
    assert tree_digest(cc.load_params(file, like)) == tree_digest(mlp)


def optimizer(module: nnx.Module) -> Any:
    return nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.Param)


def test_arrays_go_where_the_model_has_them(root: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = NamedSharding(mesh, P("x"))
    like = params(0) | {"head": {"kernel": np.zeros((3, 1), np.float32)}}
    like["layers"]["0"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)

    loaded = cc.load_params(root, like)

    assert loaded["layers"]["0"]["bias"].sharding == sharding
    assert isinstance(loaded["head"]["kernel"], np.ndarray)
    assert isinstance(loaded["layers"]["1"]["bias"], jax.Array)


def test_the_dtype_is_that_which_was_asked_for(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    like = params(0, jnp.bfloat16)
    with caplog.at_level(logging.WARNING, "ckpt_callbacks"):
        saved = cc.load_params(root, like)
    assert saved["layers"]["0"]["bias"].dtype == jnp.float32
    assert "layers/0/bias (float32, not bfloat16)" in caplog.text
    cast = cc.load_params(root, like, dtype="cast")
    assert {x.dtype.name for x in jax.tree.leaves(cast["layers"])} == {"bfloat16"}
    with pytest.raises(cc.StateMismatch, match=r"float32\[3\] in the checkpoint"):
        cc.load_params(root, like, dtype="error")
    with pytest.raises(cc.ConfigError, match="dtype must be one of"):
        cc.load_params(root, like, dtype="float32")  # type: ignore[call-overload]


def test_what_jax_would_cut_is_told(root: Path) -> None:
    file = cc.export({"w": np.full(2, 1 / 3)}, "wide.npz")

    with pytest.raises(cc.StateMismatch, match="which JAX would cut to 32 bits"):
        cc.load_params(file, {"w": jnp.zeros(2)})
    assert cc.load_params(file, {"w": np.zeros(2)})["w"].tolist() == [1 / 3] * 2
    assert cc.load_params(file, {"w": jnp.zeros(2)}, dtype="cast")["w"].dtype == jnp.float32


def test_all_that_does_not_fit_is_told_at_once(root: Path) -> None:
    like = {"params": params(0)}
    like["params"]["layers"]["0"]["kernel"] = jnp.zeros((3, 2))
    like["params"]["layers"]["1"].pop("bias")
    like["params"]["more"] = jnp.zeros(1)

    for source in (root, cc.export(root, "a.npz")):
        with pytest.raises(cc.StateMismatch) as error:
            cc.load_params(source, like)
        text = str(error.value)
        assert str(source) in text
        assert "layers/0/kernel: shape (3, 2) in the state, (2, 3) in the checkpoint" in text
        assert "layers/1/bias: not in the state" in text
        assert "more: not in the checkpoint" in text
        assert "The rest fits" not in text, "by names that only= does not take"
    with pytest.raises(cc.StateMismatch, match="head/kernel is a ndarray of dtype <U1, which cann"):
        cc.load_params(root, {"layers": params()["layers"], "head": {"kernel": np.array(["a"])}})


def test_keys_and_values_of_python_come_as_they_were() -> None:
    state = {"key": jax.random.key(3), "rate": 0.5, "name": "a", "n": 2**70}
    file = cc.export(state, "a.npz")

    like = {"key": jax.random.key(0), "rate": 0.0, "name": "", "n": 0}
    assert tree_digest(cc.load_params(file, like)) == tree_digest(state)
    loaded = cc.load_params(file)
    assert np.array_equal(loaded["key"], jax.random.key_data(state["key"]))
    with pytest.raises(cc.StateMismatch, match="make them with impl='threefry2x32'"):
        cc.load_params(file, like | {"key": jax.random.key(0, impl="rbg")})


def test_what_was_loaded_is_nobody_elses() -> None:
    mine = {"w": np.zeros(1000, np.float32)}
    loaded = [cc.load_params(mine), cc.load_params(mine, {"w": jnp.zeros(1000)})]

    mine["w"][:] = 1

    assert [float(tree["w"].sum()) for tree in loaded] == [0, 0]


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "msgpack"])
def test_arrays_of_a_file_are_those_of_the_model_alone(suffix: str) -> None:
    state = {name: np.full(1000, 1, np.float32) for name in "ab"}
    file = cc.export(state, f"a.{suffix}")
    loaded = [cc.load_params(file), cc.load_params(file, {n: jnp.zeros(1000) for n in "ab"})]

    file.write_bytes(bytes(file.stat().st_size))
    loaded[0]["a"][0] = 2
    later = jax.jit(lambda w: w + 1, donate_argnums=0)(loaded[1]["b"])

    assert float(later.sum()) == 2000
    assert [float(tree["a"].sum()) for tree in loaded] == [1001, 1000]


def test_a_lone_array(tmp_path: Path) -> None:
    array = jnp.arange(3.0)
    for source in (
        cc.export(array, "a.npy"),
        cc.export(array, "a.npz"),
        save(tmp_path / "r", array),
    ):
        assert cc.load_params(source, jnp.zeros(3)).tolist() == [0, 1, 2]
        assert cc.load_params(source)["leaf"].tolist() == [0, 1, 2]


def test_a_leaf_with_others_below_it_needs_a_state() -> None:
    np.savez("both.npz", **{"a.b": np.ones(1), "a": np.ones(1)})

    with pytest.raises(cc.StateMismatch, match="a is a leaf, and a/b is below it"):
        cc.load_params("both.npz")


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_in_one_array_each_and_in_one_of_their_own(axis: int, root: Path) -> None:
    layers = params()["layers"].values()
    stacked = {
        "layers": jax.tree.map(lambda *x: jnp.stack(x, min(axis, x[0].ndim)), *layers),
        "head": params()["head"],
    }
    apart = {f"layers_{i}": layer for i, layer in enumerate(layers)} | {"head": params()["head"]}
    joined = cc.export({"params": stacked}, "stacked.npz")

    for group in (None, "layers"):
        options: Any = {"axis": axis, "group": group}
        loaded = cc.load_params(joined, params(0), **options)
        assert tree_digest(loaded) == tree_digest(params())
        like = jax.eval_shape(lambda: {"model": stacked})
        assert tree_digest(cc.load_params(root, like, **options)["model"]) == tree_digest(stacked)
        loaded = cc.load_params(joined, jax.eval_shape(lambda: apart), **options)
        assert tree_digest(loaded) == tree_digest(apart)
        file = cc.export(apart, f"apart{group}.npz")
        assert tree_digest(cc.load_params(file, like, **options)["model"]) == tree_digest(stacked)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "group": ({"group": "blocks"}, "no layers are called 'blocks' on either side: there is layers"),
    "group in front": ({"group": "decoder/layers_{}"}, "no layers are called 'decoder/layers_{}'"),
    "group of a number": ({"group": 3}, "group must be a pattern such as .*, not 3"),
    "no pattern": ({"group": "{}x"}, "group must be a pattern"),
    "axis": ({"axis": -1}, "axis must be 0 or more, not -1"),
    "axis of text": ({"axis": "0"}, "axis must be 0 or more, not '0'"),
    "only": ({"only": 3}, "only must be a path of the state .*, not 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_that_is_wrong_is_told_also_where_it_is_not_needed(
    case: str, root: Path
) -> None:
    options, message = WRONG[case]
    with pytest.raises(cc.ConfigError, match=message):
        cc.load_params(root, params(0), **options)


def test_a_group_without_a_state_to_fit_is_told(root: Path) -> None:
    with pytest.raises(cc.ConfigError, match="group= names the layers that are to have the form"):
        cc.load_params(root, group="layers")


def test_a_group_may_be_narrowed_and_be_in_the_form_that_is_wanted(root: Path) -> None:
    assert tree_digest(cc.load_params(root, params(0), group="layers")) == tree_digest(params())
    layers = list(params()["layers"].values())
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    both = {"a": {"layers": stacked}, "b": {"layers": stacked}}
    apart = {f"layers_{i}": layer for i, layer in enumerate(layers)}

    loaded = cc.load_params(both, {**both, "b": apart}, only=None, group="b/layers_{}")

    assert tree_digest(loaded) == tree_digest({**both, "b": apart})
