"""Plain checkpoints of Orbax: what it opens itself, old and new, and what was written by it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1

import ckpt_callbacks as cc
from ckpt_callbacks import orbax_io
from ckpt_callbacks.formats import npz, orbax
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.tensors import Tensor, of_state
from foreign import WHOLE, leaves, managed, pytree
from tensor_cases import EMPTY, arrays, breaking, leaves_nothing, state_told, told, unless_damaged

# Orbax warns of keys that it restores to the device that they were on.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def whole() -> dict[str, Any]:
    keys = {"batch": jax.random.split(jax.random.key(1, impl="rbg"), 3), "one": jax.random.key(0)}
    return {**arrays(), "keys": keys, "numbers": {"f": 0.1, "i": -(2**40)}}


def named(state: Any) -> Any:
    """Return lists as the dicts that they are on disk, and arrays on the host as they come back."""
    if isinstance(state, list):
        state = dict(zip(map(str, range(len(state))), state, strict=True))
    if isinstance(state, dict):
        return {name: named(x) for name, x in state.items()}
    key = isinstance(state, jax.Array) and jnp.issubdtype(state.dtype, jax.dtypes.prng_key)
    return np.asarray(state) if isinstance(state, jax.Array) and not key else state


def v0_standard(path: Path) -> Any:
    with v0.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def v0_pytree(path: Path) -> Any:
    with v0.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def v0_handler(path: Path) -> Any:  # as MaxText has it
    with v0.Checkpointer(v0.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path)


V0 = [v0_standard, v0_pytree, v0_handler]


@pytest.mark.parametrize("load", [v1.load, *V0])
def test_without_an_item_all_of_orbax_reads_it_from_its_path(
    load: Callable[[Path], Any], tmp_path: Path
) -> None:
    orbax.write(tmp_path / "there", of_state(whole()), {"steps": 3})

    assert leaves(load(tmp_path / "there")) == leaves(named(whole()))
    assert v1.metadata(tmp_path / "there").custom_metadata == {"steps": 3}


@pytest.mark.parametrize("load", V0)
def test_an_item_is_read_by_its_name(load: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "run" / "7"
    orbax.write(path, of_state(whole()), {"steps": 3}, item="items")

    assert leaves(load(path / "items")) == leaves(named(whole()))
    assert leaves(v1.load(path)) == leaves(named(whole()))
    assert leaves(v1.load_checkpointables(path)) == leaves({"items": named(whole())})
    assert v1.metadata(path).custom_metadata == {"steps": 3}
    with v0.CheckpointManager(tmp_path / "run") as manager:
        assert manager.latest_step() == 7
        args = v0.args.Composite(items=v0.args.StandardRestore())
        assert leaves(manager.restore(7, args=args)["items"]) == leaves(named(whole()))


def test_the_arrays_go_where_orbax_is_told(tmp_path: Path) -> None:
    params = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}}
    orbax.write(tmp_path / "0", of_state(params), {}, item="items")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )

    with v0.StandardCheckpointer() as checkpointer:
        assert leaves(checkpointer.restore(tmp_path / "0" / "items", like)) == leaves(params)
    assert leaves(v1.load(tmp_path / "0", like)) == leaves(params)
    assert leaves(cc.restore(tmp_path / "0", like=params)) == leaves(params)


@pytest.mark.parametrize("item", ["", "state", "items", "params"])
def test_what_was_written_is_read(item: str, tmp_path: Path) -> None:
    orbax.write(tmp_path / "there", of_state(whole()), {"steps": 3}, item=item)

    assert orbax.matches(tmp_path / "there")
    tensors, metadata = orbax.read(tmp_path / "there")
    prefix = "params/" if item == "params" else ""  # a part of the state
    assert told(tensors) == {f"{prefix}{name}": x for name, x in state_told(whole()).items()}
    assert metadata == {"steps": 3}
    if item:
        tensors, _ = orbax.read(tmp_path / "there" / item)
        assert told(tensors) == state_told(whole())


@pytest.mark.parametrize("item", ["", "items"])
def test_a_path_may_be_relative(item: str) -> None:
    orbax.write(Path("there"), of_state(arrays()), {}, item=item)

    for path in {Path("there"), Path("there") / item}:
        assert told(orbax.read(path)[0]) == state_told(arrays())


@pytest.mark.parametrize("write", WHOLE)
def test_what_orbax_wrote_is_read(write: Callable[[Path, Any], None], tmp_path: Path) -> None:
    write(tmp_path / "there", whole())
    steps = orbax_io.steps(tmp_path / "there")
    path = steps[3] if steps else tmp_path / "there"

    assert orbax.matches(path)
    assert told(orbax.read(path)[0]) == state_told(whole())


def test_the_items_of_maxtext_are_read(tmp_path: Path) -> None:
    saved = {"params": {"params": {"decoder": {"w": jnp.ones((2, 3), jnp.bfloat16)}}}}
    args = v0.args.Composite(items=v0.args.PyTreeSave(saved))
    managed(tmp_path / "run", {5: args})

    assert told(orbax.read(tmp_path / "run" / "5")[0]) == state_told(saved)
    assert told(orbax.read(tmp_path / "run" / "5" / "items")[0]) == state_told(saved)
    assert not orbax.matches(tmp_path / "run")
    assert not orbax.matches(tmp_path / "run" / "5" / "items" / "_METADATA")


def optimizer() -> Any:
    params = {"w": jnp.ones((2, 3))}
    return optax.chain(optax.clip(1.0), optax.MultiSteps(optax.adamw(0.1), 2)).init(params)


@pytest.mark.parametrize(
    "state",
    [
        nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3))),
        {"model": nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "keys": nnx.Rngs(1)},
        eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)),
        optimizer(),
        jnp.arange(3),
    ],
    ids=["linen", "nnx", "equinox", "optax", "array"],
)
def test_states_of_all_kinds(state: Any, tmp_path: Path) -> None:
    orbax.write(tmp_path / "there", of_state(state), {})

    expected = state_told(state)
    if "the root" in expected:
        expected = {"leaf": expected["the root"]}
    assert told(orbax.read(tmp_path / "there")[0]) == expected


def test_scalars_are_arrays_without_dimensions(tmp_path: Path) -> None:
    state = {"c": 1j, "f": np.float32(0.1), "on": True}
    orbax.write(tmp_path / "there", of_state(state), {})

    expected = {name: np.asarray(x) for name, x in state.items()}
    assert leaves(v1.load(tmp_path / "there")) == leaves(expected)


@pytest.mark.parametrize("item", ["", "items"])
@pytest.mark.parametrize(
    "leaf",
    [
        *EMPTY.values(),
        b"bytes",
        2**70,
        jnp.ones(2, jnp.uint4),
        jax.random.split(jax.random.key(0), 0),
    ],
    ids=["empty", "empty-bf16", "bytes", "large", "uint4", "no-keys"],
)
def test_what_orbax_cannot_hold_is_refused(leaf: Any, item: str, tmp_path: Path) -> None:
    with pytest.raises(cc.StateMismatch, match=r"a/b is .*, which Orbax cannot store"):
        orbax.write(tmp_path / "there", of_state({"a": {"b": leaf}, "c": 1}), {}, item=item)
    assert not list(tmp_path.glob("*there*"))


def test_keys_that_jax_does_not_know_are_refused(tmp_path: Path) -> None:
    keys = Tensor(Leaf("key", (), "quantum"), lambda: np.zeros(2, np.uint32))
    npz.write(tmp_path / "a.npz", {("key",): keys}, {})

    with pytest.raises(cc.StateMismatch, match=r"key is key<quantum>\[\], and JAX knows no such"):
        cc.export(tmp_path / "a.npz", tmp_path / "there", format="orbax")
    assert not (tmp_path / "there").exists()


def test_two_leaves_of_one_name_are_refused(tmp_path: Path) -> None:
    one = of_state(1)[()]

    with pytest.raises(cc.StateMismatch, match=r"one name for a/b and a\.b: a\.b"):
        orbax.write(tmp_path / "there", {("a", "b"): one, ("a.b",): one}, {})
    with pytest.raises(cc.StateMismatch, match="a/b lies below another leaf"):
        orbax.write(tmp_path / "there", {("a",): one, ("a", "b"): one}, {})
    with pytest.raises(cc.ConfigError, match="has no option shards"):
        orbax.write(tmp_path / "there", {("a",): one}, {}, shards=2)


@pytest.mark.parametrize("item", ["metrics", "a/b", "..", "a.b"])
def test_an_item_has_a_name_that_orbax_takes(item: str, tmp_path: Path) -> None:
    with pytest.raises(cc.ConfigError, match="item must be a name"):
        orbax.write(tmp_path / "there", of_state({"w": 1}), {}, item=item)


@pytest.mark.parametrize("item", ["", "items"])
def test_a_write_that_fails_leaves_nothing(
    item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leaves_nothing(tmp_path):
        orbax.write(tmp_path / "there", breaking(of_state(arrays())), {}, item=item)
    real = orbax_io.save_plain

    def broken(*args: Any) -> None:
        real(*args)
        raise OSError("the disk is gone")

    monkeypatch.setattr(orbax_io, "save_plain", broken)
    with leaves_nothing(tmp_path):
        orbax.write(tmp_path / "there", of_state(arrays()), {}, item=item)


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    orbax.write(tmp_path / "there", of_state({"w": jnp.ones(2)}), {})

    with pytest.raises(cc.ConfigError, match="there is there already"):
        orbax.write(tmp_path / "there", of_state({"w": jnp.zeros(2)}), {})
    assert v1.load(tmp_path / "there")["w"].tolist() == [1, 1]


# Damage


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    pytree(folder / "whole", {"a": {"n": 3}, "w": jnp.arange(4, dtype=jnp.bfloat16)})
    return folder


# After an error Orbax leaves work behind on a loop that it has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_file_that_is_cut_or_lost_is_damage_or_not_needed(
    damaged: Path, data: st.DataObject
) -> None:
    whole, path = damaged / "whole", damaged / "there"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    names = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    file = path / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    if data.draw(st.booleans()):
        file.unlink()
    else:
        file.write_bytes(content[: data.draw(st.integers(0, max(0, len(content) - 1)))])

    found = unless_damaged(lambda: told(orbax.read(path)[0]), path)
    assert found is None or found == told(orbax.read(whole)[0])
