"""Files that are bytes in memory or come by a stream, in every format of a single file."""

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks.tensors import Tensors
from saved import save
from tensor_cases import state_told

FORMATS = ("safetensors", "npz", "npy", "msgpack", "equinox")


def state_for(name: str, value: float = 1.0) -> Any:
    layers = {"kernel": jnp.full((2, 3), value, jnp.bfloat16), "bias": jnp.ones(3) * value}
    return {"w": np.full((3, 2), value)} if name == "npy" else {"layers": layers, "step": 7}


@cache
def content_of(name: str) -> bytes:
    state, stream = state_for(name), io.BytesIO()
    like = {"like": state} if name == "equinox" else {}
    assert cc.export(state, stream, format=name, **like) is None
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_stream_gets_is_the_file(name: str, tmp_path: Path) -> None:
    suffix = {"equinox": "eqx"}.get(name, name)
    like = {"like": state_for(name)} if name == "equinox" else {}
    file = cc.export(state_for(name), tmp_path / f"a.{suffix}", **like)

    assert content_of(name) == file.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_written_is_read_from_bytes_and_from_streams(name: str) -> None:
    content, state = content_of(name), state_for(name)
    like = state_for(name, 0.0)
    for source in (content, bytearray(content), memoryview(content), io.BytesIO(content)):
        wanted = {"leaf": like["w"]} if name == "npy" else like
        loaded = cc.load_params(source, wanted, format=name, only=None)
        loaded = {"w": loaded["leaf"]} if name == "npy" else loaded
        assert state_told(loaded) == state_told(state)


def test_others_read_what_a_stream_gets() -> None:
    state, zeros = state_for("equinox"), state_for("equinox", 0.0)
    assert np.load(io.BytesIO(content_of("npy"))).tolist() == np.ones((3, 2)).tolist()
    assert np.load(io.BytesIO(content_of("npz")))["layers.bias"].tolist() == [1, 1, 1]
    restored = flax.serialization.msgpack_restore(content_of("msgpack"))
    assert state_told(restored) == state_told(jax.tree.map(np.asarray, state) | {"step": 7})
    read = eqx.tree_deserialise_leaves(io.BytesIO(content_of("equinox")), zeros)
    assert state_told(read) == state_told(state)


def test_what_others_write_to_a_stream_is_read() -> None:
    state, stream = state_for("equinox"), io.BytesIO()
    eqx.tree_serialise_leaves(stream, state)
    stream.seek(0)
    loaded = cc.load_params(stream, state_for("equinox", 0.0), format="equinox", only=None)
    assert state_told(loaded) == state_told(state)
    content = flax.serialization.to_bytes({"w": np.arange(3)})
    assert cc.load_params(content, format="msgpack")["w"].tolist() == [0, 1, 2]
    (archive := io.BytesIO()).write(b"before")
    np.savez(archive, w=np.arange(3))
    archive.seek(len(b"before"))  # a stream is read from where it is
    assert cc.load_params(archive, format="npz")["w"].tolist() == [0, 1, 2]


def test_a_checkpoint_goes_out_by_a_stream(tmp_path: Path) -> None:
    root = save(tmp_path / "run", {"params": state_for("npz")["layers"], "step": 7})
    with (tmp_path / "sent").open("wb") as file:
        cc.export(root, file, format="safetensors", only="params")

    loaded = cc.load_params((tmp_path / "sent").read_bytes(), format="safetensors")
    assert loaded.keys() == {"kernel", "bias"}


def test_a_stream_gets_all_or_nothing(tmp_path: Path) -> None:
    def broken(tensors: Tensors) -> Tensors:
        raise OSError("the disk is gone")

    stream = io.BytesIO()
    with pytest.raises(OSError, match="the disk is gone"):
        cc.export(state_for("npz"), stream, format="npz", transform=broken)
    with pytest.raises(cc.StateMismatch, match=r"^the leaf at key holds typed PRNG keys"):
        cc.export({"key": jax.random.key(0)}, stream, format="msgpack")
    assert stream.getvalue() == b""


WRONG: dict[str, tuple[Any, str]] = {
    "a folder": (
        lambda: cc.export({"w": 1}, io.BytesIO(), format="orbax"),
        "format 'orbax' is none of a single file.*: give format= one of safetensors, npz, msgpack",
    ),
    "shards": (
        lambda: cc.export({"w": 1}, io.BytesIO(), format="safetensors", max_shard_size=5),
        "path a folder for the shards: it is 5, and path the stream$",
    ),
    "no format": (
        lambda: cc.export({"w": 1}, io.BytesIO()),  # type: ignore[call-overload]
        "format None is none of a single file",
    ),
    "text": (
        lambda: cc.export({"w": 1}, io.StringIO(), format="npz"),  # type: ignore[call-overload]
        "neither a path nor a stream that takes bytes",
    ),
    "a number": (
        lambda: cc.export({"w": 1}, 3, format="npz"),  # type: ignore[call-overload]
        "3 is neither a path nor a stream",
    ),
    "bytes alone": (lambda: cc.load_params(b"x"), "bytes does not say what it holds: give format="),
    "a stream alone": (lambda: cc.load_params(io.BytesIO()), "BytesIO does not say what it holds"),
    "a path": (lambda: cc.load_params("a.npz", format="npz"), "not for str: of a path, name and"),
    "text in": (
        lambda: cc.load_params(io.StringIO("x"), format="npz"),
        "gives no bytes: a bytes-like object is required",
    ),
    "a folder in": (lambda: cc.load_params(b"x", format="orbax"), "none of a single file"),
    "unknown": (lambda: cc.load_params(b"x", format="hdf5"), "format 'hdf5' is none of a single"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(cc.ConfigError, match=message):
        call()


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_told_without_a_path_that_nobody_knows(name: str) -> None:
    content = content_of(name)
    wanted = state_for(name) if name == "equinox" else None
    with pytest.raises(cc.CorruptCheckpoint, match="the content given") as error:
        cc.load_params(content[:-3], wanted, format=name)
    assert tempfile.gettempdir() not in str(error.value)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@example("npy", "npy", [(42, 123)], None)  # a header that NumPy does not get to the end of
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 10**9)),
)
def test_bytes_of_anybody_are_read_or_refused(
    written: str, said: str, changes: list[tuple[int, int]], cut: int | None
) -> None:
    """Whatever they are said to be; no array is larger than what there is."""
    content = bytearray(content_of(written))
    for at, byte in changes:
        content[at % len(content)] = byte
    if cut is not None:
        del content[cut % len(content) :]
    wanted = state_for(said) if said == "equinox" else None
    try:
        loaded = cc.load_params(bytes(content), wanted, format=said, only=None)
    except (cc.CorruptCheckpoint, cc.StateMismatch, cc.CheckpointNotFound):
        return
    arrays = [x for x in jax.tree.leaves(loaded) if isinstance(x, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= len(content)
