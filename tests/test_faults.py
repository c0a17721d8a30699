"""Faults that a review found, each with what is promised instead."""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks import directory as directories
from ckpt_callbacks import engine, orbax_io
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.inbox import Pinned, submit
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.stores import Overview
from ckpt_callbacks.testing import MemoryStore
from ckpt_callbacks.worker import Worker
from loops import KEEP, advance, callbacks_in, local_steps, new_state, train, weight

HERE = Path(__file__).parent


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[None]:
    """Run the body until it calls `owner.name`, which it must."""

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            yield


def sparse(
    directory: Path, until: int, *stores: MemoryStore, offset: float = 0.0, **options: Any
) -> None:
    """Train with a checkpoint every 5 steps; `offset` tells one history from another."""
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(5), keep=cc.LatestN(9)),
        *stores,
        drain_limit=0.2 if any(store.down for store in stores) else 10,
    )
    with callbacks.run(new_state(), **options) as run:
        state = run.state
        for step in range(run.next_step, until):
            state = advance(state)
            run.on_step(step, state, {"loss": step + offset})


def with_a_store_down(directory: Path, store: MemoryStore, keep: Any = KEEP) -> cc.Callbacks:
    checkpoint = cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(1), keep=keep)
    return cc.Callbacks(checkpoint, store, drain_limit=0.2)


def run_file(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / ".ckpt_callbacks/run.json").read_text())
    return content


def our_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("ckpt-")}


def flip(step_folder: Path) -> None:
    """Change one bit of the largest file of a checkpoint."""
    files = [p for p in step_folder.rglob("*") if p.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What processes without the trackers do


ASKS: list[Callable[[Path], bool]] = [
    lambda root: cc.report_metrics(root, 2, {"score": 0.5}),
    lambda root: cc.pin(root, 2),
]


@pytest.mark.parametrize("ask", ASKS, ids=["report", "pin"])
def test_a_process_without_the_trackers_loses_no_metrics(
    tmp_path: Path, ask: Callable[[Path], bool]
) -> None:
    store = MemoryStore()
    store.down = True
    train(with_a_store_down(tmp_path, store), 3)

    assert ask(tmp_path)

    store.down = False
    train(callbacks_in(tmp_path, store), 4)
    assert [p.step for p in store.points if "loss" in p.values] == [0, 1, 2, 3]


@pytest.mark.parametrize("ask", ASKS, ids=["report", "pin"])
def test_a_process_without_the_trackers_puts_no_changed_policy_in_force(
    tmp_path: Path, ask: Callable[[Path], bool]
) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path, store, keep=cc.LatestN(5)), 5)
    store.down = True
    train(with_a_store_down(tmp_path, store, cc.LatestN(1)), 6)
    before = local_steps(tmp_path)
    assert before == {1, 2, 3, 4, 5}
    assert run_file(tmp_path)["change"]

    assert ask(tmp_path)

    assert local_steps(tmp_path) == before
    assert run_file(tmp_path)["change"]
    cc.unpin(tmp_path, 2)
    store.down = False
    train(callbacks_in(tmp_path, store, keep=cc.LatestN(1)), 7)
    assert local_steps(tmp_path) == set(store.copies) == {6}
    assert not run_file(tmp_path)["change"]


# Steps, metadata and settings


@pytest.mark.parametrize("kind", [np.int64, np.uint8, jnp.int32])
def test_a_step_of_another_integer_type_works_to_the_end(
    tmp_path: Path, kind: Callable[[int], Any]
) -> None:
    store = MemoryStore()
    callbacks = callbacks_in(tmp_path, store, keep=cc.LatestN(2))
    with callbacks.run(new_state()) as run:
        for step in range(3):
            run.on_eval(kind(step), {"score": step})
            run.on_step(kind(step), new_state(step + 1.0), {"loss": step})
        run.save(kind(3), new_state(4.0))
    assert cc.report_metrics(tmp_path, kind(3), {"score": 3})
    assert cc.pin(tmp_path, kind(2))

    train(callbacks_in(tmp_path, store, keep=cc.LatestN(2)), 6)

    assert weight(tmp_path) == 6.0
    assert float(cc.restore(tmp_path, like=new_state(), which=kind(2))["model"]["w"][0, 0]) == 3.0
    assert cc.find(tmp_path, kind(2)).metrics == {"score": 2.0, "loss": 2.0}
    assert local_steps(tmp_path) == set(store.copies) == {2, 4, 5}
    assert [p.step for p in store.points if "loss" in p.values] == [0, 1, 2, 4, 5]
    assert {type(p.step) for p in store.points} == {int}


@pytest.mark.parametrize("kind", [np.int64, jnp.int32])
def test_a_step_of_another_integer_type_can_be_the_last_one(
    tmp_path: Path, kind: Callable[[int], Any]
) -> None:
    with save_every_5(tmp_path).run(new_state()) as run:
        for step in range(3):
            run.on_step(kind(step), new_state(step + 1.0))

    assert local_steps(tmp_path) == {0, 2}
    assert weight(tmp_path) == 3.0


NO_STEPS = [1.0, np.float64(0), True, -1, -7]
REFUSED = "a step must be an integer from 0, not "


@pytest.mark.parametrize("step", NO_STEPS, ids=repr)
def test_what_is_no_step_is_refused_at_the_first_call(tmp_path: Path, step: Any) -> None:
    store = MemoryStore()
    with callbacks_in(tmp_path, store).run(new_state()) as run:
        with pytest.raises(cc.ConfigError, match=f"on_eval: {REFUSED}"):
            run.on_eval(step, {"score": 1.0})
        with pytest.raises(cc.ConfigError, match=f"save: {REFUSED}"):
            run.save(step, new_state())
        with pytest.raises(cc.ConfigError, match=f"on_step: {REFUSED}"):
            run.on_step(step, new_state())
        run.on_step(0, new_state(1.0), {"loss": 1.0})
    with pytest.raises(cc.ConfigError, match=f"report_metrics: {REFUSED}"):
        cc.report_metrics(tmp_path, step, {"score": 1.0})
    for ask in (cc.pin, cc.unpin):
        with pytest.raises(cc.ConfigError, match=REFUSED):
            ask(tmp_path, step)

    assert not list(RunDirectory(tmp_path).inbox.iterdir())
    assert local_steps(tmp_path) == set(store.copies) == {0}
    assert [(p.step, dict(p.values)) for p in store.points] == [(0, {"loss": 1.0})]


@pytest.mark.parametrize("step", NO_STEPS, ids=repr)
def test_a_step_that_is_refused_takes_no_metrics_with_it(tmp_path: Path, step: Any) -> None:
    store = MemoryStore()
    with callbacks_in(tmp_path, store).run(new_state()) as run:
        with pytest.raises(cc.ConfigError, match=f"on_step: {REFUSED}"):
            run.on_step(step, new_state(), {"loss": 2.0})
        run.on_step(0, new_state(1.0), {"loss": 1.0})

    assert [(p.step, dict(p.values)) for p in store.points] == [(0, {"loss": 1.0})]


def test_a_later_float_step_does_not_stop_the_metrics(tmp_path: Path) -> None:
    store = MemoryStore()
    with callbacks_in(tmp_path, store, every=10).run(new_state()) as run:
        run.on_step(0, new_state(), {"loss": 0.0})
        run.on_step(1.5, new_state(), {"loss": 1.5})  # type: ignore[arg-type]
        run.on_step(2, new_state(), {"loss": 2.0})

    assert {p.step for p in store.points} >= {0, 2}


def test_metadata_comes_back_with_names_of_text(tmp_path: Path) -> None:
    with callbacks_in(tmp_path).run(new_state()) as run:
        run.on_eval(0, {"score": 0.5})
        run.on_step(0, new_state(), None, {"lr": {10: 0.01, 2: 0.1}, 7: [1]})  # type: ignore[dict-item]
    train(callbacks_in(tmp_path), 2)

    assert cc.find(tmp_path, 0).metadata == {"lr": {"10": 0.01, "2": 0.1}, "7": [1]}
    assert not (tmp_path / ".ckpt_callbacks/damaged").exists()


def test_settings_of_a_store_may_have_other_names_than_text(tmp_path: Path) -> None:
    class Sharded(MemoryStore):
        def settings(self) -> Mapping[str, Any]:
            return {"shards": {10: "b", 2: "a"}}

    store = Sharded()
    train(callbacks_in(tmp_path, store), 2)

    train(callbacks_in(tmp_path, store), 3)

    assert run_file(tmp_path)["settings"] == {"memory": {"shards": {"10": "b", "2": "a"}}}
    assert store.aliases["last"] == 2


# The inbox


def test_what_is_no_request_stops_neither_the_start_nor_later_requests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(callbacks_in(tmp_path), 3)
    inbox = RunDirectory(tmp_path).inbox

    def spoil() -> None:
        (inbox / "00000000000000000001-x.json").write_bytes(b"\xff\xfe garbage")
        (inbox / "00000000000000000002-backup").mkdir(exist_ok=True)

    spoil()
    with callbacks_in(tmp_path).run(new_state()) as run:
        state = run.state
        spoil()
        submit(RunDirectory(tmp_path), Pinned(1, pinned=True))
        assert cc.report_metrics(tmp_path, 2, {"score": 0.1}, timeout=30)
        run.on_step(3, state)
        run.on_step(4, state)
    spoil()
    assert cc.report_metrics(tmp_path, 1, {"score": 0.9})

    assert cc.find(tmp_path, "best").step == 1
    assert "pinned" in cc.find(tmp_path, 1).reason
    assert [p.name for p in inbox.iterdir()] == ["00000000000000000002-backup"]
    assert "00000000000000000001-x.json is damaged" in caplog.text


# A run that went back


def test_metrics_of_a_run_that_left_out_damage_survive_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse(tmp_path, 13)
    flip(tmp_path / "10")
    with killed_at(monkeypatch, engine, "MetricLog"):
        sparse(tmp_path, 13, offset=100)
    store = MemoryStore()

    sparse(tmp_path, 13, store, offset=100)

    assert [(p.step, p.values["loss"]) for p in store.points] == [
        (s, s + 100) for s in range(6, 13)
    ]


def test_metrics_of_a_rewound_run_survive_kills_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse(tmp_path, 21)
    with killed_at(monkeypatch, engine, "MetricLog"):  # the records say that the newer steps go
        sparse(tmp_path, 30, offset=100, resume=10, discard_newer=True)
    with killed_at(monkeypatch, directories, "verify"):  # and now they are gone
        sparse(tmp_path, 30, offset=100)
    store = MemoryStore()

    sparse(tmp_path, 23, store, offset=100)

    expected = [(s, s + 100) for s in range(11, 23)]
    assert [(p.step, p.values["loss"]) for p in store.points] == expected


def test_a_rewind_while_a_store_is_down_is_told_and_logged_once(tmp_path: Path) -> None:
    good, bad = MemoryStore("good"), MemoryStore("bad")
    sparse(tmp_path, 21, good, bad)
    bad.down = True
    sparse(tmp_path, 13, good, bad, resume=10, discard_newer=True)
    logged = len(good.points)
    assert [p.step for p in good.points[-2:]] == [11, 12]

    for _ in range(2):  # each goes on from 10 and takes 11 and 12 again
        sparse(tmp_path, 13, good, bad)

    assert len(good.points) == logged
    assert sorted(g.step for g in RunDirectory(tmp_path).read_evicted()) == [15, 20]
    bad.down = False
    sparse(tmp_path, 13, good, bad)
    assert bad.points == good.points
    assert set(bad.copies) == set(good.copies) == {0, 5, 10}
    assert sorted(g.step for g in RunDirectory(tmp_path).read_evicted()) == [15, 20]


def test_a_removal_by_hand_is_a_rewind_once(tmp_path: Path) -> None:
    store = MemoryStore()
    sparse(tmp_path, 21, store)
    for step in ("20", "15"):
        shutil.rmtree(tmp_path / step)
    sparse(tmp_path, 13, store)
    logged = len(store.points)
    assert [p.step for p in store.points[-2:]] == [11, 12]

    for _ in range(2):
        sparse(tmp_path, 13, store)

    assert len(store.points) == logged
    steps = [g.step for g in RunDirectory(tmp_path).read_evicted()]
    assert len(steps) == len(set(steps))


def test_after_a_removal_by_hand_the_newest_that_is_there_is_last(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path, keep=cc.LatestN(3)), 4)
    shutil.rmtree(tmp_path / "3")

    assert cc.find(tmp_path).step == 2
    assert weight(tmp_path) == 3.0
    with pytest.raises(cc.CheckpointNotFound, match="it has last and steps 1, 2"):
        cc.find(tmp_path, 3)


def test_a_pinned_step_that_is_discarded_is_not_pinned_any_more(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path, keep=cc.LatestN(3)), 4)
    assert cc.pin(tmp_path, 3)
    assert cc.pin(tmp_path, 1)

    train(callbacks_in(tmp_path, keep=cc.LatestN(3)), 7, resume=1, discard_newer=True)

    assert local_steps(tmp_path) == {1, 4, 5, 6}
    assert run_file(tmp_path)["pins"] == [1]


# What is left behind by an error at the start


def test_a_keep_policy_that_fails_at_the_start_leaves_no_lock_and_no_thread(
    tmp_path: Path,
) -> None:
    train(callbacks_in(tmp_path), 3)
    before = our_threads()

    def mine(history: Sequence[cc.Candidate]) -> list[int]:
        raise ZeroDivisionError("a fault of mine")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="a fault of mine"):
            train(callbacks_in(tmp_path, MemoryStore(), keep=mine), 4)

    assert_nothing_is_left(before)
    train(callbacks_in(tmp_path), 4)
    assert weight(tmp_path) == 4.0


def test_a_critical_listener_at_the_start_leaves_no_lock_and_no_thread(tmp_path: Path) -> None:
    class Checks:
        @cc.hookimpl(critical=True)
        def on_run_started(self, event: cc.RunStarted) -> None:
            raise RuntimeError("no data")

    before = our_threads()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no data"):
            train(callbacks_in(tmp_path, MemoryStore(), Checks()), 4)

    assert_nothing_is_left(before)
    train(callbacks_in(tmp_path), 4)
    assert weight(tmp_path) == 4.0


def test_a_disk_that_is_full_at_the_start_leaves_no_lock_and_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Ledger, status: str) -> None:
        raise OSError(28, "No space left on device")

    before = our_threads()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "entered", full)
        for _ in range(2):
            with pytest.raises(cc.ConfigError, match="No space left on device"):
                train(callbacks_in(tmp_path, MemoryStore()), 1)

    assert_nothing_is_left(before)
    train(callbacks_in(tmp_path), 1)


def assert_nothing_is_left(before: set[threading.Thread]) -> None:
    for thread in our_threads() - before:
        thread.join(10)  # a worker ends once its call returns
    assert our_threads() <= before


# Saves that failed


def save_every_5(directory: Path) -> cc.Callbacks:
    save = cc.EveryNSteps(5) | cc.AtEnd()
    return cc.Callbacks(cc.OrbaxCheckpoint(directory, save=save, keep=cc.LatestN(3)))


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = orbax_io.save

    def once(*_: Any) -> None:
        monkeypatch.setattr(orbax_io, "save", real)
        raise OSError("the disk was full for a moment")

    monkeypatch.setattr(orbax_io, "save", once)


def test_a_step_whose_save_failed_can_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with save_every_5(tmp_path).run(new_state()) as run:
        for step in range(6):
            if step == 5:
                fail_once(monkeypatch)
            run.on_step(step, new_state(step))
        run.save(5, new_state(5))
        with pytest.raises(cc.UsageError, match="step 5 is not newer than 5"):
            run.save(5, new_state(5))

    assert local_steps(tmp_path) == {0, 5}


def test_a_last_step_whose_save_failed_is_saved_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with save_every_5(tmp_path).run(new_state()) as run:
        for step in range(6):
            if step == 5:
                fail_once(monkeypatch)
            run.on_step(step, new_state(step))

    assert local_steps(tmp_path) == {0, 5}
    assert weight(tmp_path) == 5.0


# Reading


def test_damage_is_found_while_evaluations_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(callbacks_in(tmp_path), 3)
    flip(tmp_path / "1")
    real = directories.damage

    def meanwhile(*arguments: Any) -> list[str]:
        found = list(real(*arguments))
        assert cc.report_metrics(tmp_path, 1, {"score": 0.3})
        return found

    monkeypatch.setattr(directories, "damage", meanwhile)

    assert [problem.step for problem in cc.verify(tmp_path)] == [1]


def test_a_step_is_restored_by_number_although_another_record_is_damaged(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path, keep=cc.LatestN(3)), 3)
    record = tmp_path / ".ckpt_callbacks/records/1.json"
    record.write_bytes(record.read_bytes()[:-20])

    assert weight(tmp_path, 2) == 3.0
    assert weight(tmp_path, np.int64(2)) == 3.0  # type: ignore[arg-type]
    with pytest.raises(cc.RecordError, match=r"records/1\.json is not JSON"):
        weight(tmp_path, "last")


def test_a_state_that_is_first_read_when_the_run_is_over_is_an_error(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path), 3)
    with callbacks_in(tmp_path).run(new_state()) as run:
        pass

    with pytest.raises(cc.UsageError, match="first read after the with statement"):
        _ = run.state


# Policies of somebody's own


def test_two_lambdas_are_two_policies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(callbacks_in(tmp_path, keep=lambda history: [c.step for c in history]), 4)

    train(callbacks_in(tmp_path, keep=lambda history: []), 4)

    assert "was changed to lambda in test_faults.py:" in caplog.text
    assert local_steps(tmp_path) == {0, 1, 2, 3}, "it is in force before anything newer is there"
    train(callbacks_in(tmp_path, keep=lambda history: []), 5)
    assert 4 in local_steps(tmp_path)


def without_text() -> cc.KeepPolicy:
    class Mine(cc.KeepPolicy):
        def keep(self, history: Sequence[cc.Candidate]) -> Mapping[int, str]:
            return {c.step: "mine" for c in history[-2:]}

    return Mine()


def partial() -> Callable[[Sequence[cc.Candidate]], list[int]]:
    def newest(n: int, history: Sequence[cc.Candidate]) -> list[int]:
        return [c.step for c in history[-n:]]

    return functools.partial(newest, 2)


@pytest.mark.parametrize("make", [without_text, partial])
def test_a_policy_without_a_text_is_the_same_after_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[], Any]
) -> None:
    """Its address in memory, which is another then, is no part of what is remembered."""
    first, second = make(), make()
    train(callbacks_in(tmp_path, keep=first), 4)

    train(callbacks_in(tmp_path, keep=second), 4)

    assert not run_file(tmp_path)["change"]
    assert "changed" not in caplog.text
    assert " at 0x" not in json.dumps(run_file(tmp_path)["policy"])
    assert local_steps(tmp_path) == {2, 3}


# Forks


FORK = """
import os, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import numpy as np
from loops import callbacks_in, local_steps, new_state

root = Path(sys.argv[1])
state = {"model": {"w": np.ones((4, 4), "float32")}, "moments": {"m": np.zeros(3, "float32")}}
with callbacks_in(root).run(new_state()) as run:
    run.on_step(0, state)
    run.wait()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(20)
            run.on_step(1, state, {"loss": 1.0})
            run.save(2, state)
            run.wait()
            run.__exit__(None, None, None)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    records = sorted(p.name for p in (root / ".ckpt_callbacks/records").iterdir())
    print(sorted(local_steps(root)), records, flush=True)
    run.on_step(1, state)
print(sorted(local_steps(root)))
"""


def test_a_forked_child_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=HERE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[0] ['0.json']", "[0, 1]"]


def test_what_comes_while_a_store_is_busy_at_the_end_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had looked for work before, and was told to finish since."""
    shown, ending = threading.Event(), threading.Event()

    class Busy(MemoryStore):
        def show(self, overview: Overview) -> None:
            shown.set()
            assert ending.wait(60)

    finish = Worker.finish

    def finish_and_tell(self: Worker, status: str) -> None:
        finish(self, status)
        ending.set()

    monkeypatch.setattr(Worker, "finish", finish_and_tell)
    store = Busy()
    with callbacks_in(tmp_path, store).run(new_state()) as run:
        assert shown.wait(60)
        run.on_step(0, new_state(), {"loss": 1.0})

    assert [point.step for point in store.points] == [0]
    assert store.copies.keys() == {0}
    assert store.aliases == {"last": 0}
