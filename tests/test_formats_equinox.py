"""Files of Equinox: written for it and read from it, bit for bit."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks import extras
from ckpt_callbacks.formats import equinox
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.tensors import Tensor, of_state
from foreign import leaves
from saved import save
from tensor_cases import EMPTY, NUMBERS, arrays, breaking, leaves_nothing, unless_damaged


class Net(eqx.Module):
    mlp: eqx.nn.MLP
    rate: float
    count: int
    name: str
    table: np.ndarray

    def __init__(self, seed: int, width: int = 4) -> None:
        self.mlp = eqx.nn.MLP(3, 2, width, 11, key=jax.random.key(seed))
        self.rate, self.count, self.name = seed / 7, seed, "net"
        self.table = np.arange(3) / (seed + 3)


def state(seed: int) -> tuple[Net, Any]:
    net = Net(seed)
    return net, optax.adam(0.1).init(eqx.filter(net, eqx.is_inexact_array))


def whole() -> dict[str, Any]:
    scalars = {"f": np.float64(0.1), "half": jnp.bfloat16(0.1), "i": np.int16(-3)}
    return {**arrays(), **EMPTY, "numbers": NUMBERS, "scalars": scalars}


def zeros(array: Any) -> Any:
    return (jnp if isinstance(array, jax.Array) else np).zeros_like(array)


def blank(tree: Any) -> Any:
    """Return a tree of the same form with other values."""
    return jax.tree.map(lambda x: type(x)(0) if np.isscalar(x) else zeros(x), tree)


def test_a_file_is_the_one_that_equinox_writes(tmp_path: Path) -> None:
    theirs = io.BytesIO()
    eqx.tree_serialise_leaves(theirs, (whole(), state(3)))
    equinox.write_module(tmp_path / "ours", (whole(), state(3)))

    assert (tmp_path / "ours").read_bytes() == theirs.getvalue()
    with (tmp_path / "ours").open("rb") as file:
        read = eqx.tree_deserialise_leaves(file, (blank(whole()), state(1)))
    assert leaves(read) == leaves((whole(), state(3)))


def test_a_file_of_equinox_is_read(tmp_path: Path) -> None:
    eqx.tree_serialise_leaves(tmp_path / "theirs.eqx", (whole(), state(3)))

    read = equinox.read_into(tmp_path / "theirs.eqx", (blank(whole()), state(1)))

    assert leaves(read) == leaves((whole(), state(3)))
    assert read[1][0].mlp(jnp.ones(3)).shape == (2,)
    abstract = eqx.filter_eval_shape(Net, 1)
    eqx.tree_serialise_leaves(tmp_path / "net.eqx", Net(3))
    assert leaves(equinox.read_into(tmp_path / "net.eqx", abstract)) == leaves(Net(3))


@pytest.mark.parametrize("given", [{"width": 5, "é": [1.5, None]}, {}, [], 0, None])
def test_hyper_parameters_are_the_first_line(given: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.eqx"
    equinox.write_module(path, Net(3), given)

    assert equinox.hyper_parameters(path) == given
    assert leaves(equinox.read_into(path, Net(1))) == leaves(Net(3))
    with path.open("rb") as file:  # as Equinox's guide has it
        if given is not None:
            assert json.loads(file.readline().decode()) == given
        assert leaves(eqx.tree_deserialise_leaves(file, Net(1))) == leaves(Net(3))


def test_the_pattern_of_equinox_s_guide_is_read(tmp_path: Path) -> None:
    with (tmp_path / "net.eqx").open("wb") as file:
        file.write((json.dumps({"seed": 1, "width": 6}) + "\n").encode())
        eqx.tree_serialise_leaves(file, Net(3, 6))

    like = eqx.filter_eval_shape(Net, **equinox.hyper_parameters(tmp_path / "net.eqx"))
    assert leaves(equinox.read_into(tmp_path / "net.eqx", like)) == leaves(Net(3, 6))


def test_leaves_are_written_in_the_order_of_a_module(tmp_path: Path) -> None:
    tensors = of_state(state(3))
    by_name = {path: tensors[path] for path in sorted(tensors)}
    assert list(by_name) != list(tensors)  # layer 10 before layer 2, as by Orbax

    equinox.write(path := tmp_path / "net.eqx", by_name, {"step": 3}, like=state(1))

    assert leaves(equinox.read_into(path, state(2))) == leaves(state(3))
    equinox.write(path, by_name, {}, like=state(1), hyper_parameters={"width": 4})
    assert equinox.hyper_parameters(path) == {"width": 4}
    del by_name[("0", "table")]
    with pytest.raises(cc.StateMismatch, match=r"different leaves: 0/table$"):
        equinox.write(tmp_path / "net.eqx", by_name, {}, like=state(1))


def test_what_is_exported_is_read_by_equinox_as_it_is(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {"model": Net(3)})
    model = {"model": Net(1)}

    plain = cc.export(run, tmp_path / "plain.eqx", like=model)
    read = eqx.tree_deserialise_leaves(plain, {"model": Net(2)})
    assert leaves(read) == leaves({"model": Net(3)})

    given = {"seed": 2}
    guided = cc.export(run, tmp_path / "guided.eqx", like=model, hyper_parameters=given)
    with guided.open("rb") as file:  # as Equinox's guide has it
        like = {"model": Net(**json.loads(file.readline().decode()))}
        assert leaves(eqx.tree_deserialise_leaves(file, like)) == leaves({"model": Net(3)})
    with pytest.raises(cc.ConfigError, match="the hyper-parameters are no JSON"):
        cc.export(run, tmp_path / "a.eqx", like=model, hyper_parameters={1: jnp.ones(2)})


def test_one_leaf_is_in_memory_at_a_time(tmp_path: Path) -> None:
    held, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal held
            held -= 1

    def read() -> Any:
        nonlocal held, most
        held += 1
        most = max(most, held)
        return np.ones(4).view(Counted)

    tensors = {(name,): Tensor(Leaf("array", (4,), "float64"), read) for name in "abcdef"}
    like = {name: jax.ShapeDtypeStruct((4,), np.float64) for name in "abcdef"}
    equinox.write(tmp_path / "a.eqx", tensors, {}, like=like)

    assert most <= 2
    assert (tmp_path / "a.eqx").stat().st_size > 6 * 32


def test_modules_of_nnx_are_written_as_equinox_takes_them_apart(tmp_path: Path) -> None:
    def layer(seed: int) -> nnx.Linear:
        return nnx.Linear(2, 3, rngs=nnx.Rngs(seed))

    path = cc.export(layer(3), tmp_path / "a.eqx", like=layer(1))

    like = layer(2)
    read = eqx.tree_deserialise_leaves(path, like)
    assert leaves(read) == leaves(layer(3))


def test_a_file_has_no_names(tmp_path: Path) -> None:
    equinox.write_module(tmp_path / "net.eqx", Net(3))

    assert equinox.matches(tmp_path / "net.eqx")
    with pytest.raises(cc.ConfigError, match=r"net\.eqx .* has no names.*: give like="):
        equinox.read(tmp_path / "net.eqx")
    with pytest.raises(cc.ConfigError, match=r"in the order .*: give like="):
        equinox.write(tmp_path / "net.eqx", of_state(Net(3)), {})
    with pytest.raises(cc.ConfigError, match="has no option shards"):
        equinox.write(tmp_path / "net.eqx", of_state(Net(3)), {}, like=Net(3), shards=2)


@pytest.mark.parametrize("name", ["net", "net.v1", "a.b/net"])
def test_the_path_is_exactly_what_is_given(name: str, tmp_path: Path) -> None:
    """Equinox itself puts its suffix to a name without one."""
    equinox.write_module(tmp_path / name, Net(3))

    assert [p for p in tmp_path.rglob("net*") if p.is_file()] == [tmp_path / name]
    assert leaves(equinox.read_into(tmp_path / name, Net(1))) == leaves(Net(3))


def only_arrays_out(file: Any, leaf: Any) -> None:
    if eqx.is_array(leaf):
        eqx.default_serialise_filter_spec(file, leaf)


def only_arrays_in(file: Any, leaf: Any) -> Any:
    return eqx.default_deserialise_filter_spec(file, leaf) if eqx.is_array(leaf) else leaf


def test_a_filter_says_what_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net"
    equinox.write_module(path, Net(3), {"a": 1}, filter_spec=only_arrays_out)

    read = equinox.read_into(path, Net(1), filter_spec=only_arrays_in)
    assert leaves(read.mlp) == leaves(Net(3).mlp)
    assert read.rate == Net(1).rate
    with pytest.raises(cc.StateMismatch, match="net has 25 leaves, and the module 27"):
        equinox.read_into(path, Net(1))
    with pytest.raises(cc.StateMismatch, match="does not fit like with its filter_spec"):
        equinox.read_into(path, Net(1, 5), filter_spec=only_arrays_in)
    with pytest.raises(cc.StateMismatch, match="has more leaves than like"):
        equinox.read_into(path, Net(1).mlp, filter_spec=only_arrays_in)
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with pytest.raises(cc.MissingExtra, match=r"pip install 'ckpt-callbacks\[equinox\]'"):
        equinox.read_into(path, Net(1), filter_spec=only_arrays_in)


@pytest.mark.parametrize(
    ("saved", "like", "why"),
    [
        (jnp.ones(3), jnp.ones(4), r"a/w has the shape \(3,\) there, and \(4,\) in like"),
        (np.ones(3), jnp.ones(3), "a/w has the dtype float64 there, and float32 in like"),
        (jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float16), r"dtype \|V2 there, and float16"),
        (0.5, 1, "a/w has the dtype float64 there, and int in like"),
        (2, True, "a/w has the dtype int64 there, and bool in like"),
        (jnp.ones(2, jnp.uint32), jax.random.key(0), r"shape \(2,\) there, and \(\) in like"),
        (jnp.ones(2), "text", "has 1 leaves, and the module 0"),
    ],
)
def test_what_does_not_fit_is_named(saved: Any, like: Any, why: str, tmp_path: Path) -> None:
    equinox.write_module(tmp_path / "a.eqx", {"a": {"w": saved}})

    with pytest.raises(cc.StateMismatch, match=why):
        equinox.read_into(tmp_path / "a.eqx", {"a": {"w": like}})


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (jax.random.key(0), "the leaf at a/0 holds typed PRNG keys"),
        (jnp.ones(2, jnp.float8_e4m3fn), "a/0 is of dtype float8_e4m3fn"),
        (jnp.ones(2, jnp.float8_e5m2), "a/0 is of dtype float8_e5m2"),  # of kind `f`
        (jnp.ones(2, jnp.int4), "a/0 is of dtype int4"),
        (2**70, "a/0 is of dtype object"),  # NumPy would pickle it
        (np.array([{}]), "a/0 is of dtype object"),
        (np.array(["text"]), "a/0 is of dtype <U4"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "a/0 is abstract"),
    ],
)
def test_what_equinox_cannot_read_back_is_refused(leaf: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(cc.StateMismatch, match=why):
        equinox.write_module(tmp_path / "a.eqx", {"a": [leaf]})
    assert not (tmp_path / "a.eqx").exists()


def test_keys_are_not_written_as_their_data(tmp_path: Path) -> None:
    model = {"key": jax.random.key(0), "w": jnp.ones(2)}

    with pytest.raises(cc.StateMismatch, match="the leaf at key holds typed PRNG keys"):
        equinox.write(tmp_path / "a.eqx", of_state(model), {}, like=model)


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    model = {"w": jnp.ones(2)}
    tensors = breaking(of_state(model))

    def spec(file: Any, leaf: Any) -> None:
        file.write(b"some")
        raise OSError("the disk is gone")

    for name in ("new", "old"):
        with leaves_nothing(tmp_path):
            equinox.write(tmp_path / name, tensors, {}, like={**model, "zz": jnp.ones(2)})
        with leaves_nothing(tmp_path):
            try:
                equinox.write_module(tmp_path / name, model, filter_spec=spec)
            except RuntimeError as error:  # Equinox's, of the leaf, of the path
                raise error.__cause__.__cause__ from None
    with pytest.raises(cc.ConfigError, match="the hyper-parameters are no JSON"):
        equinox.write_module(tmp_path / "new", model, {"w": jnp.ones(2)})
    assert not (tmp_path / "new").exists()


# Damage

SMALL = {"a": jnp.ones((2, 0)), "b": jnp.arange(3, dtype=jnp.bfloat16), "n": 3, "w": np.ones(4)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "small.eqx"
    equinox.write_module(path, SMALL, {"width": 5})
    path.with_name("whole").write_bytes(path.read_bytes())
    return path


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_file_that_is_cut_is_damaged(small: Path, data: st.DataObject) -> None:
    content = small.with_name("whole").read_bytes()
    small.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])

    with pytest.raises((cc.CorruptCheckpoint, cc.StateMismatch), match=str(small)) as error:
        equinox.read_into(small, SMALL)
    # Between two arrays nothing tells that more should follow but the module.
    assert isinstance(error.value, cc.CorruptCheckpoint) or "leaves" in str(error.value)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_file_that_was_changed_is_damaged_or_what_equinox_reads(
    small: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(small.with_name("whole").read_bytes())
    for at, byte in changes:
        content[at % len(content)] = byte
    small.write_bytes(content)

    read = unless_damaged(lambda: equinox.read_into(small, SMALL), small, cc.StateMismatch)
    with small.open("rb") as file:
        if not content.startswith(b"\x93NUMPY"):
            file.readline()
        assert read is None or leaves(read) == leaves(eqx.tree_deserialise_leaves(file, SMALL))


def header_of(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def form(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickle.dumps(np.ones(2)), "begins with neither an array nor a line of JSON"),
        (b"{", "begins with neither an array nor a line of JSON: it does not end"),
        (b"[" * 10**5 + b"\n", "begins with neither an array nor a line of JSON"),
        (b"{}\n" + pickle.dumps(np.ones(2)), "has no array at byte 3"),
        (b"{}\nPK\x03\x04", "has no array at byte 3"),
        (header_of(form("'|O'", "(1,)")) + pickle.dumps(1), "holds a pickle at byte 0"),
        (header_of(form("[('a', '<f4')]", "(1,)")) + b"\0" * 4, "no array"),
        (header_of(form("'<M8[s]'", "(1,)")) + b"\0" * 8, "no array"),
        (header_of(form("'<f4'", "(-1,)")), "no array"),
        (header_of(form("'<f4'", "(9" + "9" * 40 + ",)")) + b"\0" * 8, "ends within the array"),
        (header_of(form("'<f4'", "(2,)")) + b"\0" * 7, "8 bytes should follow its header, and 7"),
        (header_of("__import__('os').getcwd()\n"), "has no array at byte 0"),
        (b"\x93NUMPY\x03\x00", "has no array at byte 0"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "a.eqx"
    path.write_bytes(content)

    with pytest.raises(cc.CorruptCheckpoint, match=f"{path} .*{why}"):
        equinox.read_into(path, {"w": jnp.ones(2)})


def test_the_byte_order_and_the_layout_of_others(tmp_path: Path) -> None:
    saved = {"big": np.arange(3, dtype=">f4"), "columns": np.asfortranarray(np.ones((2, 3)))}
    eqx.tree_serialise_leaves(tmp_path / "a.eqx", saved)
    like = {"big": jnp.ones(3), "columns": np.zeros((2, 3))}

    read = equinox.read_into(tmp_path / "a.eqx", like)

    assert read["big"].tolist() == [0, 1, 2]
    assert read["columns"].tolist() == saved["columns"].tolist()
