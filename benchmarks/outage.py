"""How long a loop waits for a tracking server that is down: from the start, the whole time.

Run it with a Python that has the package and mlflow, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/outage.py
    python benchmarks/outage.py --full --json outage.json

Each loop has a process of its own, so that MLflow is imported meanwhile, as in a training.
`benchmarks/README.md` says what the columns are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console
from rich.table import Table

import measure
import servers

STEPS, EVERY = 2000, 50
LIMIT = 50.0
"""Milliseconds that an event of the loop may take."""
RETRIES = 2
"""Of `mlflow.log_metric`, unless its own seven are asked for: those take four minutes."""
DOWN = {"refused": "refuses", "deaf": "never answers"}
"""Ports that a tracker is pointed at."""
NONE = "no tracker"
EVENTS = {
    "enter": "entering the run",
    "on_step": "on_step, nothing due",
    "on_eval": "on_eval",
    "first save": "on_step, first capture",
    "save": "on_step, later capture",
    "step": "whole step of the loop",
}
GUARDED = ("enter", "on_step", "on_eval")
"""The events that the target is about: what a capture takes depends on the state."""

Times = dict[str, list[float]]
T = TypeVar("T")


@contextmanager
def down(kind: str) -> Iterator[str | None]:
    """Give the address of a server that is down as `kind` says; of none for `none`."""
    if kind == "deaf":
        with servers.deaf_port() as port:
            yield f"http://127.0.0.1:{port}"
    else:
        yield f"http://127.0.0.1:{servers.closed_port()}" if kind == "refused" else None


def train(kind: str) -> Times:
    """Train for some twenty seconds and return how long every event took."""
    import jax
    import jax.numpy as jnp

    import ckpt_callbacks as cc
    from ckpt_callbacks_mlflow import MLflowTracker

    times: Times = {name: [] for name in EVENTS}

    def timed(event: str, call: Callable[[], T]) -> T:
        seconds, result = measure.once(call)
        times[event].append(seconds)
        return result

    @jax.jit
    def train_step(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(8):
            weights = jnp.tanh(weights @ weights)
        return weights, weights.sum()

    weights = jnp.full((512, 512), 0.01)  # 1 MiB
    jax.block_until_ready(train_step(weights))
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as folder, down(kind) as uri:
        trackers = [MLflowTracker(experiment="outage", tracking_uri=uri)] if uri else []
        keep = cc.LatestN(2) | cc.BestN(1, "score", mode="max")
        callbacks = cc.Callbacks(
            cc.OrbaxCheckpoint(Path(folder, "run"), save=cc.EveryNSteps(EVERY), keep=keep),
            *trackers,
            drain_limit=0,  # else leaving the run waits, as asked for, and says what is unsent
        )
        run = callbacks.run(weights)
        timed("enter", run.__enter__)
        weights = run.state
        for step in range(STEPS):
            begin = time.perf_counter()
            weights, loss = jax.block_until_ready(train_step(weights))
            due = step % EVERY == 0
            if due:
                score = {"score": step % 7}
                timed("on_eval", lambda step=step, score=score: run.on_eval(step, score))
            event = "on_step" if not due else "save" if step else "first save"
            told = {"loss": loss}
            timed(event, lambda s=step, w=weights, told=told: run.on_step(s, w, told))
            times["step"].append(time.perf_counter() - begin)
        run.__exit__(None, None, None)
    return times


def log_metric(retries: str) -> Times:
    """Return how long one `mlflow.log_metric` takes on a port that refuses."""
    if retries.isdecimal():
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = retries
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(f"http://127.0.0.1:{servers.closed_port()}")

    def call() -> None:
        # As `mlflow.log_metric` with a run that was begun before the server went.
        with contextlib.suppress(MlflowException):
            client.log_metric("0123456789abcdef0123456789abcdef", "loss", 1.0, step=1)

    return {"log_metric": [measure.once(call)[0]]}


def apart(*arguments: str) -> Times:
    """Run a part of this script in a process of its own."""
    command = [sys.executable, __file__, "--part", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)  # noqa: S603
    found: Times = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(found: dict[str, list[Times]]) -> Iterator[tuple[str, str, str, list[float]]]:
    """Yield what a row of the table is about, and its times; one event after the other."""
    for event, title in EVENTS.items():
        for kind, runs in found.items():
            pooled = [seconds for times in runs for seconds in times[event]]
            yield title, DOWN.get(kind, NONE), event, pooled


@click.command()
@click.option("--runs", default=3, show_default=True, help="Runs, whose events are pooled.")
@click.option("--full", is_flag=True, help="Measure log_metric with its own retries: minutes.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option("--part", hidden=True)
def main(runs: int, file: Path | None, part: str | None, *, full: bool) -> None:
    """Measure every event of a loop while the tracking server is down."""
    servers.quiet()
    if part:
        logging.disable(logging.WARNING)  # that the server is down is no news here
        click.echo(json.dumps(train(part) if part in ("none", *DOWN) else log_metric(part)))
        return
    found: dict[str, list[Times]] = {"none": [], **{kind: [] for kind in DOWN}}
    for _ in range(runs):
        for kind, rows in found.items():  # in turn, so that a busy moment does not hit one alone
            rows.append(apart(kind))
    retries = "its own" if full else str(RETRIES)
    (theirs,) = apart(retries)["log_metric"]

    table = Table(title=f"{runs * STEPS:,} steps without a server", title_justify="left")
    for title in ("event", "server"):
        table.add_column(title)
    for title in ("count", "p50 ms", "p99 ms", "max ms"):
        table.add_column(title, justify="right")
    longest = 0.0
    for title, server, event, pooled in rows_of(found):
        cells = [f"{1000 * measure.quantile(pooled, part):.3f}" for part in (0.5, 0.99, 1)]
        table.add_row(title, server, f"{len(pooled):,}", *cells)
        if event in GUARDED and server != NONE:
            longest = max(longest, *pooled)
    console = Console()
    console.print(table)
    console.print(measure.at_most("any event without a capture", 1000 * longest, LIMIT, " ms"))
    console.print(f"One mlflow.log_metric, refused, with {retries} retries: {theirs:.1f} s.")
    console.print(measure.load())
    measure.write(file, runs=found, log_metric={"retries": retries, "seconds": theirs})


if __name__ == "__main__":
    main()
