"""A run as a loop sees it: real Orbax, a tracker in memory."""

import json
import logging
import math
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import ckpt_callbacks as cc
from ckpt_callbacks import failpoints
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.testing import MemoryStore, Recorder
from loops import KEEP, callbacks_in, local_steps, new_state, train


def test_all_places_hold_exactly_the_kept_steps(tmp_path: Path) -> None:
    store = MemoryStore()
    recorder = Recorder()
    callbacks = callbacks_in(tmp_path / "run", store, recorder)

    train(callbacks, 6, {0: 0.1, 1: 0.9, 3: 0.5, 5: 0.2})

    assert local_steps(tmp_path / "run") == {1, 4, 5}
    assert set(store.copies) == {1, 4, 5}
    assert store.aliases == {"best": 1, "last": 5}
    evicted = [(e.store, e.step) for e in recorder.of(cc.Evicted)]  # type: ignore[attr-defined]
    assert {s for where, s in evicted if where == "local"} == {0, 2, 3}
    assert not list((tmp_path / "run" / ".ckpt_callbacks" / "trash").iterdir())


def test_the_directory_can_be_read_by_orbax_itself(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 3)

    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert [c.step for c in checkpointer.checkpoints] == [1, 2]
    like = {"model": {"w": np.zeros((4, 4), np.float32)}}
    loaded = ocp.load_checkpointables(tmp_path / "run" / "2", like)
    np.testing.assert_array_equal(loaded["model"]["w"], np.full((4, 4), 3.0))


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store), 3)
    recorder = Recorder()

    state = train(callbacks_in(tmp_path / "run", store, recorder), 6)

    assert recorder.of(cc.RunStarted) == [cc.RunStarted(tmp_path / "run", 2, 3)]
    np.testing.assert_array_equal(state["model"]["w"], np.full((4, 4), 6.0))
    assert [p.step for p in store.points] == [0, 1, 2, 3, 4, 5]
    assert set(store.copies) == {4, 5}


def test_a_resumed_run_whose_state_was_never_read_is_an_error(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 3)

    with (
        callbacks_in(tmp_path / "run").run(new_state()) as run,
        pytest.raises(cc.UsageError, match=r"run\.state was never read.*`state = run\.state`"),
    ):
        run.on_step(3, new_state())


def test_a_resumed_run_that_starts_over_is_an_error(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 3)

    with callbacks_in(tmp_path / "run").run(new_state()) as run:
        state = run.state
        with pytest.raises(cc.UsageError, match=r"start it at run\.next_step, which is 3"):
            run.on_step(0, state)


def test_without_any_plugin_the_loop_runs_alone() -> None:
    state = train(cc.Callbacks(), 5, {2: 0.5})

    np.testing.assert_array_equal(state["model"]["w"], np.full((4, 4), 5.0))


def test_an_evaluation_that_lacks_the_metric_warns_once(tmp_path: Path) -> None:
    def evaluate(step: int, run: cc.Run[Any]) -> None:
        if step in (1, 2):
            run.on_eval(step, {"acc": 0.5})

    with pytest.warns(cc.CkptCallbacksWarning, match="step 1 has no score.*were acc, loss") as seen:
        train(callbacks_in(tmp_path / "run"), 4, before=evaluate)

    assert len(seen) == 1


def test_a_nan_is_never_best_and_evicts_nothing(tmp_path: Path) -> None:
    store = MemoryStore()

    train(callbacks_in(tmp_path / "run", store), 6, {0: 0.1, 1: 0.9, 3: math.nan, 5: math.inf})

    assert store.aliases == {"best": 1, "last": 5}


def test_a_late_evaluation_from_another_thread_ranks_again(tmp_path: Path) -> None:
    store = MemoryStore()
    promoted = threading.Event()

    class Listener:
        @cc.hookimpl
        def on_promoted(self, event: cc.Promoted) -> None:
            if (event.alias, event.step) == ("best", 1):
                promoted.set()

    with callbacks_in(tmp_path / "run", store, Listener()).run(new_state()) as run:
        for step in range(2):
            run.on_eval(step, {"score": 0.5 - step / 10})
            run.on_step(step, new_state())
        late = threading.Thread(target=run.on_eval, args=(1, {"score": 0.9}))
        late.start()
        late.join()
        assert promoted.wait(30)

    assert store.aliases == {"best": 1, "last": 1}


def test_metrics_given_to_on_step_count_for_ranking(tmp_path: Path) -> None:
    store = MemoryStore()
    with callbacks_in(tmp_path / "run", store).run(new_state()) as run:
        for step, score in enumerate([0.1, 0.9, 0.2, 0.3]):
            run.on_step(step, new_state(), {"score": jnp.float32(score)})

    assert store.aliases == {"best": 1, "last": 3}


def test_what_changes_after_on_step_is_not_what_is_saved(tmp_path: Path) -> None:
    @jax.jit
    def zero(w: jax.Array) -> jax.Array:
        return w * 0

    donating = jax.jit(lambda w: w * 0, donate_argnums=0)
    array = np.ones(300_000)
    with callbacks_in(tmp_path / "run").run(
        {"a": {"w": jnp.ones(300_000)}, "b": {"n": array}}
    ) as run:
        w = jnp.ones(300_000) * 7
        run.on_step(0, {"a": {"w": w}, "b": {"n": array}})
        donating(w)
        array[:] = 0

    like = {"a": {"w": jnp.zeros(300_000)}, "b": {"n": np.zeros(300_000)}}
    restored = cc.restore(tmp_path / "run", like=like)
    assert restored["a"]["w"].min() == 7
    assert restored["b"]["n"].min() == 1


def test_a_state_with_a_python_bool_comes_back(tmp_path: Path) -> None:
    """Orbax can not tell what is in an item with one, before it is read."""
    state = {**new_state(1.0), "flags": {"done": True, "n": 3}}
    with callbacks_in(tmp_path / "run").run(state) as run:
        run.on_step(0, state)

    like = {**new_state(), "flags": {"done": False, "n": 0}}
    assert cc.restore(tmp_path / "run", like=like)["flags"] == {"done": True, "n": 3}
    with pytest.raises(cc.StateMismatch, match=r"flags \(2 leaves\): not in the state"):
        cc.restore(tmp_path / "run", like=new_state())


def test_a_save_that_fails_is_one_event_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    good = new_state()
    with callbacks_in(tmp_path / "run", recorder).run(good) as run:
        run.on_step(0, good)
        run.on_step(1, {**good, "bad": {"x": object()}})  # type: ignore[dict-item]
        run.on_step(2, good)

    failed = recorder.of(cc.SaveFailed)
    assert [e.step for e in failed] == [1]  # type: ignore[attr-defined]
    assert "the leaf at bad/x is a object" in caplog.text
    assert local_steps(tmp_path / "run") == {0, 2}


def test_a_state_that_cannot_be_saved_is_refused_at_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(cc.StateMismatch, match="the leaf at x is a object"),
        callbacks_in(tmp_path / "run").run({"x": object()}),
    ):
        pass


@pytest.mark.parametrize("beside_ours", [False, True])
def test_a_foreign_checkpoint_is_not_touched(tmp_path: Path, beside_ours: bool) -> None:
    if beside_ours:
        train(callbacks_in(tmp_path / "run"), 3)
    ocp.save(tmp_path / "run" / "7", {"w": np.ones(3)})

    with (
        pytest.raises(cc.ConfigError, match=r"not saved by ckpt_callbacks \(steps 7\)"),
        callbacks_in(tmp_path / "run").run(new_state()),
    ):
        pass

    assert ocp.is_orbax_checkpoint(tmp_path / "run" / "7")
    with callbacks_in(tmp_path / "other").run(new_state()):
        pass  # and the refused directory holds no lock


def test_a_checkpoint_of_another_run_is_not_touched(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "other"), 8)
    train(callbacks_in(tmp_path / "run"), 3)
    shutil.copytree(tmp_path / "other" / "7", tmp_path / "run" / "7")

    with (
        pytest.raises(cc.ConfigError, match=r"\(steps 7\): choose another directory"),
        callbacks_in(tmp_path / "run").run(new_state()),
    ):
        pass

    assert local_steps(tmp_path / "run") == {1, 2, 7}


def test_a_folder_that_somebody_made_at_the_place_of_a_save_stays(tmp_path: Path) -> None:
    root, recorder = tmp_path / "run", Recorder()

    def interfere(step: int, run: cc.Run[Any]) -> None:
        if step == 2:
            (root / "2").mkdir()
            (root / "2" / "notes.txt").write_text("mine")

    train(callbacks_in(root, recorder), 4, before=interfere)

    assert [e.step for e in recorder.of(cc.SaveFailed)] == [2]  # type: ignore[attr-defined]
    assert (root / "2" / "notes.txt").read_text() == "mine"
    assert cc.find(root).step == 3


def test_a_step_that_becomes_the_best_just_before_its_eviction_stays(tmp_path: Path) -> None:
    recorder = Recorder()
    with callbacks_in(tmp_path / "run", recorder).run(new_state()) as run:

        def measure(point: str) -> None:
            if point == "eviction-begins":
                failpoints.arm(None)
                run.on_eval(0, {"score": 0.9})

        try:
            run.on_step(0, new_state())
            run.on_step(1, new_state())
            failpoints.arm(measure)
            run.on_step(2, new_state())
            run.wait()
        finally:
            failpoints.arm(None)

    assert local_steps(tmp_path / "run") == {0, 1, 2}
    assert recorder.of(cc.Evicted) == []


def test_a_tracker_that_is_down_is_reported_and_caught_up_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(call: str) -> None:
        if call == "open":
            raise ConnectionError("http://me:secret@host is down")

    store = MemoryStore(before=refuse)
    recorder = Recorder()
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(1), keep=KEEP),
        store,
        recorder,
        drain_limit=1,
    )
    with caplog.at_level(logging.WARNING, "ckpt_callbacks"):
        train(callbacks, 4)

    (ended,) = recorder.of(cc.RunEnded)
    lacking = "2 checkpoints (steps 2, 3), 4 metric values"
    why = "ConnectionError: http://***@host is down"
    assert ended.unsent == {"memory": f"{lacking} ({why})"}  # type: ignore[attr-defined]
    assert "secret" not in caplog.text
    assert len(recorder.of(cc.MirrorFailed)) == 1
    assert local_steps(tmp_path / "run") == {2, 3}

    store.before = lambda call: None
    train(callbacks_in(tmp_path / "run", store), 4)

    assert set(store.copies) == {2, 3}
    assert store.aliases == {"last": 3}
    assert [p.step for p in store.points] == [0, 1, 2, 3]


def test_uploads_slower_than_saves_still_move_last_and_pile_up_nothing(tmp_path: Path) -> None:
    """Each upload ends only after two more checkpoints are complete."""
    saved = threading.Semaphore(0)
    most_local = 0

    class Listener:
        @cc.hookimpl
        def on_saved(self, event: cc.Saved) -> None:
            nonlocal most_local
            most_local = max(most_local, len(local_steps(tmp_path / "run")))
            saved.release()

    trained = threading.Event()

    def wait_for_saves(call: str) -> None:
        for _ in range(2 if call == "put" else 0):
            while not saved.acquire(timeout=0.05) and not trained.is_set():
                pass

    store = MemoryStore(before=wait_for_saves)
    recorder = Recorder()
    callbacks = callbacks_in(tmp_path / "run", store, recorder, Listener(), keep=cc.LatestN(1))
    train(callbacks, 12, before=lambda step, run: trained.set() if step == 11 else None)

    moves = [e.step for e in recorder.of(cc.Promoted)]  # type: ignore[attr-defined]
    assert moves == sorted(moves)
    assert len(moves) >= 3
    assert store.aliases == {"last": 11}
    assert set(store.copies) == {11}
    assert most_local <= 4
    assert recorder.of(cc.MirrorFailed) == []  # what is being read stays till it is read


def test_a_damaged_checkpoint_is_an_error_with_the_name_of_the_file(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 2)
    data = max((tmp_path / "run" / "1" / "model").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.chmod(0o644)
    data.write_bytes(content)

    with pytest.raises(cc.CorruptCheckpoint, match=data.name):
        cc.restore(tmp_path / "run", like=new_state())
    part = cc.restore(tmp_path / "run", like=new_state(), only="moments")
    np.testing.assert_array_equal(part["moments"]["m"], np.full(3, 2.0))


def test_restores_best_last_a_step_and_a_part(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 4, {0: 0.9, 2: 0.1})

    def w(which: int | str) -> float:
        restored = cc.restore(tmp_path / "run", like=new_state(), which=which)
        return float(restored["model"]["w"][0, 0])

    assert (w("best"), w("last"), w(2)) == (1.0, 4.0, 3.0)
    only = cc.restore(tmp_path / "run", like=new_state(-1), only="moments")
    assert float(only["model"]["w"][0, 0]) == -1
    alone = cc.restore(tmp_path / "run" / "2", like={"model": new_state()["model"]}, only="model")
    assert float(alone["model"]["w"][0, 0]) == 3.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"which": 1}, cc.CheckpointNotFound, "has no step 1; it has 2, 3"),
        (
            {"which": "best"},
            cc.CheckpointNotFound,
            "no checkpoint 'best'; it has last and steps 2, 3",
        ),
        ({"only": "ema"}, cc.CheckpointNotFound, "no item ema; it has model, moments"),
        ({"like": {"model": {"w": jnp.ones(3)}}}, cc.StateMismatch, r"shape \(3,\) in the state"),
        (
            {"like": {**new_state(), "ema": {"w": jnp.ones(3)}}},
            cc.StateMismatch,
            "ema/w: not in the",
        ),
    ],
)
def test_a_restore_that_cannot_work_says_what_is_there(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    train(callbacks_in(tmp_path / "run"), 4)

    with pytest.raises(error, match=message):
        cc.restore(tmp_path / "run", **{"like": new_state(), **options})


def test_a_wrong_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cc.ConfigError, match="neither a run directory nor a checkpoint"):
        cc.restore(tmp_path, like=new_state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cc.Callbacks(MemoryStore()), "an OrbaxCheckpoint must be given too"),
        (lambda: callbacks_in(Path("r"), MemoryStore(), MemoryStore()), "two stores have the name"),
        (lambda: callbacks_in(Path("r"), cc.OrbaxCheckpoint("b", cc.EveryNSteps(1), KEEP)), "one"),
        (lambda: callbacks_in(Path("r"), MemoryStore("../x")), "which '../x' is not"),
        (lambda: cc.Callbacks(grace=-1), "grace must be a number of seconds from 0"),
        (lambda: cc.OrbaxCheckpoint("r", 50, KEEP), "save: 50 is no policy"),
        (lambda: cc.OrbaxCheckpoint("r", cc.EveryNSteps(1), 3), "keep: 3 is no policy"),
        (lambda: cc.Callbacks().run({}, config={"f": len}), "config must hold JSON values only"),
        (lambda: cc.Callbacks().run({}, config={1: 2}), "keys of config must be strings, not 1"),
        (lambda: cc.Callbacks(drain_limit="60"), "drain_limit must be a number of seconds"),
        (lambda: cc.Callbacks(drain_limit=float("inf")), "drain_limit must be a number"),
        (lambda: cc.Callbacks(Recorder), r"Recorder is a class; give an object, Recorder\(...\)"),
        (lambda: cc.Callbacks([Recorder()]), "one by one, not as a list"),
        (lambda: cc.Callbacks(r := Recorder(), r), "Recorder is given twice"),
        (
            lambda: cc.OrbaxCheckpoint("r", cc.EveryNSteps, KEEP),
            "save: .*EveryNSteps.* is no policy",
        ),
        (
            lambda: cc.OrbaxCheckpoint("r", cc.LatestN(2), KEEP),
            r"save policy .* LatestN\(2\) is not",
        ),
        (lambda: cc.OrbaxCheckpoint("r", cc.EveryNSteps(2), cc.OnEval()), r"OnEval\(\) is not"),
        (lambda: cc.OrbaxCheckpoint(None, cc.EveryNSteps(1), KEEP), "directory must be a path"),
        (lambda: cc.OrbaxCheckpoint("az://b/r", cc.EveryNSteps(1), KEEP), "only local directories"),
    ],
)
def test_a_wrong_setup_is_refused_where_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(cc.ConfigError, match=message):
        make()


def test_calls_outside_of_the_with_statement_are_errors(tmp_path: Path) -> None:
    run = callbacks_in(tmp_path / "run").run(new_state())
    with pytest.raises(cc.UsageError, match="outside of the with statement"):
        run.on_eval(0, {"score": 1.0})
    with pytest.raises(cc.UsageError, match="outside of the with statement"):
        run.on_step(0, new_state())
    with run:
        run.on_step(0, new_state())
    with pytest.raises(cc.UsageError, match="outside of the with statement"):
        run.on_step(1, new_state())
    with pytest.raises(cc.UsageError, match="a run is entered once"), run:
        pass


def test_an_exception_in_the_loop_ends_the_run_as_failed(tmp_path: Path) -> None:
    def fail(step: int, run: cc.Run[Any]) -> None:
        if step == 1:
            raise ZeroDivisionError

    recorder = Recorder()
    with pytest.raises(ZeroDivisionError):
        train(callbacks_in(tmp_path / "run", recorder), 3, before=fail)

    assert recorder.of(cc.RunEnded) == [cc.RunEnded("failed", {})]
    assert local_steps(tmp_path / "run") == {0}


def test_no_thread_survives_a_run(tmp_path: Path) -> None:
    before = {t.name for t in threading.enumerate()}

    train(callbacks_in(tmp_path / "run", MemoryStore()), 5)

    assert {t.name for t in threading.enumerate() if t.name.startswith("ckpt-")} == set()
    assert len({t.name for t in threading.enumerate()} - before) <= 1  # jax's own


KILL = """
import os, signal, sys
import numpy as np
import ckpt_callbacks as cc

class Kill:
    @cc.hookimpl
    def on_saved(self, event):
        if event.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
"""

KILLED = f"""{KILL}
callbacks = cc.Callbacks(
    cc.OrbaxCheckpoint(sys.argv[1], save=cc.EveryNSteps(1), keep=cc.LatestN(2)), Kill()
)
with callbacks.run({{"w": np.zeros(1000)}}) as run:
    state = run.state
    for step in range(run.next_step, 9):
        state = {{"w": state["w"] + 1}}
        run.on_step(step, state)
"""


KILLED_BEFORE_A_FLUSH = f"""{KILL}
from ckpt_callbacks import metrics
metrics.INTERVAL = 3600  # so that only a save writes them down

callbacks = cc.Callbacks(
    cc.OrbaxCheckpoint(sys.argv[1], save=cc.EveryNSteps(3), keep=cc.LatestN(2)), Kill()
)
with callbacks.run({{"w": np.zeros(3)}}) as run:
    for step in range(4):
        run.on_step(step, {{"w": np.zeros(3)}}, {{"loss": step}})
    run.wait()
"""


def test_metrics_up_to_a_checkpoint_survive_a_kill(tmp_path: Path) -> None:
    """The next run goes on after it, and would never log them again."""
    root = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED_BEFORE_A_FLUSH, root], check=False)
    assert killed.returncode == -signal.SIGKILL

    lines = (root / ".ckpt_callbacks" / "metrics.jsonl").read_text().splitlines()

    assert [json.loads(line)[0] for line in lines] == [0, 1, 2, 3]


def test_what_a_kill_left_is_finished_by_the_next_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, root], check=False)
    assert killed.returncode == -signal.SIGKILL
    # What other kills leave: a save that never committed, and an eviction half done.
    (root / "9.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
    directory = RunDirectory(root)
    records = directory.read_records()
    saving = replace(records[3], state="saving", files={})
    directory.write_record(replace(saving, step=9))
    directory.write_record(replace(records[2], state="evicting"))
    # Two that Orbax committed: after and before their metrics were logged.
    for step, logged in ((10, True), (11, False)):
        shutil.copytree(root / "3", root / str(step))
        directory.write_record(replace(saving, step=step, logged=logged))

    callbacks = callbacks_in(root, keep=cc.LatestN(2))
    with callbacks.run({"w": np.zeros(1000)}) as run:
        assert run.next_step == 11
        assert run.state["w"][0] == 4

    left = directory.read_records()
    assert {p.name for p in root.iterdir()} - {".ckpt_callbacks"} == {str(step) for step in left}
    assert all(record.state == "complete" for record in left.values())
    assert not list(directory.trash.iterdir())


def test_a_disk_that_is_full_stops_neither_training_nor_the_threads(tmp_path: Path) -> None:
    """Every write of ours fails for a while; the next good save is complete."""
    recorder = Recorder()
    with callbacks_in(tmp_path / "run", recorder).run(new_state()) as run:
        run.on_step(0, new_state(), {"loss": 0.0})
        run.wait()
        with pytest.MonkeyPatch.context() as full:

            def no_space(path: Path, text: str) -> None:
                raise OSError(28, "No space left on device", str(path))

            full.setattr("ckpt_callbacks.directory.replace_text", no_space)
            run.on_step(1, new_state(), {"loss": 1.0})
            run.wait()
        run.on_step(2, new_state(), {"loss": 2.0})

    assert [e.step for e in recorder.of(cc.SaveFailed)] == [1]  # type: ignore[attr-defined]
    assert local_steps(tmp_path / "run") == {0, 2}


def test_a_listener_may_evaluate_what_was_saved(tmp_path: Path) -> None:
    class Evaluator:
        run: cc.Run[Any]

        @cc.hookimpl
        def on_saved(self, event: cc.Saved) -> None:
            self.run.on_eval(event.step, {"score": -float(event.step)})

    evaluator = Evaluator()
    store = MemoryStore()
    with callbacks_in(tmp_path / "run", store, evaluator).run(new_state()) as evaluator.run:
        for step in range(6):
            evaluator.run.on_step(step, new_state())

    assert store.aliases == {"best": 0, "last": 5}


@pytest.mark.parametrize("removed", [[4, 5], [1, 4, 5]])
def test_checkpoints_removed_by_hand_take_no_place_in_the_policy(
    tmp_path: Path, removed: list[int]
) -> None:
    """Going back by deleting the newest steps, or losing the directory but for its records."""
    root = tmp_path / "run"
    store = MemoryStore()
    train(callbacks_in(root, store), 6, {1: 0.9})
    for step in removed:
        shutil.rmtree(root / str(step))
    recorder = Recorder()

    train(callbacks_in(root, store, recorder), 9)

    (started,) = recorder.of(cc.RunStarted)
    assert started.next_step == (2 if 1 not in removed else 0)  # type: ignore[attr-defined]
    assert local_steps(root) == {1, 7, 8} - set(removed)
    assert set(store.copies) == {1, 7, 8}  # of 1 it may be the only copy left
    assert store.aliases == {"best": 1, "last": 8}
    steps = [p.step for p in store.points if "loss" in p.values]
    assert steps == [*range(6), *range(started.next_step, 9)]  # type: ignore[attr-defined]


def test_an_odd_metric_costs_itself_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    odd: list[Any] = [{("a", "b"): 1.0}, {1: 2.0, "x": 3.0}, {"huge": 10**400, "fine": 4.0}, {}]
    with callbacks_in(tmp_path / "run", store).run(new_state()) as run:
        for step, metrics in enumerate(odd):
            run.on_step(step, new_state(), metrics)

    assert [dict(p.values) for p in store.points] == [
        {"('a', 'b')": 1.0},
        {"1": 2.0, "x": 3.0},
        {"fine": 4.0},
    ]
    assert "metric 'huge' is left out" in caplog.text
    assert local_steps(tmp_path / "run") == {2, 3}


def test_metrics_that_a_store_refuses_hold_back_no_checkpoint(tmp_path: Path) -> None:
    def refuse(call: str) -> None:
        if call == "log_metrics":
            raise ValueError("a bad name")

    store = MemoryStore(before=refuse)
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(1), keep=KEEP),
        store,
        recorder := Recorder(),
        drain_limit=1,
    )

    train(callbacks, 4)

    assert set(store.copies) == {2, 3}
    assert [e.action for e in recorder.of(cc.MirrorFailed)] == ["log metrics"]  # type: ignore[attr-defined]


def test_what_a_store_refuses_rests_while_the_rest_goes_on(tmp_path: Path) -> None:
    """Metrics arrive all the time; a checkpoint that fails is not tried as often."""
    logged = threading.Semaphore(0)

    def refuse(call: str) -> None:
        if call == "put":
            raise ValueError("too large")
        if call == "log_metrics":
            logged.release()

    def wait(step: int, run: cc.Run[Any]) -> None:
        if step:
            assert logged.acquire(timeout=30)  # each step's metrics are sent before the next

    store = MemoryStore(before=refuse)
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(1), keep=cc.LatestN(1)),
        store,
        drain_limit=0,
    )
    train(callbacks, 8, before=wait)

    assert len({p.step for p in store.points}) >= 7
    assert store.calls.count("put") <= 16  # one or two for each new step, not one for each batch


def test_a_copy_that_was_cut_goes_when_it_is_no_longer_wanted(tmp_path: Path) -> None:
    """The service got half of it, and the policy moved on before an attempt succeeded."""
    half: set[int] = set()

    class Half(MemoryStore):
        def put(self, checkpoint: Any, aliases: Any) -> Any:
            if checkpoint.step == 0:
                half.add(0)
                raise ConnectionError("cut")
            return super().put(checkpoint, aliases)

        def delete(self, step: int) -> None:
            half.discard(step)
            super().delete(step)

    store = Half()
    first_failed = threading.Event()

    class Listener:
        @cc.hookimpl
        def on_mirror_failed(self, event: cc.MirrorFailed) -> None:
            first_failed.set()

    def wait(step: int, run: cc.Run[Any]) -> None:
        if step == 1:
            assert first_failed.wait(30)

    train(callbacks_in(tmp_path / "run", store, Listener(), keep=cc.LatestN(1)), 5, before=wait)

    assert half == set()
    assert set(store.copies) == {4}


def test_a_worker_that_outlived_the_limit_changes_nothing_more(tmp_path: Path) -> None:
    hanging, release = threading.Event(), threading.Event()

    def hang(call: str) -> None:
        if call == "put" and not release.is_set():
            hanging.set()
            release.wait(30)

    store = MemoryStore(before=hang)
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(1), keep=cc.LatestN(1)),
        store,
        drain_limit=0.2,
    )
    train(callbacks, 1, before=lambda step, run: None)
    assert hanging.wait(30)
    record = (tmp_path / "run" / ".ckpt_callbacks" / "records" / "0.json").read_text()
    release.set()
    for thread in threading.enumerate():
        if thread.name == "ckpt-memory":
            thread.join(30)

    assert (tmp_path / "run" / ".ckpt_callbacks" / "records" / "0.json").read_text() == record
    train(callbacks, 2)  # and the next run of the same callbacks makes it good
    assert set(store.copies) == {1}


def test_a_store_may_be_a_dataclass(tmp_path: Path) -> None:
    """Which makes it equal to others and gives it no hash."""

    @dataclass
    class Plain(MemoryStore):
        name: str = "plain"

        def __post_init__(self) -> None:
            super().__init__(self.name)

    store = Plain()
    train(callbacks_in(tmp_path / "run", store), 2)

    assert set(store.copies) == {0, 1}


def test_a_forked_child_that_leaves_the_block_changes_nothing(tmp_path: Path) -> None:
    script = FORKED.format(root=tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )

    assert done.stdout.split() == ["child", "0", "parent", "0", "1", "2", "3"], done.stderr


FORKED = """
import os, sys
import numpy as np
import ckpt_callbacks as cc
from ckpt_callbacks.testing import MemoryStore

store = MemoryStore()
callbacks = cc.Callbacks(
    cc.OrbaxCheckpoint("{root}", save=cc.EveryNSteps(100), keep=cc.LatestN(1)), store
)
with callbacks.run({{"w": np.zeros(3)}}) as run:
    for step in range(2):
        run.on_step(step, {{"w": np.zeros(3)}}, {{"loss": step}})
    child = os.fork()
    if not child:
        run.on_step(200, {{"w": np.ones(3)}}, {{"loss": 200}})
    else:
        print("child", os.waitpid(child, 0)[1])
        for step in range(2, 4):
            run.on_step(step, {{"w": np.zeros(3)}}, {{"loss": step}})
if not child:
    os._exit(0)
print("parent", *(p.step for p in store.points))
"""


def test_a_record_that_was_removed_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 4)
    (root / ".ckpt_callbacks" / "records" / "3.json").unlink()

    with callbacks_in(root).run(new_state()) as run:
        assert run.next_step == 4
        assert run.state["model"]["w"][0, 0] == 4


def test_a_start_that_fails_leaves_no_lock_and_no_thread(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root, MemoryStore()), 2)
    shutil.rmtree(root / ".ckpt_callbacks" / "stores")
    (root / ".ckpt_callbacks" / "stores").write_text("not a folder")

    for _ in range(2):
        with (
            pytest.raises(cc.ConfigError, match=r"cannot write to the run directory .*stores"),
            callbacks_in(root, MemoryStore()).run({"w": 1}),
        ):
            pass

    assert not [t for t in threading.enumerate() if t.name.startswith("ckpt-")]


def test_a_policy_of_ones_own_can_be_read_back(tmp_path: Path) -> None:
    class Even(cc.KeepPolicy):
        def keep(self, history: Any) -> dict[int, str]:
            return {c.step: "even" for c in history if c.step % 2 == 0}

        def __str__(self) -> str:
            return "Even()"

    callbacks = callbacks_in(tmp_path / "run", keep=Even() | cc.LatestN(1))
    with callbacks.run(new_state()) as run:
        for step in range(4):
            run.on_step(step, new_state())

    assert local_steps(tmp_path / "run") == {0, 2, 3}
    assert [(r.step, r.reason) for r in run.summary().rows] == [
        (0, "Even()"),
        (2, "Even()"),
        (3, "Even(), latest #1"),
    ]
    assert cc.restore(tmp_path / "run", like=new_state()) is not None


def test_a_late_evaluation_of_an_evicted_step_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with callbacks_in(tmp_path / "run", keep=cc.LatestN(1)).run(new_state()) as run:
        for step in range(3):
            run.on_step(step, new_state())
        run.wait()
        while (tmp_path / "run" / ".ckpt_callbacks" / "records" / "0.json").exists():
            pass
        run.on_eval(0, {"score": 1.0})

    assert "step 0 was evicted before this evaluation of it came" in caplog.text


def test_saves_on_evaluations_and_by_hand(tmp_path: Path) -> None:
    recorder = Recorder()
    checkpoint = cc.OrbaxCheckpoint(tmp_path / "run", save=cc.OnEval(), keep=cc.LatestN(9))
    with cc.Callbacks(checkpoint, recorder).run(new_state()) as run:
        for step in range(6):
            if step in (0, 3):
                run.on_eval(step, {"score": 0.1})
            if step == 4:
                run.save(step, new_state())
            run.on_step(step, new_state())
        run.wait()
        assert [e.step for e in recorder.of(cc.Saved)] == [0, 3, 4]  # type: ignore[attr-defined]
        with pytest.raises(cc.UsageError, match="step 4 is not newer than 4"):
            run.save(4, new_state())


def test_what_would_be_evicted_at_once_is_not_written(tmp_path: Path) -> None:
    recorder = Recorder()
    keep = cc.BestN(1, "score", mode="max")
    checkpoint = cc.OrbaxCheckpoint(tmp_path / "run", save=cc.OnImprovement(), keep=keep)
    with cc.Callbacks(checkpoint, recorder).run(new_state()) as run:
        for step, score in enumerate([0.5, 0.1, math.nan, 0.7, 0.6]):
            run.on_eval(step, {"score": score})
            run.on_step(step, new_state())

    assert [e.step for e in recorder.of(cc.Saved)] == [0, 3]  # type: ignore[attr-defined]


def test_why_a_step_is_kept_or_gone(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 5, {0: 0.9, 1: 0.2, 3: math.nan})
    command = Path(sys.executable).with_name("ckpt-callbacks")

    def why(step: int) -> str:
        done = subprocess.run(
            [command, "why", root, str(step)], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    assert "Step 0 is kept: best #1. It is 'best'." in why(0)
    assert "Step 1 was evicted: latest #3 of" in why(1)
    assert "score 0.2 is best #2 of 2, BestN(1, 'score', mode='max') keeps 1" in why(1)
    assert "Its metrics were: loss 1, score 0.2" in why(1)
    assert "Error: " in why(77)
    assert "never had a step 77; it has 0, 3, 4" in why(77)


def test_checkpoints_are_listed_as_values(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 4, {1: 0.9})

    found = cc.checkpoints(tmp_path / "run")

    assert [c.step for c in found] == [1, 2, 3]
    assert found[0].metrics == {"score": 0.9, "loss": 1.0}
    assert found[0].path == tmp_path / "run" / "1"
    assert found[-1].aliases == ["last"]
    assert found[0].bytes > 0
    with pytest.raises(cc.ConfigError, match="is no run directory"):
        cc.checkpoints(tmp_path)


def test_a_policy_that_raises_is_reported_and_stops_no_thread(tmp_path: Path) -> None:
    def broken(history: Any) -> list[int]:
        raise ZeroDivisionError("oops")

    recorder = Recorder()
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(1), keep=broken),
        MemoryStore(),
        recorder,
        drain_limit=1,
    )
    train(callbacks, 3)

    assert local_steps(tmp_path / "run") == {0, 1, 2}
    (ended,) = recorder.of(cc.RunEnded)
    assert ended.unsent == {"memory": "what is to be kept (ZeroDivisionError: oops)"}  # type: ignore[attr-defined]
