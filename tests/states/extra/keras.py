"""Keras on JAX: a compiled model that `fit` trains, and the variables of one in a loop."""

from functools import cache, partial
from typing import Any

import jax
import keras
from keras import layers

from states.case import Case, Leaves, batch_of

Variables = tuple[list[jax.Array], list[jax.Array], list[jax.Array]]
"""Trainable and other variables of the model, and those of the optimizer."""


def compiled(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=seed),
            layers.Dense(2),
        ]
    )
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def variables(model: keras.Model) -> Variables:
    kinds = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables
    trainable, others, optimizer = ([v.value for v in kind] for kind in kinds)
    return trainable, others, optimizer


def fit(model: keras.Model, step: int) -> keras.Model:
    x, y = batch_of(step)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return model


def model_leaves(model: keras.Model) -> Leaves:
    """Name by position, since Keras counts the layers that a process has made."""
    for kind, arrays in zip(("trainable", "other", "optimizer"), variables(model), strict=True):
        for number, array in enumerate(arrays):
            yield f"{kind}/{number}", array


@cache
def blueprint() -> keras.Model:
    return compiled(0)


@partial(jax.jit, donate_argnums=0)
def step_of(state: Variables, x: jax.Array, y: jax.Array) -> Variables:
    model, (trainable, others, optimizer) = blueprint(), state

    def loss_of(trainable: list[jax.Array]) -> tuple[jax.Array, Any]:
        out, new = model.stateless_call(trainable, others, x, training=True)
        return keras.ops.mean((out - y) ** 2), new

    gradients, others = jax.grad(loss_of, has_aux=True)(trainable)
    trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
    return trainable, others, optimizer


def train_variables(state: Variables, step: int) -> Variables:
    blueprint()  # built here, not while JAX traces
    return step_of(state, *batch_of(step))


CASES = [
    Case("model", compiled, fit, model_leaves),
    Case("variables", lambda seed: variables(compiled(seed)), train_variables),
]
