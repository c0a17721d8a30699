"""Any leaf is stored as something that Orbax takes, and comes back as it was."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_callbacks.leaves import Leaf, decode, encode, found, leaf_of, missing, unsavable
from states.case import describe
from states.cases.plain import DTYPES

RARE = ["int1", "uint1", "float6_e2m3fn", "float6_e3m2fn"]
HOST = ["float64", "int64", "uint64", "complex128", *RARE]
"""What JAX cannot compute with, the first of them while it has no 64-bit numbers."""
TENSORSTORE = {*DTYPES, *HOST} - {*RARE, "uint2", "uint4", "float8_e4m3"}
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Return arrays of all dtypes, of NumPy or of JAX, and NumPy's scalars."""
    name = draw(st.sampled_from(DTYPES + HOST))
    shape, dtype = draw(shapes), jnp.dtype(name)
    count = int(np.prod(shape, dtype=int))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    host = np.frombuffer(raw, dtype).reshape(shape)
    if "int" in name or name == "bool":  # no bits beyond those of the number
        host = np.frombuffer(bytes(b % 2 for b in raw), np.uint8)[:count].astype(dtype)
        host = host.reshape(shape)
    if not shape and draw(st.booleans()):
        return host[()]
    return host if name in HOST or draw(st.booleans()) else jnp.asarray(host)


def make_keys(impl: str, shape: tuple[int, ...]) -> jax.Array:
    like = jax.random.key_data(jax.random.key(0, impl=impl))
    data = np.arange(np.prod([*shape, like.size], dtype=int), dtype=np.uint32)
    return jax.random.wrap_key_data(data.reshape(*shape, *like.shape), impl=impl)


keys = st.builds(make_keys, st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]), shapes)
numbers = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary()
)


@settings(deadline=None)  # the first array of each dtype takes JAX longer
@given(st.one_of(arrays(), keys, numbers))
def test_every_leaf_comes_back_as_it_was(value: Any) -> None:
    assert unsavable(value) is None
    assert missing(value) is None

    stored, note = encode(value)

    loaded = stored
    if isinstance(stored, np.ndarray | np.generic | jax.Array):
        assert stored.size, "Orbax stores no empty arrays"
        assert isinstance(stored, np.ndarray | jax.Array), "nor scalars of NumPy"
        if stored.dtype.name in TENSORSTORE:
            loaded = np.asarray(stored)  # as Orbax reads what is no array on a device
        else:
            assert jnp.issubdtype(stored.dtype, jax.dtypes.prng_key), stored.dtype
    else:
        assert type(stored) in (int, float, str)
    assert found(_metadata(stored), note) == leaf_of(value)
    back = decode(loaded, note)
    if isinstance(value, jax.Array) and isinstance(back, np.ndarray):
        back = jnp.asarray(back)
    assert describe(back) == describe(value)


def _metadata(stored: Any) -> Any:
    """Return what Orbax tells of a leaf: of typed keys only their data."""
    if isinstance(stored, jax.Array) and jnp.issubdtype(stored.dtype, jax.dtypes.prng_key):
        stored = jax.random.key_data(stored)
    if isinstance(stored, np.ndarray | jax.Array):
        return SimpleNamespace(shape=stored.shape, dtype=stored.dtype)
    return stored


@pytest.mark.parametrize(
    "value",
    [
        *(object(), {1}, np.array(["a"]), np.array([object()]), np.str_("a")),
        *(np.datetime64("2026"), np.zeros(2, ml_dtypes.complex32)),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_what_cannot_come_back_is_not_saved(value: Any) -> None:
    if isinstance(value, np.str_):
        assert leaf_of(value) in (None, Leaf("str"))
    else:
        assert "cannot be saved" in (unsavable(value) or "")
