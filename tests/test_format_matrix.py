"""Which leaves and states each format holds bit for bit, and which it refuses, and how."""

import re
import tempfile
import warnings
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks import formats
from ckpt_callbacks.tensors import Tensors, of_state
from saved import save
from states.case import Case, describe
from states.cases import equinox, linen, nnx, plain, rl

with warnings.catch_warnings():  # of one more transformation, which Optax deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from states.cases import optax

# Orbax warns of keys that it restores to the device that they were on.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

SUFFIXES = {
    "safetensors": ".safetensors",
    "npz": ".npz",
    "msgpack": ".msgpack",
    "equinox": ".eqx",
    "orbax": "",
}
KEYS = ("key *", "keys", "empty keys")
BIG = "Python int of 71 bits"
RARE = ("int1", "uint1", "float6_*")
"""Dtypes that arrays on the host may have; JAX has their names and can not compute with them."""
SMALL = ("int2", "int4", "uint2", "uint4")
OTHERS = ("empty *", "Python bytes", BIG)
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "safetensors": {},
    "npz": {},
    "msgpack": {
        "holds typed PRNG keys, which Flax cannot store": KEYS,
        "which Flax cannot store": RARE,
        "cannot be stored in a msgpack file": (BIG,),
    },
    "equinox": {
        "holds typed PRNG keys, which Equinox cannot store": KEYS,
        "which Equinox cannot store": (*RARE, *SMALL, "float4_*", "float8_*", BIG),
    },
    "orbax": {
        "which Orbax cannot store": (*RARE, "uint2", "uint4", "float8_e4m3", *OTHERS),
    },
}
"""By format the message, and the kinds of leaves that it is for; all others are held."""
CHANGED = {
    "equinox": ("Python str*", "Python bytes"),
    "orbax": ("NumPy *", "Python bool", "Python complex"),
}
"""Orbax has arrays without dimensions for these; Equinox leaves these out, and `like` has them."""
REFUSED_STATES = {
    "msgpack": {"NNX": "typed PRNG keys", "Linen": "typed PRNG keys", "RL": "typed PRNG keys"},
    "equinox": {
        "NNX": "typed PRNG keys",
        "Linen": "typed PRNG keys",
        "RL": "typed PRNG keys",
        "quantised": "layers/1/values is of dtype int4",
    },
}


@cache
def kinds(seed: int) -> dict[str, Any]:
    """Return a leaf of each kind by its name."""
    host, key = plain.numpy_arrays(seed), jax.random.key(seed)
    scalars = {f"NumPy {name}": x for name, x in plain.numpy_scalars(seed).items()}
    impls = ("threefry2x32", "rbg", "unsafe_rbg")
    return {
        **plain.device_arrays(seed),
        **{name: host[name] for name in ("float64", "int64", "uint64", "complex128")},
        **{f"host {name}": plain.values(jnp.dtype(name), seed) for name in ("bfloat16", "bool")},
        **{name: ((np.arange(6) + seed) % 2).astype(name) for name in ("int1", "uint1")},
        **{name: plain.values(name, seed) for name in ("float6_e2m3fn", "float6_e3m2fn")},
        **{name: host[name] for name in ("fortran", "strided", "transposed")},
        "0-d host": host["scalar"], "0-d": jnp.float32(seed), "0-d bool": jnp.array(seed == 0),
        **{f"key {impl}": jax.random.key(seed, impl=impl) for impl in impls},
        "keys": jax.random.split(key, (2, 3)), "raw key": jax.random.PRNGKey(seed),
        "empty host": np.zeros((0, 3), np.int64), "empty device": jnp.zeros((2, 0)),
        "empty bfloat16": jnp.zeros(0, jnp.bfloat16), "empty keys": jax.random.split(key, 0),
        **scalars, "NumPy bfloat16": ml_dtypes.bfloat16(0.5 + seed),
        "Python bool": seed == 0, "Python int": seed - 2**40, BIG: 2**70 + seed,
        "Python float": 0.1 - seed, "Python complex": complex(0.1, -float(seed)),
        "Python str": f"größer {seed}\0", "Python str without letters": "x" * seed,
        "Python bytes": bytes([0, 255, seed]),
    }  # fmt: skip


def refused(name: str) -> dict[str, str]:
    """Return the kinds that a format refuses, and what it says."""
    return {
        kind: message
        for message, patterns in REFUSED[name].items()
        for kind in kinds(0)
        if any(fnmatchcase(kind, pattern) for pattern in patterns)
    }


def changed(name: str, kind: str) -> bool:
    return any(fnmatchcase(kind, pattern) for pattern in CHANGED.get(name, ()))


def export(name: str, source: Any, folder: Path, like: Any, **options: Any) -> Path:
    if name == "equinox":
        options["like"] = like
    path = folder / f"written{SUFFIXES[name]}"
    try:
        return cc.export(source, path, format=name, overwrite=True, **options)
    except cc.StateMismatch:
        assert not list(folder.iterdir()), "what was refused left something"
        raise


def held(tensors: Tensors) -> dict[Any, tuple[str, str]]:
    return {path: (str(t.leaf), describe(t.read())) for path, t in tensors.items()}


def told(state: Any) -> Any:
    return jax.tree.map(describe, state)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a leaf of each kind."""
    return save(tmp_path_factory.mktemp("kinds") / "run", kinds(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


@pytest.mark.parametrize("source", ["a live state", "a run"])
@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_kind_of_leaf_is_the_same_or_refused(
    name: str, source: str, root: Path, folder: Path
) -> None:
    state, fresh = kinds(0), kinds(1)
    there: Any = root if source == "a run" else state
    for kind, message in refused(name).items():
        with pytest.raises(cc.StateMismatch, match=f"(?s){re.escape(kind)}.*{message}"):
            export(name, there, folder, {kind: fresh[kind]}, only=kind)

    expected = {kind: x for kind, x in state.items() if kind not in refused(name)}
    like = {kind: fresh[kind] for kind in expected}
    path = export(name, there, folder, like, only=list(expected))

    loaded = cc.load_params(path, like, only=None)
    if name == "equinox":
        expected |= {kind: like[kind] for kind in expected if changed(name, kind)}
    assert told(loaded) == told(expected)
    if name != "equinox":  # which has no names to read by
        if name == "orbax":
            expected |= {k: np.asarray(x) for k, x in expected.items() if changed(name, k)}
        assert held(formats.named(name).read(path)[0]) == held(of_state(expected))


class Quantised(NamedTuple):
    values: jax.Array
    scale: jax.Array


def quantised(seed: int) -> Any:
    arrays = plain.device_arrays(seed)
    names = ("int8", "int4", "float8_e4m3fn")
    scales = [jnp.full(3, i + 0.1 * seed, jnp.bfloat16) for i in range(3)]
    return {"layers": [Quantised(arrays[n], s) for n, s in zip(names, scales, strict=True)]}


@cache
def begun(seed: int) -> Any:
    return linen.train_state(seed)


def counting(seed: int) -> Any:
    """Return a state of its own, whose counter is an array, as after a step, and no number."""
    return jax.tree.map(jnp.copy, begun(seed))


STATES = {
    "NNX": nnx.CASES[1],
    "Linen": replace(linen.CASES[0], make=counting),
    "Equinox": equinox.CASES[0],
    **{case.name: case for case in optax.CASES if case.name in ("adamw", "adafactor")},
    "RL": rl.CASES[0],
    "quantised": Case("quantised", quantised, plain.train_arrays),
}


def leaves(case: Case, state: Any) -> dict[str, str]:
    return {path: describe(leaf) for path, leaf in case.leaves(state)}


@pytest.mark.parametrize("case", STATES)
def test_every_state_is_the_same_or_refused(case: str, folder: Path) -> None:
    states = STATES[case]
    state = states.train(states.make(0), 0)
    expected = leaves(states, state)
    run = save(folder.parent / "run", state)
    for name in formats.FORMATS:
        for source in (state, run):
            fresh = states.make(1)
            assert leaves(states, fresh) != expected
            if message := REFUSED_STATES.get(name, {}).get(case):
                with pytest.raises(cc.StateMismatch, match=message):
                    export(name, source, folder, fresh)
                continue
            path = export(name, source, folder, fresh)
            loaded = cc.load_params(path, states.make(2), only=None)
            assert leaves(states, loaded) == expected, (name, source)
        for path in folder.iterdir():
            path.rename(folder.parent / f"done-{name}")


trees = st.recursive(
    st.sampled_from(sorted(kinds(0))),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from(["a", "b.c", "é /", "7"]), inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(trees, st.integers(0, 3))
def test_any_pytree_is_the_same_or_refused(tree: Any, seed: int) -> None:
    """`tree` has the names of the kinds in the places of the leaves."""

    def made(seed: int, but: str = "") -> Any:
        """Return the pytree, with what one format changes as `like` has it."""
        here, like = kinds(seed), kinds(seed + 1)
        return {"tree": jax.tree.map(lambda k: (like if changed(but, k) else here)[k], tree)}

    for name in formats.FORMATS:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            if refused(name).keys() & set(jax.tree.leaves(tree)):
                with pytest.raises(cc.StateMismatch, match="|".join(REFUSED[name])):
                    export(name, made(seed), Path(folder), made(seed + 1))
                continue
            path = export(name, made(seed), Path(folder), made(seed + 1))
            loaded = cc.load_params(path, made(seed + 1), only=None)
            assert told(loaded) == told(made(seed, "" if name == "orbax" else name))


def documented() -> dict[str, list[set[str]]]:
    """Return the two columns of the table in the documentation, as kinds by format."""
    lines = (formats.__doc__ or "").splitlines()
    first, head, last = (i for i, line in enumerate(lines) if line.startswith("===="))
    spans = [match.span() for match in re.finditer("=+", lines[first])]
    found: dict[str, list[set[str]]] = {}
    name = ""
    for line in lines[head + 1 : last]:
        cells = [line[start:end] for start, end in spans]
        name = cells[0].strip() or name
        columns = found.setdefault(name, [set(), set()])
        for held_there, cell in zip(columns, cells[1:], strict=True):
            patterns = re.findall("``(.*?)``", cell)
            held_there |= {k for k in kinds(0) for p in patterns if fnmatchcase(k, p)}
    return found


def test_the_table_in_the_documentation_is_this_one() -> None:
    assert documented() == {
        name: [set(refused(name)), {kind for kind in kinds(0) if changed(name, kind)}]
        for name in formats.FORMATS
    }
