"""Train a small Flax Linen network on scikit-learn's handwritten digits, with checkpoints kept
jointly in an Orbax directory, MLflow and W&B.

    python examples/digits_linen.py [--directory runs] [--steps 1000]

Run it again and it goes on where it stopped, also after a `kill -9`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from rich.progress import Progress

import ckpt_callbacks as cc
from digits import BATCH_SIZE, EVAL_EVERY, Batch, batch_of, load, main


class Network(nn.Module):
    @nn.compact
    def __call__(self, pixels: jax.Array, *, training: bool) -> jax.Array:
        hidden = nn.Dense(256)(pixels)
        hidden = nn.relu(nn.BatchNorm(use_running_average=not training, momentum=0.9)(hidden))
        hidden = nn.Dropout(0.2, deterministic=not training)(hidden)
        return nn.Dense(10)(hidden)


class TrainState(train_state.TrainState):
    """With what changes while training beside parameters and optimizer."""

    batch_stats: Any
    dropout: jax.Array
    """A typed PRNG key, from which each step takes its own."""


def loss_of(logits: jax.Array, classes: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()


@jax.jit(donate_argnums=0)
def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    pixels, classes = batch
    key = jax.random.fold_in(state.dropout, state.step)

    def forward(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            pixels,
            training=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return loss_of(logits, classes), updated["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(forward, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients, batch_stats=batch_stats)
    return state, {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}


@jax.jit
def evaluate(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    pixels, classes = batch
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, pixels, training=False)
    right = jnp.argmax(logits, axis=-1) == classes
    return {"val_loss": loss_of(logits, classes), "val_accuracy": jnp.mean(right)}


def new_state(learning_rate: float) -> TrainState:
    network = Network()
    variables = network.init(jax.random.key(0), jnp.zeros((1, 64)), training=False)
    return TrainState.create(
        apply_fn=network.apply,
        tx=optax.adam(learning_rate),
        dropout=jax.random.key(1),
        **variables,
    )


def train(callbacks: cc.Callbacks, steps: int) -> tuple[TrainState, cc.Summary]:
    config = {"learning_rate": 1e-3, "batch_size": BATCH_SIZE, "steps": steps}
    training, validation = load()
    with callbacks.run(new_state(config["learning_rate"]), config=config) as run, Progress() as bar:
        task = bar.add_task("training", total=steps + 1, completed=run.next_step)
        state = run.state
        for step in range(run.next_step, steps + 1):
            state, metrics = train_step(state, batch_of(step, training))
            if step % EVAL_EVERY == 0:
                run.on_eval(step, evaluate(state, validation))
            run.on_step(step, state, metrics)
            bar.update(task, completed=step + 1)
    return state, run.summary()


if __name__ == "__main__":
    main("digits-linen", train)
