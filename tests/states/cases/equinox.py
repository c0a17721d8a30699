"""Equinox: modules, their state, and tuples of both with what trains them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from states.case import Case, Leaves, batch_of, pytree_leaves

OPTIMIZER = optax.adam(0.1)


class Net(eqx.Module):
    """Functions, static fields and numbers beside the arrays."""

    layers: list[eqx.nn.Linear]
    dropout: eqx.nn.Dropout
    activation: Callable[[jax.Array], jax.Array]
    temperature: float
    name: str = eqx.field(static=True)

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(3, 4, key=first), eqx.nn.Linear(4, 2, key=second)]
        self.dropout = eqx.nn.Dropout(0.5)
        self.activation = jax.nn.relu  # a `custom_jvp`, which is a leaf
        self.temperature = 0.7
        self.name = "net"

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        hidden = self.dropout(self.activation(self.layers[0](x)), key=key)
        return self.layers[1](hidden) / self.temperature


class Normed(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.linear, self.out = eqx.nn.Linear(3, 4, key=first), eqx.nn.Linear(4, 2, key=second)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x, state = self.norm(self.linear(x), state)
        return self.out(x), state


class Tied(eqx.Module):
    shared: eqx.nn.Shared
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        first, second, third = jax.random.split(key, 3)
        layers = eqx.nn.Linear(3, 3, key=first), eqx.nn.Linear(3, 3, key=second)
        self.shared = eqx.nn.Shared(
            layers, lambda pair: pair[1].weight, lambda pair: pair[0].weight
        )
        self.out = eqx.nn.Linear(3, 2, key=third)

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = self.shared()
        return self.out(second(jnp.tanh(first(x))))


class Stateful(NamedTuple):
    model: Normed
    norms: eqx.nn.State
    optimizer: optax.OptState


def array_leaves(model: Any) -> Leaves:
    """Leave out the object that stands where a shared weight was taken away."""
    return [(path, leaf) for path, leaf in pytree_leaves(model) if eqx.is_array(leaf)]


def updated(model: Any, optimizer: optax.OptState, gradients: Any) -> tuple[Any, optax.OptState]:
    updates, optimizer = OPTIMIZER.update(gradients, optimizer)
    return eqx.apply_updates(model, updates), optimizer


def begin(model: Any) -> optax.OptState:
    return OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit(donate="all-except-first")
def module_step(batch: Any, model: Any) -> Any:
    x, y = batch

    def loss_of(model: Any) -> jax.Array:
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    gradients = eqx.filter_grad(loss_of)(model)
    return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradients))


def with_optimizer(seed: int) -> tuple[Any, ...]:
    key = jax.random.key(seed)
    model = Net(key)
    return model, begin(model), 100 * seed, jax.random.fold_in(key, 1)


@eqx.filter_jit(donate="all-except-first")
def tuple_step(batch: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    (x, y), (model, optimizer, key) = batch, state
    key, dropout = jax.random.split(key)

    def loss_of(model: Net) -> jax.Array:
        return jnp.mean((jax.vmap(model)(x, jax.random.split(dropout, len(x))) - y) ** 2)

    return *updated(model, optimizer, eqx.filter_grad(loss_of)(model)), key


def train_tuple(state: tuple[Any, ...], step: int) -> tuple[Any, ...]:
    model, optimizer, count, key = state
    model, optimizer, key = tuple_step(batch_of(step), (model, optimizer, key))
    return model, optimizer, count + 1, key


def stateful(seed: int) -> Stateful:
    model, norms = eqx.nn.make_with_state(Normed)(jax.random.key(seed))
    return Stateful(model, norms, begin(model))


@eqx.filter_jit(donate="all-except-first")
def stateful_step(batch: Any, state: Stateful) -> Stateful:
    x, y = batch

    def loss_of(model: Normed, norms: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        forward = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        out, norms = forward(x, norms)
        return jnp.mean((out - y) ** 2), norms

    gradients, norms = eqx.filter_grad(loss_of, has_aux=True)(state.model, state.norms)
    model, optimizer = updated(state.model, state.optimizer, gradients)
    return Stateful(model, norms, optimizer)


CASES = [
    Case(
        "module",
        lambda seed: eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(seed)),
        lambda model, step: module_step(batch_of(step), model),
    ),
    Case("tuple", with_optimizer, train_tuple),
    Case("batch-norm", stateful, lambda s, step: stateful_step(batch_of(step), s)),
    Case(
        "shared",
        lambda seed: Tied(jax.random.key(seed)),
        lambda model, step: module_step(batch_of(step), model),
        array_leaves,
    ),
    Case(
        "abstract",
        with_optimizer,
        train_tuple,
        template=lambda seed: eqx.filter_eval_shape(with_optimizer, seed),
    ),
]
