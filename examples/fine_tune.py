"""Fine-tune a small Flax NNX network. A run learns the digits 0 to 4 from many images; another one
begins with the first layer of its best checkpoint, a new output layer and a fresh optimizer, and
learns all ten digits from 50 images. What it begins with is compared to random weights.

    python examples/fine_tune.py [--directory runs] [--steps 300]

Run it again and both go on where they stopped, also after a `kill -9`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ckpt_callbacks as cc
from digits import Batch, batch_of, callbacks_for, load
from digits_nnx import evaluate, new_state, train_step

LEARNING_RATE = 1e-3
EVAL_EVERY = 10
COMPARED = 50
"""Steps to train from random weights."""

State = dict[str, Any]


def few_classes(data: Batch) -> Batch:
    """Return what there is of the digits 0 to 4."""
    few = data[1] < 5
    return data[0][few], data[1][few]


def fine_tuning(callbacks: cc.Callbacks, pretrained: Path) -> cc.Run[State]:
    """Return a run that begins with the first layer of the best checkpoint of another one."""
    weights = cc.Weights(pretrained, which="best", only="model/layers/0")
    return callbacks.run(new_state(LEARNING_RATE), start_from=weights)


def train(
    run: cc.Run[State], batch_at: Callable[[int], Batch], validation: Batch, steps: int
) -> dict[int, float]:
    """Train to the end; return the accuracy at the steps that were evaluated."""
    accuracy: dict[int, float] = {}
    state = run.state
    for step in range(run.next_step, steps + 1):
        state["model"].train()
        metrics = train_step(state["model"], state["optimizer"], batch_at(step))
        if step % EVAL_EVERY == 0:
            state["model"].eval()
            evaluated = evaluate(state["model"], validation)
            run.on_eval(step, evaluated)
            accuracy[step] = float(evaluated["val_accuracy"])
        run.on_step(step, state, metrics)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    directory, steps = options.directory, options.steps
    directory.mkdir(parents=True, exist_ok=True)
    training, validation = load()
    many, some = few_classes(training), (training[0][:50], training[1][:50])

    callbacks = callbacks_for("digits-pretrained", directory)
    with callbacks.run(new_state(LEARNING_RATE, classes=5)) as run:
        train(run, lambda step: batch_of(step, many), few_classes(validation), steps)
    print(run.summary())

    callbacks = callbacks_for("digits-fine-tuned", directory)
    with fine_tuning(callbacks, directory / "digits-pretrained") as run:
        fine_tuned = train(run, lambda _: some, validation, steps)
    print(run.summary())

    with cc.Callbacks().run(new_state(LEARNING_RATE)) as run:
        from_scratch = train(run, lambda _: some, validation, min(steps, COMPARED))
    print("step  fine-tuned  from scratch")
    for step in sorted(fine_tuned.keys() & from_scratch.keys()):
        print(f"{step:4}{fine_tuned[step]:12.4f}{from_scratch[step]:14.4f}")


if __name__ == "__main__":
    main()
