"""A profile tells where the time of the callbacks goes; without one nothing is wrapped."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.events import RunEnded, Step
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.profile import Profile, Row
from ckpt_callbacks.testing import FakeClock, MemoryStore
from ckpt_callbacks.worker import Worker
from loops import KEEP, new_state


class Takes:
    """Lets time pass on a clock in every hook."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    @cc.hookimpl(every=10)
    def on_step(self, event: Step) -> None:
        self.clock.advance(2.0 if event.step == 10 else 1.0)

    @cc.hookimpl
    def on_run_ended(self) -> None:
        self.clock.advance(5.0)


class Around(Takes):
    @cc.hookimpl(wrapper=True)
    def on_run_ended(self, event: RunEnded) -> Iterator[object]:
        self.clock.advance(0.25)
        result = yield
        self.clock.advance(0.5)
        return result


def profile(clock: FakeClock) -> Profile:
    """Return a profile for which three quarters of all time are CPU."""
    return Profile(clock, lambda: 0.75 * clock.steady)


def rows_of(found: Profile | None) -> dict[str, Row]:
    """Return the rows by the last part of their names."""
    assert found
    rows = {row.name.rpartition(".<locals>.")[2]: row for row in found.rows}
    assert len(rows) == len(found.rows)
    return {name.removeprefix(f"{__name__}."): row for name, row in rows.items()}


def test_each_hook_of_a_plugin_is_counted() -> None:
    clock = FakeClock()
    found = profile(clock)
    hooks = Hooks([Takes(clock)], timed=found.timed)
    due = hooks.first_step(5)
    for step in range(5, 35):
        if step >= due:
            due = hooks.step(Step(step, None, {}))
    hooks.emit(RunEnded("finished", {}))

    rows = rows_of(found)
    assert rows == {
        "Takes.on_step": Row(rows["Takes.on_step"].name, "loop", 4, 5.0, 5.0, 3.75, 2.0),
        "Takes.on_run_ended": Row(rows["Takes.on_run_ended"].name, "loop", 1, 5.0, 5.0, 3.75, 5.0),
    }
    assert rows["Takes.on_step"].mean == 1.25


def test_a_wrapper_is_counted_without_those_it_wraps() -> None:
    clock = FakeClock()
    found = profile(clock)
    Hooks([Takes(clock), Around(clock)], timed=found.timed).emit(RunEnded("finished", {}))

    rows = rows_of(found)
    assert (rows["Takes.on_run_ended"].calls, rows["Takes.on_run_ended"].seconds) == (1, 5.0)
    around = rows["Around.on_run_ended"]
    assert (around.calls, around.seconds, around.max) == (1, 0.75, 0.5)


def test_order_critical_and_wrappers_are_as_without(caplog: pytest.LogCaptureFixture) -> None:
    def told(timed: dict[str, Any]) -> list[object]:
        calls: list[object] = []

        class First:
            @cc.hookimpl(tryfirst=True, critical=True)
            def on_saved(self, event: cc.Saved) -> None:
                calls.append("first")
                raise SystemExit(3)

            @cc.hookimpl(trylast=True)
            def on_run_ended(self, event: RunEnded) -> None:
                raise ZeroDivisionError("oops")

        class Other:
            @cc.hookimpl
            def on_saved(self) -> None:
                calls.append("other")

            @cc.hookimpl(wrapper=True)
            def on_run_ended(self, event: RunEnded) -> Iterator[None]:
                try:
                    yield
                except ZeroDivisionError as error:
                    calls.append(f"wrapped {error}")
                    raise LookupError("worse") from error

        hooks = Hooks([Other(), First()], critical=lambda e: calls.append(repr(e)), **timed)
        thread = threading.Thread(
            target=hooks.emit, args=[cc.Saved(1, Path(), {}, 1, 1.0)], name="ckpt-test"
        )
        thread.start()
        thread.join()
        with pytest.raises(SystemExit):
            hooks.emit(cc.Saved(1, Path(), {}, 1, 1.0))
        hooks.emit(RunEnded("finished", {}))
        calls += [(r.message, r.exc_info and repr(r.exc_info[1])) for r in caplog.records]
        caplog.clear()
        return calls

    found = Profile(FakeClock())
    with caplog.at_level(logging.ERROR, "ckpt_callbacks"):
        without, with_profile = told({}), told({"timed": found.timed})

    assert with_profile == without
    assert "first" in without
    assert "wrapped oops" in without
    rows = {(n.rpartition(".<locals>.")[2], t): c for n, t, c in calls_of(found)}
    assert rows == {
        ("First.on_saved", "background"): 1,
        ("First.on_saved", "loop"): 1,
        ("Other.on_saved", "background"): 1,
        ("First.on_run_ended", "loop"): 1,
        ("Other.on_run_ended", "loop"): 1,
    }


def calls_of(found: Profile) -> list[tuple[str, str, int]]:
    return [(row.name, row.thread, row.calls) for row in found.rows]


def test_what_is_within_counts_once() -> None:
    clock = FakeClock()
    found = profile(clock)

    @found.timed("failing")
    def fail() -> None:
        clock.advance(3)
        raise ZeroDivisionError

    with found.timed("outer"):
        clock.advance(1)
        for _ in range(2):
            with found.timed("inner"):
                clock.advance(4)
        with pytest.raises(ZeroDivisionError):
            fail()
    clock.advance(88)
    found.end()
    clock.advance(1000)

    rows = [(r.name, r.calls, r.own, r.seconds, r.max) for r in found.rows]
    assert rows == [
        ("inner", 2, 8.0, 8.0, 4.0),
        ("failing", 1, 3.0, 3.0, 3.0),
        ("outer", 1, 1.0, 12.0, 12.0),
    ]
    assert (found.seconds, found.share) == (100.0, 0.12)
    assert found.line() == (
        "callbacks took 12.0 % of 100 s; the largest: inner 8 s, failing 3 s, outer 1 s"
    )


def test_threads_lose_nothing_and_do_not_wait_for_each_other() -> None:
    clock = FakeClock()
    found = profile(clock)
    within, all_within = found.timed("within"), threading.Barrier(9)

    def work() -> None:
        with found.timed("outer"):
            all_within.wait()  # so all nine are under way at once
            for _ in range(500):
                with within:
                    pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()

    assert sorted(calls_of(found)) == [
        ("outer", "background", 8),
        ("outer", "loop", 1),
        ("within", "background", 4000),
        ("within", "loop", 500),
    ]


def test_without_a_profile_nothing_is_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Hooks] = []
    workers: list[Worker] = []

    def noted(of: list[Any], init: Callable[..., None]) -> Callable[..., None]:
        def call(made: Any, *arguments: Any, **options: Any) -> None:
            init(made, *arguments, **options)
            of.append(made)

        return call

    def none(*arguments: object) -> None:
        pytest.fail("a profile was made")

    monkeypatch.setattr(Hooks, "__init__", noted(made, Hooks.__init__))
    monkeypatch.setattr(Worker, "__init__", noted(workers, Worker.__init__))
    monkeypatch.setattr(Profile, "__init__", none)
    plugin, store = Takes(FakeClock()), MemoryStore()
    with cc.Callbacks(cc.OrbaxCheckpoint(tmp_path, keep=KEEP, save=cc.AtEnd()), plugin, store).run(
        new_state()
    ) as run:
        assert type(run) is cc.Run
        assert not {"on_step", "on_eval", "save", "wait"} & vars(run).keys()
        assert run._saves
        engine = run._saves.engine
        assert run._log == engine._buffer.append
        assert engine.save == engine._saver.save  # type: ignore[union-attr]
        assert [w._call.put for w in workers] == [store.put]
    assert [step.call[0] for step in made[-1]._steps] == [plugin.on_step]
    assert (run.profile, run.summary().profile) == (None, None)


def test_the_loop_without_a_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    class Evaluates:
        @cc.hookimpl
        def on_step(self, event: Step) -> None:
            run.on_eval(event.step, {"score": 1.0})
            clock.advance(0.5)

        @cc.hookimpl
        def on_eval(self, event: cc.Eval) -> None:
            clock.advance(0.25)

    with cc.Callbacks(Evaluates(), profile=True, clock=clock).run(new_state()) as run:
        state = run.state
        for step in range(4):
            run.on_step(step, state, {"loss": 1.0})
            clock.advance(3.0)

    rows = rows_of(run.profile)
    assert {name: (r.calls, r.own, r.seconds) for name, r in rows.items() if r.own} == {
        "Evaluates.on_step": (4, 2.0, 3.0),
        "Evaluates.on_eval": (4, 1.0, 1.0),
    }
    assert (rows["run.on_step"].calls, rows["run.on_step"].seconds) == (4, 3.0)
    assert run.profile
    assert (run.profile.seconds, run.profile.share) == (15.0, 0.2)
    assert run.summary().profile is run.profile
    (record,) = caplog.records
    assert record.message == str(run.profile)
    assert record.message.startswith("callbacks took 20.0 % of 15 s; the largest: ")
    assert "│ run.on_step " in record.message


def test_a_run_that_fails_raises_what_it_raised_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with cc.Callbacks(profile=True).run(new_state()) as run:
            run.on_step(0, run.state)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    (record,) = caplog.records
    assert record.message.startswith("callbacks took ")


def test_a_run_that_saves(tmp_path: Path) -> None:
    store, state = MemoryStore(), new_state()
    checkpoint = cc.OrbaxCheckpoint(
        tmp_path, save=cc.EveryNSteps(2), keep=cc.LatestN(2), synchronous=True
    )
    with cc.Callbacks(checkpoint, store, profile=True).run(state) as run:
        state = run.state
        for step in range(6):
            run.on_step(step, state, {"loss": jnp.float32(step)})
    puts = store.calls.count("put")

    assert run.profile
    rows = {(row.name, row.thread): row for row in run.profile.rows}
    assert {name: row.calls for name, row in rows.items() if name[1] == "loop"} == {
        ("entering the run", "loop"): 1,
        ("run.state", "loop"): 1,
        ("run.on_step", "loop"): 6,
        ("handing over metrics", "loop"): 6,
        ("save", "loop"): 3,
        ("capture", "loop"): 3,
        ("record of the save", "loop"): 3,
        ("Orbax's call", "loop"): 3,
        # Before each save, after it (`synchronous`), and three times at the end.
        ("waiting for a save", "loop"): 9,
        ("leaving the run", "loop"): 1,
    }
    behind = {name: row.calls for (name, thread), row in rows.items() if thread == "background"}
    assert behind["waiting for the commit"] == behind["digests and fsync"] == 3
    assert behind["reading metrics"] >= 3
    assert behind["memory: put"] == puts > 0
    assert behind["memory: alias"] == store.calls.count("alias")
    assert behind["memory: delete"] == store.calls.count("delete")
    assert behind["memory: listing"] == behind["memory: open"] == behind["memory: close"] == 1

    parts = ("capture", "record of the save", "Orbax's call")
    within = sum(rows[part, "loop"].seconds for part in parts)
    whole = rows["save", "loop"]
    assert 0 < within <= whole.seconds <= rows["run.on_step", "loop"].seconds
    assert whole.own == pytest.approx(whole.seconds - within)
    assert 0 < run.profile.share <= 1
