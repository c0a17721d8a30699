"""Train a small Flax NNX network on scikit-learn's handwritten digits, with checkpoints kept
jointly in an Orbax directory, MLflow and W&B.

    python examples/digits_nnx.py [--directory runs] [--steps 1000]

Run it again and it goes on where it stopped, also after a `kill -9`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.progress import Progress

import ckpt_callbacks as cc
from digits import BATCH_SIZE, EVAL_EVERY, Batch, batch_of, load, main


class Network(nnx.Module):
    def __init__(self, classes: int, rngs: nnx.Rngs) -> None:
        layers = [nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, classes, rngs=rngs)]
        self.layers = nnx.List(layers)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        hidden = self.dropout(nnx.relu(self.layers[0](pixels)))
        return self.layers[1](hidden)


def loss_of(model: Network, batch: Batch) -> jax.Array:
    pixels, classes = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(pixels), classes).mean()


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, batch: Batch) -> dict[str, jax.Array]:
    loss, gradients = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, gradients)
    return {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}


@nnx.jit
def evaluate(model: Network, batch: Batch) -> dict[str, jax.Array]:
    pixels, classes = batch
    predicted = jnp.argmax(model(pixels), axis=-1)
    return {"val_loss": loss_of(model, batch), "val_accuracy": jnp.mean(predicted == classes)}


def new_state(learning_rate: float, classes: int = 10) -> dict[str, Any]:
    model = Network(classes, nnx.Rngs(0))
    return {
        "model": model,
        "optimizer": nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param),
    }


def train(callbacks: cc.Callbacks, steps: int) -> tuple[dict[str, Any], cc.Summary]:
    config = {"learning_rate": 1e-3, "batch_size": BATCH_SIZE, "steps": steps}
    training, validation = load()
    with callbacks.run(new_state(config["learning_rate"]), config=config) as run, Progress() as bar:
        task = bar.add_task("training", total=steps + 1, completed=run.next_step)
        state = run.state
        for step in range(run.next_step, steps + 1):
            state["model"].train()
            metrics = train_step(state["model"], state["optimizer"], batch_of(step, training))
            if step % EVAL_EVERY == 0:
                state["model"].eval()
                run.on_eval(step, evaluate(state["model"], validation))
            run.on_step(step, state, metrics)
            bar.update(task, completed=step + 1)
    return state, run.summary()


if __name__ == "__main__":
    main("digits-nnx", train)
