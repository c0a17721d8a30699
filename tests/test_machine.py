"""The real ledger, saver and workers against services that fail, under every order of events.

Hypothesis draws the order. The threads are not started: each rule does one piece of their work,
so that a failure replays. Orbax is replaced by something that writes and renames a folder, since
thousands of real saves would take hours; `test_kills.py` has the real one.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import strategies
from ckpt_callbacks import failpoints, orbax_io
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.events import Saved
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.metrics import MetricLog
from ckpt_callbacks.policy import KeepPolicy
from ckpt_callbacks.recovery import recover
from ckpt_callbacks.retention import finite
from ckpt_callbacks.saver import Saver
from ckpt_callbacks.stores import Checkpoint, Copy, Listing, RunInfo
from ckpt_callbacks.testing import MemoryStore, Recorder
from ckpt_callbacks.worker import Worker


class Killed(BaseException):
    """The process is gone."""


class Service(MemoryStore):
    """A store whose service can be down, lose a reply, or list what it held a while ago."""

    def __init__(self, name: str, *, put_moves_aliases: bool) -> None:
        super().__init__(name)
        self.put_moves_aliases = put_moves_aliases
        self.down = False
        self.lose_reply = False
        self.lag = False
        self.changes = 0

    def _called(self, call: str) -> None:
        if self.down:
            raise ConnectionError("down")

    def _changed(self) -> None:
        self.changes += 1
        if self.lose_reply:
            self.lose_reply = False
            raise ConnectionError("applied, but the reply is lost")

    def put(self, checkpoint: Checkpoint, aliases: Any) -> Copy:
        copy = super().put(checkpoint, aliases)
        if self.put_moves_aliases:
            self.aliases |= dict.fromkeys(aliases, checkpoint.step)
        self._changed()
        return copy

    def listing(self) -> Listing | None:
        found = super().listing()
        return Listing({}, {}) if self.lag else found

    def alias(self, name: str, step: int) -> None:
        super().alias(name, step)
        self._changed()

    def delete(self, step: int) -> None:
        # Not an invariant of states: only the order of calls shows it.
        assert self.down or step not in self.aliases.values(), "deleted what an alias names"
        super().delete(step)
        self._changed()


class FakeSave:
    """Stands in for a save of Orbax: a folder that is written aside and renamed."""

    def __init__(self, path: Path, items: Any) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
        shutil.rmtree(self.temporary, ignore_errors=True)
        (self.temporary / "state").mkdir(parents=True)
        (self.temporary / "_CHECKPOINT_METADATA").write_text("{}")
        (self.temporary / "state" / "data").write_bytes(items["state"]["w"].tobytes())

    def result(self, timeout: float | None = None) -> None:
        self.temporary.rename(self.path)


class Machine(RuleBasedStateMachine):
    @initialize(policy=strategies.policies)
    def begin(self, policy: KeepPolicy) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="machine-"))
        self.services = [
            Service("one", put_moves_aliases=False),
            Service("two", put_moves_aliases=True),
        ]
        self.policy = policy
        self.directory: RunDirectory | None = None
        self.step = -1
        self.acknowledged = -1
        self.open()

    def open(self) -> None:
        """What a new process does; the old one may have been killed anywhere, here too."""
        if self.directory:
            self.directory.release()
        directory = self.directory = RunDirectory(self.root)
        self.recorder = Recorder()
        hooks = Hooks([self.recorder])
        directory.acquire()
        self.ledger = Ledger(directory, self.policy, stores={s.name: None for s in self.services})
        recover(self.ledger)
        newest = self.ledger.newest()
        self.step = newest.step if newest else -1
        self.saver = Saver(self.ledger, hooks, lambda: None)
        log = MetricLog(directory.meta, self.step)
        self.workers = [Worker(s, self.info(s), self.ledger, log, hooks) for s in self.services]

    def info(self, service: Service) -> RunInfo:
        return RunInfo(self.ledger.run_id, "run", {}, self.root, {})

    def guarded(self, call: Callable[[], object]) -> None:
        """Do something that a kill may cut short; then a new process opens the directory."""
        while True:
            try:
                call()
            except Killed:
                failpoints.arm(None)
                call = self.open
            else:
                return

    @rule(metrics=strategies.metrics)
    def save(self, metrics: dict[str, float]) -> None:
        def body() -> None:
            self.step += 1
            state = {"w": np.array([self.step])}
            self.saver.save(self.step, state, metrics, {}, {})
            work = self.saver._work.get_nowait()
            assert work is not None
            self.saver._finish(work)

        self.guarded(body)
        saved = [e.step for e in self.recorder.events if isinstance(e, Saved)]
        self.acknowledged = max([self.acknowledged, *saved])

    @rule()
    def evict(self) -> None:
        self.guarded(self.saver.evict)

    @rule(which=st.integers(0, 1), times=st.integers(1, 6))
    def work(self, which: int, times: int) -> None:
        def body() -> None:
            for _ in range(times):
                self.workers[which]._round()

        self.guarded(body)

    @rule(back=st.integers(0, 6), metrics=strategies.metrics)
    def measure_late(self, back: int, metrics: dict[str, float]) -> None:
        self.guarded(lambda: self.ledger.measured(self.step - back, metrics))

    @rule(which=st.integers(0, 1), down=st.booleans())
    def outage(self, which: int, down: bool) -> None:
        self.services[which].down = down

    @rule(which=st.integers(0, 1))
    def lose_a_reply(self, which: int) -> None:
        self.services[which].lose_reply = True

    @rule(which=st.integers(0, 1), lag=st.booleans())
    def lag(self, which: int, lag: bool) -> None:
        self.services[which].lag = lag

    @rule(after=st.integers(1, 25))
    def kill(self, after: int) -> None:
        left = after

        def action(name: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        failpoints.arm(action)

    @rule(policy=st.none() | strategies.policies)
    def restart(self, policy: KeepPolicy | None) -> None:
        self.policy = policy or self.policy
        self.guarded(self.open)

    @invariant()
    @precondition(lambda self: hasattr(self, "ledger"))
    def once_complete_always_complete(self) -> None:
        newest = self.ledger.newest()
        if self.acknowledged >= 0:
            assert newest is not None
            assert newest.step >= self.acknowledged

    @invariant()
    @precondition(lambda self: hasattr(self, "ledger"))
    def every_folder_is_a_whole_checkpoint_of_a_record(self) -> None:
        for path in self.root.iterdir():
            if path.name.isdecimal():
                assert (path / "_CHECKPOINT_METADATA").exists()
                assert (path / "state" / "data").read_bytes() == np.array(
                    [int(path.name)]
                ).tobytes()

    @invariant()
    @precondition(lambda self: hasattr(self, "ledger"))
    def every_alias_names_a_whole_copy(self) -> None:
        for service in self.services:
            for step in service.aliases.values():
                expected = np.array([step]).tobytes()
                assert service.copies[step]["state/data"] == expected

    @invariant()
    @precondition(lambda self: hasattr(self, "ledger"))
    def best_is_a_number(self) -> None:
        decision = self.ledger.decision()
        if "best" in decision.aliases:
            metrics = self.ledger.records()[decision.aliases["best"]].metrics
            assert any(finite(v) is not None for v in metrics.values())

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        try:
            self.converges()
        finally:
            failpoints.arm(None)
            assert self.directory
            self.directory.release()
            shutil.rmtree(self.root)

    def converges(self) -> None:
        """With all services well again, everything ends as decided, and stays so."""
        failpoints.arm(None)
        for service in self.services:
            service.down = service.lose_reply = service.lag = False
        self.open()
        self.drain()
        decision = self.ledger.decision()
        folders = {int(p.name) for p in self.root.iterdir() if p.name.isdecimal()}
        assert folders == decision.kept.keys()
        for service in self.services:
            stale = {s for n, s in service.aliases.items() if n not in decision.aliases}
            assert service.copies.keys() - stale == decision.kept.keys() - stale
            assert decision.aliases.items() <= service.aliases.items()
        assert not list(self.directory.trash.iterdir())  # type: ignore[union-attr]
        left = {s for s, r in self.ledger.records().items() if r.state != "complete"}
        assert all(self.ledger.records()[s].copies for s in left)

        before = [s.changes for s in self.services]
        self.open()
        self.drain()
        assert [s.changes for s in self.services] == before

    def drain(self) -> None:
        for _ in range(2):  # a changed policy is in force once all workers are done
            self.saver.evict()
            for worker in self.workers:
                for _ in range(1000):
                    if not worker._round() and not worker.failure:
                        break
                assert worker.failure is None
        self.saver.evict()


@pytest.mark.timeout(1800)
def test_under_every_order_of_events(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(orbax_io, "save", lambda path, items, metadata: FakeSave(path, items))
    monkeypatch.setattr("ckpt_callbacks.worker.FIRST_RETRY", 0.0)
    # Nothing here loses power, and a hundred thousand syncs take minutes.
    monkeypatch.setattr("os.fsync", lambda fd: None)
    monkeypatch.setattr(logging.getLogger("ckpt_callbacks"), "disabled", True)
    examples = request.config.getoption("--machine-runs")
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
