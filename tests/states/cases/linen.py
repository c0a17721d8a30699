"""Flax Linen: train states and dicts of variables."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

from states.case import Case, batch_of


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x)))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x))


NET, OPTIMIZER = Net(), optax.adamw(0.1)


class Trained(TrainState):
    batch_stats: Any
    key: jax.Array


def variables(seed: int) -> dict[str, Any]:
    params, dropout = jax.random.split(jax.random.key(seed))
    return jax.jit(NET.init)({"params": params, "dropout": dropout}, jnp.ones((8, 3)))


def gradients_of(
    params: Any, batch_stats: Any, key: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[Any, Any]:
    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        full = {"params": params, "batch_stats": batch_stats}
        out, changed = NET.apply(full, x, rngs={"dropout": key}, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), changed["batch_stats"]

    return jax.grad(loss_of, has_aux=True)(params)


def train_state(seed: int) -> Trained:
    made = variables(seed)
    return Trained.create(
        apply_fn=NET.apply,
        params=made["params"],
        tx=OPTIMIZER,
        batch_stats=made["batch_stats"],
        key=jax.random.key(seed),
    )


def frozen_train_state(seed: int) -> Trained:
    made = train_state(seed)
    frozen: FrozenDict = freeze(made.params)
    return made.replace(params=frozen, opt_state=OPTIMIZER.init(frozen))


@partial(jax.jit, donate_argnums=0)
def state_step(state: Trained, x: jax.Array, y: jax.Array) -> Trained:
    key, dropout = jax.random.split(state.key)
    gradients, stats = gradients_of(state.params, state.batch_stats, dropout, x, y)
    return state.apply_gradients(grads=gradients, batch_stats=stats, key=key)


@partial(jax.jit, donate_argnums=0)
def variables_step(state: dict[str, Any], x: jax.Array, y: jax.Array) -> dict[str, Any]:
    params = state["params"]
    gradients, stats = gradients_of(params, state["batch_stats"], jax.random.key(0), x, y)
    new = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    return {"params": new, "batch_stats": stats}


CASES = [
    Case("train-state", train_state, lambda s, step: state_step(s, *batch_of(step))),
    Case("frozen-dict", frozen_train_state, lambda s, step: state_step(s, *batch_of(step))),
    Case("variables", variables, lambda s, step: variables_step(s, *batch_of(step))),
]
