"""Iterators of Grain, and a replay buffer that is also written to a Flashbax vault."""

import shutil
from pathlib import Path
from typing import Any

import flashbax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flashbax.vault import Vault

import ckpt_callbacks as cc
from states.cases.nnx import Net, nnx_leaves
from states.extra.grain import dataset_iterator


def callbacks_in(directory: Path) -> cc.Callbacks:
    return cc.Callbacks(cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(1), keep=cc.LatestN(1)))


def test_the_position_is_that_of_the_save(tmp_path: Path) -> None:
    data = dataset_iterator()
    next(data)
    with callbacks_in(tmp_path / "run").run({"data": data, "w": jnp.ones(1)}) as run:
        run.on_step(0, run.state)
        expected = [next(data)["x"] for _ in range(3)]  # while the save is in flight

    restored = cc.restore(tmp_path / "run", like={"data": dataset_iterator(), "w": jnp.zeros(1)})

    for x in expected:
        np.testing.assert_array_equal(next(restored["data"])["x"], x)


def test_an_iterator_of_another_number_of_processes_is_refused_at_once(tmp_path: Path) -> None:
    with callbacks_in(tmp_path / "run").run({"data": dataset_iterator(), "model": Net(0)}) as run:
        run.on_step(0, run.state)
    alone = tmp_path / "copy"
    shutil.copytree(tmp_path / "run" / "0", alone)
    (alone / "data").chmod(0o755)
    (alone / "data" / "process_0-of-1.json").rename(alone / "data" / "process_0-of-2.json")
    model, data = Net(1), dataset_iterator()
    before = [str(leaf) for leaf in nnx_leaves(model)]

    with pytest.raises(cc.StateMismatch) as error:
        cc.restore(alone, like={"data": data, "model": model})

    assert str(error.value).endswith(
        "data: saved by 2 processes, each with a part of its own, and now there are 1: go on with "
        "as many, or leave it out with only=\nThe rest fits: only='model' restores that alone"
    )
    assert [str(leaf) for leaf in nnx_leaves(model)] == before
    cc.restore(alone, like={"model": model}, only="model")


BUFFER = flashbax.make_flat_buffer(
    max_length=40, min_length=8, sample_batch_size=4, add_batch_size=4
)


def test_a_vault_holds_each_row_once_after_a_resume(tmp_path: Path) -> None:
    """Opened again it takes all that is in the buffer for new; and some rows come twice."""

    def row(step: int) -> dict[str, jax.Array]:
        return {"x": jnp.arange(4) + 4 * step}

    def step_of(state: dict[str, Any], step: int) -> dict[str, Any]:
        buffer = BUFFER.add(state["buffer"], row(step))
        state["vault"].write(buffer)
        return state | {"buffer": buffer}

    def opened() -> dict[str, Any]:
        buffer = BUFFER.init({"x": jnp.int32(0)})
        vault = Vault("rows", buffer.experience, str(tmp_path / "vaults"), vault_uid="one")
        return {"buffer": buffer, "vault": vault}

    with callbacks_in(tmp_path / "run").run(opened()) as run:
        state = run.state
        for step in range(7):
            state = step_of(state, step)
            if step <= 4:  # what comes later is lost, but for the rows in the vault
                run.on_step(step, state)
    with callbacks_in(tmp_path / "run").run(opened()) as run:
        state = run.state
        assert run.next_step == 5
        for step in range(run.next_step, 9):
            state = step_of(state, step)
            run.on_step(step, state)

    kept = Vault("rows", rel_dir=str(tmp_path / "vaults"), vault_uid="one").read()
    rows = np.asarray(kept.experience["x"])
    expected = np.concatenate([row(step)["x"] for step in range(9)])
    np.testing.assert_array_equal(np.sort(rows.ravel()), expected)
