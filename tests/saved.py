"""One state in one checkpoint, for the tests of what comes back."""

from pathlib import Path
from typing import Any

import jax

import ckpt_callbacks as cc
from states.case import describe


def save(root: Path, state: Any) -> Path:
    """Save a state as step 0 of a run directory, which is returned."""
    checkpoint = cc.OrbaxCheckpoint(
        root, save=cc.EveryNSteps(1), keep=cc.LatestN(1), on_failure="raise"
    )
    with cc.Callbacks(checkpoint).run(state) as run:
        run.save(0, run.state)
    return root


def tree_digest(tree: Any) -> dict[str, str]:
    """Return type, dtype, shape and SHA-256 of every leaf of a pytree that JAX knows."""
    return {
        jax.tree_util.keystr(path): describe(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not callable(leaf)
    }
