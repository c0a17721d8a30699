"""The forms of a model by files and on the command line, and back into a run that goes on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from click.testing import CliRunner

import ckpt_callbacks as cc
from ckpt_callbacks.cli import main
from saved import tree_digest

LAYERS, WIDTH = 3, 4
OPTIMIZER = optax.adamw(0.1)


def new_state(seed: int) -> dict[str, Any]:
    first, second = jax.random.split(jax.random.key(seed))
    params = {
        "decoder": {
            "layers": {
                "kernel": jax.random.normal(first, (LAYERS, WIDTH, WIDTH)),
                "bias": jnp.zeros((LAYERS, WIDTH), jnp.bfloat16),
            }
        },
        "head": jax.random.normal(second, (WIDTH, 2)),
    }
    return {"params": params, "opt_state": OPTIMIZER.init(params), "step": jnp.int32(0)}


@jax.jit
def train_step(state: dict[str, Any]) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(state["step"]), (8, WIDTH))

    def loss_of(params: Any) -> jax.Array:
        def layer(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ layer["kernel"] + layer["bias"].astype(x.dtype)), None

        x_out, _ = jax.lax.scan(layer, x, params["decoder"]["layers"])
        return jnp.mean((x_out @ params["head"]) ** 2)

    grads = jax.grad(loss_of)(state["params"])
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}


def trained(state: dict[str, Any], steps: int) -> dict[str, Any]:
    for _ in range(steps):
        state = train_step(state)
    return state


def run(*arguments: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output


@pytest.fixture
def state() -> dict[str, Any]:
    """Train three steps in `run`, and return what was saved there last."""
    checkpoint = cc.OrbaxCheckpoint("run", save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    with cc.Callbacks(checkpoint).run(new_state(0)) as run:
        state = run.state
        for step in range(3):
            state = train_step(state)
            run.on_step(step, state)
    return state


@pytest.mark.parametrize("axis", ["0", "1"])
@pytest.mark.parametrize(("file", "back"), [("safetensors", "npz"), ("msgpack", "safetensors")])
def test_training_goes_on_after_all_forms_as_if_nothing_had_happened(
    state: dict[str, Any], file: str, back: str, axis: str
) -> None:
    stacked = f"stacked.{back}"
    run("export", "run", f"scanned.{file}")  # training, stacked, axis 0 as it was saved
    run("convert", f"scanned.{file}", f"apart.{file}", "--unstack", "layers")
    run("convert", f"apart.{file}", f"{axis}.{file}", "--stack", "layers", "--axis", axis)
    run("convert", f"{axis}.{file}", f"again.{back}", "--unstack", "layers", "--axis", axis)
    run("convert", f"again.{back}", stacked, "--stack", "layers")
    run("export", "run", f"weights.{file}", "--only", "params", "--unstack", "layers")
    run("convert", f"weights.{file}", f"weights-stacked.{back}", "--stack", "layers")

    apart = cc.load_params(f"apart.{file}", only=None)
    kernel = state["params"]["decoder"]["layers"]["kernel"]
    for i in range(LAYERS):
        layer = apart["params"]["decoder"][f"layers_{i}"]
        assert np.array_equal(layer["kernel"], kernel[i])
    moments = apart["opt_state"]["0"]["mu"]["decoder"]
    assert moments.keys() == {f"layers_{i}" for i in range(LAYERS)}
    loaded = cc.load_params(stacked, like=new_state(1), only=None)
    assert tree_digest(loaded) == tree_digest(state)
    assert tree_digest(trained(loaded, 3)) == tree_digest(trained(state, 3))
    alone = cc.load_params(f"weights-stacked.{back}", like=new_state(1))
    assert tree_digest(alone["params"]) == tree_digest(state["params"])


def test_a_run_goes_on_in_another_directory_from_files(state: dict[str, Any]) -> None:
    run("export", "run", "apart.safetensors", "--unstack", "layers")
    run("convert", "apart.safetensors", "stacked", "--format", "orbax", "--stack", "layers")
    assert Path("stacked").is_dir()
    loaded = cc.restore("stacked", like=new_state(1))
    checkpoint = cc.OrbaxCheckpoint("other", save=cc.EveryNSteps(1), keep=cc.LatestN(1))

    with cc.Callbacks(checkpoint).run(loaded) as other:
        for step in range(3, 6):
            loaded = train_step(loaded)
            other.on_step(step, loaded)

    resumed = cc.restore("other", like=new_state(2))
    assert tree_digest(resumed) == tree_digest(trained(state, 3))
