"""Checkpoints that Orbax wrote for others, of all kinds, are read bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from orbax.checkpoint import v1

import ckpt_callbacks as cc
from foreign import WHOLE, EquinoxSave, composite, leaves, managed, manager, standard, v1_pytree

Writer = Callable[[Path, Any], None]


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class Agent(NamedTuple):
    critic: dict[str, jax.Array]
    keys: jax.Array
    raw: jax.Array
    count: int


def plain(seed: int) -> dict[str, Any]:
    w = jax.random.normal(jax.random.key(seed), (3, 2))
    return {
        "params": {"w": w, "half": w.astype(jnp.bfloat16), "layers": [{"b": w[0]}, {"b": w[1]}]},
        "critic": {"value": w * 2},
        "host": np.full(2, seed / 3),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "raw": jax.random.PRNGKey(seed),
        "step": seed,
        "rate": seed / 7,
    }


def named(seed: int) -> Agent:
    w = jax.random.normal(jax.random.key(seed), (2,))
    return Agent({"value": w}, jax.random.split(jax.random.key(seed)), jax.random.PRNGKey(3), seed)


def optimizer(seed: int) -> tuple[Any, ...]:
    transform = optax.chain(optax.clip(1.0), optax.MultiSteps(optax.adamw(0.1), 2))
    params = {"w": jax.random.normal(jax.random.key(seed), (3, 2))}
    state = transform.init(params)
    for _ in range(seed):
        _, state = transform.update(params, state, params)
    return params, state


def linen(seed: int) -> TrainState:
    module = nn.Dense(2)
    variables = module.init(jax.random.key(seed), jnp.ones((1, 3)))
    state = TrainState.create(apply_fn=module.apply, params=variables["params"], tx=optax.adam(0.1))
    for _ in range(seed):
        state = state.apply_gradients(grads=state.params)
    return state.replace(step=jnp.int32(seed))


def nnx_state(seed: int) -> dict[str, Any]:
    model = Net(seed)
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)}


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state
    )


@pytest.mark.parametrize("make", [plain, named, optimizer, linen])
@pytest.mark.parametrize("write", WHOLE)
def test_a_state_comes_back_bit_for_bit(
    write: Writer, make: Callable[[int], Any], tmp_path: Path
) -> None:
    saved = make(3)
    write(tmp_path / "there", saved)

    for like in (make(1), abstract(make(1))):
        assert leaves(cc.restore(tmp_path / "there", like=like)) == leaves(saved)


@pytest.mark.parametrize("write", WHOLE)
def test_live_nnx_objects_take_a_state_that_was_saved_with_its_level_of_values(
    write: Writer, tmp_path: Path
) -> None:
    saved = nnx_state(3)
    write(tmp_path / "there", nnx.state(saved))

    live = nnx_state(1)
    assert cc.restore(tmp_path / "there", like=live)["model"] is live["model"]
    empty = nnx.eval_shape(lambda: nnx_state(1))
    for state in (live, cc.restore(tmp_path / "there", like=empty)):
        assert leaves(nnx.state(state)) == leaves(nnx.state(saved))
    alone = cc.restore(tmp_path / "there", like={"model": Net(1)}, only="model")
    assert leaves(nnx.state(alone["model"])) == leaves(nnx.state(saved["model"]))


@pytest.mark.parametrize("write", WHOLE)
def test_without_a_state_the_names_are_those_on_disk(write: Writer, tmp_path: Path) -> None:
    saved = plain(3)
    write(tmp_path / "there", saved)

    layers = dict(zip("01", saved["params"]["layers"], strict=True))
    expected = saved | {"params": saved["params"] | {"layers": layers}}
    assert leaves(cc.restore(tmp_path / "there")) == leaves(expected)
    assert leaves(cc.restore(tmp_path / "there", only="params/w")) == leaves(
        {"params": {"w": saved["params"]["w"]}}
    )


def test_items_are_parts_of_the_state(tmp_path: Path) -> None:
    params, state = optimizer(3)
    composite(tmp_path / "v0", {"params": params, "opt_state": state}, {"rate": 0.1, "on": [True]})
    v1.save_checkpointables(
        tmp_path / "v1", {"params": params, "opt_state": state}, custom_metadata={"run": "mine"}
    )
    fresh = optimizer(1)
    saved = {"params": params, "opt_state": state}

    for source in (tmp_path / "v0", tmp_path / "v0" / "3", tmp_path / "v1"):
        like = {"params": fresh[0], "opt_state": fresh[1]}
        assert leaves(cc.restore(source, like=like)) == leaves(saved)
        (tmp_path / "v0" / "3" / "opt_state").rename(tmp_path / "away")  # it is not touched
        part = cc.restore(source, like=like, only="params")
        assert leaves(part) == leaves(like | {"params": params})
        assert leaves(cc.restore(source, only="params")) == leaves({"params": params})
        (tmp_path / "away").rename(tmp_path / "v0" / "3" / "opt_state")

    config = {"rate": 0.1, "on": {"0": True}}
    assert cc.restore(tmp_path / "v0")["config"] == config
    assert cc.restore(tmp_path / "v0", only="config") == {"config": config}
    like = {"params": fresh[0], "opt_state": fresh[1], "config": {"rate": 0.0, "on": [False]}}
    assert cc.restore(tmp_path / "v0", like=like)["config"] == {"rate": 0.1, "on": [True]}


def test_an_item_named_as_a_part_that_holds_all_parts_is_the_state(tmp_path: Path) -> None:
    saved = {"state": {"w": jnp.ones(2)}, "step": 4}
    v1_pytree(tmp_path / "whole", saved)  # an item called `state`
    v1.save_checkpointables(tmp_path / "parts", {"state": saved["state"], "more": {"n": 1}})

    like = {"state": {"w": jnp.zeros(2)}, "step": 0}
    assert leaves(cc.restore(tmp_path / "whole", like=like)) == leaves(saved)
    like = {"state": {"w": jnp.zeros(2)}, "more": {"n": 0}}
    restored = cc.restore(tmp_path / "parts", like=like)
    assert leaves(restored) == leaves({"state": saved["state"], "more": {"n": 1}})


def test_a_single_item_of_any_name_can_be_the_whole_state(tmp_path: Path) -> None:
    saved = {"w": jnp.arange(3)}
    managed(tmp_path / "there", {0: v0.args.Composite(weights=v0.args.StandardSave(saved))})

    assert leaves(cc.restore(tmp_path / "there", like={"w": jnp.zeros(3, int)})) == leaves(saved)
    like = {"weights": {"w": jnp.zeros(3, int)}}
    assert leaves(cc.restore(tmp_path / "there", like=like)) == leaves({"weights": saved})


@pytest.mark.parametrize("options", [{}, {"step_prefix": "at", "step_format_fixed_length": 6}])
def test_a_directory_of_a_manager_has_steps(options: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "there"
    steps = {s: v0.args.StandardSave({"w": jnp.full(2, s)}) for s in (2, 10)}
    managed(root, steps, lambda s: {"score": -s}, **options)
    like = {"w": jnp.zeros(2, int)}

    assert cc.restore(root, like=like)["w"][0] == 10
    assert cc.restore(root, like=like, which=2)["w"][0] == 2
    for which in ("best", 3):
        with pytest.raises(cc.CheckpointNotFound, match="with the steps 2, 10"):
            cc.restore(root, like=like, which=which)
    with pytest.raises(cc.ConfigError, match="neither a run directory nor a checkpoint"):
        cc.restore(tmp_path, like=like)


@pytest.mark.parametrize("write", [standard, manager])
def test_old_checkpoints_lack_a_file(write: Writer, tmp_path: Path) -> None:
    saved = plain(3)
    write(tmp_path / "there", saved)
    (file,) = (tmp_path / "there").rglob("_CHECKPOINT_METADATA")
    file.unlink()

    assert leaves(cc.restore(tmp_path / "there", like=plain(1))) == leaves(saved)
    with pytest.raises(cc.ConfigError, match="adopt: "):
        cc.adopt(tmp_path / "there", tmp_path / "run")


@pytest.mark.parametrize("write", [standard, manager, v1_pytree])
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("key", jax.random.PRNGKey(0)),
        ("raw", jax.random.key(0)),
        ("key", jax.random.key(0, impl="unsafe_rbg")),
        ("keys", jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 3)),  # of the same shape
    ],
)
@pytest.mark.parametrize("as_numpy", [False, True])
def test_keys_of_another_kind_are_told(
    write: Writer, name: str, other: jax.Array, as_numpy: bool, tmp_path: Path
) -> None:
    write(tmp_path / "there", plain(3))

    with pytest.raises(cc.StateMismatch, match=f"{name}: .* in the state, .* in the checkpoint"):
        cc.restore(tmp_path / "there", like=plain(1) | {name: other}, as_numpy=as_numpy)


def test_all_that_does_not_fit_is_told_by_the_names_on_disk(tmp_path: Path) -> None:
    standard(tmp_path / "there", nnx.state(Net(0)))
    like = Net(0)
    like.layers[0].kernel = nnx.Param(jnp.ones((5, 4)))
    like.norm.scale = nnx.data(None)

    with pytest.raises(cc.StateMismatch) as error:
        cc.restore(tmp_path / "there", like=like)

    assert "layers/0/kernel: shape (5, 4) in the state, (3, 4) in the checkpoint" in str(
        error.value
    )
    assert "norm/scale/value: not in the state" in str(error.value)


# Equinox


def eqx_model(seed: int, width: int = 4) -> eqx.nn.MLP:
    return eqx.nn.MLP(3, 2, width, 1, key=jax.random.key(seed))


@pytest.fixture
def with_equinox(tmp_path: Path) -> Path:
    model = eqx_model(3)
    args = v0.args.Composite(
        model=EquinoxSave(model),
        opt_state=v0.args.StandardSave(optax.adam(0.1).init(eqx.filter(model, eqx.is_array))),
    )
    managed(tmp_path / "there", {5: args})
    return tmp_path / "there"


def eqx_state(seed: int, width: int = 4) -> dict[str, Any]:
    model = eqx_model(seed, width)
    return {
        "model": model,
        "opt_state": optax.adam(0.1).init(eqx.filter(model, eqx.is_array)),
    }


def test_a_module_that_a_custom_handler_saved_is_read(with_equinox: Path) -> None:
    saved = eqx_state(3)

    for like in (eqx_state(1), eqx.filter_eval_shape(eqx_state, 1)):
        restored = cc.restore(with_equinox, like=like)
        assert leaves(restored) == leaves(saved)
        assert restored["model"](jnp.ones(3)).shape == (2,)
    part = cc.restore(with_equinox, like=eqx_state(1), only="model")
    assert leaves(part) == leaves(eqx_state(1) | {"model": saved["model"]})
    bias = cc.restore(with_equinox, like=eqx_state(1), only="model/layers/*/bias")["model"]
    assert bias.layers[0].bias.tolist() == saved["model"].layers[0].bias.tolist()
    assert bias.layers[0].weight.tolist() == eqx_model(1).layers[0].weight.tolist()
    host = cc.restore(with_equinox, like=eqx_state(1), as_numpy=True)["model"]
    assert type(host.layers[0].weight) is np.ndarray


def test_a_run_goes_on_from_a_module_that_was_adopted(with_equinox: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    cc.adopt(with_equinox, root)
    callbacks = cc.Callbacks(cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(2)))

    with callbacks.run(eqx_state(1)) as run:
        state = run.state
        assert leaves(state) == leaves(eqx_state(3))
        run.on_step(run.next_step, state)

    for which in (5, 6):
        assert leaves(cc.restore(root, like=eqx_state(1), which=which)) == leaves(eqx_state(3))
    damaged = root / "5" / "model" / "model.eqx"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(cc.CorruptCheckpoint, match=str(damaged)):
        cc.restore(root, like=eqx_state(1), which=5)


def test_a_module_that_is_all_there_is(with_equinox: Path) -> None:
    shutil.rmtree(with_equinox / "5" / "opt_state")

    assert leaves(cc.restore(with_equinox, like=eqx_model(1))) == leaves(eqx_model(3))


WHY = ": .* has the shape| has 4 leaves, and the module"


@pytest.mark.parametrize(
    "model", [eqx_model(1, width=5), eqx_model(1).layers[0], [eqx_model(1), jnp.ones(2)]]
)
def test_a_module_that_does_not_fit_is_told(with_equinox: Path, model: Any) -> None:
    like = eqx_state(1) | {"model": model}

    with pytest.raises(cc.StateMismatch, match=rf"/5/model/model\.eqx({WHY})"):
        cc.restore(with_equinox, like=like)


def test_a_module_is_read_into_a_state_only(with_equinox: Path) -> None:
    assert list(cc.restore(with_equinox)) == ["opt_state"]
    with pytest.raises(cc.CheckpointNotFound, match=r"without like= \(model\)"):
        cc.restore(with_equinox, only="model")

    like = {"model": {"w": jnp.ones(2)}, "opt_state": eqx_state(1)["opt_state"]}
    with pytest.raises(cc.StateMismatch, match="has 4 leaves, and the module 1"):
        cc.restore(with_equinox, like=like)
