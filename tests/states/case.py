"""A kind of training state: how a user makes and trains it, and what its leaves are."""

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Leaves = Iterable[tuple[str, Any]]
Digest = dict[str, str]
"""Type, dtype, shape, key implementation and SHA-256 of every leaf, by its path."""


def pytree_leaves(state: Any) -> Leaves:
    """Return all leaves but functions, as JAX itself sees them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not callable(leaf):
            yield jax.tree_util.keystr(path), leaf


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[int], Any]
    """Returns the state for a seed, as a user passes it to `callbacks.run`."""
    train: Callable[[Any, int], Any]
    """Returns the state after a step; the data depend on the step alone."""
    leaves: Callable[[Any], Leaves] = pytree_leaves
    """Takes a state apart without the help of ckpt_callbacks."""
    template: Callable[[int], Any] | None = None
    """Returns what the process that goes on passes; else that is what `make` returns."""

    def target(self, seed: int) -> Any:
        return (self.template or self.make)(seed)


def digest(case: Case, state: Any) -> Digest:
    found: Digest = {}
    for path, leaf in case.leaves(state):
        assert path not in found, f"two leaves at {path}"
        found[path] = describe(leaf)
    assert found, "no leaves"
    return found


def differences(expected: Digest, actual: Digest) -> list[str]:
    paths = sorted(expected.keys() | actual.keys())
    pairs = [(p, expected.get(p, "missing"), actual.get(p, "missing")) for p in paths]
    return [f"{p}: {ours}, not {theirs}" for p, theirs, ours in pairs if ours != theirs]


def describe(leaf: Any) -> str:
    match leaf:
        case jax.Array() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(leaf)
            return f"key {impl} {leaf.shape} {_host(jax.random.key_data(leaf))}"
        case jax.Array():
            return f"jax.Array {leaf.dtype} {leaf.shape} {_host(leaf)}"
        case np.ndarray() | np.generic():
            kind = type(leaf).__name__
            return f"numpy.{kind} {leaf.dtype} {leaf.shape} {_sha(leaf.tobytes())}"
        case float():
            return f"{type(leaf).__name__} {_sha(struct.pack('<d', leaf))}"
        case complex():
            return f"complex {_sha(struct.pack('<2d', leaf.real, leaf.imag))}"
        case int() | str() | bytes():
            return f"{type(leaf).__name__} {_sha(repr(leaf).encode())}"
        case _:
            raise TypeError(f"no digest of a {type(leaf).__qualname__}")


def _host(array: jax.Array) -> str:
    # Of a copy: the host view of an array stays with it and would keep it from being donated.
    return _sha(np.asarray(jnp.copy(array)).tobytes())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def batch_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs of shape (8, 3) and targets of shape (8, 2)."""
    rng = np.random.default_rng(step)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    return x.astype(np.float32), y.astype(np.float32)
