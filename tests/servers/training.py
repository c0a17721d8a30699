"""A training of three steps, which evicts one checkpoint, and what it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ckpt_callbacks as cc

SCORES = [0.5, 0.9, 0.1]
STEPS = len(SCORES)
KEEP = cc.LatestN(1) | cc.BestN(1, "score", mode="max")
ALIASES = {"best": 1, "last": 2}
METRICS = {
    "loss": [(step, step / 2) for step in range(STEPS)],
    "score": list(enumerate(SCORES)),
}


def new_state() -> dict[str, Any]:
    return {"w": np.zeros(8)}


def advance(state: dict[str, Any], step: int) -> dict[str, Any]:
    return {"w": state["w"] * 1.5 + step + 0.1}


def expected_weights() -> bytes:
    """Return what the training ends with, without callbacks."""
    state = new_state()
    for step in range(STEPS):
        state = advance(state, step)
    return weights(state)


def weights(state: dict[str, Any]) -> bytes:
    content: bytes = state["w"].tobytes()
    return content


def train(
    directory: Path,
    *plugins: object,
    drain_limit: float = 20.0,
    after_step: Callable[[], None] = lambda: None,
) -> bytes:
    """Train to the end, from where the directory is, and return the weights."""
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(1), keep=KEEP),
        *plugins,
        drain_limit=drain_limit,
    )
    with callbacks.run(new_state(), config={"rate": 0.5}) as run:
        state = run.state
        for step in range(run.next_step, STEPS):
            state = advance(state, step)
            run.on_eval(step, {"score": SCORES[step]})
            run.on_step(step, state, {"loss": step / 2})
            after_step()
    return weights(state)
