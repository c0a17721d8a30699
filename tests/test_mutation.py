"""What the loop does to its state after `on_step` is not in the checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpt_callbacks as cc
from saved import tree_digest

STEPS = 200


def callbacks_in(root: Path) -> cc.Callbacks:
    checkpoint = cc.OrbaxCheckpoint(
        root, save=cc.EveryNSteps(5), keep=cc.EveryNSteps(1), on_failure="raise"
    )
    return cc.Callbacks(checkpoint)


@partial(jax.jit, donate_argnums=0)
def donate(state: Any) -> Any:
    return jax.tree.map(lambda x: jnp.roll(x, 1) + 1, state)


def test_donated_buffers(tmp_path: Path) -> None:
    """Every step donates its state at once, also while a save of it is under way."""
    state = {"w": jnp.arange(4096.0).reshape(64, 64), "n": jnp.asarray(0), "b": jnp.ones(3)}
    like = jax.tree.map(jnp.zeros_like, state)
    digests, donated = {}, 0
    with callbacks_in(tmp_path / "run").run(state) as run:
        state = run.state
        for step in range(STEPS):
            old, state = state, donate(state)
            donated += old["w"].is_deleted()
            # On the CPU what a save looks at can not be donated: then it is deleted.
            jax.tree.map(lambda x: x.delete(), old)
            if step % 5 == 0:
                digests[step] = tree_digest(state)
            run.on_step(step, state)

    assert donated >= STEPS * 3 / 4
    for step, digest in list(digests.items())[::4]:
        assert tree_digest(cc.restore(tmp_path / "run", like=like, which=step)) == digest


def spoil_numpy(state: Any) -> None:
    for array in state["numpy"]:
        array[...] = 7


def spoil_containers(state: Any) -> None:
    state["list"].append(jnp.ones(1))
    state["list"][0] = 9
    state["dict"].clear()
    state["dict"]["new"] = 1


def spoil_buffers(state: Any) -> None:
    state["buffer"][:] = b"\xff" * len(state["buffer"])


def host_state(value: int) -> dict[str, Any]:
    buffer = bytearray(range(value, value + 64))
    base = np.full((6, 4), value, np.float64)
    return {
        "numpy": [
            np.full(20_000, value, np.float32),
            base.T,
            base[::2],
            np.full((), value),
            np.full(8, value).astype(jnp.uint4),
            np.full(8, value).astype(jnp.bfloat16),
            np.frombuffer(buffer, np.uint8),
        ],
        "list": [value, "text" * value, b"bytes" * value, np.float32(value), np.uint64(value)],
        "dict": {"a": {"b": value / 3}, "flag": value > 1, "large": value * 2**80},
        "buffer": buffer,
    }


@pytest.mark.parametrize("spoil", [spoil_numpy, spoil_containers, spoil_buffers])
def test_what_lies_in_the_memory_of_the_host(tmp_path: Path, spoil: Any) -> None:
    full = host_state(2)
    shown = {name: x for name, x in full.items() if name != "buffer"}
    like = {name: x for name, x in host_state(1).items() if name != "buffer"}
    digest = tree_digest(shown)
    with callbacks_in(tmp_path / "run").run(shown) as run:
        run.on_step(0, run.state)
        spoil(full)  # the save is under way
        assert spoil is spoil_buffers or tree_digest(shown) != digest

    assert tree_digest(cc.restore(tmp_path / "run", like=like)) == digest


def test_modules_that_train_on_in_place(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        return {"model": model, "opt": nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)}

    def arrays(state: dict[str, Any]) -> dict[str, str]:
        return tree_digest({name: nnx.state(node) for name, node in state.items()})

    @nnx.jit
    def train(model: nnx.Linear, opt: nnx.Optimizer[nnx.Linear]) -> None:
        opt.update(model, nnx.grad(lambda m: (m(jnp.ones(3)) ** 2).sum())(model))

    state, digests = make(0), {}
    with callbacks_in(tmp_path / "run").run(state) as run:
        state = run.state
        for step in range(40):
            train(state["model"], state["opt"])
            digests[step] = arrays(state)
            run.on_step(step, state)
            state["model"].kernel[...] = state["model"].kernel[...] * 1.01
    for step in range(0, 40, 10):
        assert arrays(cc.restore(tmp_path / "run", like=make(1), which=step)) == digests[step]
