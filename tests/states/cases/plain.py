"""Plain pytrees: every dtype, every kind of number and every container that Python has."""

import collections
import dataclasses
import enum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from states.case import Case, Leaves, pytree_leaves

DTYPES = [
    *("bool", "int2", "int4", "int8", "int16", "int32"),
    *("uint2", "uint4", "uint8", "uint16", "uint32"),
    *("float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("bfloat16", "float16", "float32", "complex64"),
]
"""All that JAX 0.10 can compute with while it has no 64-bit numbers."""


def values(dtype: Any, seed: int, shape: tuple[int, ...] = (5, 3)) -> np.ndarray:
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if jnp.issubdtype(dtype, jnp.integer):
        low, high = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
        wide = np.int64 if low else np.uint64
        return rng.integers(low, high, shape, wide, endpoint=True).astype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


@partial(jax.jit, donate_argnums=0)
def rolled(arrays: Any) -> Any:
    """Move every element one place on, which works for any dtype."""
    return jax.tree.map(lambda x: jnp.roll(x, 1), arrays)


def device_arrays(seed: int) -> dict[str, jax.Array]:
    return {name: jnp.asarray(values(jnp.dtype(name), seed)) for name in DTYPES}


def numpy_arrays(seed: int) -> dict[str, np.ndarray]:
    kinds = (np.float64, np.int64, np.uint64, np.complex128, np.float16, np.bool_)
    arrays = {np.dtype(kind).name: values(kind, seed) for kind in kinds}
    return arrays | {
        "bfloat16": values(jnp.bfloat16, seed),
        "fortran": np.asfortranarray(values(np.float64, seed)),
        "strided": values(np.float32, seed, (10, 6))[::2, ::-2],
        "transposed": values(np.int32, seed).T,
        "scalar": values(np.float64, seed, ()),
    }


def train_numpy(arrays: dict[str, np.ndarray], _: int) -> dict[str, np.ndarray]:
    for array in arrays.values():  # in place, as replay buffers are written
        array[...] = np.roll(array, 1) if array.shape else array + 1
    return arrays


def numpy_scalars(seed: int) -> dict[str, Any]:
    kinds = (np.float32, np.float64, np.int8, np.int32, np.int64, np.uint64)
    made = {kind.__name__: kind(seed + 3) for kind in kinds}
    return made | {"bool": np.bool_(seed == 0), "complex": np.complex128(seed + 1j)}


def train_scalars(scalars: dict[str, Any], step: int) -> dict[str, Any]:
    flipped = {"bool": np.bool_(step % 2)}
    return {name: type(x)(x + 1) for name, x in scalars.items()} | flipped


def empty_arrays(seed: int) -> dict[str, Any]:
    return {
        "device": {"vector": jnp.zeros(0), "matrix": jnp.zeros((3, 0), jnp.bfloat16)},
        "host": {"vector": np.zeros(0, np.int64), "matrix": np.zeros((0, 2, 5))},
        "count": jnp.asarray(seed),
        "bias": jnp.full(2, seed, jnp.float32),
    }


@partial(jax.jit, donate_argnums=0)
def counted(device: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: x + 1, device)


def train_empty(state: dict[str, Any], _: int) -> dict[str, Any]:
    host = state.pop("host")
    return counted(state) | {"host": host}


EXOTIC: dict[str, list[Any]] = {
    "bool": [True, False, False, True, True],
    "int": [0, -1, 2**31, 2**33, 2**63, -(2**70), 2**70],
    "float": [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 0.1],
    "complex": [1 + 2j, complex(float("nan"), -0.0), 0.1j],
    "str": ["", "words", "größer 大", "a/b.c", 'quo"te\n', "\0"],
    "bytes": [b"", b"words", bytes(range(256)), b"\xff\xfe"],
}


def python_values(seed: int) -> dict[str, list[Any]]:
    if seed == 0:
        return EXOTIC
    return {name: [type(x)() for x in exotic] for name, exotic in EXOTIC.items()}


def train_python(state: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
    return {name: [*held[1:], held[0]] for name, held in state.items()}


class Phase(enum.IntEnum):
    WARMUP = 0
    TRAINING = 1


def containers(seed: int) -> dict[str, Any]:
    def array(number: int) -> jax.Array:
        return jnp.asarray(values(np.float32, 10 * seed + number))

    return {
        "nothing": None,
        "empty": {"dict": {}, "list": [], "tuple": (), "list of empties": [{}, None, ()]},
        "ordered": collections.OrderedDict(z=array(1), a=array(2)),
        "default": collections.defaultdict(int, {"b": array(3), "a": 4 + seed}),
        "phase": Phase(1 - seed),
        "pair": (array(4), [array(5), (array(6),)]),
        "deep": {"a": {"b": {"c": {"d": array(7)}}}},
    }


def train_arrays(state: Any, _: int) -> Any:
    return jax.tree.map(lambda x: rolled(x) if isinstance(x, jax.Array) else x, state)


def structured_leaves(state: Any) -> Leaves:
    """Give the kinds of all containers too."""
    yield from pytree_leaves(state)
    yield "structure", str(jax.tree.structure(state))


def odd_keys(seed: int) -> dict[str, Any]:
    def array(number: int) -> jax.Array:
        return jnp.asarray(values(np.float32, 10 * seed + number))

    return {
        "int": {0: array(0), 10: array(1), 2: array(2), -1: array(3)},
        "tuple": {(0, "a"): array(4), (1, "b"): {(): array(5)}},
        "path": {"a/b": array(6), "a": {"b": array(7)}, "/": array(8), "..": array(9)},
        "dot": {"a.b": array(1)},
        "odd": {"": array(2), " ": array(3), "größe 大": array(4), "%2F": array(5)},
        "bool": {False: array(6), True: array(7)},
    }


@dataclasses.dataclass
class Inner:
    weights: jax.Array
    count: int


@dataclasses.dataclass(frozen=True)
class Outer:
    """No pytree, neither for JAX nor for anyone else."""

    inner: Inner
    layers: list[Inner]
    best: float
    name: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    inner: dict[str, jax.Array]
    count: int
    name: str = dataclasses.field(default="registered", metadata={"static": True})


def inner(seed: int) -> Inner:
    return Inner(jnp.asarray(values(np.float32, seed)), seed)


def unregistered(seed: int) -> dict[str, Any]:
    layers = [inner(seed + 20), inner(seed + 30)]
    return {"agent": Outer(inner(seed + 10), layers, best=0.5 + seed, name=f"seed {seed}")}


def train_inner(one: Inner) -> Inner:
    return Inner(rolled(one.weights), one.count + 1)


def train_unregistered(state: dict[str, Any], _: int) -> dict[str, Any]:
    old = state["agent"]
    layers = [train_inner(one) for one in old.layers]
    return {"agent": Outer(train_inner(old.inner), layers, old.best * 2, old.name)}


def field_leaves(node: Any, path: str = "") -> Leaves:
    """Take dataclasses apart by their fields."""
    if dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from field_leaves(getattr(node, field.name), f"{path}.{field.name}")
    elif isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from field_leaves(child, f"{path}[{name!r}]")
    else:
        yield path, node


def registered(seed: int) -> Registered:
    return Registered({"w": jnp.asarray(values(np.float32, seed))}, count=seed)


def train_registered(state: Registered, _: int) -> Registered:
    return Registered(rolled(state.inner), state.count + 1, state.name)


CASES = [
    Case("device-arrays", device_arrays, lambda arrays, _: rolled(arrays)),
    Case("lone-array", lambda seed: jnp.asarray(values(np.float32, seed)), lambda x, _: rolled(x)),
    Case("numpy-arrays", numpy_arrays, train_numpy),
    Case("numpy-scalars", numpy_scalars, train_scalars),
    Case("empty-arrays", empty_arrays, train_empty),
    Case("python", python_values, train_python),
    Case("containers", containers, train_arrays, structured_leaves),
    Case("keys", odd_keys, train_arrays, structured_leaves),
    Case("unregistered-dataclass", unregistered, train_unregistered, field_leaves),
    Case("registered-dataclass", registered, train_registered),
]
