"""The real ledger, saver and workers against services that fail, under every order of events.

Hypothesis draws the order. The threads are not started: each rule does one piece of their work,
so that a failure replays. Orbax is replaced by something that writes and renames a folder, since
thousands of real saves would take hours; `test_kills.py` has the real one.
"""

import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
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
from ckpt_callbacks.artifacts import Spool
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.events import Saved
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.metrics import MetricLog
from ckpt_callbacks.policy import Candidate, KeepPolicy, Resume
from ckpt_callbacks.record import Record
from ckpt_callbacks.recovery import choose, copy_from, recover
from ckpt_callbacks.retention import Decision, LatestN, narrow
from ckpt_callbacks.saver import Saver
from ckpt_callbacks.situation import candidate
from ckpt_callbacks.stores import RunInfo
from ckpt_callbacks.testing import FakeClock, MemoryStore, Recorder
from ckpt_callbacks.worker import Worker

small_disks = st.one_of(st.none(), st.just(LatestN(1)), strategies.policies)
"""What the directory holds of what is kept; all if `None`."""


class Killed(BaseException):
    """The process is gone."""


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
    @initialize(
        policy=strategies.policies,
        own=st.none() | strategies.policies,
        here=small_disks,
    )
    def begin(
        self, policy: KeepPolicy, own: KeepPolicy | None, here: KeepPolicy | None = None
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="machine-"))
        self.services = [
            MemoryStore("one"),
            MemoryStore("two", put_moves_aliases=True, keep=own),
        ]
        self.services[1].exact = True
        self.clock = FakeClock()
        self.policy = policy
        self.here = here
        self.directory: RunDirectory | None = None
        self.step = -1
        self.acknowledged = -1
        self.taken: set[int] = set()
        """Steps of which somebody has removed a copy, since they were saved."""
        self.open()

    def open(self, resume: Resume = "last") -> None:
        """What a new process does; the old one may have been killed anywhere, here too."""
        if self.directory:
            self.directory.release()
        directory = self.directory = RunDirectory(self.root)
        self.recorder = Recorder()
        hooks = Hooks([self.recorder])
        directory.acquire()
        policies = {s.name: s.keep for s in self.services}
        self.ledger = Ledger(
            directory, self.policy, stores=policies, now=self.clock.time, here=self.here
        )
        recover(self.ledger)
        resumed = self.chosen(resume)
        self.step = resumed.step if resumed else -1
        self.saver = Saver(self.ledger, hooks, lambda: None)
        if self.ledger.run.rewound is not None:
            self.ledger.went_back(None)
            self.saver.evict()
        log = MetricLog(directory.meta, self.step)
        files = Spool(directory.meta / "artifacts", [s.name for s in self.services])
        self.workers = [
            Worker(s, self.info(s), self.ledger, log, files, hooks) for s in self.services
        ]

    def chosen(self, resume: Resume) -> Record | None:
        """Return what to go on from: if need be once the services are well, or from another."""
        places = [(service, self.info(service)) for service in self.services]
        select = partial(choose, self.ledger, repair=partial(copy_from, places))
        try:
            return select(resume, True)
        except CheckpointNotFound:
            for service in self.services:
                service.down = False
        try:
            return select(resume, True)
        except CheckpointNotFound:  # somebody has removed the last copy
            if resume == "last":
                assert not any(map(self.is_held, self.ledger.known()))
                self.acknowledged = -1
            return select(None if resume == "last" else "last", True)

    def info(self, service: MemoryStore) -> RunInfo:
        return RunInfo(self.ledger.run_id, "run", {}, self.root, {})

    def guarded(self, call: Callable[[], object]) -> None:
        """Do something that a kill may cut short; then a new process opens the directory."""
        while True:
            try:
                call()
            except Killed:
                failpoints.arm(None)
                call = self.open  # without going back any further
            else:
                return

    @rule(metrics=strategies.metrics)
    def save(self, metrics: dict[str, float]) -> None:
        def body() -> None:
            self.step += 1
            self.taken.discard(self.step)
            state = {"w": np.array([self.step])}
            assert self.saver.save(self.step, state, metrics, {}, {}) is None
            work = self.saver._work.get_nowait()
            assert work is not None
            self.saver._finish(work)

        self.guarded(body)
        saved = [e.step for e in self.recorder.events if isinstance(e, Saved)]
        self.acknowledged = max([self.acknowledged, *saved])

    @rule()
    def evict(self) -> None:
        def body() -> None:
            kept = self.ledger.decision().kept.keys() & self.folders()
            self.saver.evict()
            left = kept - self.folders()
            assert self.here or not left
            assert all(self.has(self.services[0], step) for step in left)

        self.guarded(body)

    def folders(self) -> set[int]:
        return {int(p.name) for p in self.root.iterdir() if p.name.isdecimal()}

    def has(self, service: MemoryStore, step: int) -> bool:
        """Return whether a service has a whole copy of a step."""
        return service.copies.get(step, {}).get("state/data") == np.array([step]).tobytes()

    def is_whole(self, step: int) -> bool:
        """Return whether there is a step, here or elsewhere."""
        return step in self.folders() or any(self.has(s, step) for s in self.services)

    def is_held(self, step: int) -> bool:
        """Return whether a run can go on from what a service has, is known to have, and gives."""
        record = self.ledger.record(step)
        assert record
        known = [n for n, copy in record.copies.items() if copy.state == "confirmed"]
        there = [s for s in self.services if s.name in known and self.has(s, step)]
        return self.here is not None and not all(service.down for service in there)

    @rule(which=st.integers(0, 1), times=st.integers(1, 6))
    def work(self, which: int, times: int) -> None:
        def body() -> None:
            service = self.services[which]
            for _ in range(times):
                kept = self.ledger.decision().kept.keys()
                held = service.copies.keys() & kept
                self.workers[which]._round()
                counted = self.ledger.counted()
                by_policy = not service.keep and not any(
                    r.lost and r.step not in counted for r in self.ledger.records().values()
                )
                assert not by_policy or held <= service.copies.keys()

        self.guarded(body)

    @rule(steps=st.lists(strategies.metrics, min_size=1, max_size=4), times=st.integers(0, 5))
    def train(self, steps: list[dict[str, float]], times: int) -> None:
        """Often enough a run simply goes on; else hardly anything is there that could go wrong."""
        for metrics in steps:
            self.save(metrics)
            self.evict()
            self.work(0, times)
            self.work(1, times)

    @rule(back=st.integers(0, 6), metrics=strategies.metrics)
    def measure_late(self, back: int, metrics: dict[str, float]) -> None:
        self.guarded(lambda: self.ledger.measured(self.step - back, metrics))

    @rule(back=st.integers(0, 6), pinned=st.booleans())
    def pin(self, back: int, pinned: bool) -> None:
        step = self.step - back
        if not pinned or step in self.ledger.known():
            self.guarded(lambda: self.ledger.pin(step, pinned=pinned))

    @rule(back=st.integers(0, 4))
    def go_back(self, back: int) -> None:
        """Go on from an older step, or start over; a kill in between may stop half-way."""
        steps = self.ledger.counted()
        step = steps[-1 - back] if back < len(steps) else None
        self.acknowledged = min(self.acknowledged, -1 if step is None else step)
        self.guarded(lambda: self.open(step))

    @rule(back=st.integers(0, 3))
    def somebody_removes_a_folder(self, back: int) -> None:
        steps = self.ledger.steps()
        if back < len(steps):
            shutil.rmtree(self.root / str(steps[-1 - back]), ignore_errors=True)
            left = [s for s in self.ledger.counted() if s in self.folders() or self.is_held(s)]
            self.acknowledged = min(self.acknowledged, max(left, default=-1))
            self.guarded(self.open)

    @rule(back=st.integers(0, 3))
    def somebody_removes_a_copy(self, back: int) -> None:
        """Of the store whose listing is exact, since the other one can not know."""
        service = self.services[1]
        free = sorted(service.copies.keys() - set(service.aliases.values()))
        if back < len(free):
            del service.copies[free[back]]
            self.taken.add(free[back])

    @rule(seconds=st.floats(-500, 500))
    def move_the_clock(self, seconds: float) -> None:
        self.clock.wall += seconds

    @rule(which=st.integers(0, 1), down=st.booleans())
    def outage(self, which: int, down: bool) -> None:
        self.services[which].down = down

    @rule(which=st.integers(0, 1))
    def lose_a_reply(self, which: int) -> None:
        self.services[which].lose_reply = True

    @rule(which=st.integers(0, 1), refused=st.sampled_from(["put", "alias", "delete"]))
    def refuse_once(self, which: int, refused: str) -> None:
        service = self.services[which]

        def before(call: str) -> None:
            if call == refused:
                service.before = lambda call: None
                raise ConnectionError("busy, ask again")

        service.before = before

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

    @rule(policy=st.none() | strategies.policies, here=small_disks)
    def restart(self, policy: KeepPolicy | None, here: KeepPolicy | None) -> None:
        self.policy, self.here = policy or self.policy, here
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
    def what_is_kept_is_whole_somewhere(self) -> None:
        for step in self.ledger.situation.decision.kept.keys() - self.taken:
            assert self.is_whole(step)

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
        decision = self.ledger.situation.decision  # which writes nothing, so that no kill comes
        if "best" in decision.aliases:
            metrics = self.ledger.records()[decision.aliases["best"]].metrics
            assert any(map(math.isfinite, metrics.values()))

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
        records = self.ledger.records()
        away = {s for s in decision.kept if records[s].lost}
        assert self.folders() == decision.kept.keys() - away
        assert all(map(self.is_whole, away))
        self.leaves_to_others_what_it_may(decision)
        for service in self.services:
            history = [Candidate(r.step, r.metrics, r.time) for r in records.values()]
            # A step whose folder somebody removed counts where a whole copy of it is left: one of
            # other bytes, of a save that was discarded, is no copy of it.
            held = self.ledger.situation.view(service.name).held
            lost = {s for s, r in records.items() if r.lost and not r.discarded} & held
            there = [records[s] for s in {*self.ledger.counted(), *lost}]
            joint, pins = self.ledger.situation.decide(there), self.ledger.run.pins
            own = narrow(joint, self.policy, service.keep, history, pins)
            # Wanted again, or removed by somebody, when the other service alone was known to have
            # it whole, also since a deletion here was cut: it can not be sent, and what an alias
            # names stays until the alias can move.
            beyond = away - held
            named = {n: s for n, s in own.aliases.items() if s not in beyond}
            stale = {s for n, s in service.aliases.items() if n not in named}
            assert service.copies.keys() - stale - beyond == own.kept.keys() - stale - beyond
            assert named.items() <= service.aliases.items()
        assert not list(self.directory.trash.iterdir())  # type: ignore[union-attr]
        left = {s for s, r in self.ledger.records().items() if r.state != "complete"}
        assert all(self.ledger.records()[s].copies for s in left)

        before = [s.changes for s in self.services]
        self.open()
        self.drain()
        assert [s.changes for s in self.services] == before

    def leaves_to_others_what_it_may(self, decision: Decision) -> None:
        """What is here is what it is to hold, the newest, and what is pinned."""
        run, records = self.ledger.run, self.ledger.records()
        if self.here is None or run.change:
            return
        history = [candidate(records[s]) for s in self.ledger.counted()]
        own = narrow(decision, self.policy, self.here, history, run.pins)
        assert self.folders() <= {*own.kept, max(self.folders(), default=-1)}

    def drain(self) -> None:
        for _ in range(2):  # a changed policy is in force once all workers are done
            self.saver.evict()
            for worker in self.workers:
                for _ in range(1000):
                    if not worker._round() and not worker.failure:
                        break
                assert worker.failure is None
        self.saver.evict()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_io, "save", lambda path, items, metadata: FakeSave(path, items))
    monkeypatch.setattr("ckpt_callbacks.worker.FIRST_RETRY", 0.0)
    # Nothing here loses power, and a hundred thousand syncs take minutes.
    monkeypatch.setattr("os.fsync", lambda fd: None)
    monkeypatch.setattr(logging.getLogger("ckpt_callbacks"), "disabled", True)


def test_a_step_that_is_wanted_again_after_its_deletion_lost_its_reply_is_sent_again() -> None:
    """It was taken for held there, and was nowhere once its folder went."""
    machine = Machine()
    machine.begin(policy=LatestN(1), own=None)
    (service, _), (worker, _) = machine.services, machine.workers
    machine.save({})
    machine.drain()
    machine.save({})
    service.before = lambda call: setattr(service, "lose_reply", call == "delete")
    while 0 in service.copies:
        worker._round()
    assert worker.failure

    machine.pin(back=1, pinned=True)
    machine.drain()

    assert service.copies.keys() == {0, 1}
    machine.teardown()


@pytest.mark.timeout(7200)
def test_under_every_order_of_events(request: pytest.FixtureRequest) -> None:
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
