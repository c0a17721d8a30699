"""Flax NNX: modules, optimizers and states."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from states.case import Case, Leaves, batch_of


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed, dropout=seed + 1)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](self.dropout(nnx.relu(self.norm(self.layers[0](x)))))


class Sowing(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.first, self.second = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.first(x))
        self.sow(nnx.Intermediate, "hidden", hidden)
        return self.second(hidden)


class Tied(nnx.Module):
    """One submodule under two names, and one weight in two layers."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Linear(3, 3, rngs=rngs)
        self.again = self.inner
        self.other = nnx.Linear(3, 3, rngs=rngs)
        self.other.kernel = self.inner.kernel
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.other(self.again(self.inner(x))))


class Mean(nnx.Variable):
    """A kind of variable that Flax does not know."""


class Seen(nnx.Variable):
    pass


class Custom(nnx.Module):
    """Variables of its own kinds, a key with a tag, a bare array, and attributes that are none."""

    def __init__(self, seed: int) -> None:
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        self.mean = Mean(jnp.full(3, seed, jnp.bfloat16), note="moving")
        self.seen = Seen(jnp.asarray(seed))
        self.noise = nnx.RngKey(jax.random.key(seed), tag="noise")
        self.scale = jnp.asarray(1.0 + seed)
        self.label, self.width = "custom", 3

    def __call__(self, x: jax.Array) -> jax.Array:
        self.mean[...] = 0.9 * self.mean + 0.1 * x.mean(0).astype(jnp.bfloat16)
        self.seen[...] += len(x)
        self.noise[...], key = jax.random.split(self.noise[...])
        return self.linear(x + jax.random.normal(key, x.shape)) * self.scale


def nnx_leaves(state: Any) -> Leaves:
    """Take a module, an optimizer or a state apart; what was sowed is not for keeping."""
    if not isinstance(state, nnx.State):
        state = nnx.state(state, nnx.Not(nnx.Intermediate))
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        yield "/".join(map(str, path)), value


def loss_of(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - y) ** 2)


@partial(nnx.jit, donate_argnums=0)
def sgd_step(model: Any, x: jax.Array, y: jax.Array) -> None:
    gradients = nnx.grad(loss_of)(model, x, y)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))


def train_module(model: Any, step: int) -> Any:
    sgd_step(model, *batch_of(step))
    return model


def train_sowing(model: Sowing, step: int) -> Sowing:
    nnx.pop(model, nnx.Intermediate)
    return train_module(model, step)


def with_optimizer(seed: int) -> dict[str, Any]:
    model = Net(seed)
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)}


@partial(nnx.jit, donate_argnums=(0, 1))
def optimizer_step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    optimizer.update(model, nnx.grad(loss_of)(model, x, y))


def train_optimizer(state: dict[str, Any], step: int) -> dict[str, Any]:
    optimizer_step(state["model"], state["optimizer"], *batch_of(step))
    return state


@nnx.jit
def both_step(both: nnx.ModelAndOptimizer, x: jax.Array, y: jax.Array) -> None:
    both.update(nnx.grad(loss_of)(both.model, x, y))


def train_both(both: nnx.ModelAndOptimizer, step: int) -> nnx.ModelAndOptimizer:
    both_step(both, *batch_of(step))
    return both


@nnx.jit
def draw(rngs: nnx.Rngs) -> None:
    rngs.params()
    rngs.dropout()


def train_rngs(rngs: nnx.Rngs, _: int) -> nnx.Rngs:
    draw(rngs)
    return rngs


def tied_leaves(model: Tied) -> Leaves:
    yield from nnx_leaves(model)
    yield "one module", model.inner is model.again
    yield "one weight", model.inner.kernel is model.other.kernel


def train_state(state: nnx.State, step: int) -> nnx.State:
    return state_step(state, *batch_of(step))


@partial(jax.jit, donate_argnums=0)
def state_step(state: nnx.State, x: jax.Array, y: jax.Array) -> nnx.State:
    model = nnx.merge(nnx.graphdef(Net(0)), state)
    sgd_step(model, x, y)
    return nnx.state(model)


def train_params(params: nnx.State, step: int) -> nnx.State:
    return params_step(params, *batch_of(step))


@partial(jax.jit, donate_argnums=0)
def params_step(params: nnx.State, x: np.ndarray, y: np.ndarray) -> nnx.State:
    model = Net(0)
    nnx.update(model, params)
    sgd_step(model, x, y)
    return nnx.state(model, nnx.Param)


CASES = [
    Case("module", Net, train_module, nnx_leaves),
    Case("optimizer", with_optimizer, train_optimizer, nnx_leaves),
    Case(
        "model-and-optimizer",
        lambda seed: nnx.ModelAndOptimizer(Net(seed), optax.adam(0.1), wrt=nnx.Param),
        train_both,
        nnx_leaves,
    ),
    Case("rngs", lambda seed: nnx.Rngs(seed, dropout=seed + 1), train_rngs, nnx_leaves),
    Case("tied", Tied, train_module, tied_leaves),
    Case("custom-variables", Custom, train_module, nnx_leaves),
    Case("sowed", Sowing, train_sowing, nnx_leaves),
    Case("state", lambda seed: nnx.state(Net(seed)), train_state, nnx_leaves),
    Case("params", lambda seed: nnx.state(Net(seed), nnx.Param), train_params, nnx_leaves),
    Case(
        "abstract",
        with_optimizer,
        train_optimizer,
        nnx_leaves,
        template=lambda seed: nnx.eval_shape(lambda: with_optimizer(seed)),
    ),
]
