"""What logging metrics to W&B costs a loop: `on_step` beside `wandb.log`.

Run it with a Python that has the package with its extra `wandb-testing`::

    python benchmarks/wandb_metrics.py
    python benchmarks/wandb_metrics.py --json metrics.json

W&B's client is the real one; the server is the stand-in of the tests, in this process, and the
loops have another one. `benchmarks/README.md` says what the columns are.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import measure
from ckpt_callbacks_wandb.testing import StoredRun, WandbServer

STEPS = 10_000
LIMIT = 0.10
DRAIN_LIMIT = 600.0
NAMES = ("loss", "gradient_norm", "learning_rate")
OURS, THEIRS = "on-step", "log"
"""Projects."""


def expected(name: str) -> list[tuple[int, float]]:
    """Return what a complete history of a metric holds, in order."""
    value: dict[str, Callable[[int], float]] = {
        "loss": lambda step: step / 4,
        "gradient_norm": lambda step: step + 0.5,
        "learning_rate": lambda step: -float(step),
    }
    return [(step, value[name](step)) for step in range(STEPS)]


def loops(folder: Path) -> dict[str, float]:
    """Train without telling, with `on_step` and with `wandb.log`; return the seconds a step."""
    import jax
    import jax.numpy as jnp
    import wandb

    import ckpt_callbacks as cc
    from ckpt_callbacks_wandb import WandbTracker

    @jax.jit
    def train_step(weights: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Work for about a millisecond; the metrics are exact, so that they can be compared."""
        metrics = dict(zip(NAMES, (step / 4, step + 0.5, -step), strict=True))
        return jnp.tanh(weights @ weights), metrics

    def loop(steps: int, tell: Callable[[int, Any, Any], object]) -> tuple[float, float]:
        """Return the seconds a step that `tell` took, and that the step took with it."""
        weights = jnp.full((256, 256), 0.01)
        spent = 0.0
        begin = time.perf_counter()
        for step in range(steps):
            weights, metrics = jax.block_until_ready(train_step(weights, jnp.float32(step)))
            start = time.perf_counter()
            tell(step, weights, metrics)
            spent += time.perf_counter() - start
        return spent / steps, (time.perf_counter() - begin) / steps

    jax.block_until_ready(train_step(jnp.zeros((256, 256)), jnp.float32(0)))
    _, bare = loop(STEPS // 5, lambda step, state, metrics: None)

    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(folder / "run", save=cc.AtEnd(), keep=cc.LatestN(1)),
        WandbTracker(OURS),
        drain_limit=DRAIN_LIMIT,
    )
    with callbacks.run(jnp.zeros((256, 256))) as run:
        assert run.state is not None  # noqa: S101  # it is read once, as in any loop
        ours, with_ours = loop(STEPS, run.on_step)
        end = time.perf_counter()
    drained = time.perf_counter() - end

    def log(step: int, _: jax.Array, metrics: dict[str, jax.Array]) -> None:
        wandb.log({name: float(value) for name, value in metrics.items()}, step=step)

    with wandb.init(project=THEIRS):
        theirs, with_theirs = loop(STEPS, log)
        end = time.perf_counter()
    return {
        "on_step_seconds": ours,
        "loop_seconds": with_ours,
        "drain_seconds": drained,
        "log_seconds": theirs,
        "log_loop_seconds": with_theirs,
        "finish_seconds": time.perf_counter() - end,
        "bare_loop_seconds": bare,
    }


def check(run: StoredRun, step_key: str) -> None:
    """Raise unless the server has every value, in order."""
    for name in NAMES:
        values = [(row[step_key], row[name]) for row in run.history if name in row]
        if values != expected(name):
            raise RuntimeError(
                f"{run.project}: {name} has {len(values)} values, or others, or in disorder"
            )


def measured(folder: Path) -> dict[str, float]:
    """Run the loops in a process of their own, against a server in this one."""
    places = {f"WANDB_{what}DIR": str(folder) for what in ("", "DATA_", "CACHE_", "CONFIG_")}
    with WandbServer() as server:
        command = [sys.executable, __file__, "--part", str(folder)]
        done = subprocess.run(  # noqa: S603  # the command is ours
            command,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            env={**os.environ, **places, **server.environment(), "WANDB_CONSOLE": "off"},
        )
        for project, key in {OURS: "trainer/step", THEIRS: "_step"}.items():
            (run,) = server.runs(project)
            check(run, key)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@click.command()
@click.option("--runs", default=3, show_default=True, help="Runs, of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option("--part", type=click.Path(path_type=Path), hidden=True)
def main(runs: int, file: Path | None, part: Path | None) -> None:
    """Measure 10,000 steps with three metrics each."""
    if part:
        click.echo(json.dumps(loops(part)))
        return
    rows = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as name:
            rows.append(measured(Path(name)))

    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    ratio = statistics.median(row["on_step_seconds"] / row["log_seconds"] for row in rows)
    table = Table(title=f"{STEPS:,} steps with {len(NAMES)} metrics each", title_justify="left")
    for title in ("on_step us", "log us", "ratio", "loop us", "bare us", "drain s"):
        table.add_column(title, justify="right")
    table.add_row(
        f"{1e6 * middle['on_step_seconds']:.1f}",
        f"{1e6 * middle['log_seconds']:.1f}",
        f"{ratio:.3f}",
        f"{1e6 * middle['loop_seconds']:,.0f}",
        f"{1e6 * middle['bare_loop_seconds']:,.0f}",
        f"{middle['drain_seconds']:.1f}",
    )
    console = Console()
    console.print(table)
    console.print(measure.at_most("on_step by wandb.log", ratio, LIMIT))
    console.print(f"All {STEPS * len(NAMES):,} values arrived, in order, in every run.")
    console.print(measure.load())
    measure.write(file, runs=rows)


if __name__ == "__main__":
    main()
