"""A small training loop, for the tests of what happens around it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ckpt_callbacks as cc

KEEP = cc.LatestN(2) | cc.BestN(1, "score", mode="max")


def new_state(value: float = 0.0) -> dict[str, Any]:
    return {"model": {"w": jnp.full((4, 4), value)}, "moments": {"m": jnp.zeros(3)}}


def advance(state: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: x + 1, state)


def callbacks_in(
    directory: Path,
    *plugins: object,
    keep: Any = KEEP,
    every: int = 1,
    drain_limit: float = 10,
    **options: Any,
) -> cc.Callbacks:
    return cc.Callbacks(
        cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(every), keep=keep, **options),
        *plugins,
        drain_limit=drain_limit,
    )


def train(
    callbacks: cc.Callbacks,
    steps: int,
    scores: Mapping[int, float] | None = None,
    before: Callable[[int, cc.Run[Any]], None] = lambda step, run: None,
    **options: Any,
) -> dict[str, Any]:
    """Take all steps up to `steps`; the model's weights are the number of steps taken."""
    with callbacks.run(new_state(), **options) as run:
        state = run.state
        for step in range(run.next_step, steps):
            before(step, run)
            state = advance(state)
            if scores and step in scores:
                run.on_eval(step, {"score": scores[step]})
            run.on_step(step, state, {"loss": jnp.float32(step)})
    return state


def local_steps(directory: Path) -> set[int]:
    return {int(p.name) for p in directory.iterdir() if p.name.isdecimal()}


def weight(directory: Path, which: int | str = "last") -> float:
    return float(cc.restore(directory, like=new_state(), which=which)["model"]["w"][0, 0])
