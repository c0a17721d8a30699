"""Restoring: a part, another dtype, another place, without a state, and into a new run."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpt_callbacks as cc
from ckpt_callbacks.payload import WEIGHTS
from ckpt_callbacks.reading import read_alone
from loops import callbacks_in
from saved import save, tree_digest


def new_state(value: int = 1) -> dict[str, Any]:
    def full(*shape: int) -> jax.Array:
        return jnp.full(shape, value, jnp.float32)

    layers = [{"kernel": full(2, 2) + i, "bias": full(2)} for i in range(3)]
    model = {"layers": layers, "head": {"kernel": full(2, 1)}}
    return {
        "model": model,
        "opt_state": {"mu": full(3)},
        "step": value,
        "key": jax.random.key(value),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "run", new_state(1))


def restored_paths(root: Path, only: Any) -> set[str]:
    """Return which leaves of a state of zeros have the values of the checkpoint."""
    before = tree_digest(new_state(0))
    after = tree_digest(cc.restore(root, like=new_state(0), only=only))
    saved = tree_digest(new_state(1))
    changed = {path for path in saved if after[path] == saved[path]}
    assert {path for path in saved if after[path] == before[path]} == before.keys() - changed
    return changed


MODEL = {f"['model']['layers'][{i}]['{name}']" for i in range(3) for name in ("kernel", "bias")}
HEAD = "['model']['head']['kernel']"


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("model", MODEL | {HEAD}),
        ("params", MODEL | {HEAD}),
        ("params/layers", MODEL),
        ("model/layers/1", {p for p in MODEL if "[1]" in p}),
        ("model/layers/*/bias", {p for p in MODEL if "bias" in p}),
        ("**/kernel", {p for p in MODEL | {HEAD} if "kernel" in p}),
        (["model", "!**/bias", "!model/head"], {p for p in MODEL if "kernel" in p}),
        (["!params", "!opt_state"], {"['step']", "['key']"}),
        (["s*", "model/head"], {"['step']", HEAD}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_only_what_was_chosen_is_read(root: Path, only: Any, expected: set[str]) -> None:
    assert restored_paths(root, only) == expected


@pytest.mark.parametrize(
    ("only", "error", "message"),
    [
        ("decoder", cc.CheckpointNotFound, "there is key, model, opt_state, step"),
        ("model/layers/7", cc.CheckpointNotFound, "below model/layers there is 0, 1, 2"),
        (["model", "modle"], cc.CheckpointNotFound, "'modle' matches nothing"),
        (["step", "!step"], cc.CheckpointNotFound, "leaves nothing"),
        ([], cc.ConfigError, "only must be a path"),
    ],
    ids=str,
)
@pytest.mark.parametrize("like", [True, False])
def test_what_chooses_nothing_is_an_error(
    root: Path, only: Any, error: type[Exception], message: str, like: bool
) -> None:
    with pytest.raises(error, match=message):
        cc.restore(root, like=new_state(0) if like else None, only=only)


def test_what_only_one_side_has_is_told(root: Path) -> None:
    more = new_state(0) | {"ema": {"w": jnp.ones(1)}}
    with pytest.raises(cc.StateMismatch, match="ema/w: not in the checkpoint"):
        cc.restore(root, like=more, only=["model", "ema"])
    with pytest.raises(cc.StateMismatch, match="opt_state/mu: not in the state"):
        cc.restore(root, like={"model": new_state()["model"]}, only=["model", "opt_state"])


def test_items_that_are_not_wanted_need_not_be_there(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(copy / "0" / "opt_state")

    assert restored_paths(copy, "model") == MODEL | {HEAD}


def test_the_dtype_is_that_of_the_checkpoint_or_of_the_state_or_both(tmp_path: Path) -> None:
    saved = {"w": jnp.full(3, 1.1), "h": np.full(2, 0.1), "s": np.float32(0.1), "n": 7, "x": 0.5}
    like = {
        "w": jnp.zeros(3, jnp.bfloat16),
        "h": np.zeros(2, np.float16),
        "s": np.float64(0),
        "n": 0.0,
        "x": jnp.float32(0),
    }
    root = save(tmp_path / "run", saved)
    types = {
        "saved": (jnp.float32, np.float64, np.float32, int, float),
        "cast": (jnp.bfloat16, np.float16, np.float64, float, jnp.float32),
    }

    for dtype, expected in types.items():
        got = cc.restore(root, like=like, dtype=dtype)  # type: ignore[call-overload]  # a literal
        found = tuple(getattr(got[name], "dtype", type(got[name])) for name in like)
        assert found == expected, dtype
        for name, value in saved.items():
            kind = np.asarray(like[name] if dtype == "cast" else value).dtype
            assert np.array_equal(np.asarray(got[name]), np.asarray(value).astype(kind)), name
    with pytest.raises(cc.StateMismatch) as error:
        cc.restore(root, like=like, dtype="error")
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        *("h", "n", "s", "w", "x")
    ]
    same = cc.restore(root, like=saved, dtype="error")
    assert tree_digest(same) == tree_digest(saved)
    with pytest.raises(cc.ConfigError, match="dtype must be one of"):
        cc.restore(root, like=saved, dtype="float32")  # type: ignore[call-overload]


def test_arrays_may_stay_in_the_memory_of_the_host(root: Path) -> None:
    def put(x: Any, *args: Any, **options: Any) -> Any:
        assert x.dtype == jnp.uint32, "more than keys, which Orbax always makes, is on a device"
        return device_put(x, *args, **options)

    device_put = jax.device_put
    for like in (None, new_state(0), jax.eval_shape(lambda: new_state(0))):
        with mock.patch("jax.device_put", put):
            got = cc.restore(root, like=like, as_numpy=True)
        leaves = jax.tree.leaves(got)
        assert sum(isinstance(x, np.ndarray) for x in leaves) == 9
        assert got["step"] == 1
        assert not any(isinstance(x, jax.Array) for x in leaves)
        assert np.array_equal(got["key"], jax.random.key_data(new_state()["key"]))
        assert np.array_equal(got["model"]["head"]["kernel"], np.ones((2, 1), np.float32))


def test_without_a_state_it_is_nested_dicts(root: Path) -> None:
    got = cc.restore(root)

    layers = {str(i): layer for i, layer in enumerate(new_state()["model"]["layers"])}
    expected = new_state()
    expected["model"] = expected["model"] | {"layers": layers}
    assert tree_digest(got) == tree_digest(expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.linear, self.dropout = nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


def nnx_state(seed: int) -> dict[str, Any]:
    net = Net(seed)
    return {"model": net, "optimizer": nnx.Optimizer(net, optax.adam(0.1), wrt=nnx.Param)}


def eqx_state(seed: int) -> dict[str, Any]:
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(seed))
    return {"model": mlp, "opt_state": optax.adam(0.1).init(eqx.filter(mlp, eqx.is_array))}


def linen_state(seed: int) -> dict[str, Any]:
    params = {"w": jax.random.normal(jax.random.key(seed), (3, 2))}
    return {
        "params": params,
        "opt_state": optax.adam(0.1).init(params),
        "key": jax.random.key(seed),
    }


def nnx_arrays(state: dict[str, Any]) -> Any:
    return {name: nnx.state(node) for name, node in state.items()}


ABSTRACT = {
    "nnx": (nnx_state, nnx.eval_shape, nnx_arrays),
    "equinox": (eqx_state, eqx.filter_eval_shape, lambda state: state),
    "jax": (linen_state, jax.eval_shape, lambda state: state),
}


@pytest.mark.parametrize("kind", ABSTRACT)
def test_an_abstract_state_is_given_values(tmp_path: Path, kind: str) -> None:
    make, abstract, arrays = ABSTRACT[kind]
    root = save(tmp_path / "run", make(1))

    got = cc.restore(root, like=abstract(lambda: make(0)))

    assert tree_digest(arrays(got)) == tree_digest(arrays(make(1)))


@pytest.mark.parametrize("kind", ABSTRACT)
def test_a_run_of_an_abstract_state_begins_with_init_and_goes_on_without(
    tmp_path: Path, kind: str
) -> None:
    make, abstract, arrays = ABSTRACT[kind]
    callbacks, made = callbacks_in(tmp_path / "run"), []

    def init() -> Any:
        made.append(1)
        return make(1)

    with (
        pytest.raises(cc.ConfigError, match=r"the state is abstract, and .*: give init="),
        callbacks.run(abstract(lambda: make(0))),
    ):
        pass
    with callbacks.run(abstract(lambda: make(0)), init=init) as run:
        state = run.state
        assert tree_digest(arrays(state)) == tree_digest(arrays(make(1)))
        run.on_step(0, state)
    assert made == [1]
    for given in ({}, {"init": init}):
        with callbacks.run(abstract(lambda: make(0)), **given) as run:
            assert run.next_step == 1
            assert tree_digest(arrays(run.state)) == tree_digest(arrays(make(1)))
    assert made == [1]


def test_a_part_of_an_abstract_state_leaves_the_rest_abstract(root: Path) -> None:
    got = cc.restore(root, like=jax.eval_shape(lambda: new_state(0)), only="params")

    assert tree_digest(got["model"]) == tree_digest(new_state()["model"])
    assert isinstance(got["opt_state"]["mu"], jax.ShapeDtypeStruct)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_holds_no_state_that_the_loop_let_go(tmp_path: Path, resumed: bool) -> None:
    callbacks = callbacks_in(tmp_path / "run")
    if resumed:
        with callbacks.run(new_state()) as run:
            run.on_step(0, run.state)
    given = new_state(0)
    refs = [weakref.ref(given["opt_state"]["mu"])]

    with callbacks.run(given) as run:
        del given
        state = run.state
        refs += [weakref.ref(state["opt_state"]["mu"])]
        gc.collect()
        assert (refs[0]() is None) == resumed, "the state given is held besides the restored one"
        state = jax.tree.map(lambda x: x, new_state(2))
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
        with pytest.raises(cc.UsageError, match=r"run.state is read once"):
            run.state  # noqa: B018  # a property that restores
        run.on_step(1, state)
        refs = [weakref.ref(state["opt_state"]["mu"])]
        state = new_state(3)
        run.on_step(2, state)
        run.wait()
        gc.collect()
        assert refs[0]() is None, "what was saved is held"


def pretrained(tmp_path: Path) -> Path:
    root = tmp_path / "pretrained"
    with callbacks_in(root, keep=cc.LatestN(5)).run(new_state()) as run:
        for step in range(3):
            run.on_eval(step, {"score": -abs(step - 1)})
            run.on_step(step, new_state(step + 1))
    return root


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    source, expected = pretrained(tmp_path), new_state(0)
    expected["model"] = new_state(3)["model"]
    callbacks = callbacks_in(tmp_path / "run")

    with callbacks.run(new_state(0), start_from=source) as run:
        assert run.next_step == 0
        state = run.state
        assert tree_digest(state) == tree_digest(expected)  # a fresh optimizer, and step
        run.on_step(0, new_state(9))

    shutil.rmtree(source)  # a restart does not look at it
    with callbacks.run(new_state(0), start_from=source) as run:
        assert run.next_step == 1
        assert tree_digest(run.state) == tree_digest(new_state(9))


def test_what_a_run_begins_with_can_be_chosen(tmp_path: Path) -> None:
    source = pretrained(tmp_path)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), new_state(2)["model"])
    cases: list[tuple[Any, dict[str, Any]]] = [
        (cc.Weights(source, 0), {"model": new_state(1)["model"]}),
        (cc.Weights(source / "1"), {"model": new_state(2)["model"]}),
        (cc.Weights(source, only=None), new_state(3)),
        (cc.Weights(str(source), only=["opt_state", "step"]), {
            "opt_state": new_state(3)["opt_state"], "step": 3,
        }),
        (cc.Weights(source, 1, dtype="cast"), {"model": half}),
    ]  # fmt: skip
    for number, (weights, taken) in enumerate(cases):
        state = new_state(0)
        if weights.dtype == "cast":
            state["model"] = jax.tree.map(jnp.zeros_like, half)
        with callbacks_in(tmp_path / f"run{number}").run(state, start_from=weights) as run:
            assert tree_digest(run.state) == tree_digest(state | taken)
            assert run.next_step == 0


def test_an_abstract_state_begins_with_weights_in_what_init_makes(tmp_path: Path) -> None:
    source = pretrained(tmp_path)
    abstract = jax.eval_shape(lambda: new_state(0))
    run = callbacks_in(tmp_path / "run").run(abstract, start_from=source, init=lambda: new_state(5))
    with run:
        expected = new_state(5) | {"model": new_state(3)["model"]}
        assert tree_digest(run.state) == tree_digest(expected)


def test_a_run_that_saves_nothing_begins_with_them_too(tmp_path: Path) -> None:
    abstract = jax.eval_shape(lambda: new_state(0))
    with cc.Callbacks().run(
        abstract, start_from=pretrained(tmp_path), init=lambda: new_state(5)
    ) as run:
        with pytest.raises(cc.UsageError, match=r"is to begin anew, but run.state was never read"):
            run.on_step(0, new_state(5))
        expected = new_state(5) | {"model": new_state(3)["model"]}
        assert tree_digest(run.state) == tree_digest(expected)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("missing", cc.ConfigError, "missing is neither a run directory nor a checkpoint"),
        (cc.Weights("pretrained", 7), cc.CheckpointNotFound, "has no step 7; it has 0, 1, 2"),
        (cc.Weights("pretrained", only="decoder"), cc.CheckpointNotFound, "'decoder' matches noth"),
        (cc.Weights("pretrained", dtype="error"), cc.StateMismatch, "bfloat16.* in the state"),
    ],
    ids=["missing", "step", "only", "dtype"],
)
def test_a_run_does_not_begin_without_the_weights_it_was_to_have(
    tmp_path: Path, weights: Any, error: type[Exception], message: str
) -> None:
    pretrained(tmp_path)
    state = new_state(0)
    state["model"]["head"]["kernel"] = jnp.zeros((2, 1), jnp.bfloat16)
    with callbacks_in(tmp_path / "run").run(state, start_from=weights) as run:
        with pytest.raises(error, match=message):
            run.state  # noqa: B018  # a property that restores
        with pytest.raises(cc.UsageError, match="is to begin anew"):
            run.on_step(0, state)
    assert not cc.checkpoints(tmp_path / "run")


@pytest.mark.parametrize("make", [Net, lambda seed: {"a": {"w": jnp.full(2, seed)}, "n": seed}])
def test_a_checkpoint_without_an_item_of_weights_is_read_alone_in_whole(
    tmp_path: Path, make: Any
) -> None:
    def arrays(state: Any) -> Any:
        return tree_digest(nnx.state(state) if isinstance(state, Net) else state)

    root = save(tmp_path / "run", make(1))
    path, files = root / "0", {}

    assert arrays(read_alone(path, make(0), files, WEIGHTS)) == arrays(make(1))
    found = read_alone(path, None, files, WEIGHTS)
    assert len(tree_digest(found)) == len(arrays(make(1)))


def shared_state() -> dict[str, Any]:
    """Return the state that `tests/sharded.py` has too."""
    w = jnp.arange(128, dtype=jnp.float32).reshape(16, 8)
    params = {"w": w, "b": w[0].astype(jnp.bfloat16), "u": (w[:8] % 16).astype(jnp.uint4)}
    return {
        "params": params,
        "keys": jax.random.split(jax.random.key(1), 8),
        "step": jnp.asarray(1),
    }


def test_eight_devices_and_one(tmp_path: Path) -> None:
    save(tmp_path / "one", shared_state())
    script = Path(__file__).with_name("sharded.py")

    done = subprocess.run(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True, check=True
    )

    results = json.loads(done.stdout)
    assert len(results) >= 7
    assert {name: text for name, text in results.items() if text != "ok"} == {}
    zeros = jax.tree.map(lambda x: x[::-1] if x.shape else x + 1, shared_state())
    for like in (zeros, jax.eval_shape(shared_state), None):
        got = cc.restore(tmp_path / "eight", like=like)
        assert tree_digest(got) == tree_digest(shared_state())
