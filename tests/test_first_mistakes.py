"""What people get wrong first: told at once, by what they can do about it, and nothing is lost."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import ckpt_callbacks as cc
from ckpt_callbacks.state import apply, leaves_of


def callbacks_in(directory: Path) -> cc.Callbacks:
    return cc.Callbacks(cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(1), keep=cc.LatestN(2)))


def trained(directory: Path, state: Any) -> Path:
    with callbacks_in(directory).run(state) as run:
        run.on_step(0, state)
    return directory


def test_a_run_in_a_directory_of_orbax_leaves_it_as_it_was(tmp_path: Path) -> None:
    old = tmp_path / "old"
    ocp.save(old / "3", {"w": jnp.ones(2)})
    before = sorted(path.name for path in old.iterdir())

    with (
        pytest.raises(cc.ConfigError, match=r"steps 3\).* into which cc\.adopt can take them"),
        callbacks_in(old).run({"w": jnp.zeros(2)}),
    ):
        pass

    assert sorted(path.name for path in old.iterdir()) == before
    assert cc.restore(old, like={"w": jnp.zeros(2)})["w"].tolist() == [1.0, 1.0]
    assert cc.adopt(old, tmp_path / "new") == [3]


def test_a_dict_keeps_its_order(tmp_path: Path) -> None:
    root = trained(tmp_path / "run", {"params": jnp.ones(2), "opt": [{"z": 1, "a": 2}]})

    with callbacks_in(root).run({"params": jnp.zeros(2), "opt": [{"z": 0, "a": 0}]}) as run:
        state = run.state

    assert list(state) == ["params", "opt"]
    assert state["opt"] == [{"z": 1, "a": 2}]
    assert list(state["opt"][0]) == ["z", "a"]


@pytest.mark.parametrize(
    ("made", "told"),
    [(None, "made no state: the state, a NoneType"), ({"w": jnp.ones(2)}, "only one .* has step")],
)
def test_what_init_makes_is_what_was_described(tmp_path: Path, made: Any, told: str) -> None:
    abstract = jax.eval_shape(lambda: {"w": jnp.ones(2), "step": jnp.int32(0)})

    with (
        pytest.raises(cc.ConfigError, match=told),
        callbacks_in(tmp_path / "run").run(abstract, init=lambda: made) as run,
    ):
        assert run.state


class Forgetful:
    def matches(self, node: Any) -> bool:
        return isinstance(node, Path)

    def capture(self, node: Any) -> Any:
        return {"length": len(node.parts)}

    def apply(self, node: Any, values: Any) -> Any: ...


def test_an_adapter_that_returns_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_callbacks.adapters._registered", [])
    cc.register_adapter(Forgetful())
    state = {"where": Path("a/b")}

    with pytest.raises(cc.StateMismatch, match=r"Forgetful\.apply returned None for where"):
        apply(state, leaves_of(state))


def test_another_dtype_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = trained(tmp_path / "run", {"w": jnp.ones(2), "b": jnp.ones(2)})

    with caplog.at_level(logging.WARNING):
        like = {"w": jnp.zeros(2, jnp.bfloat16), "b": jnp.zeros(2)}
        assert cc.restore(root, like=like)["w"].dtype == np.float32
        told = "these keep the dtype that they were saved with: w (float32, not bfloat16)"
        assert caplog.messages == [f"{root / '0'}: {told}"]
        assert cc.restore(root, like=like, dtype="cast")["w"].dtype == jnp.bfloat16
    assert len(caplog.messages) == 1


def test_a_step_may_be_text(tmp_path: Path) -> None:
    root = trained(tmp_path / "run", {"w": jnp.ones(2)})

    assert cc.restore(root, which="0").keys() == {"w"}
    with pytest.raises(cc.CheckpointNotFound, match="has no step 7; it has 0"):
        cc.restore(root, which="7")


def test_a_lone_model_is_given_below_its_name(tmp_path: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    root = trained(tmp_path / "run", {"model": model, "step": 1})

    with pytest.raises(cc.StateMismatch, match=r"as in like=\{'model': model\}"):
        cc.restore(root, like=model, only="params")


def test_metrics_are_numbers_by_name(tmp_path: Path) -> None:
    with (
        pytest.raises(cc.ConfigError, match="metrics must be numbers by name, not a float"),
        callbacks_in(tmp_path / "run").run({"w": jnp.ones(2)}) as run,
    ):
        run.on_step(0, run.state, 0.5)  # type: ignore[arg-type]
