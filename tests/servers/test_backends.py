"""The tracker on every backend: the contract, and the whole life of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.report import why
from ckpt_callbacks.testing import TrackerContract
from ckpt_callbacks_mlflow import MLflowTracker
from servers.backends import Backend, faults

Make = Callable[[], MLflowTracker]
SCORES = {0: 0.5, 2: 0.9, 4: 0.1, 6: 0.2, 8: 0.3, 10: 0.4}
KEEP = cc.LatestN(1) | cc.BestN(2, "score", mode="max")


class TestRegistered(TrackerContract):
    @pytest.fixture
    def make_store(self, backend: Backend) -> Make:
        name = f"contract-{uuid4()}"
        return lambda: backend.tracker(name)


class TestUnregistered(TrackerContract):
    @pytest.fixture
    def make_store(self, backend: Backend) -> Make:
        name = f"contract-{uuid4()}"
        return lambda: backend.tracker(name, register_as=None)


def new_state() -> dict[str, Any]:
    return {"w": np.zeros(1000), "deep": {"b": np.zeros((3, 3))}}


def train(directory: Path, tracker: MLflowTracker, until: int, **options: Any) -> None:
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(2), keep=KEEP, **options),
        tracker,
        drain_limit=20,
    )
    with callbacks.run(new_state(), config={"rate": 0.5}) as run:
        state = run.state
        for step in range(run.next_step, until):
            state = {"w": state["w"] + step, "deep": {"b": state["deep"]["b"] - step}}
            if step in SCORES:
                run.on_eval(step, {"score": SCORES[step]})
            run.on_step(step, state, {"loss": float(step)})


def test_a_run_from_its_start_to_a_late_evaluation(backend: Backend, tmp_path: Path) -> None:
    name = f"life-{uuid4()}"
    directory = tmp_path / "run"

    train(directory, backend.tracker(name), 5)

    metrics = {
        "loss": [(s, float(s)) for s in range(5)],
        "score": [(s, v) for s, v in SCORES.items() if s < 5],
    }
    assert faults(backend, name, directory, {"best": 2, "last": 4}, metrics) == []

    train(directory, backend.tracker(name), 11)  # it resumes

    metrics = {"loss": [(s, float(s)) for s in range(11)], "score": list(SCORES.items())}
    assert faults(backend, name, directory, {"best": 2, "last": 10}, metrics) == []
    assert {p.name for p in directory.iterdir() if p.name.isdecimal()} == {"0", "2", "10"}

    assert cc.report_metrics(directory, 10, {"score": 0.95, "extra": 1.0})

    metrics |= {"score": [*SCORES.items(), (10, 0.95)], "extra": [(10, 1.0)]}
    assert faults(backend, name, directory, {"best": 10, "last": 10}, metrics) == []
    assert {p.name for p in directory.iterdir() if p.name.isdecimal()} == {"2", "10"}


@pytest.mark.parametrize("backend", ["server", "cloud", "direct"], indirect=True)  # no links
def test_a_damaged_checkpoint_is_read_from_there(backend: Backend, tmp_path: Path) -> None:
    train(tmp_path / "run", backend.tracker(f"repair-{uuid4()}"), 5)
    files = [p for p in (tmp_path / "run" / "2").rglob("*") if p.is_file()]
    damaged = max(files, key=lambda p: p.stat().st_size)
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1])

    restored = cc.restore(tmp_path / "run", like=new_state(), which=2)

    assert restored["w"][0] == 0 + 1 + 2


@pytest.mark.parametrize("backend", ["server", "cloud", "direct"], indirect=True)  # no links
def test_a_small_disk_leaves_all_but_the_newest_there(backend: Backend, tmp_path: Path) -> None:
    name, directory = f"small-{uuid4()}", tmp_path / "run"

    for until in (5, 11):  # it resumes
        train(directory, backend.tracker(name), until, keep_here=cc.LatestN(1))
        assert [p.name for p in directory.iterdir() if p.name.isdecimal()] == [f"{until - 1}"]

    assert {c.step: c.where for c in cc.checkpoints(directory)} == {
        0: ["MLflow"],
        2: ["MLflow"],
        10: ["local", "MLflow"],
    }
    best, last = (cc.restore(directory, like=new_state(), which=w) for w in ("best", "last"))
    assert (best["w"][0], last["w"][0]) == (sum(range(3)), sum(range(11)))
    assert why(directory, 4).state == "evicted"
