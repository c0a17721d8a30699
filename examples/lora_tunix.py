"""Fine-tune a small Flax NNX transformer with LoRA, by the trainer of Tunix: what knows
scikit-learn's handwritten digits learns to read them white on black.

    python examples/lora_tunix.py [--directory runs] [--steps 300]

Run it again and it goes on where it stopped, also after a `kill -9`. A checkpoint holds the LoRA
parameters and the optimizer only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from sklearn.datasets import load_digits
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import ckpt_callbacks as cc
from ckpt_callbacks_tunix import attach

BATCH_SIZE = 64
WIDTH = 32
Batch = dict[str, np.ndarray]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=WIDTH, decode=False, rngs=rngs
        )
        self.widen = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.narrow = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        tokens = tokens + self.attention(self.norms[0](tokens))
        return tokens + self.dropout(self.narrow(nnx.gelu(self.widen(self.norms[1](tokens)))))


class Transformer(nnx.Module):
    """Reads a picture as eight tokens, its rows."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(8, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (8, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        tokens = self.embed(pixels.reshape(-1, 8, 8)) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(axis=1))


def loss_of(model: Transformer, pixels: jax.Array, classes: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(pixels), classes).mean()


def load() -> tuple[Batch, Batch]:
    """Return the training and the validation set, black on white."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = (digits.data[order] / 16).astype(np.float32)
    classes = digits.target[order].astype(np.int32)
    return (
        {"pixels": pixels[:1400], "classes": classes[:1400]},
        {"pixels": pixels[1400:], "classes": classes[1400:]},
    )


def inverted(batch: Batch) -> Batch:
    return batch | {"pixels": 1 - batch["pixels"]}


def batches(data: Batch, seed: int) -> Iterator[Batch]:
    """Yield batches without end, the same ones every time."""
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.choice(len(data["classes"]), BATCH_SIZE, replace=False)
        yield {name: values[chosen] for name, values in data.items()}


def base_model(steps: int = 300) -> Transformer:
    """Return a network that reads digits: what is a download elsewhere."""
    model = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Transformer, optimizer: nnx.Optimizer, batch: Batch) -> None:
        optimizer.update(model, nnx.grad(loss_of)(model, **batch))

    for _, batch in zip(range(steps), batches(load()[0], seed=0), strict=False):
        train_step(model, optimizer, batch)
    return model


def with_lora(model: Transformer) -> Transformer:
    provider = qwix.LoraProvider(module_path=".*(embed|widen|narrow|head)", rank=4, alpha=8.0)
    pixels = jnp.zeros((1, 64))
    return qwix.apply_lora_to_model(model, provider, pixels, rngs=nnx.Rngs(1))


def callbacks_in(directory: Path) -> cc.Callbacks:
    return cc.Callbacks(
        cc.OrbaxCheckpoint(
            directory / "lora-tunix",
            save=cc.EveryNSteps(50),
            keep=cc.LatestN(2) | cc.BestN(1, "eval_loss", mode="min"),
        )
    )


def train(callbacks: cc.Callbacks, steps: int) -> cc.Summary:
    training, validation = map(inverted, load())
    trainer = PeftTrainer(
        with_lora(base_model()),
        optax.adamw(1e-2),
        TrainingConfig(eval_every_n_steps=50, max_steps=steps),
    ).with_loss_fn(loss_of)
    with attach(callbacks, trainer, config={"rank": 4, "steps": steps}) as run:
        print(f"training goes on after step {run.next_step - 1}" if run.next_step else "training")
        # The same batches from the beginning: the trainer skips what it was trained on.
        trainer.train(batches(training, seed=1), [validation])
    return run.summary()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    print(train(callbacks_in(options.directory), options.steps))


if __name__ == "__main__":
    main()
