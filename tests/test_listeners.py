"""Listeners that call the run, ask of its directory, or end the program: none stops the loop."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks import orbax_io
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.failpoints import arm
from ckpt_callbacks.inbox import Measured, submit
from ckpt_callbacks.testing import MemoryStore, Recorder
from loops import callbacks_in, local_steps, new_state, train

pytestmark = pytest.mark.timeout(120)
LIMIT = 30
"""Seconds after which what should have happened is taken for a deadlock."""
ENTER = """
import sys
import ckpt_callbacks as cc
from loops import callbacks_in, new_state
try:
    with callbacks_in(sys.argv[1]).run(new_state()):
        print("entered")
except cc.DirectoryLocked as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm(None)


def bounded(body: Callable[[], object]) -> None:
    """Run `body` on a thread of its own, so that a deadlock fails the test and hangs nothing."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive(), "a deadlock"
    if raised:
        raise raised[0]


def enter_elsewhere(root: Path) -> str:
    """Enter a run in another process; return what came of it."""
    command = [sys.executable, "-c", ENTER, root]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent, check=True
    )
    return done.stdout


class OnSaved:
    """Calls `then` with the step of each checkpoint, and tells of what that raised."""

    def __init__(self, then: Callable[[int], object]) -> None:
        self.then = then
        self.errors: list[BaseException] = []

    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        try:
            self.then(event.step)
        except Exception as error:
            self.errors.append(error)
            raise


def test_a_listener_may_wait_for_saves_while_the_next_one_is_in_flight(tmp_path: Path) -> None:
    begun, returned = threading.Event(), threading.Event()

    def wait(step: int) -> None:
        if step == 0:
            begun.wait(LIMIT)
            run.wait()
            returned.set()

    listener = OnSaved(wait)
    run = callbacks_in(tmp_path, listener).run(new_state())

    def body() -> None:
        with run:
            run.on_step(0, new_state())
            run.on_step(1, new_state())
            begun.set()
            run.on_step(2, new_state())

    bounded(body)

    assert returned.is_set()
    assert not listener.errors
    assert 2 in local_steps(tmp_path)


@pytest.mark.parametrize("where", ["at once", "at the commit"])
def test_a_listener_may_wait_when_a_save_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real, begun, returned = orbax_io.save, threading.Event(), threading.Event()

    class Broken:
        def result(self) -> None:
            raise OSError("the disk broke")

    def broken(*_: object) -> Broken:
        monkeypatch.setattr(orbax_io, "save", real)
        if where == "at once":
            raise OSError("the disk broke")
        return Broken()

    class Waits:
        @cc.hookimpl
        def on_save_failed(self, event: cc.SaveFailed) -> None:
            if where == "at the commit":
                begun.wait(LIMIT)  # the next save has begun, which this thread is to finish
            run.wait()
            returned.set()

    run = callbacks_in(tmp_path, Waits()).run(new_state())

    def body() -> None:
        with run:
            monkeypatch.setattr(orbax_io, "save", broken)
            run.on_step(0, new_state())
            run.on_step(1, new_state())
            begun.set()

    bounded(body)

    assert returned.is_set()
    assert local_steps(tmp_path) == {1}


def test_a_listener_may_evaluate_while_the_next_save_fails_at_once(tmp_path: Path) -> None:
    saving = threading.Event()

    def fail(point: str) -> None:
        if point == "save-begins":
            saving.set()
            raise OSError("the disk is full for a moment")

    def evaluate(step: int) -> None:
        assert saving.wait(LIMIT)
        run.on_eval(step, {"score": 1.0})

    listener, recorder = OnSaved(evaluate), Recorder()
    run = callbacks_in(tmp_path, listener, recorder).run(new_state())

    def body() -> None:
        with run:
            run.on_step(0, new_state())
            run.wait()
            arm(fail)
            run.on_step(1, new_state())

    bounded(body)

    assert not listener.errors
    assert [e.step for e in recorder.events if isinstance(e, cc.SaveFailed)] == [1]
    assert cc.find(tmp_path, "best").metrics["score"] == 1.0


@pytest.mark.parametrize("save", [cc.EveryNSteps(1), cc.AtEnd()], ids=str)
def test_an_evaluation_of_the_last_checkpoint_counts_even_if_it_takes_its_time(
    tmp_path: Path, save: cc.SavePolicy
) -> None:
    def evaluate(step: int) -> None:
        if step == 2:
            time.sleep(0.3)  # an evaluation takes time: meanwhile the loop is left
        run.on_eval(step, {"score": step})

    listener, store = OnSaved(evaluate), MemoryStore()
    keep = cc.LatestN(2) | cc.BestN(1, "score", mode="max")
    callbacks = cc.Callbacks(cc.OrbaxCheckpoint(tmp_path, save=save, keep=keep), store, listener)
    run = callbacks.run(new_state())

    def body() -> None:
        with run:
            for step in range(3):
                run.on_step(step, new_state(step))

    bounded(body)

    assert not listener.errors
    assert cc.find(tmp_path, "best").step == 2
    assert store.aliases == {"best": 2, "last": 2}


class Exits:
    """Ends the program in one hook."""

    def __init__(self, hook: str) -> None:
        self.hook = hook
        self.told = threading.Event()

    def _end(self, hook: str) -> None:
        if hook == self.hook:
            self.told.set()
            sys.exit("enough")

    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        self._end("on_saved")

    @cc.hookimpl
    def on_mirrored(self, event: cc.Mirrored) -> None:
        self._end("on_mirrored")


@pytest.mark.parametrize("hook", ["on_saved", "on_mirrored"])
def test_a_listener_that_exits_ends_the_training_at_its_next_call(
    tmp_path: Path, hook: str
) -> None:
    listener, recorder = Exits(hook), Recorder()
    taken: list[int] = []
    root = tmp_path / "run"
    callbacks = callbacks_in(root, MemoryStore(), listener, recorder, keep=cc.LatestN(1))

    def body() -> None:
        with callbacks.run(new_state()) as run:
            run.on_step(0, new_state())
            assert listener.told.wait(LIMIT)
            for step in range(1, 300):  # the exception is on its way
                run.on_step(step, new_state())
                taken.append(step)

    with pytest.raises(SystemExit, match="enough"):
        bounded(body)

    assert len(taken) < 299
    (ended,) = recorder.of(cc.RunEnded)
    assert isinstance(ended, cc.RunEnded)
    assert ended.status == "failed"
    with callbacks_in(root).run(new_state()) as again:
        assert again.next_step >= 1


@pytest.mark.parametrize("hook", ["on_saved", "on_mirrored"])
def test_a_listener_that_exits_when_the_loop_is_over_still_ends_the_program(
    tmp_path: Path, hook: str
) -> None:
    store = MemoryStore()

    with pytest.raises(SystemExit, match="enough"):
        bounded(lambda: train(callbacks_in(tmp_path, store, Exits(hook)), 1))

    assert store.aliases == {"last": 0}
    assert enter_elsewhere(tmp_path) == "entered\n"


class Guard:
    @cc.hookimpl(critical=True)
    def on_saved(self, event: cc.Saved) -> None:
        raise RuntimeError("the loss is NaN")


class StepGuard:
    @cc.hookimpl(critical=True)
    def on_step(self, event: cc.Step) -> None:
        raise RuntimeError("the loss is NaN")


class Evaluator:
    """Evaluates each checkpoint, on a thread of ours."""

    run: cc.Run[Any]

    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        self.run.on_eval(event.step, {"score": 1.0})


class StepEvaluator:
    """Evaluates each step, on the loop's thread."""

    run: cc.Run[Any]

    @cc.hookimpl
    def on_step(self, event: cc.Step) -> None:
        self.run.on_eval(event.step, {"score": 1.0})


@pytest.mark.parametrize("kinds", [(Guard, Evaluator), (StepGuard, StepEvaluator)])
@pytest.mark.parametrize("order", [1, -1])
def test_an_evaluating_listener_does_not_swallow_what_is_to_end_the_training(
    tmp_path: Path, kinds: tuple[type, type], order: int
) -> None:
    plugins = [kind() for kind in kinds]
    told = threading.Event()

    class Last:
        @cc.hookimpl(trylast=True)
        def on_saved(self, event: cc.Saved) -> None:
            told.set()

    run = callbacks_in(tmp_path, *plugins[::order], Last()).run(new_state())
    plugins[1].run = run

    def body() -> None:
        with run:
            for step in range(3):
                told.clear()
                run.on_step(step, new_state())
                assert told.wait(LIMIT)

    with pytest.raises(RuntimeError, match="the loss is NaN"):
        bounded(body)


def test_a_step_hook_that_is_critical_ends_the_training_at_its_own_step(tmp_path: Path) -> None:
    evaluator = StepEvaluator()
    run = callbacks_in(tmp_path, StepGuard(), evaluator).run(new_state())
    evaluator.run = run

    with run, pytest.raises(RuntimeError, match="the loss is NaN"):
        run.on_step(0, new_state())


def test_a_pin_in_the_training_process_works_and_leaves_the_directory_locked(
    tmp_path: Path,
) -> None:
    answers: list[bool] = []

    def pin(step: int) -> None:
        if step == 0:
            answers.append(cc.pin(tmp_path, step, timeout=LIMIT))

    def body() -> None:
        with callbacks_in(tmp_path, OnSaved(pin), keep=cc.LatestN(1)).run(new_state()) as run:
            run.on_step(0, new_state())
            run.on_step(1, new_state())
            run.wait()
            answers.append(cc.pin(tmp_path, 1, timeout=LIMIT))
            assert cc.unpin(tmp_path, 1, timeout=LIMIT)
            assert f"is in use by process {RunDirectory(tmp_path)._read_owner()['pid']}" in (
                enter_elsewhere(tmp_path)
            )
            run.on_step(2, new_state())

    bounded(body)

    assert answers == [True, True]
    assert local_steps(tmp_path) == {0, 2}
    assert cc.find(tmp_path, 0).reason == "pinned"


def test_a_pin_while_the_run_is_entered_or_left_is_applied_later(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path, keep=cc.LatestN(2)), 2)
    answers: list[bool] = []

    class Pins:
        @cc.hookimpl
        def on_run_started(self, event: cc.RunStarted) -> None:
            answers.append(cc.pin(tmp_path, 0, timeout=10 * LIMIT))

    def body() -> None:
        train(callbacks_in(tmp_path, Pins(), keep=cc.LatestN(1)), 4)

    bounded(body)

    assert answers == [False]
    assert cc.find(tmp_path, 0).reason == "pinned"


def test_a_pin_on_the_thread_that_applies_requests_is_applied_later(tmp_path: Path) -> None:
    """It would wait for itself."""
    answered = threading.Event()
    answers: list[bool] = []

    class Pins:
        @cc.hookimpl
        def on_eval(self, event: cc.Eval) -> None:
            answers.append(cc.pin(tmp_path, event.step, timeout=10 * LIMIT))
            answered.set()

    def body() -> None:
        with callbacks_in(tmp_path, Pins(), keep=cc.LatestN(1)).run(new_state()) as run:
            run.on_step(0, new_state())
            run.wait()
            asked = time.monotonic()
            submit(RunDirectory(tmp_path), Measured(0, {"score": 1.0}, time.time()))
            assert answered.wait(LIMIT)
            while "pinned" not in cc.find(tmp_path, 0).reason:
                assert time.monotonic() < asked + LIMIT
            run.on_step(1, new_state())

    bounded(body)

    assert answers == [False]
    assert local_steps(tmp_path) == {0, 1}
