"""What logging metrics to MLflow costs a loop: `on_step` beside `mlflow.log_metric`.

Run it with a Python that has the package and mlflow, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/mlflow_metrics.py
    python benchmarks/mlflow_metrics.py --json metrics.json

It starts an `mlflow server` of its own on loopback. `benchmarks/README.md` says what the columns
are.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import ckpt_callbacks as cc
import measure
import servers
from ckpt_callbacks_mlflow import MLflowTracker

STEPS, STEPS_OF_MLFLOW = 10_000, 300
LIMIT = 0.02
DRAIN_LIMIT = 600.0
NAMES = ("loss", "gradient_norm", "learning_rate")

Metrics = dict[str, jax.Array]


@jax.jit
def train_step(weights: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    """Work for about a millisecond; the metrics are exact, so that they can be compared."""
    return jnp.tanh(weights @ weights), dict(zip(NAMES, (step / 4, step + 0.5, -step), strict=True))


def expected(name: str) -> list[tuple[int, float]]:
    """Return what a complete history of a metric holds, in order."""
    value: dict[str, Callable[[int], float]] = {
        "loss": lambda step: step / 4,
        "gradient_norm": lambda step: step + 0.5,
        "learning_rate": lambda step: -float(step),
    }
    return [(step, value[name](step)) for step in range(STEPS)]


def loop(steps: int, tell: Callable[[int, jax.Array, Metrics], object]) -> tuple[float, float]:
    """Train; return the seconds a step that `tell` took, and that the step took with it."""
    weights = jnp.full((256, 256), 0.01)
    spent = 0.0
    begin = time.perf_counter()
    for step in range(steps):
        weights, metrics = jax.block_until_ready(train_step(weights, jnp.float32(step)))
        start = time.perf_counter()
        tell(step, weights, metrics)
        spent += time.perf_counter() - start
    return spent / steps, (time.perf_counter() - begin) / steps


def ours(uri: str, folder: Path) -> dict[str, Any]:
    """Train with `on_step`; all values must have arrived at the end."""
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(folder / "run", save=cc.AtEnd(), keep=cc.LatestN(1)),
        MLflowTracker(
            experiment=folder.name,
            tracking_uri=uri,
            artifact_location=None if uri.startswith("http") else str(folder / "artifacts"),
        ),
        drain_limit=DRAIN_LIMIT,
    )
    with callbacks.run(jnp.zeros((256, 256))) as run:
        assert run.state is not None  # noqa: S101  # it is read once, as in any loop
        calls, whole = loop(STEPS, run.on_step)
        end = time.perf_counter()
    drained = time.perf_counter() - end
    check(uri, folder.name)
    return {"on_step_seconds": calls, "loop_seconds": whole, "drain_seconds": drained}


def check(uri: str, experiment: str) -> None:
    """Raise unless MLflow has every value, in order."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    for name in NAMES:
        history = client.get_metric_history(run.info.run_id, name)
        values = [(point.step, point.value) for point in history]
        if values != expected(name):
            raise RuntimeError(f"{uri}: {name} has {len(values)} values, or others, or in disorder")


def theirs(uri: str, folder: Path) -> dict[str, Any]:
    """Train with `mlflow.log_metric`, fewer steps, since each costs as much as the first."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    if not uri.startswith("http"):
        mlflow.create_experiment(f"{folder.name}-log-metric", str(folder / "artifacts"))
    mlflow.set_experiment(f"{folder.name}-log-metric")

    def log(step: int, _: jax.Array, metrics: Metrics) -> None:
        for name, value in metrics.items():
            mlflow.log_metric(name, float(value), step=step)

    with mlflow.start_run():
        loop(3, log)  # what the first calls set up does not count
        calls, whole = loop(STEPS_OF_MLFLOW, log)
    return {"log_metric_seconds": calls, "log_metric_loop_seconds": whole}


def measured(uri: str, folder: Path, runs: int) -> list[dict[str, Any]]:
    """Return the raw numbers of one server: each run has all loops in turn."""
    rows: list[dict[str, Any]] = []
    for number in range(runs):
        here = folder / f"metrics-{number}"
        here.mkdir()
        _, bare = loop(STEPS // 5, lambda step, state, metrics: None)
        rows.append(ours(uri, here) | theirs(uri, here) | {"bare_loop_seconds": bare})
    return rows


@click.command()
@click.option("--runs", default=3, show_default=True, help="Runs, of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
def main(runs: int, file: Path | None) -> None:
    """Measure 10,000 steps with three metrics each, on a sqlite file and on a server."""
    servers.quiet()
    jax.block_until_ready(train_step(jnp.zeros((256, 256)), jnp.float32(0)))
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as name:
        folder = Path(name)
        (folder / "sqlite").mkdir()
        uri = f"sqlite:///{folder}/sqlite/mlflow.db"
        found["sqlite file"] = measured(uri, folder / "sqlite", runs)
        with servers.mlflow_server(folder / "server") as uri:
            found["server"] = measured(uri, folder / "server", runs)

    table = Table(title=f"{STEPS:,} steps with {len(NAMES)} metrics each", title_justify="left")
    titles = ("MLflow", "on_step us", "log_metric us", "ratio", "loop us", "bare us", "drain s")
    for title in titles:
        table.add_column(title, justify="left" if title == "MLflow" else "right")
    lines = []
    for where, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        ratio = statistics.median(r["on_step_seconds"] / r["log_metric_seconds"] for r in rows)
        table.add_row(
            where,
            f"{1e6 * middle['on_step_seconds']:.1f}",
            f"{1e6 * middle['log_metric_seconds']:,.0f}",
            f"{ratio:.5f}",
            f"{1e6 * middle['loop_seconds']:,.0f}",
            f"{1e6 * middle['bare_loop_seconds']:,.0f}",
            f"{middle['drain_seconds']:.1f}",
        )
        lines.append(measure.at_most(f"on_step by log_metric, {where},", ratio, LIMIT))
    console = Console()
    console.print(table)
    for line in lines:
        console.print(line)
    console.print(f"All {STEPS * len(NAMES):,} values arrived, in order, in every run.")
    console.print(measure.load())
    measure.write(file, runs=found)


if __name__ == "__main__":
    main()
