"""How long a loop waits for W&B: while its server is well, hangs, answers 500 or hangs up.

Run it with a Python that has the package with its extra `wandb-testing`::

    python benchmarks/wandb_outage.py
    python benchmarks/wandb_outage.py --runs 1 --json outage.json

W&B's client is the real one; the server is the stand-in of the tests, in this process, and each
loop has another one, so that W&B is imported meanwhile, as in a training. `benchmarks/README.md`
says what the columns are.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import click
from rich.console import Console
from rich.table import Table

import measure
from ckpt_callbacks_wandb.testing import Fault, WandbServer

STEPS, EVERY = 1000, 50
LIMIT = 50.0
"""Milliseconds that an event of the loop may take longer than without a tracker."""
NONE, WELL = "no tracker", "well"
HARMS: tuple[Literal["hang", "500", "drop"], ...] = ("hang", "500", "drop")
LATER = 100
"""The request with which an outage begins that does not begin with the first."""
EVENTS = {
    "enter": "entering the run",
    "on_step": "on_step",
    "on_eval": "on_eval",
    "first save": "first capture",
    "save": "later capture",
    "step": "whole step",
}
GUARDED = ("enter", "on_step", "on_eval")
"""The events that the target is about: what a capture takes depends on the state."""

Times = dict[str, list[float]]
T = TypeVar("T")


def train(folder: Path, *, tracked: bool) -> Times:
    """Train for some ten seconds and return how long every event took."""
    import jax
    import jax.numpy as jnp

    import ckpt_callbacks as cc
    from ckpt_callbacks_wandb import WandbTracker

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
    trackers = [WandbTracker("outage")] if tracked else []
    keep = cc.LatestN(2) | cc.BestN(1, "score", mode="max")
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(folder / "run", save=cc.EveryNSteps(EVERY), keep=keep),
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
    begin = time.perf_counter()
    run.__exit__(None, None, None)
    times["leave"] = [time.perf_counter() - begin]
    return times


def apart(fault: Fault | None, *, tracked: bool) -> Times:
    """Train in a process of its own, against a server in this one."""
    with (
        tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as folder,
        WandbServer() as server,
    ):
        server.begin(*filter(None, [fault]))
        places = {f"WANDB_{what}DIR": folder for what in ("", "DATA_", "CACHE_", "CONFIG_")}
        command = [sys.executable, __file__, "--part", folder]
        with subprocess.Popen(  # noqa: S603  # the command is ours
            [*command, "--tracked"] if tracked else command,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | places | server.environment(),
        ) as child:
            assert child.stdout  # noqa: S101  # there is a pipe
            line = child.stdout.readline()
            begin = time.perf_counter()
            child.wait()
        found: Times = json.loads(line)
        found["end"] = [time.perf_counter() - begin]
    return found


@click.command()
@click.option("--runs", default=3, show_default=True, help="Runs, whose events are pooled.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option("--part", type=click.Path(path_type=Path), hidden=True)
@click.option("--tracked", is_flag=True, hidden=True)
def main(runs: int, file: Path | None, part: Path | None, *, tracked: bool) -> None:
    """Measure every event of a loop, in an outage from the start and in one that begins later."""
    if part:
        logging.disable(logging.WARNING)  # that the server is down is no news here
        click.echo(json.dumps(train(part, tracked=tracked)))
        return
    cases: dict[str, Fault | None] = {NONE: None, WELL: None}
    cases |= {harm: Fault(harm, times=sys.maxsize) for harm in HARMS}
    cases |= {f"{harm} later": Fault(harm, at=LATER, times=sys.maxsize) for harm in HARMS}
    found: dict[str, list[Times]] = {case: [] for case in cases}
    for _ in range(runs):
        for case, fault in cases.items():  # in turn: a busy moment does not hit one alone
            found[case].append(apart(fault, tracked=case != NONE))

    table = Table(title=f"{runs * STEPS:,} steps with W&B", title_justify="left")
    for title in ("event", "server"):
        table.add_column(title)
    for title in ("count", "p50 ms", "p99 ms", "max ms"):
        table.add_column(title, justify="right")
    longest: dict[str, dict[str, float]] = {case: {} for case in cases}
    for event, title in EVENTS.items():
        for case in cases:
            pooled = [seconds for times in found[case] for seconds in times[event]]
            longest[case][event] = max(pooled)
            cells = [f"{1000 * measure.quantile(pooled, part):.3f}" for part in (0.5, 0.99, 1)]
            table.add_row(title, case, f"{len(pooled):,}", *cells)
    console = Console()
    console.print(table)
    for case in list(cases)[1:]:
        more = max(longest[case][event] - longest[NONE][event] for event in GUARDED)
        what = f"{case}, any event without a capture, more than {NONE},"
        console.print(measure.at_most(what, 1000 * more, LIMIT, " ms"), soft_wrap=True)
    ends = {c: max(t["leave"][0] + t["end"][0] for t in rows) for c, rows in found.items()}
    told = ", ".join(f"{case} {seconds:.1f} s" for case, seconds in ends.items())
    console.print(f"From the last step to the end of the process, at most: {told}.", soft_wrap=True)
    console.print(measure.load())
    measure.write(file, runs=found)


if __name__ == "__main__":
    main()
