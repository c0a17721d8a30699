"""Train a small Equinox network on scikit-learn's handwritten digits, with checkpoints kept
jointly in an Orbax directory, MLflow and W&B.

    python examples/digits_equinox.py [--directory runs] [--steps 1000]

Run it again and it goes on where it stopped, also after a `kill -9`.
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from rich.progress import Progress

import ckpt_callbacks as cc
from digits import BATCH_SIZE, EVAL_EVERY, Batch, batch_of, load, main

OPTIMIZER = optax.adam(1e-3)


class State(NamedTuple):
    """Everything that changes while training; the activation inside the model is left alone."""

    model: eqx.nn.MLP
    optimizer: optax.OptState


def loss_of(model: eqx.nn.MLP, batch: Batch) -> jax.Array:
    pixels, classes = batch
    logits = jax.vmap(model)(pixels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()


@eqx.filter_jit(donate="all-except-first")
def train_step(batch: Batch, state: State) -> tuple[State, dict[str, jax.Array]]:
    loss, gradients = eqx.filter_value_and_grad(loss_of)(state.model, batch)
    updates, optimizer = OPTIMIZER.update(gradients, state.optimizer)
    return State(eqx.apply_updates(state.model, updates), optimizer), {"loss": loss}


@eqx.filter_jit
def evaluate(model: eqx.nn.MLP, batch: Batch) -> dict[str, jax.Array]:
    pixels, classes = batch
    predicted = jnp.argmax(jax.vmap(model)(pixels), axis=-1)
    return {"val_loss": loss_of(model, batch), "val_accuracy": jnp.mean(predicted == classes)}


def new_state() -> State:
    model = eqx.nn.MLP(64, 10, width_size=256, depth=1, key=jax.random.key(0))
    return State(model, OPTIMIZER.init(eqx.filter(model, eqx.is_array)))


def train(callbacks: cc.Callbacks, steps: int) -> tuple[State, cc.Summary]:
    config = {"learning_rate": 1e-3, "batch_size": BATCH_SIZE, "steps": steps}
    training, validation = load()
    with callbacks.run(new_state(), config=config) as run, Progress() as bar:
        task = bar.add_task("training", total=steps + 1, completed=run.next_step)
        state = run.state
        for step in range(run.next_step, steps + 1):
            state, metrics = train_step(batch_of(step, training), state)
            if step % EVAL_EVERY == 0:
                run.on_eval(step, evaluate(state.model, validation))
            run.on_step(step, state, metrics)
            bar.update(task, completed=step + 1)
    return state, run.summary()


if __name__ == "__main__":
    main("digits-equinox", train)
