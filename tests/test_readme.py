"""The code in the README and in the documentation does what it says there.

`tests/docs` runs all of the documentation; here what comes of it is looked at.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx

import ckpt_callbacks as cc
from ckpt_callbacks import adapters
from ckpt_callbacks.cli import main
from ckpt_callbacks.formats import npz
from ckpt_callbacks.testing import MemoryStore
from embedded import tracker, uri
from saved import tree_digest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def found(language: str, holding: str) -> str:
    """Return the one block of a language that holds a text."""
    pages = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(rf"^```{language}\n(.*?)^```", pages, re.DOTALL | re.MULTILINE)
    (one,) = [block for block in blocks if holding in block]
    return str(one)


def block(holding: str) -> str:
    """Return the one block of Python that holds a text."""
    return found("python", holding)


def shell(holding: str) -> list[str]:
    """Return the lines of the one block of commands that holds a text."""
    return found("sh", holding).splitlines()


def test_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(tmp_path))

    def train_step(state: Any, batch: int) -> Any:
        w = state["params"]["w"] + batch
        return {"params": {"w": w}}, {"loss": w.sum()}

    made: dict[str, Any] = {
        "state": {"params": {"w": jnp.zeros(2)}},
        "batch_of": lambda step: 1,
        "train_step": train_step,
        "evaluate": lambda state: {"val_accuracy": -abs(float(state["params"]["w"][0]) - 500)},
    }
    exec(block("# before on_step; it may also come later"), made)

    there = cc.checkpoints("runs/digits")
    assert {c.step: c.aliases for c in there} == {450: [], 500: ["best"], 950: [], 1000: ["last"]}
    assert {tuple(c.where) for c in there} == {("local", "MLflow", "W&B (staged)")}
    assert made["best"]["params"]["w"].tolist() == [501.0, 501.0]
    assert made["weights"]["params"]["w"].tolist() == [501.0, 501.0]


def save(root: str, state: Any) -> None:
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            root, save=cc.EveryNSteps(1), keep=cc.LatestN(1) | cc.BestN(1, "score", mode="max")
        )
    )
    with callbacks.run(state) as run:
        run.on_eval(0, {"score": 1.0})
        run.on_step(0, run.state)


class Buffer:
    """Of a library that JAX does not know."""

    def __init__(self, fill: float) -> None:
        self.samples, self.position = jnp.full(4, fill), int(fill)


@pytest.fixture
def _reservoir(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("reservoir")
    monkeypatch.setattr(library, "Buffer", Buffer, raising=False)
    monkeypatch.setitem(sys.modules, "reservoir", library)
    monkeypatch.setattr(adapters, "_registered", [])


def comes_back() -> None:
    save("run", {"buffer": Buffer(3)})
    state = {"buffer": Buffer(0)}

    cc.restore("run", like=state)

    assert state["buffer"].position == 3
    assert state["buffer"].samples.tolist() == [3.0] * 4
    assert list(cc.inspect("run").leaves) == ["buffer/position", "buffer/samples"]


@pytest.mark.usefixtures("_reservoir")
def test_an_adapter_of_your_own() -> None:
    with pytest.raises(cc.StateMismatch, match="register a StateAdapter"):
        save("refused", {"buffer": Buffer(3)})

    exec(block("class BufferAdapter"), {"cc": cc})

    comes_back()


@pytest.mark.usefixtures("_reservoir")
def test_a_package_that_brings_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("class BufferAdapter").replace("cc.register_adapter(BufferAdapter())", "")
    (tmp_path / "my_package.py").write_text(code)
    group, point = adapters.GROUP, 'reservoir = "my_package:BufferAdapter"'
    states = " ".join((ROOT / "docs" / "how-to" / "states.md").read_text().split())
    assert f"the entry point `{point}` in the group `{group}`" in states
    about = tmp_path / "my_package-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: my-package\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{point}\n".replace('"', ""))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(adapters, "_by_module", None)

    comes_back()

    sys.modules.pop("my_package")


def test_reading_back(capsys: pytest.CaptureFixture[str]) -> None:
    def state(value: float, dtype: Any = jnp.float32) -> dict[str, Any]:
        layer = {"kernel": jnp.full((2, 2), value, dtype), "bias": jnp.full(2, value, dtype)}
        return {"model": {"body": layer, "head": dict(layer)}, "step": 7}

    save("runs/digits", state(1.0))
    seen = SimpleNamespace(calls=[])

    def restore(*arguments: Any, **options: Any) -> Any:
        if "like" in options:
            options["like"] = state(0.0, jnp.bfloat16 if "dtype" in options else jnp.float32)
        seen.calls.append(cc.restore(*arguments, **options))
        return seen.calls[-1]

    library = SimpleNamespace(restore=restore, inspect=cc.inspect)
    exec(block("as_numpy=True"), {"cc": library, "state": None})

    best, some, cast, arrays = seen.calls
    assert jax.tree.all(jax.tree.map(np.array_equal, best, state(1.0)))
    body, head = some["model"]["body"], some["model"]["head"]
    assert (float(body["kernel"].sum()), float(head["kernel"].sum())) == (4.0, 0.0)
    assert not body["bias"].any()
    assert cast["model"]["body"]["bias"].dtype == jnp.bfloat16
    assert float(cast["model"]["body"]["bias"][0]) == 1.0
    assert isinstance(arrays["model"]["head"]["kernel"], np.ndarray)
    assert "├─ model" in capsys.readouterr().out


def test_where_the_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    class Bell:
        @cc.hookimpl
        def on_saved(self, event: cc.Saved) -> None:
            """Ring."""

    def train(run: cc.Run[Any]) -> None:
        run.on_step(0, run.state)

    about = {
        "checkpoint": cc.OrbaxCheckpoint("run", save=cc.EveryNSteps(1), keep=cc.LatestN(1)),
        "tracker": MemoryStore(),
        "state": {"w": jnp.ones(3)},
    }
    exec(block("profile=True"), {"cc": cc, "Bell": Bell, "train": train, **about})

    told = capsys.readouterr().out
    assert re.match(r"callbacks took [0-9.]+ % of [0-9.]+ m?s; the largest: ", told)
    for name in ("run.on_step", "Orbax's call", "memory: put"):
        assert f"│ {name} " in told


class Layers(nnx.Module):
    def __init__(self, value: float) -> None:
        self.kernel = nnx.Param(value + jnp.arange(12.0).reshape(3, 2, 2))
        self.bias = nnx.Param(jnp.full((3, 2), value))


class Model(nnx.Module):
    """Layers that are stacked for `jax.lax.scan`."""

    def __init__(self, value: float = 0.0) -> None:
        self.layers = Layers(value)


@pytest.fixture
def _digits(tmp_path: Path) -> Iterator[None]:
    """Have a run in `runs/digits` and in MLflow, of which the first of two steps is the best."""
    mlflow.set_tracking_uri(uri(tmp_path))
    save_at = cc.OrbaxCheckpoint(
        "runs/digits", save=cc.EveryNSteps(1), keep=cc.LatestN(1) | cc.BestN(1, "score", mode="max")
    )
    callbacks = cc.Callbacks(save_at, tracker(tmp_path), drain_limit=60)
    with callbacks.run({"model": Model(), "step": 0}) as run:
        for step in (0, 1):
            run.on_eval(step, {"score": 1.0 - step})
            run.on_step(step, {"model": Model(step + 1.0), "step": step})
    yield
    mlflow.set_tracking_uri(None)


@pytest.mark.usefixtures("_digits")
def test_checkpoints_that_travel() -> None:
    made: dict[str, Any] = {"cc": cc, "nnx": nnx, "make_model": Model}

    exec(block('"mlflow:/digits@best", "digits.npz"'), made)

    expected = tree_digest(nnx.state(Model(1.0)))
    assert tree_digest(nnx.state(made["model"])) == expected
    with np.load("digits.npz") as arrays:
        assert arrays["model.layers.kernel"].tolist() == Model(1.0).layers.kernel.tolist()
        assert arrays["step"] == 0
    Path("digits.safetensors").unlink()
    Path("digits.npz").unlink()

    for line in shell("--only params --unstack layers"):
        command, *arguments = shlex.split(line)
        done = CliRunner().invoke(main, arguments)
        assert (command, done.exit_code) == ("ckpt-callbacks", 0), done.output

    layers = {f"model.layers_{i}.{name}" for i in range(3) for name in ("kernel", "bias")}
    with np.load("digits.npz") as arrays:
        assert set(arrays) - {npz.NOTES} == layers
    model = cc.load_params("digits.npz", like=nnx.eval_shape(Model))
    assert tree_digest(nnx.state(model)) == expected


def test_other_names_and_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {str(n): np.full((4, 3), n, np.float32) for n in range(2)}
    layers = {n: {"mlp": {"up_proj": {"weight": w}}} for n, w in weights.items()}
    cc.export({"model": {"layers": layers}}, "model.safetensors")
    made: dict[str, Any] = {"cc": cc}
    exec(block("cc.KeyMap("), made)

    assert made["params"]["layers"]["up"].shape == (2, 3, 4)
    back = cc.load_params("again.safetensors")["layers"]
    assert all((back[n]["mlp"]["up_proj"]["weight"] == w).all() for n, w in weights.items())
