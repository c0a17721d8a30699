"""Train a small residual network whose layers are stacked for `jax.lax.scan`, in plain JAX. Then
the best weights alone are taken apart into one entry a layer, as inference often wants them, and so
is the whole state, moments included; put together again, it trains on as if nothing had happened.

    python examples/stacked_layers.py [--directory runs] [--steps 200]

Run it again and it goes on where it stopped, also after a `kill -9`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ckpt_callbacks as cc
from digits import Batch, batch_of, load

LAYERS, WIDTH = 6, 32
OPTIMIZER = optax.adamw(3e-3)

State = dict[str, Any]


def new_state(seed: int = 0) -> State:
    """Return a state with one entry a layer: `layers_0` to `layers_5`."""
    first, last, *keys = jax.random.split(jax.random.key(seed), 2 + LAYERS)
    params = {
        "first": jax.random.normal(first, (64, WIDTH)) / 8,
        "last": jax.random.normal(last, (WIDTH, 10)) / 6,
        **{f"layers_{i}": new_layer(key) for i, key in enumerate(keys)},
    }
    return {"params": params, "opt_state": OPTIMIZER.init(params)}


def new_layer(key: jax.Array) -> Any:
    return {"kernel": jax.random.normal(key, (WIDTH, WIDTH)) / 6, "bias": jnp.zeros(WIDTH)}


def layer(x: jax.Array, params: Any) -> jax.Array:
    return x + jnp.tanh(x @ params["kernel"] + params["bias"])


def scanned(params: Any, images: jax.Array) -> jax.Array:
    """Return logits, with layers stacked: XLA compiles one layer, however many there are."""
    x = images.reshape(len(images), -1) @ params["first"]
    x, _ = jax.lax.scan(lambda x, params: (layer(x, params), None), x, params["layers"])
    return x @ params["last"]


def looped(params: Any, images: jax.Array) -> jax.Array:
    """Return logits, with one entry a layer."""
    x = images.reshape(len(images), -1) @ params["first"]
    for i in range(LAYERS):
        x = layer(x, params[f"layers_{i}"])
    return x @ params["last"]


@jax.jit
def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    def loss_of(params: Any) -> jax.Array:
        logits = scanned(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state}, {"loss": loss}


def train(callbacks: cc.Callbacks, state: State, steps: int) -> State:
    """Train a state with stacked layers to the end."""
    training, validation = load()
    with callbacks.run(state) as run:
        state = run.state
        for step in range(run.next_step, steps + 1):
            state, metrics = train_step(state, batch_of(step, training))
            if step % 20 == 0:
                right = scanned(state["params"], validation[0]).argmax(-1) == validation[1]
                run.on_eval(step, {"val_accuracy": right.mean()})
            run.on_step(step, state, metrics)
    print(run.summary())
    return state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    root = options.directory / "stacked-layers"
    root.mkdir(parents=True, exist_ok=True)
    keep = cc.LatestN(1) | cc.BestN(1, "val_accuracy", mode="max")
    callbacks = cc.Callbacks(cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(20), keep=keep))

    train(callbacks, cc.stack(new_state(), tx=OPTIMIZER), options.steps)

    like = jax.eval_shape(lambda: cc.stack(new_state()))
    best = cc.restore(root, like=like, which="best")
    params = cc.unstack(cc.strip(best))["params"]
    images, labels = load()[1]
    right = (looped(params, images).argmax(-1) == labels).mean()
    print(f"layer by layer, the best weights have an accuracy of {right:.4f}")

    apart = cc.unstack(best, tx=OPTIMIZER)  # with the moments of each layer
    together = cc.stack(apart, tx=OPTIMIZER)
    batch = batch_of(1, load()[0])
    one, other = (train_step(state, batch)[0] for state in (best, together))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), one, other)
    print(f"there and back, the next step is the same: {all(jax.tree.leaves(same))}")


if __name__ == "__main__":
    main()
