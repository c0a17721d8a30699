"""What a whole training loop loses to metrics and checkpoints, beside other ways to write it.

Run it with a Python that has the package, mlflow and wandb, such as the one `tox run -e py` makes::

    .tox/py/bin/python benchmarks/whole_loop.py
    python benchmarks/whole_loop.py --rounds 20 --json whole_loop.json

`benchmarks/README.md` says what the rows are.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

import ckpt_callbacks as cc
import measure
import servers

STEPS, EVERY = 150, 50
WIDTH, LAYERS, BATCH = 1024, 8, 64

optimizer = optax.adam(1e-3)


def new_state() -> dict[str, Any]:
    """Return weights of 32 MiB with both moments of Adam."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys]
    return {"params": params, "opt_state": optimizer.init(params)}


@jax.jit(donate_argnums=0)
def train_step(state: dict[str, Any], batch: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take a step."""

    def loss_of(params: list[jax.Array]) -> jax.Array:
        x = batch
        for weight in params:
            x = jnp.tanh(x @ weight)
        return jnp.mean((x - batch) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state["params"])
    updates, opt_state = optimizer.update(gradients, state["opt_state"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state}, {"loss": loss}


def save_by_orbax(path: Path, state: Any) -> Any:
    """Begin to save as Orbax does by default."""
    return ocp.save_checkpointables_async(path, {"state": state})


@contextmanager
def ideal(folder: Path) -> Iterator[Callable[[int, Any, Any], None]]:
    """Tell nobody."""
    yield lambda step, state, metrics: None


@contextmanager
def orbax_alone(folder: Path) -> Iterator[Callable[[int, Any, Any], None]]:
    """Save by Orbax in the background, and log nothing."""
    pending: list[Any] = []

    def tell(step: int, state: Any, metrics: Any) -> None:
        if step % EVERY == 0:
            if pending:
                pending.pop().result()
            pending.append(save_by_orbax(folder / str(step), state))

    yield tell
    pending.pop().result()


@contextmanager
def trackers(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Give the run of MLflow, as a client and its id, and that of W&B."""
    import mlflow
    import wandb

    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("inline", str(folder / "artifacts"))
    mlflow.set_experiment("inline")
    with (
        mlflow.start_run(),
        wandb.init(project="inline", dir=folder, settings=wandb.Settings(console="off")) as run,
    ):
        yield mlflow, run


@contextmanager
def naive(folder: Path) -> Iterator[Callable[[int, Any, Any], None]]:
    """Read, log, save and upload in the loop."""
    import wandb

    with trackers(folder) as (mlflow, run):

        def tell(step: int, state: Any, metrics: Any) -> None:
            loss = float(metrics["loss"])
            mlflow.log_metric("loss", loss, step=step)
            run.log({"loss": loss}, step=step)
            if step % EVERY == 0:
                path = folder / str(step)
                save_by_orbax(path, state).result()
                mlflow.log_artifacts(str(path), f"checkpoints/{step}")
                artifact = wandb.Artifact("checkpoint", "model")
                artifact.add_dir(str(path))
                run.log_artifact(artifact)

        yield tell


@contextmanager
def lightning_like(folder: Path) -> Iterator[Callable[[int, Any, Any], None]]:
    """Do as Lightning's loop does with its defaults.

    The progress bar reads the loss of each step, loggers get that of every 50th, and
    `ModelCheckpoint` saves at once, one file by one write, which loggers with `log_model="all"`
    then upload.
    """
    import wandb

    with trackers(folder) as (mlflow, run):

        def tell(step: int, state: Any, metrics: Any) -> None:
            loss = float(metrics["loss"])
            if step % EVERY:
                return
            mlflow.log_metric("loss", loss, step=step)
            run.log({"loss": loss}, step=step)
            path = folder / f"{step}.npz"
            leaves = jax.device_get(jax.tree.leaves(state))
            np.savez(path, *leaves)
            mlflow.log_artifact(str(path), f"checkpoints/{step}")
            artifact = wandb.Artifact("checkpoint", "model")
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        yield tell


@contextmanager
def ours(folder: Path) -> Iterator[Callable[[int, Any, Any], None]]:
    """Tell `run.on_step`."""
    from mlflow import MlflowClient

    from ckpt_callbacks_mlflow import MLflowTracker
    from ckpt_callbacks_wandb import WandbTracker

    MlflowClient(
        f"sqlite:///{folder}/mlflow.db"
    ).search_experiments()  # makes it, as for the others
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(folder / "run", save=cc.EveryNSteps(EVERY), keep=cc.LatestN(2)),
        MLflowTracker(
            experiment="ours",
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
            artifact_location=str(folder / "artifacts"),
        ),
        WandbTracker("ours", mode="offline"),
    )
    with callbacks.run(new_state()) as run:
        run.state  # noqa: B018  # the run lets go of it
        yield run.on_step


WAYS: dict[str, Any] = {
    "ideal": ideal,
    "naive": naive,
    "lightning": lightning_like,
    "orbax": orbax_alone,
    "ours": ours,
}


def sample(way: Any, base: Path, batch: jax.Array) -> dict[str, float]:
    """Return the seconds of a loop: wall, CPU of all threads, and wall until all is done."""
    with tempfile.TemporaryDirectory(dir=base, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        state = jax.block_until_ready(new_state())
        with way(folder) as tell:
            begin, cpu = time.perf_counter(), time.process_time()
            for step in range(STEPS):
                state, metrics = train_step(state, batch)
                tell(step, state, metrics)
            jax.block_until_ready(state)
            loop, spent = time.perf_counter() - begin, time.process_time() - cpu
        return {"loop": loop, "cpu": spent, "drained": time.perf_counter() - begin}


def rows_of(found: dict[str, list[dict[str, float]]]) -> list[measure.Row]:
    """Return the lines of the table."""
    of = {
        f"{way}_{part}": [taken[part] for taken in samples]
        for way, samples in found.items()
        for part in samples[0]
    }

    def by(other: str, limit: float, part: str = "loop", mine: str = "ours") -> measure.Row:
        titles = {"orbax": "Orbax alone", "lightning": "Lightning-like"}
        what = {"loop": "", "cpu": ", CPU", "drained": ", with the end"}[part]
        who = {"ours": ""}.get(mine, f"{titles.get(mine, mine)} ")
        title = f"  {who}by {titles.get(other, other)}{what}"
        ratio = measure.ratio(of, f"{mine}_{part}", f"{other}_{part}")
        return measure.Row(title, ratio, "x", limit or None)

    return [
        measure.Row("a step, ideal", [t / STEPS for t in of["ideal_loop"]], "ms"),
        measure.Row("whole loop, ours", of["ours_loop"], "s"),
        *(by("ideal", 0, mine=way) for way in ("naive", "lightning", "orbax")),
        by("ideal", 1.10),
        by("ideal", 0, "cpu"),
        by("naive", 0.6),
        by("naive", 0, "cpu"),
        by("lightning", 0.7),
        by("lightning", 0, "cpu"),
        by("orbax", 1.0),
        by("orbax", 0, "cpu"),
        by("orbax", 0, "drained"),
    ]


@click.command()
@click.option("--rounds", default=8, show_default=True, help="Of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
def main(rounds: int, file: Path | None) -> None:
    """Measure what a training loop loses to metrics and checkpoints."""
    servers.quiet()
    logging.getLogger("absl").setLevel(logging.ERROR)
    batch = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-", ignore_cleanup_errors=True) as name:
        places = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
        os.environ |= dict.fromkeys(places, name)
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        samples = {n: lambda way=way: sample(way, Path(name), batch) for n, way in WAYS.items()}
        found = measure.interleaved(samples, rounds)
    packages = ("jax", "orbax-checkpoint", "mlflow", "wandb")
    measure.report(f"A loop of {STEPS} steps", rows_of(found), packages, file, seconds=found)


if __name__ == "__main__":
    main()
