"""Train a small network over all devices of all processes, with checkpoints in one directory.

    python examples/distributed/train.py --directory runs/many

It is one script for one process, several on a machine, Slurm, Kubernetes and Ray: how the processes
find each other is in the environment. Every process runs all of it; process 0 decides what is saved
and kept, and talks to trackers. Start it again and it goes on, on as many devices as there are.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpt_callbacks as cc

WIDTH, HIDDEN, BATCH = 64, 512, 256
VALIDATION = 2**32 - 1
"""The batch that no step is trained on."""


def join() -> None:
    """Join the other processes, if there are any.

    `COORDINATOR_ADDRESS`, `NUM_PROCESSES` and `PROCESS_ID` say how; under Slurm JAX finds out by
    itself.
    """
    if address := os.environ.get("COORDINATOR_ADDRESS"):
        jax.distributed.initialize(
            address,
            int(os.environ["NUM_PROCESSES"]),
            int(os.environ["PROCESS_ID"]),
            cluster_detection_method="deactivate",
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()


def new_state(mesh: Mesh) -> dict[str, Any]:
    """Return weights that are sharded by their hidden axis, and the moments of the optimizer."""
    places = {"in": P(None, "x"), "bias": P("x"), "out": P("x", None)}
    shapes = {"in": (WIDTH, HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN, WIDTH)}
    shardings = {name: NamedSharding(mesh, place) for name, place in places.items()}

    @partial(jax.jit, out_shardings=(shardings, shardings))
    def make() -> tuple[dict[str, Any], dict[str, Any]]:
        keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 3), strict=True))
        params = {n: 0.05 * jax.random.normal(keys[n], shape) for n, shape in shapes.items()}
        return params, jax.tree.map(jnp.zeros_like, params)

    params, moments = make()
    return {"params": params, "moments": moments}


def loss_of(params: dict[str, Any], batch: Any) -> Any:
    hidden = jnp.tanh(batch @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - jnp.sin(3 * batch)) ** 2)


@partial(jax.jit, donate_argnums=0)
def train_step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    loss, gradients = jax.value_and_grad(loss_of)(state["params"], batch)
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, state["moments"], gradients)
    params = jax.tree.map(lambda p, m: p - 0.02 * m, state["params"], moments)
    return {"params": params, "moments": moments}, {"loss": loss}


evaluate = jax.jit(loss_of)


def batch_of(step: int, rows: NamedSharding) -> jax.Array:
    """Return the batch of a step, of which each process makes the rows of its own devices."""
    whole = np.random.default_rng(step).normal(size=(BATCH, WIDTH)).astype(np.float32)
    return jax.make_array_from_callback(whole.shape, rows, lambda index: whole[index])


def train(callbacks: cc.Callbacks, steps: int) -> bool:
    """Train up to `steps`; return whether a notice ended it before."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rows = NamedSharding(mesh, P("x"))
    validation = batch_of(VALIDATION, rows)
    with callbacks.run(new_state(mesh), config={"steps": steps}) as run:
        state = run.state
        for step in range(run.next_step, steps):
            state, metrics = train_step(state, batch_of(step, rows))
            if step % 50 == 0:
                run.on_eval(step, {"val_loss": evaluate(state["params"], validation)})
            run.on_step(step, state, metrics)
            if jax.default_backend() == "cpu":  # where collectives of many steps at a time may hang
                jax.block_until_ready(state)
            if run.should_stop:  # in all processes after the same step
                break
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices")
        print(run.summary())
    return run.should_stop


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", default="runs/many", help="one that all processes share")
    parser.add_argument("--steps", type=int, default=301)
    parser.add_argument("--stopped", type=int, default=0, help="exit code after a notice")
    options = parser.parse_args(arguments)
    join()
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            options.directory,
            save=cc.EveryNSteps(50) | cc.AtEnd(),
            keep=cc.LatestN(2) | cc.BestN(1, "val_loss", mode="min"),
        ),
        process_timeout=120,
    )
    if train(callbacks, options.steps) and options.stopped:
        sys.exit(options.stopped)


if __name__ == "__main__":
    main()
