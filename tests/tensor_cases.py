"""Leaves of every kind, and what is told of them to compare them bit for bit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckpt_callbacks.errors import CorruptCheckpoint
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.paths import show
from ckpt_callbacks.tensors import Tensor, Tensors, of_state
from states.case import describe


def arrays() -> dict[str, Any]:
    """What every format here can hold; the names are in order."""
    return {
        "bf16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7,
        "bool": np.array([True, False, True]),
        "c64": np.array([1 + 2j, -0.0], np.complex64),
        "f16": jnp.full((1, 1, 2), 0.1, jnp.float16),
        "f64": np.array([[0.1, -0.0, np.nan], [np.inf, 1e-320, np.pi]]),
        "i64": np.array([2**53 + 1, -(2**63)]),
        "i8": jnp.arange(-3, 3, dtype=jnp.int8),
        "large": np.arange(30_000, dtype=np.float32),
        "layers": [{"w": jnp.ones((3, 2))}, {"w": jnp.zeros((2, 1))}],
        "raw": jax.random.PRNGKey(7),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "u8": np.arange(16, dtype=np.uint8),
        "zero": jnp.float32(1.5),
    }


EMPTY = {"a": np.zeros((0, 3)), "b": jnp.zeros((2, 0), jnp.bfloat16)}
NUMBERS = {"c": -1.5 + 2j, "f": 0.1, "i": -(2**40), "on": True}


def told(tensors: Tensors) -> dict[str, str]:
    """Return what each leaf is and a digest of it, read by its path."""
    for path, tensor in tensors.items():
        value = tensor.read()
        if tensor.leaf.kind == "array":
            assert (value.shape, value.dtype.name) == (tensor.leaf.shape, tensor.leaf.dtype), path
    return {show(path): describe(tensor.read()) for path, tensor in tensors.items()}


def state_told(state: Any) -> dict[str, str]:
    return told(of_state(state))


def breaking(tensors: Tensors) -> Mapping[tuple[str, ...], Tensor]:
    """Return leaves of which the last cannot be read, as when its file is damaged."""

    def read() -> Any:
        raise OSError("the disk is gone")

    return {**tensors, ("zz",): Tensor(Leaf("array", (2,), "float32"), read)}


def unless_damaged(read: Callable[[], Any], path: Path, *errors: type[Exception]) -> Any:
    """Return what is read; nothing after an error, which has to name the file."""
    try:
        return read()
    except (CorruptCheckpoint, *errors) as error:
        problem = str(error)
    assert str(path) in problem
    return None


@contextmanager
def leaves_nothing(folder: Path) -> Iterator[None]:
    """Check that a write that fails changes nothing in a folder."""
    before = {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}
    with pytest.raises(OSError, match="the disk is gone"):
        yield
    assert {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")} == before
