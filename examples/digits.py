"""What the digits examples share: the data, the callbacks, and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import ckpt_callbacks as cc
from ckpt_callbacks_mlflow import MLflowTracker
from ckpt_callbacks_wandb import WandbTracker

Batch = tuple[np.ndarray, np.ndarray]
BATCH_SIZE = 128
EVAL_EVERY = 50


def load() -> tuple[Batch, Batch]:
    """Return the training and the validation set: pixels in [0, 1] and classes."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = (digits.data[order] / 16).astype(np.float32)
    classes = digits.target[order].astype(np.int32)
    return (pixels[:1400], classes[:1400]), (pixels[1400:], classes[1400:])


def batch_of(step: int, data: Batch) -> Batch:
    """Return the batch of a step: a function of the step alone, so a resumed run sees the same."""
    chosen = np.random.default_rng(step).choice(len(data[1]), BATCH_SIZE, replace=False)
    return data[0][chosen], data[1][chosen]


def callbacks_for(name: str, directory: Path, *more: object) -> cc.Callbacks:
    """Keep the two latest and the two best, in `directory / name`, MLflow and W&B."""
    return cc.Callbacks(
        cc.OrbaxCheckpoint(
            directory / name,
            save=cc.EveryNSteps(EVAL_EVERY),
            keep=cc.LatestN(2) | cc.BestN(2, "val_accuracy", mode="max"),
        ),
        MLflowTracker(
            experiment="digits",
            register_as=name,
            tracking_uri=f"sqlite:///{directory.absolute()}/mlflow.db",
            artifact_location=str(directory.absolute() / "mlartifacts"),
        ),
        WandbTracker(project="digits", mode="offline", dir=directory),
        *more,
    )


def main(name: str, train: Callable[[cc.Callbacks, int], tuple[object, cc.Summary]]) -> None:
    """Train with the options of the command line, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    _, summary = train(callbacks_for(name, options.directory), options.steps)
    print(summary)
