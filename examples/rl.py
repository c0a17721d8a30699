"""Train a DQN to balance a pole, in an environment written in JAX, with checkpoints of everything
that a run needs to go on: networks, optimizer, key, environments and the replay buffer.

    python examples/rl.py [--directory runs] [--steps 1500] [--buffer left-out|included|own]

Run it again and it goes on where it stopped, also after a `kill -9`. The replay buffer is the
largest part of the state, so what becomes of it is a choice:

- `left-out` of the state: a run that goes on fills it again before it learns.
- `included`: a run that goes on ends with the same bits as one that never stopped.
- `own`: it is saved in a directory of its own, less often, and only the newest stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from rich.progress import Progress

import ckpt_callbacks as cc

EVAL_EVERY = 50
ENVIRONMENTS = 64
"""Each makes one move a step."""
UPDATES, BATCH_SIZE = 16, 128
CAPACITY, LEARN_FROM = 50_000, 1_000
EXPLORATION = 30_000
"""Transitions until the policy is almost greedy."""
DISCOUNT = 0.99
TARGET_RATE = 0.01
LONGEST = 500
"""Moves after which an episode ends; its return is how many there were."""

NETWORK = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(2)])
OPTIMIZER = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(3e-4))


class World(NamedTuple):
    """Environments, the first axis of both."""

    bodies: jax.Array
    """Position and speed of the cart, angle and angular speed of the pole."""
    ages: jax.Array


class Statistics(NamedTuple):
    """Mean and variance of all observations so far, by which the networks' input is scaled."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


class Transition(NamedTuple):
    body: jax.Array
    action: jax.Array
    next_body: jax.Array
    fell: jax.Array


class Replay(NamedTuple):
    """A ring of transitions: the newest `size` rows before `position` are valid."""

    rows: Transition
    position: jax.Array
    size: jax.Array


class State(NamedTuple):
    params: Any
    target: Any
    optimizer: optax.OptState
    statistics: Statistics
    world: World
    key: jax.Array
    env_steps: int
    replay: Replay | None


def new_bodies(key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, (ENVIRONMENTS, 4), minval=-0.05, maxval=0.05)


def move(body: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Push the cart for 0.02 s as Gymnasium's CartPole-v1 does; return where all is, and whether
    the pole fell or the cart left the track.
    """
    _, speed, angle, spin = body
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * spin**2 * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    body = body + 0.02 * jnp.stack([speed, push - 0.05 * turn * cos / 1.1, spin, turn])
    return body, (jnp.abs(body[0]) > 2.4) | (jnp.abs(body[2]) > jnp.deg2rad(12))


def values(params: Any, statistics: Statistics, bodies: jax.Array) -> jax.Array:
    """Return what each action is worth, of shape (bodies, 2)."""
    scale = jnp.sqrt(statistics.variance + 1e-6)
    return NETWORK.apply(params, (bodies - statistics.mean) / scale)


def collect(state: State, key: jax.Array, epsilon: float) -> tuple[World, Transition]:
    """Make a move in each environment; those whose episode is over begin another."""
    which, what, begin = jax.random.split(key, 3)
    bodies, ages = state.world
    best = jnp.argmax(values(state.params, state.statistics, bodies), axis=-1)
    explores = jax.random.bernoulli(which, epsilon, (ENVIRONMENTS,))
    action = jnp.where(explores, jax.random.bernoulli(what, 0.5, (ENVIRONMENTS,)), best)
    moved, fell = jax.vmap(move)(bodies, action)
    over = fell | (ages + 1 >= LONGEST)
    world = World(jnp.where(over[:, None], new_bodies(begin), moved), jnp.where(over, 0, ages + 1))
    return world, Transition(bodies, action, moved, fell)


def observed(statistics: Statistics, bodies: jax.Array) -> Statistics:
    """Return the statistics with more observations, by Chan's formula."""
    count = statistics.count + len(bodies)
    share = len(bodies) / count
    change = bodies.mean(axis=0) - statistics.mean
    variance = (1 - share) * (statistics.variance + share * change**2) + share * bodies.var(axis=0)
    return Statistics(count, statistics.mean + share * change, variance)


def add(replay: Replay, rows: Transition) -> Replay:
    places = (replay.position + jnp.arange(ENVIRONMENTS)) % CAPACITY
    return Replay(
        jax.tree.map(lambda all_, new: all_.at[places].set(new), replay.rows, rows),
        (replay.position + ENVIRONMENTS) % CAPACITY,
        jnp.minimum(replay.size + ENVIRONMENTS, CAPACITY),
    )


def sample(replay: Replay, key: jax.Array) -> Transition:
    back = jax.random.randint(key, (BATCH_SIZE,), 1, replay.size + 1)
    return jax.tree.map(lambda x: x[(replay.position - back) % CAPACITY], replay.rows)


def without_newest(replay: Replay, count: int) -> Replay:
    """Return the buffer as it was `count` transitions ago, but for the oldest, which are gone."""
    position = (replay.position - count) % CAPACITY
    return replay._replace(position=position, size=jnp.maximum(replay.size - count, 0))


def learn(state: State, key: jax.Array) -> tuple[State, jax.Array]:
    """Take some gradient steps on batches of the buffer; return the loss of the last."""

    def loss_of(params: Any, target: Any, rows: Transition) -> jax.Array:
        at_hand = values(params, state.statistics, rows.body)
        value = jnp.take_along_axis(at_hand, rows.action[:, None], axis=-1)[:, 0]
        # The one network chooses and the other one values: that is double Q-learning.
        best = values(params, state.statistics, rows.next_body).argmax(axis=-1)
        later = values(target, state.statistics, rows.next_body)
        later = jnp.take_along_axis(later, best[:, None], axis=-1)[:, 0]
        # A fall is worth -1 and all else nothing: whoever falls later is better here, too.
        return optax.l2_loss(value, jnp.where(rows.fell, -1, DISCOUNT * later)).mean()

    def once(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, target, optimizer = carry
        rows = sample(state.replay, key)
        loss, gradients = jax.value_and_grad(loss_of)(params, target, rows)
        updates, optimizer = OPTIMIZER.update(gradients, optimizer)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, target, TARGET_RATE), optimizer), loss

    carry = state.params, state.target, state.optimizer
    (params, target, optimizer), losses = jax.lax.scan(once, carry, jax.random.split(key, UPDATES))
    return state._replace(params=params, target=target, optimizer=optimizer), losses[-1]


@jax.jit(donate_argnums=0)
def train_step(state: State, epsilon: float) -> tuple[State, dict[str, jax.Array]]:
    """Collect, then learn if the buffer holds enough; the loss is NaN if it does not."""
    key, for_moves, for_batches = jax.random.split(state.key, 3)
    world, rows = collect(state, for_moves, epsilon)
    state = state._replace(
        key=key,
        world=world,
        statistics=observed(state.statistics, rows.body),
        replay=add(state.replay, rows),
        env_steps=state.env_steps + ENVIRONMENTS,
    )
    full = state.replay.size >= LEARN_FROM
    state, loss = jax.lax.cond(full, learn, lambda s, _: (s, jnp.nan), state, for_batches)
    return state, {"loss": loss}


@jax.jit
def evaluate(params: Any, statistics: Statistics) -> dict[str, jax.Array]:
    """Play an episode in each environment, always with the best action."""

    def once(carry: Any, _: None) -> tuple[Any, jax.Array]:
        bodies, stands = carry
        bodies, fell = jax.vmap(move)(bodies, jnp.argmax(values(params, statistics, bodies), -1))
        return (bodies, stands & ~fell), stands

    start = new_bodies(jax.random.key(1)), jnp.ones(ENVIRONMENTS, bool)
    _, stood = jax.lax.scan(once, start, length=LONGEST)
    return {"mean_return": stood.sum(axis=0).mean()}


def new_state() -> State:
    key, for_params, for_bodies = jax.random.split(jax.random.key(0), 3)
    params = NETWORK.init(for_params, jnp.zeros((1, 4)))
    row = Transition(jnp.zeros(4), jnp.int32(0), jnp.zeros(4), jnp.bool(False))
    rows = jax.tree.map(lambda x: jnp.zeros((CAPACITY, *x.shape), x.dtype), row)
    return State(
        params=params,
        target=jax.tree.map(jnp.copy, params),
        optimizer=OPTIMIZER.init(params),
        statistics=Statistics(jnp.float32(0), jnp.zeros(4), jnp.ones(4)),
        world=World(new_bodies(for_bodies), jnp.zeros(ENVIRONMENTS, jnp.int32)),
        key=key,
        env_steps=0,
        replay=Replay(rows, jnp.int32(0), jnp.int32(0)),
    )


def train(
    callbacks: cc.Callbacks, steps: int, *, included: bool, buffer_callbacks: cc.Callbacks
) -> tuple[State, list[cc.Summary]]:
    """Train with the buffer in the state, or beside it, in a run of its own or in none."""

    def saved(state: State) -> State:
        return state if included else state._replace(replay=None)

    state = new_state()
    config = {"environments": ENVIRONMENTS, "discount": DISCOUNT, "steps": steps}
    with (
        callbacks.run(saved(state), config=config) as run,
        buffer_callbacks.run(state.replay) as buffer_run,
        Progress() as bar,
    ):
        task = bar.add_task("training", total=steps + 1, completed=run.next_step)
        state = run.state
        if not included:
            # A buffer that is older than the rest is fine. What a newer one has from steps that
            # are to come would be in it twice.
            ahead = max(0, buffer_run.next_step - run.next_step)
            state = state._replace(replay=without_newest(buffer_run.state, ahead * ENVIRONMENTS))
        for step in range(run.next_step, steps + 1):
            env_steps = state.env_steps
            state, metrics = train_step(state, max(0.05, 1 - env_steps / EXPLORATION))
            state = state._replace(env_steps=env_steps + ENVIRONMENTS)
            if step % EVAL_EVERY == 0:
                evaluated = evaluate(state.params, state.statistics)
                run.on_eval(step, evaluated)
                bar.update(task, description=f"mean return {evaluated['mean_return']:3.0f}")
            run.on_step(step, saved(state), metrics)
            if step >= buffer_run.next_step:
                buffer_run.on_step(step, state.replay)
            bar.update(task, completed=step + 1)
            if run.should_stop:
                break
    return state, [run.summary(), buffer_run.summary()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--buffer", choices=["left-out", "included", "own"], default="included")
    options = parser.parse_args()
    directory = options.directory / f"rl-{options.buffer}"
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            directory,
            save=cc.EveryNSteps(EVAL_EVERY),
            keep=cc.LatestN(2) | cc.BestN(2, "mean_return", mode="max"),
        )
    )
    own = cc.OrbaxCheckpoint(
        directory / "buffer", save=cc.EveryNSteps(4 * EVAL_EVERY), keep=cc.LatestN(1)
    )
    _, summaries = train(
        callbacks,
        options.steps,
        included=options.buffer == "included",
        buffer_callbacks=cc.Callbacks(*[own] * (options.buffer == "own")),
    )
    for summary in summaries:
        if summary.rows:
            print(summary)


if __name__ == "__main__":
    main()
