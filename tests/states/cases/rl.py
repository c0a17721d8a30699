"""Reinforcement learning: everything that changes, in one named tuple."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from states.case import Case, batch_of

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))


class Running(NamedTuple):
    """Statistics of what the agent saw, kept on the host in double precision."""

    count: np.int64
    mean: np.ndarray
    squares: np.ndarray


class Learner(NamedTuple):
    params: dict[str, jax.Array]
    target_params: dict[str, jax.Array]
    optimizer: optax.OptState
    updates: jax.Array
    key: jax.Array
    fast_key: jax.Array
    actor_keys: jax.Array
    raw_key: jax.Array


class Agent(NamedTuple):
    learner: Learner
    frames: int
    episodes: np.int64
    best_return: np.float64
    observations: Running


def learner(seed: int) -> Learner:
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)}
    return Learner(
        params,
        jax.tree.map(jnp.copy, params),
        OPTIMIZER.init(params),
        jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
        fast_key=jax.random.key(seed, impl="rbg"),
        actor_keys=jax.random.split(key, (2, 3)),
        raw_key=jax.random.PRNGKey(seed),
    )


def make(seed: int) -> Agent:
    return Agent(
        learner(seed),
        frames=(2**33 + 1) * (1 - seed),
        episodes=np.int64(2**40 + seed),
        best_return=np.float64(0.1 + seed),
        observations=Running(np.int64(0), np.zeros(3), np.zeros(3)),
    )


@partial(jax.jit, donate_argnums=0)
def update(state: Learner, x: jax.Array, y: jax.Array) -> tuple[Learner, jax.Array]:
    key, noise = jax.random.split(state.key)
    fast_key, drop = jax.random.split(state.fast_key)
    x = x + jax.random.normal(noise, x.shape) * jax.random.bernoulli(drop, 0.9, x.shape)

    def loss_of(params: Any) -> jax.Array:
        bootstrapped = y + 0.9 * (x @ state.target_params["w"] + state.target_params["b"])
        return jnp.mean((x @ params["w"] + params["b"] - bootstrapped) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, optimizer = OPTIMIZER.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    new = Learner(
        params,
        optax.incremental_update(params, state.target_params, 0.1),
        optimizer,
        state.updates + 1,
        key,
        fast_key,
        jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, 1)))(state.actor_keys),
        jax.random.split(state.raw_key)[0],
    )
    return new, loss


def train(agent: Agent, step: int) -> Agent:
    x, y = batch_of(step)
    learner, loss = update(agent.learner, x, y)
    seen, frames = agent.observations, agent.frames + len(x)
    count = seen.count + len(x)
    mean = seen.mean + (x - seen.mean).sum(0) / count
    squares = seen.squares + ((x - seen.mean) * (x - mean)).sum(0)
    best = max(agent.best_return, np.float64(-loss))
    return Agent(learner, frames, agent.episodes + 1, best, Running(count, mean, squares))


CASES = [Case("agent", make, train)]
