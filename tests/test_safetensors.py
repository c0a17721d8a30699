"""safetensors files: what is written is read again, others' files too, and no file does harm."""

import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from ckpt_callbacks.errors import ConfigError, CorruptCheckpoint, StateMismatch
from ckpt_callbacks.formats import format_of, named, safetensors
from ckpt_callbacks.formats.naming import guess, join, split
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.tensors import Tensor, Tensors, of_state
from states.case import describe
from states.cases.plain import DTYPES

HOST = ["float64", "int64", "uint64", "complex128"]
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def made(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return an array of any bits; of whole numbers those that the dtype has."""
    rng, kind = np.random.default_rng(seed), jnp.dtype(dtype)
    raw = rng.integers(0, 256, math.prod(shape) * kind.itemsize, np.uint8)
    if "int" in dtype or dtype == "bool":
        return (raw[: math.prod(shape)] % 2).astype(kind).reshape(shape)
    return raw.view(kind).reshape(shape)


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    name = draw(st.sampled_from(DTYPES + HOST))
    array = made(name, draw(shapes), draw(st.integers(0, 99)))
    form = draw(st.sampled_from(["plain", "transposed", "jax", "swapped", "scalar"]))
    if form == "transposed":
        return array.T
    if form == "jax" and name not in HOST:
        return jnp.asarray(array)
    if form == "swapped" and name in HOST:
        return array.byteswap().view(array.dtype.newbyteorder())
    return array[()] if form == "scalar" and not array.shape else array


keys = st.builds(
    lambda impl, n: jax.random.split(jax.random.key(n, impl=impl), n),
    st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]),
    st.integers(0, 3),
)
numbers = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary()
)
names = st.text(max_size=4) | st.sampled_from(["a", "a.b", "b@c", "#1", "x/y", "..", "01", "7"])
states = st.recursive(
    arrays() | keys | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


def described(tensors: Tensors) -> dict[Any, Any]:
    return {path: (str(t.leaf), describe(little(t.read()))) for path, t in tensors.items()}


def little(value: Any) -> Any:
    """Return what is read of an array whose bytes were in the other order."""
    swapped = isinstance(value, np.ndarray) and value.dtype.byteorder == ">"
    return value.astype(value.dtype.newbyteorder("<")) if swapped else value


def raw_file(header: Any, data: bytes = b"", pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@settings(deadline=None)  # the first array of each dtype takes JAX longer
@given(states, st.dictionaries(st.text(), json_values, max_size=3), st.data())
def test_every_state_comes_back_as_it_was(state: Any, about: Any, data: st.DataObject) -> None:
    naming = data.draw(st.sampled_from(["dots", "safejax", "pytree2safetensors"]))
    try:
        tensors = of_state(state)
    except StateMismatch:  # names that differ by a dot alone are of no state
        reject()
    if len({join(path, naming) for path in tensors}) < len(tensors):
        with pytest.raises(StateMismatch, match="would both be called"):
            safetensors.dumps(tensors, about, naming=naming)
        return
    content = safetensors.dumps(tensors, about, naming=naming)
    back, metadata = safetensors.loads(content)
    assert described(back) == described(tensors)
    assert {path: t.leaf for path, t in back.items()} == {p: t.leaf for p, t in tensors.items()}
    assert metadata == about
    assert safetensors.dumps(back, metadata, naming=naming) == content


@pytest.mark.parametrize("dtype", DTYPES + HOST)
def test_every_dtype_is_stored_bit_by_bit(dtype: str) -> None:
    state = {"big": made(dtype, (7, 5)), "empty": made(dtype, (0, 2)), "zero": made(dtype, ())}
    back, _ = safetensors.loads(safetensors.dumps(of_state(state), {}))
    for name, array in state.items():
        read = back[name,].read()
        assert (read.dtype, read.shape, read.tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        )


@pytest.mark.parametrize("name", ["format", "leaves", "metadata", "naming"])
def test_no_name_of_the_users_is_in_the_way(name: str) -> None:
    about = {name: "mine", f"ckpt_callbacks.{name}": "mine", "__metadata__": "mine"}
    tensors, metadata = safetensors.loads(
        safetensors.dumps(of_state({"a": 1.5 * np.ones(2)}), about)
    )
    assert metadata == about
    assert tensors["a",].read().tolist() == [1.5, 1.5]


@pytest.mark.parametrize("dtype", [">f8", ">i2", ">c16", ">c8"])
def test_the_other_order_of_bytes_is_turned(dtype: str) -> None:
    array = np.arange(6).astype(dtype).reshape(2, 3).T
    read = safetensors.loads(safetensors.dumps(of_state({"a": array}), {}))[0]["a",].read()
    assert read.dtype == array.dtype.newbyteorder("<")
    assert read.tolist() == array.tolist()


def test_the_file_is_what_others_write() -> None:
    state = {
        "A": np.arange(3, dtype=np.int16),
        "a": {"1": np.arange(2, dtype=np.float32), "0": np.float32([3])},
        "é": np.bool_([True]),
    }
    about = {"format": "flax", "step": 3, "run": "é"}
    content = safetensors.dumps(of_state(state), about)
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert list(header.items()) == [
        ("a.0", entry("F32", [1], 0, 4)),
        ("a.1", entry("F32", [2], 4, 12)),
        ("A", entry("I16", [3], 12, 18)),
        ("é", entry("BOOL", [1], 18, 19)),
    ]
    assert content[8 + length :] == bytes.fromhex("00004040 00000000 0000803f 000001000200 01")
    assert '"é"'.encode() in content
    assert metadata["format"] == "flax"
    assert metadata["run"] == "é"
    assert "step" not in metadata, "only text is for others"
    assert json.loads(safetensors.dumps({}, {})[8:])["__metadata__"]["format"] == "pt"


def test_files_of_others_are_read(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "layers.0.w": entry("F32", [2], 1, 9),  # in an order of their own, and not aligned
        "flag": entry("BOOL", [1], 0, 1),
        "a@b": entry("I64", [], 9, 17),
        "a.b": entry("U8", [0, 2], 17, 17),
    }
    data = b"\1" + np.float32([1, 2]).tobytes() + np.int64(7).tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(header, data, pad=3))
    for place in (path, tmp_path):
        assert format_of(place) == "safetensors"
        tensors, metadata = named("safetensors").read(place)
        assert metadata == {"format": "pt"}
        read = tensors["layers", "0", "w"].read()
        assert read.tolist() == [1, 2]
        assert read.flags.aligned
        assert not tensors["flag",].read().flags.writeable
        assert tensors["flag",].read().tolist() == [True]
        assert tensors["a@b",].read().tolist() == 7
        assert tensors["a", "b"].leaf == Leaf("array", (0, 2), "uint8")
        assert tensors["a", "b"].read().shape == (0, 2)


@pytest.mark.parametrize(
    ("naming", "path", "name"),
    [
        ("dots", ("model", "0", "w"), "model.0.w"),
        ("safejax", ("model", "0", "w"), "model.0.w"),
        ("pytree2safetensors", ("model", "0", "w"), "@model#0@w"),
        ("pytree2safetensors", ("0", "01"), "#0@01"),
        ("dots", (), ""),
        ("pytree2safetensors", (), ""),
    ],
)
def test_leaves_are_named(naming: str, path: tuple[str, ...], name: str) -> None:
    assert join(path, naming) == name
    assert split(name, naming) == path


def test_names_with_attributes_are_understood() -> None:
    assert split("layers#0.weight", "pytree2safetensors") == ("layers", "0", "weight")
    assert guess(["layers#0.weight", "@a@k", "#0.mu@k"]) == "pytree2safetensors"
    assert guess(["a.b", "c.0"]) == "dots"
    assert guess(["c#x"]) == "dots"
    assert guess(["a@b", "a.b"]) == "dots", "else two arrays would have one path"


@pytest.mark.parametrize(
    ("naming", "one", "other"),
    [("dots", ("a.b",), ("a", "b")), ("pytree2safetensors", ("a@b",), ("a", "b"))],
)
def test_two_leaves_of_one_name_are_refused(naming: str, one: Any, other: Any) -> None:
    leaf = of_state(np.zeros(1))[()]
    with pytest.raises(StateMismatch) as refused:
        safetensors.dumps({one: leaf, other: leaf}, {}, naming=naming)
    assert str(one) in str(refused.value)
    assert str(other) in str(refused.value)


@pytest.mark.parametrize("path", [("__metadata__",), ("a", "\ud800")])
def test_a_name_that_the_format_has_not_is_refused(path: Any) -> None:
    with pytest.raises(StateMismatch, match="rename it"):
        safetensors.dumps({path: of_state(np.zeros(1))[()]}, {})


@pytest.mark.parametrize("shape", [(3,), (1, 2)])
def test_a_leaf_that_changed_is_refused(shape: tuple[int, ...]) -> None:
    tensors = {("a",): Tensor(Leaf("array", (2,), "float32"), lambda: np.zeros(shape, np.float32))}
    with pytest.raises(StateMismatch, match="a was read as float32"):
        safetensors.dumps(tensors, {})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("m.safetensors", {"max_shard_size": 10}),
        ("m", {"max_shard_size": 0}),
        ("m", {"max_shard_size": "5GB"}),
        ("m", {"naming": "slashes"}),
        ("m", {"metadata": {"a": object()}}),
        ("full", {}),
        ("full/file.safetensors", {}),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, name: str, options: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file.safetensors").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    options = {"metadata": {}} | options
    with pytest.raises(ConfigError):
        safetensors.write(tmp_path / name, of_state({"a": np.zeros(1)}), **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "file.safetensors").read_text() == "mine"


def test_shards_have_the_layout_of_hugging_face(tmp_path: Path) -> None:
    state = {f"w{i}": np.full(10, i, np.int32) for i in range(5)} | {
        "b.c": 2**80,
        "k": jax.random.key(1),
    }
    tensors = of_state(state)
    safetensors.write(tmp_path / "model", tensors, {"step": 3}, max_shard_size=80)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(
        [*shards, "model.safetensors.index.json"]
    )
    assert index["metadata"] == {"total_size": 5 * 40 + len(str(2**80)) + 8}
    assert set(index["weight_map"]) == {"w0", "w1", "w2", "w3", "w4", "b.c", "k"}
    for place in ("model", "model/model.safetensors.index.json"):
        back, metadata = safetensors.read(tmp_path / place)
        assert described(back) == described(tensors)
        assert metadata == {"step": 3}
    alone, metadata = safetensors.read(tmp_path / "model" / index["weight_map"]["b.c"])
    assert alone["b.c",].read() == 2**80, "a shard is a whole file"
    assert metadata == {"step": 3}


def test_a_folder_of_what_fits_has_one_file(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "model", of_state({"a": np.ones(2)}), {})
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    back, _ = safetensors.read(tmp_path / "model")
    assert back["a",].read().tolist() == [1, 1]


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_a_file_is_there_only_once_it_is_durable(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / name
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def sync(fd: int) -> None:
        fsync(fd)
        synced.append((str(Path(f"/proc/self/fd/{fd}").readlink()), target.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    state = {"a": np.ones(4), "b": np.ones(4)}
    options = {} if target.suffix else {"max_shard_size": 32}
    safetensors.write(target, of_state(state), {}, **options)
    *before, last = synced
    assert last == (str(tmp_path), True)
    assert not any(there for _, there in before)
    written = {Path(path).name for path, _ in before if path != str(tmp_path)}
    assert len(written) == (1 if target.suffix else 4)  # the file; or folder, index and two shards


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, name: str) -> None:
    tensors, folder = of_state({"a": np.ones(4)}), tmp_path / "models"
    folder.mkdir()

    def fails() -> Any:
        raise OSError("gone")

    broken = tensors | {("b",): Tensor(Leaf("array", (4,), "float64"), fails)}
    with pytest.raises(OSError, match="gone"):
        safetensors.write(folder / name, broken, {})
    assert list(folder.iterdir()) == []
    safetensors.write(folder / name, tensors, {})
    assert list(folder.iterdir()) == [folder / name]


def test_memory_is_that_of_one_leaf(tmp_path: Path) -> None:
    size = 10 * 2**20
    leaf = Leaf("array", (size // 4,), "float32")
    tensors: Tensors = {
        (str(i),): Tensor(leaf, lambda i=i: np.full(size // 4, i, np.float32)) for i in range(20)
    }
    path = tmp_path / "model.safetensors"
    assert peak(lambda: safetensors.write(path, tensors, {})) < 1.2 * size
    assert path.stat().st_size > 20 * size
    back: list[Any] = []
    assert (
        peak(lambda: back.append(safetensors.read(path)[0]["7",].read()[5:9].tolist())) < size / 10
    )
    assert back == [[7, 7, 7, 7]]


def peak(function: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_array_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    reads: list[str] = []

    def read(name: str) -> Any:
        reads.append(name)
        return np.zeros(3, np.float32)

    leaf = Leaf("array", (3,), "float32")
    tensors = {(n,): Tensor(leaf, lambda n=n: read(n)) for n in ("z", "a", "m")}
    safetensors.dumps(tensors, {})
    assert reads == ["z", "a", "m"], "in the order given"


GOOD = {"a": entry("F32", [2], 0, 8)}


def noted(note: Any, field: Any = None, data: bytes = bytes(8)) -> bytes:
    text = note if isinstance(note, str) else json.dumps({"a": note})
    about = {"__metadata__": {"ckpt_callbacks.leaves": text}}
    return raw_file(about | ({"a": field} if field else GOOD), data)


DAMAGED = {
    "empty": (b"", "first 9 of its 0 bytes"),
    "short": (b"\x01\0\0", "first 9 of its 3 bytes"),
    "pickle": (b"\x80\x04\x95" + bytes(30), "pickle"),
    "zip": (b"PK\x03\x04" + bytes(30), "pickle"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "first 9 of its"),
    "header beyond the end": (raw_file(GOOD, bytes(8))[:20], "its header is said to take"),
    "huge header": (b"\xff" * 7 + b"\0{" + bytes(20), "its header is said to take"),
    "cut": (raw_file(GOOD, bytes(7)), "cut short"),
    "longer": (raw_file(GOOD, bytes(9)), "something was added"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "cannot be read"),
    "not JSON": (raw_file(b"{nonsense}"), "cannot be read"),
    "deep JSON": (raw_file(b'{"a":' + b"[" * 100_000), "cannot be read"),
    "long number": (raw_file(b'{"a":' + b"9" * 10_000 + b"}"), "cannot be read"),
    "twice": (raw_file(b'{"a": 1, "a": 2}'), "'a' twice"),
    "half a letter": (raw_file({"\ud800": entry("U8", [0], 0, 0)}), "no valid text"),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), "something else than text"),
    "metadata a list": (raw_file({"__metadata__": []}), "something else than text"),
    "no entry": (raw_file({"a": 3}), "dtype None"),
    "dtype": (raw_file({"a": entry("F12", [2], 0, 8)}, bytes(8)), "'F12'"),
    "packed dtype": (raw_file({"a": entry("F4", [4], 0, 2)}, bytes(2)), "'F4'"),
    "dtype a list": (raw_file({"a": entry([], [2], 0, 8)}, bytes(8)), "dtype"),  # type: ignore[arg-type]
    "negative shape": (raw_file({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8)), "shape"),
    "fraction": (raw_file({"a": entry("F32", [2.0], 0, 8)}, bytes(8)), "shape"),
    "truth": (raw_file({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)), "shape"),
    "infinity": (raw_file({"a": entry("F32", [math.inf], 0, 8)}, bytes(8)), "shape"),
    "many axes": (raw_file({"a": entry("U8", [1] * 65, 0, 1)}, b"1"), "shape"),
    "wide": (raw_file({"a": entry("U8", [2**63], 0, 8)}, bytes(8)), "shape"),
    "wide and empty": (raw_file({"a": entry("F64", [0, 2**62, 2**62], 0, 0)}), "take 0 bytes"),
    "size": (raw_file({"a": entry("F32", [3], 0, 8)}, bytes(8)), "take 8 bytes"),
    "backwards": (raw_file({"a": entry("F32", [2], 8, 0)}, bytes(8)), "take -8 bytes"),
    "negative": (raw_file({"a": entry("F32", [2], -8, 0)}, bytes(8)), "data_offsets"),
    "one offset": (raw_file({"a": entry("F32", [2], 0)}, bytes(8)), "data_offsets"),
    "beyond": (raw_file({"a": entry("U8", [2**40], 0, 2**40)}, bytes(8)), "cut short"),
    "hole": (raw_file({"a": entry("F32", [2], 4, 12)}, bytes(12)), "hole"),
    "overlap": (raw_file(GOOD | {"b": entry("F32", [2], 4, 12)}, bytes(12)), "overlaps"),
    "same place": (raw_file(GOOD | {"b": entry("F32", [2], 0, 8)}, bytes(8)), "overlaps"),
    "notes no JSON": (noted("{"), "ckpt_callbacks.leaves in its metadata cannot be read"),
    "notes a list": (noted("[]"), "no object"),
    "note a list": (noted([]), "does not fit"),
    "note of another": (noted({"shape": [2**50], "dtype": "float64"}), "does not fit"),
    "note of dtype": (noted({"dtype": "int4"}), "does not fit"),
    "unknown dtype": (noted({"dtype": "object"}), "does not fit"),
    "dtype a dict": (noted({"dtype": {}}), "does not fit"),
    "type": (noted({"type": "pickle"}), "does not fit"),
    "type a list": (noted({"type": []}), "does not fit"),
    "type and dtype": (noted({"type": "float"}), "does not fit"),
    "type and shape": (noted({"type": "float"}, entry("F64", [1], 0, 8)), "does not fit"),
    "key of floats": (noted({"key": "other"}), "does not fit"),
    "key of another size": (noted({"key": "rbg"}, entry("U32", [2], 0, 8)), "does not fit"),
    "pair": (noted({"dtype": "complex128"}, entry("F64", [1], 0, 8)), "does not fit"),
    "path": (noted({"path": "b"}), "the path of"),
    "path of numbers": (noted({"path": [1]}), "the path of"),
    "no text": (noted({"type": "str"}, entry("U8", [8], 0, 8), b"\xff" * 8), "no str"),
    "no number": (noted({"type": "bigint"}, entry("U8", [8], 0, 8)), "no bigint"),
    "truth of 2": (raw_file({"a": entry("BOOL", [1], 0, 1)}, b"\2"), "neither"),
    "one path twice": (
        raw_file(
            {
                "__metadata__": {"ckpt_callbacks.leaves": '{"b": {"path": ["a"]}}'},
                "a": entry("U8", [1], 0, 1),
                "b": entry("U8", [1], 1, 2),
            },
            b"12",
        ),
        "a is there twice",
    ),
    "about a list": (
        raw_file({"__metadata__": {"ckpt_callbacks.metadata": "[]"}}),
        "no object of JSON",
    ),
}


def read_all(tensors: Tensors) -> dict[Any, Any]:
    return {path: tensor.read() for path, tensor in tensors.items()}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told(case: str, tmp_path: Path) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert format_of(path) == "safetensors"
    tracemalloc.start()
    with pytest.raises(CorruptCheckpoint, match=r"\A.*\Z") as refused:
        read_all(safetensors.read(path)[0])
    assert tracemalloc.get_traced_memory()[1] < 2**24, "nothing was allocated for it"
    tracemalloc.stop()
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    with pytest.raises(CorruptCheckpoint, match="the content given"):
        read_all(safetensors.loads(content)[0])


def test_a_file_that_was_cut_after_it_was_opened_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(GOOD, bytes(8)))
    tensors, _ = safetensors.read(path)
    path.write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match="changed while it was read"):
        tensors["a",].read()


def test_arrays_are_those_of_the_file_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(GOOD, bytes(8)))
    tensors, _ = safetensors.read(path)
    newer = tmp_path / "newer"
    newer.write_bytes(raw_file(GOOD, b"1" * 8))
    newer.replace(path)
    assert tensors["a",].read().tolist() == [0, 0]


def shards(weight_map: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(raw_file(GOOD, bytes(8)))
    (folder / "one.safetensors").write_bytes(raw_file(GOOD, bytes(8)))
    (folder / "two.safetensors").write_bytes(raw_file({"b": entry("U8", [1], 0, 1)}, b"2"))
    (folder / "folder.safetensors").mkdir()
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.safetensors"}, "expected the name of a safetensors file"),
        ({"a": "folder/../../secret.safetensors"}, "expected the name"),
        ({"a": "/etc/passwd.safetensors"}, "expected the name"),
        ({"a": "..\\secret.safetensors"}, "expected the name"),
        ({"a": "one.safetensors\0.safetensors"}, "expected the name"),
        ({"a": "pytorch_model.bin"}, "expected the name"),
        ({"a": 3}, "expected the name"),
        ({"a": "gone.safetensors"}, "missing"),
        ({"a": "folder.safetensors"}, "no file"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "'c', which is not there"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'b', which is not there"),
        ({"b": "two.safetensors", "a": "two.safetensors"}, "'a', which is not there"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ("[]", "no weight_map"),
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "twice"),
    ],
)
def test_a_damaged_index_is_told(weight_map: Any, message: str, tmp_path: Path) -> None:
    folder = shards(weight_map, tmp_path)
    with pytest.raises(CorruptCheckpoint) as refused:
        safetensors.read(folder)
    assert message in str(refused.value)


def test_an_array_that_the_index_leaves_out_is_told(tmp_path: Path) -> None:
    folder = shards({"a": "one.safetensors"}, tmp_path)
    content = raw_file(GOOD | {"b": entry("U8", [1], 8, 9)}, bytes(9))
    (folder / "one.safetensors").write_bytes(content)
    with pytest.raises(
        CorruptCheckpoint, match=r"'b' is in one\.safetensors, and weight_map has n"
    ):
        safetensors.read(folder)


def test_what_an_index_of_others_says_is_read(tmp_path: Path) -> None:
    index = {
        "metadata": {"total_size": 9, "by": "others"},
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
    }
    tensors, metadata = safetensors.read(shards(json.dumps(index), tmp_path))
    assert metadata == {"by": "others"}
    assert tensors["b",].read().tolist() == [ord("2")]


def test_a_folder_of_something_else_is_none(tmp_path: Path) -> None:
    assert not safetensors.matches(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(raw_file(GOOD, bytes(8)))
    assert not safetensors.matches(tmp_path), "either could be meant"
    with pytest.raises(CorruptCheckpoint, match="several"):
        safetensors.read(tmp_path)
    (tmp_path / "note").write_text("{}")
    assert not safetensors.matches(tmp_path / "note")
    (tmp_path / "page").write_text("12345678{}")
    assert not safetensors.matches(tmp_path / "page")
    (tmp_path / "blob").write_bytes(raw_file(GOOD, bytes(8)))
    assert safetensors.matches(tmp_path / "blob"), "by its content"


VALID = safetensors.dumps(
    of_state(
        {
            "w": {"0": np.arange(6, dtype=np.float32).reshape(2, 3), "1": jnp.ones(3, "bfloat16")},
            "flags": np.array([True, False]),
            "small": jnp.ones((2, 2), "int4"),
            "wide": np.ones(2, np.complex128),
            "key": jax.random.key(0),
            "step": 3,
            "big": 2**70,
            "text": "é",
            "a.b": b"12",
            "n": np.float64(0.5),
        }
    ),
    {"step": 3},
)
LENGTH = int.from_bytes(VALID[:8], "little")
TOKENS = [b"0", b"-1", b"9" * 30, b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"1e9", b"\\"]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a valid file with some harm done to it, most of it to the header."""
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 3))):
        match draw(st.sampled_from(["flip", "header", "token", "cut", "add", "copy", "length"])):
            case "flip":
                content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
            case "header":
                at = draw(st.integers(0, min(8 + LENGTH, len(content)) - 1))
                content[at] = draw(st.integers(32, 126))
            case "token":
                at, token = draw(st.integers(8, 8 + LENGTH)), draw(st.sampled_from(TOKENS))
                content[at : at + len(token)] = token
            case "cut":
                del content[draw(st.integers(9, len(content))) :]
            case "add":
                content += draw(st.binary(min_size=1, max_size=9))
            case "copy":
                at, to = draw(st.integers(8, 8 + LENGTH)), draw(st.integers(8, 8 + LENGTH))
                part = content[at : at + draw(st.integers(1, 40))]
                content[to : to + len(part)] = part
            case "length":
                size = draw(st.integers(0, 2 * LENGTH) | st.integers(0, 2**64 - 1))
                content[:8] = size.to_bytes(8, "little")
    return bytes(content)


@settings(max_examples=2000, deadline=None)
@given(mutated())
def test_a_file_is_told_to_be_damaged_or_is_read_as_it_is(content: bytes) -> None:
    try:
        tensors, _ = safetensors.loads(content)
        values = read_all(tensors)
    except CorruptCheckpoint:
        return
    # What no reader can know is harm: the file says so itself, and all of it was read.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    assert len(values) == len(header)
    assert sum(e["data_offsets"][1] - e["data_offsets"][0] for e in header.values()) == (
        len(content) - 8 - length
    )
    for path, value in values.items():
        leaf = tensors[path].leaf
        if leaf.kind == "array":
            assert (value.dtype.name, value.shape) == (leaf.dtype, leaf.shape)
