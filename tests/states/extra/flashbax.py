"""Flashbax: a replay buffer that is part of the state, and donated as soon as it is saved."""

from functools import partial
from typing import Any

import flashbax
import jax
import jax.numpy as jnp

from states.case import Case, batch_of

BUFFER = flashbax.make_flat_buffer(
    max_length=40, min_length=8, sample_batch_size=4, add_batch_size=8
)


def make(seed: int) -> dict[str, Any]:
    key = jax.random.key(seed)
    empty = BUFFER.init({"x": jnp.zeros(3), "y": jnp.zeros(2)})
    x, y = batch_of(100 + seed)
    return {
        "buffer": BUFFER.add(empty, {"x": x, "y": y}),
        "params": {"w": jax.random.normal(key, (3, 2))},
        "key": key,
    }


@partial(jax.jit, donate_argnums=0)
def step_of(state: dict[str, Any], x: jax.Array, y: jax.Array) -> dict[str, Any]:
    buffer = BUFFER.add(state["buffer"], {"x": x, "y": y})
    key, sample = jax.random.split(state["key"])
    batch = BUFFER.sample(buffer, sample).experience.first

    def loss_of(params: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    gradients = jax.grad(loss_of)(state["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], gradients)
    return {"buffer": buffer, "params": params, "key": key}


def train(state: dict[str, Any], step: int) -> dict[str, Any]:
    return step_of(state, *batch_of(step))


CASES = [Case("flat-buffer", make, train)]
