"""Qwix: quantised weights, and a model of which only the low-rank part is trained."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from states.case import Case, batch_of
from states.cases.nnx import nnx_leaves

Quantised = dict[str, qwix.QArray]
FORMATS = {
    "int8": partial(qwix.quantize, qtype=jnp.int8, channelwise_axes=[1]),
    "int4": partial(qwix.quantize, qtype=jnp.int4, tiled_axes={0: 4}),
    "int4-asymmetric": partial(qwix.quantize, qtype=jnp.int4, calibration_method="minmax"),
    "fp8": partial(qwix.quantize, qtype=jnp.float8_e4m3fn, scale_dtype=jnp.bfloat16),
    "fp8-range": partial(qwix.quantize, qtype=jnp.float8_e5m2),
}
NORMAL_FLOAT = {"nf4": partial(qwix.quantize, qtype="nf4", channelwise_axes=[1])}


def quantised(formats: dict[str, Callable[[jax.Array], qwix.QArray]], seed: int) -> Quantised:
    weights = jax.random.normal(jax.random.key(seed), (8, 6))
    return {name: quantise(weights) for name, quantise in formats.items()}


@partial(jax.jit, donate_argnums=0)
def requantised(weights: Quantised, noise: jax.Array) -> Quantised:
    formats = FORMATS | NORMAL_FLOAT
    return {
        name: formats[name]((qwix.dequantize(array) + noise).astype(jnp.float32))
        for name, array in weights.items()
    }


def train_quantised(weights: Quantised, step: int) -> Quantised:
    return requantised(weights, jax.random.normal(jax.random.key(step), (8, 6)))


class Base(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


def adapted(seed: int) -> Base:
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0)
    return qwix.apply_lora_to_model(Base(), provider, jnp.ones((8, 3)), rngs=nnx.Rngs(seed))


@cache
def frozen() -> tuple[Any, nnx.State]:
    graph, _, rest = nnx.split(adapted(0), nnx.LoRAParam, ...)
    return graph, rest


@partial(jax.jit, donate_argnums=0)
def lora_step(lora: nnx.State, rest: nnx.State, x: jax.Array, y: jax.Array) -> nnx.State:
    def loss_of(lora: nnx.State) -> jax.Array:
        return jnp.mean((nnx.merge(frozen()[0], lora, rest)(x) - y) ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, lora, jax.grad(loss_of)(lora))


def train_lora(lora: nnx.State, step: int) -> nnx.State:
    return lora_step(lora, frozen()[1], *batch_of(step))


CASES = [
    Case("arrays", partial(quantised, FORMATS), train_quantised),
    Case("normal-float", partial(quantised, NORMAL_FLOAT), train_quantised),
    Case("lora", lambda seed: nnx.state(adapted(seed), nnx.LoRAParam), train_lora, nnx_leaves),
]
