"""What can be chosen besides the defaults: when busy, on failure, a store, Orbax's policies."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import ckpt_callbacks as cc
from ckpt_callbacks import orbax_io
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.policy import AnyOf, as_policy
from ckpt_callbacks.testing import FakeClock, MemoryStore, Recorder
from loops import KEEP, callbacks_in, local_steps, new_state, train

keeping = ocp.training.preservation_policies
saving = ocp.training.save_decision_policies


class Held:
    """A save that ends when the test says so."""

    def __init__(self, real: Any, go: threading.Event) -> None:
        self.real, self.go = real, go

    def result(self, timeout: float | None = None) -> Any:
        assert self.go.wait(60)
        return self.real.result()


@pytest.fixture
def held_saves(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let no save end before the event is set."""
    go, save = threading.Event(), orbax_io.save
    monkeypatch.setattr(orbax_io, "save", lambda *arguments: Held(save(*arguments), go))
    return go


def test_a_save_that_is_due_while_one_is_in_flight_can_be_skipped(
    tmp_path: Path, held_saves: threading.Event
) -> None:
    callbacks = callbacks_in(tmp_path / "run", keep=cc.LatestN(9), busy="skip")
    with callbacks.run(new_state()) as run:
        for step in range(5):
            if step == 3:
                held_saves.set()
                run.wait()
            run.on_step(step, new_state())

    assert local_steps(tmp_path / "run") >= {0, 3}
    assert not local_steps(tmp_path / "run") & {1, 2}


def test_by_default_it_is_waited_for(tmp_path: Path, held_saves: threading.Event) -> None:
    with callbacks_in(tmp_path / "run", keep=cc.LatestN(9)).run(new_state()) as run:
        run.on_step(0, new_state())
        threading.Timer(0.1, held_saves.set).start()
        for step in range(1, 4):
            run.on_step(step, new_state())

    assert local_steps(tmp_path / "run") == {0, 1, 2, 3}


def test_synchronously_all_is_done_when_on_step_returns(tmp_path: Path) -> None:
    recorder = Recorder()
    callbacks = callbacks_in(tmp_path / "run", recorder, keep=cc.LatestN(1), synchronous=True)
    with callbacks.run(new_state()) as run:
        for step in range(3):
            run.on_step(step, new_state())
            assert len(recorder.of(cc.Saved)) == step + 1
            assert local_steps(tmp_path / "run") == {step}


def test_a_failed_save_can_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("the disk is on fire")

    recorder = Recorder()
    callbacks = callbacks_in(tmp_path / "run", recorder, on_failure="raise")

    def break_the_disk(step: int, run: cc.Run[Any]) -> None:
        if step == 1:
            run.wait()
            monkeypatch.setattr(orbax_io, "save", fail)

    with pytest.raises(cc.SaveError, match="step 1 could not be saved: the disk is on fire"):
        train(callbacks, 3, before=break_the_disk)

    assert [type(e) for e in recorder.of(cc.SaveFailed)] == [cc.SaveFailed]
    assert recorder.events[-1] == cc.RunEnded("failed", {})
    assert local_steps(tmp_path / "run") == {0}


def test_a_save_that_fails_in_the_background_stops_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def result(self, timeout: float | None = None) -> None:
            raise OSError("no space left")

    monkeypatch.setattr(orbax_io, "save", lambda *arguments: Failing())
    with callbacks_in(tmp_path / "run", on_failure="raise").run(new_state()) as run:
        run.on_step(0, new_state())
        with pytest.raises(cc.SaveError, match="no space left"):
            run.wait()


def test_a_run_is_over_also_where_ctrl_c_ends_the_wait_for_its_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(engine: Engine) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "finish_saving", interrupted)
    recorder = Recorder()

    with pytest.raises(KeyboardInterrupt):
        train(callbacks_in(tmp_path / "run", recorder), 1)

    assert recorder.events[-1] == cc.RunEnded("killed", {})


@pytest.mark.parametrize("event", ["on_run_started", "on_step", "on_eval", "on_saved"])
def test_a_critical_hook_that_raises_ends_the_training(event: str, tmp_path: Path) -> None:
    def hook(self: Any, event: Any) -> None:
        raise ZeroDivisionError(str(event))

    hook.__name__ = event
    plugin = type("Critical", (), {event: cc.hookimpl(critical=True)(hook)})()
    recorder = Recorder()

    with pytest.raises(ZeroDivisionError):
        train(callbacks_in(tmp_path / "run", plugin, recorder), 1000, {0: 0.5})

    assert len(recorder.of(cc.Step)) < 1000
    train(callbacks_in(tmp_path / "run"), 3)  # the directory was released


def test_a_store_may_keep_less_than_the_others(tmp_path: Path) -> None:
    best = cc.BestN(1, "score", mode="max", pending=0)
    store, small = MemoryStore("all"), MemoryStore("small", keep=best)

    train(callbacks_in(tmp_path / "run", store, small), 6, {1: 0.9, 2: 0.3, 5: 0.5})

    assert set(store.copies) == local_steps(tmp_path / "run") == {1, 4, 5}
    assert store.aliases == {"best": 1, "last": 5}
    assert set(small.copies) == {1}
    assert small.aliases == {"best": 1, "last": 1}
    assert small.calls.count("put") <= 3  # what it does not keep it is never sent


def test_metadata_of_ones_own_comes_back_with_the_checkpoint(tmp_path: Path) -> None:
    about = {"tokens": 12_000_000_000, "shards": ["a", "b"]}
    with callbacks_in(tmp_path / "run", keep=cc.LatestN(3)).run(new_state()) as run:
        run.on_step(0, new_state(), metadata=about)
        run.on_step(1, new_state())
        run.save(2, new_state(), metadata={"by": "hand"})
        with pytest.raises(cc.ConfigError, match="metadata must hold JSON values"):
            run.on_step(3, new_state(), metadata={"x": np.zeros(3)})

    assert [c.metadata for c in cc.checkpoints(tmp_path / "run")] == [about, {}, {"by": "hand"}]
    assert cc.find(tmp_path / "run", 0).metadata == about


def test_evaluations_that_keep_missing_the_saved_steps_are_told_of_once(tmp_path: Path) -> None:
    callbacks = callbacks_in(tmp_path / "run", every=5)
    with pytest.warns(cc.CkptCallbacksWarning, match="never meet") as seen:
        train(callbacks, 40, dict.fromkeys(range(4, 40, 5), 0.5))

    assert len(seen) == 1
    text = str(seen[0].message)
    assert "evaluated were steps 4, 9, 14" in text
    assert "saved were steps 0, 5, 10…" in text
    assert "EveryNSteps(5)" in text


def test_evaluations_that_meet_now_and_then_are_fine(tmp_path: Path) -> None:
    with callbacks_in(tmp_path / "run", every=10).run(new_state()) as run:
        for step in range(60):
            run.on_eval(step, {"score": 0.5})
            run.on_step(step, new_state())


def test_a_clock_that_is_moved_back_changes_no_decision(tmp_path: Path) -> None:
    clock = FakeClock()
    checkpoint = cc.OrbaxCheckpoint(
        tmp_path / "run",
        save=cc.EveryNSeconds(60),
        keep=cc.LatestN(1) | cc.EveryNSeconds(120),
    )
    with cc.Callbacks(checkpoint, clock=clock).run(new_state()) as run:
        for step in range(10):
            clock.advance(60)
            if step == 5:
                clock.wall -= 100_000
            run.on_step(step, new_state())

    assert local_steps(tmp_path / "run") == {0, 2, 4, 5, 7, 9}


class Odd:
    """A user's own Orbax policy, by the protocol alone."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [c.step % 2 == 1 for c in checkpoints]


def test_orbax_policies_say_when_to_save(tmp_path: Path) -> None:
    policy = saving.AnySavePolicy(
        [saving.InitialSavePolicy(), saving.FixedIntervalPolicy(4), saving.SpecificStepsPolicy({6})]
    )
    checkpoint = cc.OrbaxCheckpoint(
        tmp_path / "run", save=policy | cc.CustomSteps([7]), keep=cc.LatestN(9)
    )

    with cc.Callbacks(checkpoint).run(new_state()) as run:
        for step in range(1, 10):
            run.on_step(step, new_state())

    assert local_steps(tmp_path / "run") == {1, 4, 6, 7, 8}


def test_orbax_policies_say_what_to_keep(tmp_path: Path) -> None:
    def loss(metrics: dict[str, float]) -> float:
        return metrics["loss_"]

    policy = keeping.AnyPreservationPolicy(
        [
            keeping.LatestN(1),
            keeping.BestN(
                get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
            keeping.EveryNSteps(interval_steps=3),
        ]
    )
    store = MemoryStore()
    losses = {1: 0.5, 2: float("nan"), 4: 0.1, 5: 0.3}
    with callbacks_in(tmp_path / "run", store, keep=policy).run(new_state()) as run:
        for step in range(8):
            if step in losses:
                run.on_eval(step, {"loss_": losses[step]})
            run.on_step(step, new_state())

    assert set(store.copies) == local_steps(tmp_path / "run") == {0, 3, 4, 6, 7}
    assert store.aliases == {"best": 4, "last": 7}


def test_orbax_policies_of_ones_own_and_all_of_theirs_are_understood() -> None:
    history = [cc.Candidate(s, {"a": float(s % 3)}, 60.0 * s) for s in range(6)]
    kept = {
        "Odd": as_policy(Odd()),
        "all": as_policy(keeping.PreserveAll()),
        "everything": as_policy(keeping.LatestN(None)),
        "steps": as_policy(keeping.CustomSteps([2, 5])),
        "seconds": as_policy(keeping.EveryNSeconds(120)),
        "closest": as_policy(keeping.EveryNStepsClosest(interval_steps=4)),
        "most": as_policy(keeping.BestN(get_metric_fn=lambda m: m["a"], n=2)),
    }
    assert {name: sorted(policy.keep(history)) for name, policy in kept.items()} == {  # type: ignore[attr-defined]
        "Odd": [1, 3, 5],
        "all": list(range(6)),
        "everything": list(range(6)),
        "steps": [2, 5],
        "seconds": [0, 2, 4],
        "closest": [0, 4, 5],
        "most": [2, 5],
    }
    joined = cc.LatestN(1) | keeping.CustomSteps([2])
    assert isinstance(joined, AnyOf)
    assert sorted(joined.keep(history)) == [2, 5]
    continuous = as_policy(saving.ContinuousCheckpointingPolicy(minimum_interval_secs=60))
    assert isinstance(continuous, cc.SavePolicy)
    assert not continuous.due(cc.SaveContext(5, last=4, now=59, last_time=0))
    assert not continuous.due(cc.SaveContext(5, last=4, now=61, last_time=0, busy=True))
    assert continuous.due(cc.SaveContext(5, last=4, now=61, last_time=0))
    notice = as_policy(saving.PreemptionCheckpointingPolicy())
    assert isinstance(notice, cc.SavePolicy)
    assert notice.due(cc.SaveContext(5, preempted=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"busy": "drop"}, "busy must be 'wait' or 'skip', not 'drop'"),
        ({"on_failure": "stop"}, "on_failure must be 'continue' or 'raise', not 'stop'"),
    ],
)
def test_a_choice_that_is_none_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(cc.ConfigError, match=message):
        callbacks_in(tmp_path, **options)


def test_what_is_remembered_of_stores_makes_them_again(tmp_path: Path) -> None:
    """In a process that has only the directory, and without any credential."""
    from ckpt_callbacks_mlflow import MLflowTracker
    from ckpt_callbacks_wandb import WandbTracker

    best = cc.BestN(1, "score", mode="max", pending=0)
    root = tmp_path / "run"
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=KEEP),
        MLflowTracker("digits", tracking_uri="sqlite:///mlflow.db", register_as="digits"),
        WandbTracker("digits", mode="offline", keep=best),
        drain_limit=100,
    )
    train(callbacks, 4, {1: 0.9})

    assert cc.report_metrics(root, 2, {"score": 0.95}, timeout=100)

    assert local_steps(root) == {2, 3}
    where = {c.step: c.where for c in cc.checkpoints(root)}
    assert where == {2: ["local", "MLflow", "W&B (staged)"], 3: ["local", "MLflow"]}


@pytest.mark.parametrize(
    "options",
    [
        {"tracking_uri": "http://user:hunter2@host"},
        {"tracking_uri": "postgresql://host/db?user=u&password=hunter2"},
        {"artifact_location": "sftp://user:hunter2@host/art"},
    ],
)
def test_what_holds_a_password_is_not_remembered(options: dict[str, str]) -> None:
    from ckpt_callbacks_mlflow import MLflowTracker

    assert MLflowTracker("digits", **options).settings() is None
    plain = MLflowTracker("digits", tracking_uri="sqlite:////home/u@host/ml.db").settings()
    assert plain
    assert plain["tracking_uri"] == "sqlite:////home/u@host/ml.db"
