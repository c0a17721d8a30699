"""Files of Flax: written for it and read from it, bit for bit."""

import pickle
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks import extras
from ckpt_callbacks.formats import _msgpack_read, msgpack
from ckpt_callbacks.tensors import of_state
from states.case import describe
from tensor_cases import (
    EMPTY,
    NUMBERS,
    arrays,
    breaking,
    leaves_nothing,
    state_told,
    told,
    unless_damaged,
)

MORE = {
    "bytes": b"\x00\xff",
    "e4m3": jnp.arange(4, dtype=jnp.float8_e4m3fn),
    "empty": EMPTY,
    "int4": jnp.arange(-3, 3, dtype=jnp.int4),
    "numbers": NUMBERS,
    "scalars": {"bf16": jnp.bfloat16(0.1), "f": np.float64(0.1), "i": np.int16(-3)},
    "text": "é/.",
    "u64": 2**64 - 1,
}


def whole() -> dict[str, Any]:
    return dict(sorted({**arrays(), "more": MORE}.items()))


def linen() -> TrainState:
    module = nn.Dense(2)
    params = module.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    transform = optax.chain(optax.clip(1.0), optax.MultiSteps(optax.adamw(0.1), 2))
    state = TrainState.create(apply_fn=module.apply, params=params, tx=transform)
    return state.apply_gradients(grads=params)


def nested(depth: int) -> Any:
    return {"n": nested(depth - 1)} if depth else 1


def test_a_file_is_the_one_that_flax_writes(tmp_path: Path) -> None:
    msgpack.write(tmp_path / "ours", of_state(whole()), {})

    assert (tmp_path / "ours").read_bytes() == serialization.to_bytes(whole())
    assert msgpack.matches(tmp_path / "ours")
    restored = serialization.msgpack_restore((tmp_path / "ours").read_bytes())
    assert state_told(restored) == state_told(whole())


def test_arrays_of_all_lengths_are_as_flax_writes_them(tmp_path: Path) -> None:
    """MessagePack has its own way to tell each length."""
    lengths = [*range(30), *range(240, 260), *range(65_500, 65_540)]
    state = {f"{n:05}": np.arange(n).astype(np.uint8) for n in lengths}
    msgpack.write(tmp_path / "ours", of_state(state), {})

    assert (tmp_path / "ours").read_bytes() == serialization.to_bytes(state)
    assert told(msgpack.read(tmp_path / "ours")[0]) == state_told(state)


def test_a_file_of_flax_is_read(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(serialization.to_bytes(whole()))

    tensors, metadata = msgpack.read(tmp_path / "theirs")

    assert told(tensors) == state_told(whole())
    assert metadata == {}
    assert {path: t.leaf for path, t in tensors.items()} == {
        path: t.leaf for path, t in of_state(whole()).items()
    }


def test_no_array_is_read_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").write_bytes(serialization.to_bytes(arrays()))
    opened: list[str] = []
    real = _msgpack_read._array
    monkeypatch.setattr(
        _msgpack_read, "_array", lambda *args: opened.append(args[3]) or real(*args)
    )

    tensors, _ = msgpack.read(tmp_path / "theirs")

    assert not opened
    assert describe(tensors[("i8",)].read()) == describe(np.arange(-3, 3, dtype=np.int8))
    assert opened == ["int8"]


@pytest.mark.parametrize("value", [np.arange(3.0), 3, 0.5, "text"], ids=str)
def test_a_leaf_alone_is_a_file_too(value: Any, tmp_path: Path) -> None:
    msgpack.write(tmp_path / "a.msgpack", of_state(value), {})

    restored = serialization.msgpack_restore((tmp_path / "a.msgpack").read_bytes())
    assert describe(restored) == describe(value)
    assert told(msgpack.read(tmp_path / "a.msgpack")[0]) == {"the root": describe(value)}


def test_large_arrays_are_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 10)
    monkeypatch.setattr(msgpack, "_CHUNK", 10)
    path = tmp_path / "ours"
    parts = {f"{n:02}": np.arange(n, dtype=np.int8) for n in (9, 10, 11, 20, 21)}
    for state in (whole(), parts):
        msgpack.write(path, of_state(state), {})
        assert b"__msgpack_chunked_array__" in path.read_bytes()
        assert path.read_bytes() == serialization.to_bytes(state)
        assert told(msgpack.read(path)[0]) == state_told(state)
    msgpack.write(path, of_state(np.arange(30.0)), {})
    assert serialization.msgpack_restore(path.read_bytes()).tolist() == list(range(30))


@pytest.mark.parametrize(
    "parts",
    [
        {"shape": {"0": 2}, "chunks": {}},
        {"shape": {"0": 3}, "chunks": {"0": np.ones(2)}},
        {"shape": {"0": 2}, "chunks": {"0": np.ones(1), "1": np.ones(1, np.float32)}},
        {"shape": {"0": 2}, "chunks": {"0": "ab"}},
        {"shape": {"0": -1, "1": -2}, "chunks": {"0": np.ones(2)}},
        {"chunks": {"1": np.ones(2)}},
    ],
)
def test_parts_that_make_up_no_array_are_damage(parts: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    content = {"w": {"__msgpack_chunked_array__": True, **parts}}
    path.write_bytes(serialization.msgpack_serialize(content))

    with pytest.raises(cc.CorruptCheckpoint, match="the parts of w do not make up an array"):
        msgpack.read(path)


def test_lists_and_numbers_for_names_are_read_as_names(tmp_path: Path) -> None:
    tree = {"layers": [np.ones(2), [np.zeros(1)]], "at": {3: np.ones(1), -1: None}, "none": {}}
    (tmp_path / "theirs").write_bytes(serialization.msgpack_serialize(tree))

    tensors, _ = msgpack.read(tmp_path / "theirs")

    assert sorted(tensors) == [("at", "3"), ("layers", "0"), ("layers", "1", "0")]


def test_flax_takes_a_train_state_for_its_own(tmp_path: Path) -> None:
    state, path = linen(), tmp_path / "state.msgpack"
    msgpack.write(path, of_state(state), {}, like=state)

    restored = serialization.from_bytes(linen(), path.read_bytes())
    assert state_told(restored) == state_told(state)
    assert state_told(serialization.from_bytes(state, path.read_bytes())) == state_told(state)

    path.write_bytes(serialization.to_bytes(state))
    assert told(msgpack.read(path)[0]) == state_told(state)


def test_what_is_nested_deep_is_read_again(tmp_path: Path) -> None:
    msgpack.write(tmp_path / "file", of_state(nested(200)), {})

    assert told(msgpack.read(tmp_path / "file")[0]) == state_told(nested(200))
    assert serialization.msgpack_restore((tmp_path / "file").read_bytes()) == nested(200)


def test_nodes_without_leaves_come_back_as_they_were(tmp_path: Path) -> None:
    state = {"a": {}, "b": {"c": None, "d": (), "w": np.ones(2)}, "e": [optax.EmptyState(), {}]}
    msgpack.write(tmp_path / "file", of_state(state), {}, like=state)

    restored = serialization.from_bytes(state, (tmp_path / "file").read_bytes())
    assert repr(restored) == repr(state)
    assert state_told(restored) == state_told(state)


@pytest.mark.parametrize("empty", [None, {}, optax.EmptyState()])
def test_a_leaf_where_the_state_has_nothing_is_told(empty: Any, tmp_path: Path) -> None:
    tensors = of_state({"a": {"b": {"c": 1}}})

    with pytest.raises(cc.StateMismatch, match="a/b/c is not in like, which has nothing at a"):
        msgpack.write(tmp_path / "file", tensors, {}, like={"a": empty})
    assert not (tmp_path / "file").exists()


def test_nodes_without_leaves_are_known_from_the_state_only(tmp_path: Path) -> None:
    state, path = linen(), tmp_path / "state.msgpack"
    msgpack.write(path, of_state(state), {})

    with pytest.raises(ValueError, match="size of the list and the state dict do not match"):
        serialization.from_bytes(state, path.read_bytes())


def test_params_of_linen_and_state_of_nnx(tmp_path: Path) -> None:
    params = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    path = tmp_path / "file"

    msgpack.write(path, of_state(params), {})
    assert state_told(serialization.from_bytes(params, path.read_bytes())) == state_told(params)

    msgpack.write(path, of_state(model), {})
    pure = nnx.to_pure_dict(nnx.state(model))
    assert state_told(serialization.from_bytes(pure, path.read_bytes())) == state_told(pure)
    path.write_bytes(serialization.msgpack_serialize(pure))
    assert told(msgpack.read(path)[0]) == state_told(model)


def test_the_byte_order_of_a_machine_that_is_not_this_one(tmp_path: Path) -> None:
    """Flax stores the bytes as they are, and no order with them."""
    msgpack.write(tmp_path / "ours", of_state({"w": np.array([1.0, 2.0], ">f8")}), {})

    restored = serialization.msgpack_restore((tmp_path / "ours").read_bytes())
    assert restored["w"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (jax.random.key(0), "the leaf at a/b holds typed PRNG keys"),
        (2**70, "the leaf at a/b cannot be stored in a msgpack file: "),
        ("\ud800", "the leaf at a/b cannot be stored in a msgpack file: "),
        (np.ones(2, ml_dtypes.float6_e2m3fn), "a/b is of dtype float6_e2m3fn, which Flax cannot"),
        (nested(199), "is nested more than 200 deep"),
        ({"__msgpack_chunked_array__": 1}, "a/b/__msgpack_chunked_array__ has the name"),
    ],
)
def test_what_flax_cannot_hold_is_refused(leaf: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(cc.StateMismatch, match=why):
        msgpack.write(tmp_path / "file", of_state({"a": {"b": leaf}}), {})
    assert not any(map(Path.is_file, tmp_path.iterdir()))


def test_a_leaf_below_another_one_is_refused(tmp_path: Path) -> None:
    tensors = {("a",): of_state(1)[()], ("a", "b"): of_state(1)[()]}

    with pytest.raises(cc.StateMismatch, match="a/b lies below another leaf"):
        msgpack.write(tmp_path / "file", tensors, {})
    with pytest.raises(cc.StateMismatch, match="a lies below another leaf"):
        msgpack.write(tmp_path / "file", {(): of_state(1)[()], **of_state({"a": 1})}, {})


def test_options_and_libraries_are_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(cc.ConfigError, match="has no option shards"):
        msgpack.write(tmp_path / "file", of_state(arrays()), {}, shards=2)
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with pytest.raises(cc.MissingExtra, match=r"pip install 'ckpt-callbacks\[flax\]'"):
        msgpack.write(tmp_path / "file", of_state(arrays()), {})


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    tensors = breaking(of_state(arrays()))
    with leaves_nothing(tmp_path):
        msgpack.write(tmp_path / "new", tensors, {})
    (tmp_path / "old").write_bytes(b"old")
    with leaves_nothing(tmp_path):
        msgpack.write(tmp_path / "old", tensors, {})


# Damage

SMALL = {
    "b": {"empty": EMPTY["a"], "n": -70_000, "r": 0.5},
    "c": {"c": 1j, "s": np.float32(0.5), "t": "text"},
    "w": jnp.arange(4, dtype=jnp.bfloat16),
    "x": [np.arange(300.0), True, None, b"\xff"],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage") / "small.msgpack"


def flat(node: Any, path: str = "") -> dict[str, str]:
    """Return what is in a tree that Flax has read."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for name, x in items for k, v in flat(x, f"{path}/{name}").items()}
    return {} if node is None else {path[1:] or "the root": describe(node)}


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_file_that_is_cut_is_damaged(small: Path, data: st.DataObject) -> None:
    content = serialization.msgpack_serialize(SMALL)
    small.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])

    with pytest.raises(cc.CorruptCheckpoint, match=str(small)):
        msgpack.read(small)
    assert msgpack.matches(small)


def test_arrays_are_those_of_the_file_that_was_opened(tmp_path: Path) -> None:
    path, newer = tmp_path / "a.msgpack", tmp_path / "b.msgpack"
    for file, value in ((path, 0), (newer, 1)):
        msgpack.write(file, of_state({"w": np.full(2, value)}), {})
    tensors, _ = msgpack.read(path)

    newer.replace(path)
    assert tensors["w",].read().tolist() == [0, 0]
    tensors, _ = msgpack.read(path)
    path.write_bytes(b"")
    with pytest.raises(cc.CorruptCheckpoint, match="changed while it was read"):
        tensors["w",].read()


changes = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), min_size=1, max_size=4)


@given(changes)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_file_that_was_changed_is_damaged_or_what_flax_reads(
    small: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(serialization.msgpack_serialize(SMALL))
    head = len(content) - 2500  # few changes are to hit the one large array
    for at, byte in changes:
        content[at % (head if at % 4 else len(content))] = byte
    small.write_bytes(content)

    found = unless_damaged(lambda: told(msgpack.read(small)[0]), small)
    assert found is None or found == flat(serialization.msgpack_restore(bytes(content)))


def packed(tree: Any) -> bytes:
    import msgpack as library

    return library.packb(tree, strict_types=True)


def array_of(*parts: Any, code: int = 1) -> bytes:
    import msgpack as library

    return library.packb({"w": library.ExtType(code, packed(list(parts)))})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it ends where 1 bytes should follow"),
        (array_of([1], "object", b"\0" * 8), "'object' is no dtype of an array"),
        (array_of([1], "O", b"\0" * 8), "'O' is no dtype of an array"),
        (array_of([2], "float32", b"\0" * 4), "has 4 bytes"),
        (array_of([-1], "float32", b"\0" * 4), "is no shape"),
        (array_of([1.0], "float32", b"\0" * 4), "is no shape"),
        (array_of([1], "float32", b"\0" * 4, code=3), "a scalar has the shape"),
        (array_of([1], "float32", b"\0" * 4, code=9), "an extension is of type 9"),
        (array_of(1.0, code=2), "a complex number has not two parts"),
        (array_of("a", "b", code=2), "there is a str where a value should be"),
        (packed({"a": 1}) + b"\0", "1 bytes follow its end"),
        (b"\x82" + packed("a") * 4, "a is there twice"),
        (b"\x82" + packed("1") + b"\0" + packed(1) + b"\0", "1 is there twice"),
        (b"\x81" + packed(b"a") + b"\0", "a name is neither text nor a whole number"),
        (b"\x81\xa1\xff\0", "text is no UTF-8"),
        (b"\xc1", "0xc1 begins nothing"),
        (b"\x91" * 5000, "nested more than 200 deep"),
        (b"\xdd\xff\xff\xff\xff", "it ends where"),
        (b"\x81\xa1a\xdb\xff\xff\xff\xff", "it ends where 4294967295 bytes should follow"),
        (pickle.dumps({"a": 1}), "bytes follow its end"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    path.write_bytes(content)

    with pytest.raises(cc.CorruptCheckpoint, match=f"{path} is no whole msgpack file: .*{why}"):
        msgpack.read(path)


@pytest.mark.parametrize("content", [b"\x93NUMPY\x01\0", b"PK\x03\x04", pickle.dumps({}), b"{}"])
def test_other_files_are_not_taken_for_flax(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)

    assert not msgpack.matches(tmp_path / "file")
    assert not msgpack.matches(tmp_path)


def test_flax_is_not_needed_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").write_bytes(serialization.to_bytes(arrays()))
    monkeypatch.delattr(flax, "serialization")

    assert told(msgpack.read(tmp_path / "theirs")[0]) == state_told(arrays())
