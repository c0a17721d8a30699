"""Haiku: parameters and state by the names of modules, with Optax."""

from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from states.case import Case, batch_of

OPTIMIZER = optax.adam(0.1)


def forward(x: jax.Array) -> jax.Array:
    x = hk.nets.MLP([4, 3])(x)
    return hk.Linear(2)(hk.BatchNorm(True, True, 0.9)(x, is_training=True))


NET = hk.transform_with_state(forward)


def make(seed: int) -> dict[str, Any]:
    params, stats = NET.init(jax.random.key(seed), np.ones((8, 3), np.float32))
    return {"params": params, "stats": stats, "optimizer": OPTIMIZER.init(params)}


@partial(jax.jit, donate_argnums=0)
def step_of(state: dict[str, Any], x: jax.Array, y: jax.Array) -> dict[str, Any]:
    def loss_of(params: hk.Params) -> tuple[jax.Array, hk.State]:
        out, stats = NET.apply(params, state["stats"], None, x)
        return jnp.mean((out - y) ** 2), stats

    gradients, stats = jax.grad(loss_of, has_aux=True)(state["params"])
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "stats": stats, "optimizer": optimizer}


CASES = [Case("mlp", make, lambda state, step: step_of(state, *batch_of(step)))]
