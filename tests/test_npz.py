"""Files of NumPy, in and out."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks.formats import format_of, npz
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.tensors import of_state
from states.case import describe
from test_leaves import arrays, keys, numbers

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\\:"), min_size=1)
states = st.dictionaries(
    st.lists(names, min_size=1, max_size=3).map(tuple),
    st.one_of(arrays(), keys, numbers),
    min_size=1,
    max_size=4,
)


def write(path: Path, state: Any, **metadata: Any) -> Path:
    npz.write(path, of_state(state), metadata)
    return path


def values(path: Path) -> dict[str, str]:
    """Return what all leaves of a file are."""
    tensors, _ = npz.read(path)
    return {"/".join(at): f"{x.leaf} {describe(x.read())}" for at, x in tensors.items()}


def in_memory(state: Any) -> dict[str, str]:
    return {"/".join(at): f"{x.leaf} {describe(x.read())}" for at, x in of_state(state).items()}


@settings(deadline=None)  # the first array of each dtype takes JAX longer
@given(st.data())
def test_every_leaf_comes_back_as_it_was(data: st.DataObject) -> None:
    flat = data.draw(states)
    tops = {f"{i}": {"/".join(path): value} for i, (path, value) in enumerate(flat.items())}
    path = Path("state.npz")

    try:
        write(path, tops, step=3)
    except cc.StateMismatch as error:  # such as two dots between slashes
        assert "leads out of a folder" in str(error)  # noqa: PT017  # only some names do
        return

    tensors, metadata = npz.read(path)
    assert metadata == {"step": 3}
    expected = of_state(tops)
    assert {at: x.leaf for at, x in tensors.items()} == {at: x.leaf for at, x in expected.items()}
    for at, tensor in tensors.items():
        assert describe(tensor.read()) == describe(expected[at].read())


def state() -> dict[str, Any]:
    return {
        "model": {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16)},
        "more": {"int4": jnp.array([1, -2], jnp.int4), "fp8": jnp.ones(2, jnp.float8_e4m3fn)},
        "key": jax.random.key(3),
        "none": np.zeros((0, 4)),
        "big": 2**70,
        "name": "é",
        "dotted.name": np.float16(2),
    }


def test_numpy_reads_what_is_written() -> None:
    found = np.load(write(Path("a.npz"), state(), step=1))

    shown = {name: (str(found[name].dtype), found[name].shape) for name in found.files}
    assert shown.pop(npz.NOTES)[0] == "uint8"
    assert shown == {
        "model.w": ("float32", (2, 3)),
        "model.half": ("uint16", (3,)),
        "more.int4": ("int8", (2,)),
        "more.fp8": ("uint8", (2,)),
        "key": ("uint32", (2,)),
        "none": ("float64", (0, 4)),
        "big": ("uint8", (22,)),
        "name": ("uint8", (2,)),
        "dotted.name": ("float16", ()),
    }
    assert np.array_equal(found["model.w"], state()["model"]["w"])
    assert np.array_equal(found["model.half"].view(ml_dtypes.bfloat16), np.ones(3))
    assert found["more.int4"].tolist() == [1, -2]
    about = json.loads(found[npz.NOTES].tobytes())
    assert about["metadata"] == {"step": 1}
    assert about["leaves"]["model.half"] == {"dtype": "bfloat16"}
    assert about["leaves"]["dotted.name"] == {"type": "scalar", "path": ["dotted.name"]}


def test_the_same_leaves_make_the_same_bytes() -> None:
    files = [write(Path(name), state(), step=1).read_bytes() for name in ("a.npz", "b.npz")]

    assert files[0] == files[1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_is_read(save: Callable[..., None]) -> None:
    theirs = {
        "layer.w": np.arange(12, dtype=">f4").reshape(3, 4),
        "layer.turned": np.arange(6).reshape(2, 3).T,
        "n": np.array(7, np.uint8),
    }
    save("theirs.npz", **theirs)
    save("slashes.npz", **{"Transformer/block_0.5/w": np.ones(2), "head": np.ones(1)})

    tensors, metadata = npz.read(Path("theirs.npz"))

    assert metadata == {}
    assert tensors["layer", "w"].leaf == Leaf("array", (3, 4), "float32")
    for name, expected in theirs.items():
        array = tensors[tuple(name.split("."))].read()
        assert array.dtype.isnative
        assert array.flags.c_contiguous
        assert np.array_equal(array, expected)
    assert set(npz.read(Path("slashes.npz"))[0]) == {("Transformer", "block_0.5", "w"), ("head",)}


def test_an_array_alone() -> None:
    array = np.arange(6.0).reshape(2, 3)
    alone = write(Path("alone.npy"), {"w": array})
    assert np.array_equal(np.load(alone), array)
    assert np.array_equal(npz.read(alone)[0]["leaf",].read(), array)
    for wrong in ({"w": array, "b": array}, {"w": jnp.ones(2, jnp.bfloat16)}, {"n": 1}):
        with pytest.raises(cc.StateMismatch, match=r"other\.npy can hold one array"):
            write(Path("other.npy"), wrong)
    assert not Path("other.npy").exists()
    alone.write_bytes(alone.read_bytes()[:-1])
    with pytest.raises(cc.CorruptCheckpoint, match=r"alone\.npy"):
        npz.read(alone)


def test_a_leaf_is_read_when_it_is_asked_for() -> None:
    path = write(Path("a.npz"), {"a": np.zeros(1 << 20), "b": np.ones(4)})
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("a.npy").header_offset + 4096
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)

    tensors, _ = npz.read(path)
    assert tensors["b",].read().tolist() == [1] * 4
    with pytest.raises(cc.CorruptCheckpoint, match=r"a\.npz: 'a.npy' is damaged: Bad CRC"):
        tensors["a",].read()


def test_little_more_than_one_leaf_is_in_memory() -> None:
    import tracemalloc

    from ckpt_callbacks.tensors import Tensor

    leaf = Leaf("array", (1 << 20,), "float64")
    tensors = {(str(i),): Tensor(leaf, lambda: np.zeros(1 << 20)) for i in range(8)}
    tracemalloc.start()
    npz.write(Path("a.npz"), tensors, {})
    for tensor in npz.read(Path("a.npz"))[0].values():
        tensor.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert Path("a.npz").stat().st_size > 8 * leaf.nbytes
    assert peak < 4 * leaf.nbytes


def archive(entries: list[tuple[str, bytes]], **options: Any) -> Path:
    with zipfile.ZipFile("made.npz", "w", **options) as file:
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name), content)
    return Path("made.npz")


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def told(about: object) -> tuple[str, bytes]:
    return f"{npz.NOTES}.npy", npy(np.frombuffer(json.dumps(about).encode(), np.uint8))


ONE = npy(np.ones(2, np.float32))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("../up.npy", ONE)], "leads out"),
        ([("/root.npy", ONE)], "leads out"),
        ([("a/../../b.npy", ONE)], "leads out"),
        ([("a\\..\\b.npy", ONE)], "leads out"),
        ([("C:/a.npy", ONE)], "leads out"),
        ([("a.npy", ONE), ("a.npy", ONE)], "twice"),
        ([("a.txt", b"text")], "it is no .npy"),
        ([("a.npy", b"text")], "magic string"),
        ([("a.npy", ONE + b"more")], "bytes, but it has"),
        ([("a.npy", ONE[:-1])], "bytes, but it has"),
        ([("a.npy", npy(np.array([{}], object)))], "objects of Python"),
        ([("a.npy", npy(np.array(["text"])))], "none of numbers"),
        ([("a.npy", npy(np.zeros(2, [("x", "f4")])))], "none of numbers"),
        ([("a.npy", ONE.replace(b"(2,)", b"(-2,)"))], ""),
        ([("a.npy", ONE.replace(b"}", b"{"))], "its header is none"),
        ([("a.npy", ONE.replace(b"{", b" x\n  {\n "))], ""),
        ([("a.npy", ONE), told({"version": 2, "leaves": {}})], "version is 2; known is 1"),
        ([("a.npy", ONE), told({"version": 1, "leaves": {}, "metadata": {}})], "not in both"),
        ([("a.npy", ONE), told([1])], ""),
        ([told({"version": 1, "leaves": {"a": {}}, "metadata": {}})], "not in both"),
    ],
)
def test_what_is_made_to_do_harm_is_refused(entries: list[tuple[str, bytes]], message: str) -> None:
    path = archive(entries)

    with pytest.raises(cc.CorruptCheckpoint, match=rf"made\.npz.*{message}"):
        npz.read(path)


@pytest.mark.parametrize(
    "note",
    [
        {"dtype": "object"},
        {"dtype": "bfloat16"},  # of two bytes, where there are four
        {"dtype": "nothing"},
        {"type": "str"},
        {"type": "int"},
        {"type": "files"},
        {"key": "threefry2x32"},
        {"key": ["x"]},
        {"shape": [10**9]},
        {"path": 3},
        {"path": [3]},
        {"path": ["b"]},
    ],
)
def test_what_a_file_says_of_a_leaf_has_to_fit_it(note: dict[str, Any]) -> None:
    notes = {"a": note, "b": {}}
    about = {"version": 1, "leaves": notes, "metadata": {}}
    path = archive([("a.npy", ONE), ("b.npy", ONE), told(about)])

    with pytest.raises(cc.CorruptCheckpoint, match=r"'[ab]' is damaged"):
        npz.read(path)


@pytest.mark.parametrize(("impl", "lengths"), [("rbg", 2), ("threefry2x32", 4), (5, 2)])
def test_data_of_other_keys_are_refused(impl: Any, lengths: int) -> None:
    about = {"version": 1, "leaves": {"a": {"key": impl}}, "metadata": {}}
    path = archive([("a.npy", npy(np.ones(lengths, np.uint32))), told(about)])

    with pytest.raises(cc.CorruptCheckpoint, match=r"is said to be .'key': "):
        npz.read(path)


def test_a_size_that_lies_allocates_nothing() -> None:
    head = ONE.replace(b"(2,), }" + b" " * 11, b"(250000000000,), }")
    assert len(head) == len(ONE)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = archive([("a.npy", head)], compression=compression)
        content = path.read_bytes()
        at = content.index(b"PK\1\2")
        size = (len(head) - 8 + 4 * 250_000_000_000) & 0xFFFFFFFE
        path.write_bytes(content[: at + 24] + size.to_bytes(4, "little") + content[at + 28 :])
        with pytest.raises(cc.CorruptCheckpoint, match=r"cannot be|bytes, but it has"):
            npz.read(path)


def test_a_damaged_file_is_told_or_right() -> None:
    path = write(Path("a.npz"), state(), step=1)
    whole, expected = path.read_bytes(), in_memory(state())
    assert values(path) == expected
    rng, told = random.Random(0), 0
    for case in range(500):
        content = bytearray(whole)
        at = rng.randrange(len(content))
        match case % 4:
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + 4] = rng.randbytes(4)
            case 2:
                del content[at : at + rng.randrange(1, 40)]
            case 3:
                del content[at:]
        path.write_bytes(content)
        try:
            found = values(path)
        except cc.CorruptCheckpoint:
            told += 1
        else:
            assert found == expected, f"case {case} at {at}"
    assert told > 350


def test_names_that_a_file_can_not_have_are_told_before_anything_is_written() -> None:
    wrong = {"../x": 1, "a": {"../../b": 1}, "ok": 1, "nul\0": 1, "\ud800": 1}

    with pytest.raises(cc.StateMismatch) as error:
        write(Path("a.npz"), wrong)

    assert len(str(error.value).splitlines()) == 5
    with pytest.raises(cc.StateMismatch, match=r"would both be '__ckpt_callbacks__.json'"):
        write(Path("a.npz"), {"__ckpt_callbacks__": {"json": 1}})
    with pytest.raises(cc.ConfigError, match="takes no options: compress"):
        npz.write(Path("a.npz"), of_state({"a": 1}), {}, compress=True)
    assert not list(Path().glob("*.npz*"))


def test_what_fails_leaves_the_old_file_and_nothing_else() -> None:
    from ckpt_callbacks.tensors import Tensor

    def fail() -> None:
        raise OSError("the disk is gone")

    path = write(Path("a.npz"), {"a": 1})
    before = path.read_bytes()
    tensors = of_state({"a": 2}) | {("b",): Tensor(Leaf("int"), fail)}
    with pytest.raises(OSError, match="the disk is gone"):
        npz.write(path, tensors, {})

    assert path.read_bytes() == before
    assert [p.name for p in Path().iterdir() if "npz" in p.name] == ["a.npz"]


def test_what_is_taken_for_a_file_of_numpy() -> None:
    write(Path("a.npz"), {"a": 1})
    Path("damaged.npz").write_bytes(b"")
    Path("other.bin").write_bytes(Path("a.npz").read_bytes())

    found = [format_of(Path(name)) for name in ("a.npz", "damaged.npz", "other.bin")]
    assert found == ["npz", "npz", None]
    with pytest.raises(cc.CorruptCheckpoint, match=r"damaged\.npz is damaged"):
        npz.read(Path("damaged.npz"))
