"""What others write is read, and others read what is written: safetensors, Hugging Face, and more.

They need `equinox`, `flax`, `huggingface_hub`, `pytree2safetensors` and `safetensors`.
"""

import io
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # adds its dtypes to NumPy's
import mlflow
import numpy as np
import pytest
import pytree2safetensors
import safetensors.flax
import safetensors.numpy
from huggingface_hub import get_local_safetensors_metadata, split_state_dict_into_shards_factory
from safetensors import safe_open

import ckpt_callbacks as cc
from ckpt_callbacks.formats import safetensors as ours
from ckpt_callbacks.tensors import of_state
from embedded import tracker, uri

READABLE = [
    *("bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "uint32"),
    *("float32", "complex64", "float64", "int64", "uint64"),
]
WRITABLE = [
    *READABLE,
    *("float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
]


def array_of(dtype: str, shape: tuple[int, ...] = (3, 4)) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(np.dtype(dtype))


def same(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def header_of(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_the_layout_is_that_of_the_official_writer() -> None:
    arrays = {f"{i % 3} é\n\x7f{dtype}": array_of(dtype) for i, dtype in enumerate(WRITABLE)}
    content = ours.dumps(of_state(arrays), {})
    metadata = header_of(content)["__metadata__"]
    mine, theirs = header_of(content), header_of(safetensors.numpy.save(arrays, metadata))
    assert list(mine.items()) == list(theirs.items())
    alone = {k: v for k, v in metadata.items() if k == "format"}
    # With one text of metadata, of which the order is certain, each byte is the same.
    official = safetensors.numpy.save(arrays, alone)
    text = json.dumps(metadata, separators=(",", ":")).encode()
    start = 8 + int.from_bytes(content[:8], "little")
    shorter = content[8:start].replace(text, json.dumps(alone, separators=(",", ":")).encode())
    shorter = shorter.rstrip() + b" " * (-len(shorter.rstrip()) % 8)
    assert len(shorter).to_bytes(8, "little") + shorter + content[start:] == official


@pytest.mark.parametrize("dtype", READABLE)
def test_numpy_reads_and_writes_the_same(dtype: str, tmp_path: Path) -> None:
    arrays = {
        "a.0": array_of(dtype),
        "a.1": array_of(dtype, ()),
        "a.2": array_of(dtype, (0, 2)),
        "b": array_of(dtype).T,
    }
    path = tmp_path / "ours.safetensors"
    state = {"a": [arrays["a.0"], arrays["a.1"], arrays["a.2"]], "b": arrays["b"]}
    ours.write(path, of_state(state), {"step": 3, "name": "x"})
    read = safetensors.numpy.load_file(path)
    assert read.keys() == arrays.keys()
    assert all(same(read[name], arrays[name]) for name in arrays)
    with safe_open(path, "np") as file:
        assert file.metadata()["name"] == "x"
        assert same(file.get_slice("b")[1:3], arrays["b"][1:3])
    arrays["b"] = np.ascontiguousarray(arrays["b"])
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", {"step": "3"})
    tensors, metadata = ours.read(tmp_path / "theirs.safetensors")
    assert metadata == {"step": "3"}
    assert all(same(tensors[tuple(n.split("."))].read(), arrays[n]) for n in arrays)


@pytest.mark.parametrize("dtype", WRITABLE)
def test_what_numpy_writes_is_read(dtype: str) -> None:
    tensors, _ = ours.loads(safetensors.numpy.save({"a": array_of(dtype)}))
    assert same(tensors["a",].read(), array_of(dtype))


def test_flax_reads_and_writes_the_same(tmp_path: Path) -> None:
    state = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.arange(3.0), "c": jnp.ones((2, 3)).T}
    ours.write(tmp_path / "ours.safetensors", of_state(state), {})
    read = safetensors.flax.load_file(tmp_path / "ours.safetensors")
    assert read.keys() == state.keys()
    assert all(same(read[name], state[name]) for name in state)
    safetensors.flax.save_file(state, tmp_path / "theirs.safetensors")
    tensors, _ = ours.read(tmp_path / "theirs.safetensors")
    assert all(same(tensors[name,].read(), state[name]) for name in state)


class Model(eqx.Module):
    layers: list[eqx.nn.Linear]
    scales: dict[str, jax.Array]


def model(seed: int) -> Model:
    keys = jax.random.split(jax.random.key(seed))
    return Model([eqx.nn.Linear(2, 3, key=key) for key in keys], {"in": jnp.ones(2) * seed})


def test_pytree2safetensors_writes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    pytree2safetensors.save_pytree(eqx.filter(model(1), eqx.is_array), path)
    tensors, _ = ours.read(path)
    expected = of_state(model(1))
    assert tensors.keys() == expected.keys()
    assert all(same(tensors[p].read(), expected[p].read()) for p in expected)


def test_pytree2safetensors_reads_what_is_written(tmp_path: Path) -> None:
    state = {"a": [jnp.ones(2), {"b": jnp.zeros((2, 2)), "c": (jnp.arange(3),)}]}
    path = tmp_path / "ours.safetensors"
    ours.write(path, of_state(state), {}, naming="pytree2safetensors")
    loaded = pytree2safetensors.load_pytree(path)
    assert same(loaded["a"][0], state["a"][0])
    assert same(loaded["a"][1]["b"], state["a"][1]["b"])
    assert same(loaded["a"][1]["c"][0], jnp.arange(3))
    again = pytree2safetensors.load_into_pytree(jax.tree.map(jnp.zeros_like, state), path)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again, state))


def test_shards_are_those_of_hugging_face(tmp_path: Path) -> None:
    state = {f"w{i}": np.full(size, i, np.float32) for i, size in enumerate([6, 6, 2, 6, 2, 2])}
    ours.write(tmp_path / "ours", of_state(state), {}, max_shard_size=40)
    split = split_state_dict_into_shards_factory(
        state,
        get_storage_size=lambda array: array.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=40,
    )
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, held in split.filename_to_tensors.items():
        read = safetensors.numpy.load_file(tmp_path / "ours" / name)
        assert read.keys() == set(held)
        assert all(same(read[n], state[n]) for n in held)
        arrays = {n: state[n] for n in held}
        safetensors.numpy.save_file(arrays, theirs / name, {"format": "pt"})
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors, metadata = ours.read(theirs)
    assert metadata == {"format": "pt"}
    assert all(same(tensors[n,].read(), state[n]) for n in state)


@pytest.mark.parametrize("size", [None, 40])
def test_hugging_face_knows_what_is_in_a_folder(size: int | None, tmp_path: Path) -> None:
    half = jnp.ones((2, 4), jnp.bfloat16)
    state = {"model": {"a": half, "b": np.arange(6.0)}, "head": np.arange(4), "zero": np.int8(3)}
    folder = cc.export(state, tmp_path / "ours", format="safetensors", max_shard_size=size)

    found = get_local_safetensors_metadata(folder)

    assert found.sharded == (size is not None)
    assert found.parameter_count == {"BF16": 8, "F64": 6, "I64": 4, "I8": 1}
    assert found.weight_map.keys() == {"model.a", "model.b", "head", "zero"}
    for name, shard in found.weight_map.items():
        array = safetensors.numpy.load_file(folder / shard)[name]
        held = found.files_metadata[shard].tensors[name]
        assert (tuple(held.shape), np.diff(held.data_offsets)) == (array.shape, array.nbytes)
        assert found.files_metadata[shard].metadata["format"] == "pt"
    if size is not None:
        assert found.metadata == {"total_size": 16 + 48 + 32 + 1}
        assert len(found.files_metadata) == 4


@pytest.mark.parametrize("where", ["a file", "bytes"])
def test_what_a_tracker_publishes_is_read_by_others_alone(where: str, tmp_path: Path) -> None:
    mirror = tracker(tmp_path, payload=cc.Safetensors(only="params"))
    checkpoint = cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    state = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "step": 0}
    with cc.Callbacks(checkpoint, mirror, drain_limit=60).run(state) as run:
        run.on_step(0, run.state)

    path = mlflow.artifacts.download_artifacts(
        "models:/digits@last/weights/model.safetensors", tracking_uri=uri(tmp_path)
    )
    if where == "a file":
        read = safetensors.flax.load_file(path)
    else:
        read = safetensors.flax.load(Path(path).read_bytes())
        sent = io.BytesIO()
        cc.export(state, sent, format="safetensors", only="params")
        assert same(safetensors.flax.load(sent.getvalue())["params.w"], state["params"]["w"])
        content = safetensors.numpy.save({"a.w": np.ones(2)})
        assert cc.load_params(content, format="safetensors")["a"]["w"].tolist() == [1, 1]

    assert read.keys() == {"params.w"}
    assert same(read["params.w"], state["params"]["w"])
