"""Plugins: what is refused, who is called, and what a failing one does to the others."""

import dataclasses
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.events import Evicted, RunEnded, Step
from ckpt_callbacks.hooks import NEVER, Hooks
from ckpt_callbacks.testing import MemoryStore, Recorder
from loops import callbacks_in, train


class Steps:
    def __init__(self) -> None:
        self.seen: list[int] = []

    @cc.hookimpl(every=10)
    def on_step(self, event: Step) -> None:
        self.seen.append(event.step)


def drive(hooks: Hooks, steps: range) -> list[int]:
    """Call the hooks as a run does; return the steps at which they were called at all."""
    called = []
    due = hooks.first_step(steps.start)
    for step in steps:
        if step >= due:
            called.append(step)
            due = hooks.step(Step(step, None, {}))
    return called


def test_every_asks_for_the_first_step_in_each_bucket() -> None:
    plugin = Steps()

    drive(Hooks([plugin]), range(3, 41))

    assert plugin.seen == [3, 10, 20, 30, 40]


def test_steps_that_no_plugin_wants_cost_no_call() -> None:
    assert drive(Hooks([Steps()]), range(30)) == [0, 10, 20]
    assert drive(Hooks([]), range(30)) == []
    assert Hooks([]).first_step(0) == NEVER


def test_a_misspelt_hook_is_refused_with_a_suggestion() -> None:
    class Plugin:
        @cc.hookimpl
        def on_sved(self, event: cc.Saved) -> None: ...

    with pytest.raises(cc.ConfigError, match=r"no hook 'on_sved'; did you mean on_saved\?"):
        cc.Callbacks(Plugin())


def test_an_unmarked_hook_is_refused() -> None:
    class Plugin:
        def on_saved(self, event: cc.Saved) -> None: ...

    with pytest.raises(
        cc.ConfigError, match=r"on_saved is not marked with @ckpt_callbacks\.hookimpl"
    ):
        cc.Callbacks(Plugin())


def test_a_wrong_signature_is_refused() -> None:
    class Plugin:
        @cc.hookimpl
        def on_saved(self, step: int, path: str) -> None: ...

    with pytest.raises(cc.ConfigError, match=r"on_saved has the parameters .* only one is `event`"):
        cc.Callbacks(Plugin())


def test_a_step_can_not_be_wrapped() -> None:
    """The plugins inside run at steps of their own."""
    with pytest.raises(cc.ConfigError, match="on_step can not be wrapped"):

        class Plugin:
            @cc.hookimpl(wrapper=True)
            def on_step(self, event: Step) -> Iterator[None]:
                yield


def test_something_that_is_no_plugin_is_refused() -> None:
    with pytest.raises(cc.ConfigError, match="'runs/digits' is no plugin"):
        cc.Callbacks("runs/digits")


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_every_must_be_a_positive_number(every: int) -> None:
    with pytest.raises(cc.ConfigError, match="every must be an integer of at least 1"):
        cc.hookimpl(every=every)(lambda: None)


def test_every_is_for_steps_only() -> None:
    with pytest.raises(cc.ConfigError, match="every= is for on_step only, not for on_saved"):

        class Plugin:
            @cc.hookimpl(every=2)
            def on_saved(self, event: cc.Saved) -> None: ...


def test_a_failing_plugin_is_reported_and_the_others_run(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        @cc.hookimpl(tryfirst=True)
        def on_evicted(self, event: Evicted) -> None:
            raise ZeroDivisionError("oops")

    class Other:
        seen = 0

        @cc.hookimpl
        def on_evicted(self) -> None:  # an implementation may leave the event out
            self.seen += 1

    other = Other()
    with caplog.at_level(logging.ERROR, "ckpt_callbacks"):
        Hooks([other, Failing()]).emit(Evicted("local", 1, "because"))

    assert other.seen == 1
    assert "Failing failed in on_evicted" in caplog.text
    assert "ZeroDivisionError: oops" in caplog.text


def test_order_and_wrappers_are_as_in_pluggy() -> None:
    calls: list[str] = []

    class First:
        @cc.hookimpl(tryfirst=True)
        def on_run_ended(self, event: RunEnded) -> None:
            calls.append("first")

    class Last:
        @cc.hookimpl(trylast=True)
        def on_run_ended(self, event: RunEnded) -> None:
            calls.append("last")

    class Around:
        @cc.hookimpl(wrapper=True)
        def on_run_ended(self, event: RunEnded) -> Iterator[None]:
            calls.append("before")
            result = yield
            calls.append("after")
            return result

    Hooks([Last(), First()]).emit(RunEnded("finished", {}))
    assert calls == ["first", "last"]

    calls.clear()
    Hooks([Last(), First(), Around()]).emit(RunEnded("finished", {}))
    assert calls == ["before", "first", "last", "after"]


def test_a_listener_may_cause_an_event() -> None:
    seen: list[str] = []

    class Echo:
        def __init__(self) -> None:
            self.hooks: Hooks | None = None

        @cc.hookimpl
        def on_evicted(self, event: Evicted) -> None:
            seen.append(event.store)
            if event.store == "local" and self.hooks:
                self.hooks.emit(Evicted("other", event.step, ""))

    echo = Echo()
    echo.hooks = Hooks([echo])
    echo.hooks.emit(Evicted("local", 1, ""))

    assert seen == ["local", "other"]


def test_order_and_threads_are_as_documented(tmp_path: Path) -> None:
    recorder = Recorder()
    callbacks = callbacks_in(tmp_path / "run", MemoryStore(), recorder, keep=cc.LatestN(1))
    train(callbacks, 3, {1: 0.5})

    events = recorder.events
    loop = threading.main_thread().name
    where = {type(e): set[str]() for e in events}
    for event, thread in zip(events, recorder.threads, strict=True):
        where[type(event)].add(thread)
    assert where == {
        cc.RunStarted: {loop},
        cc.Step: {loop},
        cc.Eval: {loop},
        cc.RunEnded: {loop},
        cc.Saved: {"ckpt-saver"},
        cc.Evicted: {"ckpt-saver", "ckpt-memory"},
        cc.Mirrored: {"ckpt-memory"},
        cc.Promoted: {"ckpt-memory"},
    }
    assert isinstance(events[0], cc.RunStarted)
    assert isinstance(events[-1], cc.RunEnded)

    def at(kind: type[Any], step: int) -> int:
        return next(i for i, e in enumerate(events) if isinstance(e, kind) and e.step == step)

    assert at(cc.Eval, 1) < at(cc.Step, 1)
    for step in {e.step for e in events if isinstance(e, cc.Mirrored)}:
        assert at(cc.Saved, step) < at(cc.Mirrored, step) < at(cc.Promoted, step)
    for i, event in enumerate(events):
        if isinstance(event, cc.Evicted):
            # Another one has taken its place before: on disk, and by name in a store.
            kind = cc.Saved if event.store == "local" else cc.Promoted
            assert any(isinstance(e, kind) and e.step > event.step for e in events[:i])


def test_a_step_is_as_frozen_as_other_events() -> None:
    """Its `__init__` is our own, to be fast."""
    event = Step(3, {"w": 1}, {"loss": 0.5})

    assert event == Step(step=3, state={"w": 1}, metrics={"loss": 0.5})
    assert dataclasses.replace(event, step=4).step == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.step = 5  # type: ignore[misc]
