"""What other processes ask of a run directory, with an owner and without."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ckpt_callbacks as cc
from ckpt_callbacks.cli import main
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.inbox import Inbox, Measured, Pinned, Request, submit
from ckpt_callbacks.testing import MemoryStore, Recorder
from folder_store import FolderStore
from loops import KEEP, callbacks_in, local_steps, new_state, train, weight

HERE = Path(__file__).parent
REPORT = """
import sys
import ckpt_callbacks as cc
from folder_store import FolderStore
directory, step, score, store = sys.argv[1:]
stores = [FolderStore(store)] if store else None
assert cc.report_metrics(directory, int(step), {"score": float(score)}, stores=stores)
"""


def report(directory: Path, step: int, score: float, store: Path | None = None) -> None:
    command = [sys.executable, "-c", REPORT, directory, str(step), str(score), str(store or "")]
    subprocess.run(command, check=True, timeout=60, cwd=HERE)


class Promotions:
    """Tells when an alias names a step."""

    def __init__(self, alias: str, step: int) -> None:
        self.wanted = (alias, step)
        self.seen = threading.Event()

    @cc.hookimpl
    def on_promoted(self, event: cc.Promoted) -> None:
        if (event.alias, event.step) == self.wanted:
            self.seen.set()


def test_an_evaluator_in_another_process_ranks_again_within_a_second(tmp_path: Path) -> None:
    root, store = tmp_path / "run", FolderStore(tmp_path / "store")
    moved, recorder = Promotions("best", 0), Recorder()
    keep = cc.LatestN(1) | cc.BestN(1, "score", mode="max", pending=None)
    with callbacks_in(root, store, moved, recorder, keep=keep).run(new_state()) as run:
        for step in range(3):
            run.on_step(step, new_state(step + 1.0))
        run.on_eval(2, {"score": 0.5})
        report(root, 0, 0.9)
        assert moved.seen.wait(30)
        asked = time.monotonic()
        submit(RunDirectory(root), Measured(1, {"score": 0.95}, asked))
        while run.unmeasured:
            assert time.monotonic() < asked + 30
        applied = time.monotonic() - asked

    assert applied < 1
    assert local_steps(root) == {1, 2}
    listing = store.listing()
    assert listing
    assert dict(listing.aliases) == {"best": 1, "last": 2}
    evaluations = [(e.step, dict(e.metrics)) for e in recorder.events if isinstance(e, cc.Eval)]
    assert evaluations == [(2, {"score": 0.5}), (0, {"score": 0.9}), (1, {"score": 0.95})]
    assert (1, "score") in store.metrics()


def test_without_an_owner_the_caller_does_it_in_every_store(tmp_path: Path) -> None:
    root, store = tmp_path / "run", FolderStore(tmp_path / "store")
    train(callbacks_in(root, store), 4, {1: 0.5})
    assert local_steps(root) == {1, 2, 3}

    report(root, 2, 0.9, tmp_path / "store")

    assert local_steps(root) == {2, 3}
    listing = store.listing()
    assert listing
    assert set(listing.copies) == {2, 3}
    assert dict(listing.aliases) == {"best": 2, "last": 3}
    assert (2, "score") in store.metrics()
    assert not list(RunDirectory(root).inbox.iterdir())


def test_a_store_that_can_not_be_made_again_is_told_by_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, store = tmp_path / "run", MemoryStore()
    train(callbacks_in(root, store), 4, {1: 0.5})

    assert cc.report_metrics(root, 2, {"score": 0.9})

    assert "the store 'memory' is left out" in caplog.text
    assert store.aliases == {"best": 1, "last": 3}
    train(callbacks_in(root, store), 4)
    assert store.aliases == {"best": 2, "last": 3}
    assert set(store.copies) == {2, 3}


def test_a_caller_that_fails_as_owner_owns_it_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, store = tmp_path / "run", FolderStore(tmp_path / "store")
    train(callbacks_in(root, store), 4)
    before = set(threading.enumerate())

    def fail(self: Inbox) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Inbox, "look", fail)
        with pytest.raises(cc.ConfigError, match="No space left"):
            cc.pin(root, 2, stores=[store])

    assert not RunDirectory(root).is_mine
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()
    assert cc.pin(root, 2, stores=[store])
    run = RunDirectory(root).read_run()
    assert run
    assert (run.status, run.pins) == ("finished", {2})


def test_requests_of_many_processes_never_lose_each_other(tmp_path: Path) -> None:
    root = tmp_path / "run"
    keep = cc.BestN(1, "score", mode="max", pending=None)
    with callbacks_in(root, keep=keep).run(new_state()) as run:
        for step in range(8):
            run.on_step(step, new_state(step))
        run.wait()
        reporters = [
            subprocess.Popen(
                [sys.executable, "-c", REPORT, root, str(step), str(step % 5), ""], cwd=HERE
            )
            for step in range(8)
        ]
        assert [reporter.wait(60) for reporter in reporters] == [0] * 8
        assert run.unmeasured == []
        run.on_step(8, new_state(8))

    # 4 is the best, and of the reports all others made way for it.
    assert local_steps(root) == {4, 8}


def test_a_report_while_the_owner_starts_waits_for_it(tmp_path: Path) -> None:
    """An owner for a moment only is waited for, so that training never fails because of it."""
    root = tmp_path / "run"
    train(callbacks_in(root), 2)
    holder = RunDirectory(root)
    holder.acquire(brief=True)
    threading.Timer(0.2, holder.release).start()

    train(callbacks_in(root), 3)

    assert weight(root) == 3.0


def test_what_can_not_be_applied_is_dropped_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 2)
    inbox = RunDirectory(root).inbox
    (inbox / "1.json").write_text("{")
    (inbox / "2.json").write_text(json.dumps({"format": 1, "pin": 77}))
    (inbox / "3.json").write_text(json.dumps({"format": 3, "explode": 1}))

    train(callbacks_in(root), 3)

    assert [p.name for p in inbox.iterdir()] == ["3.json"]
    for text in ("1.json is damaged", "2.json is dropped: step 77 can not", "3.json was written"):
        assert text in caplog.text


def test_a_request_is_there_until_it_is_applied(tmp_path: Path) -> None:
    """A kill on the way, or a full disk, must not lose it."""
    directory = RunDirectory(tmp_path)
    directory.acquire()
    path = submit(directory, Pinned(7, pinned=True))
    applied: list[Request] = []

    def apply(request: Request) -> None:
        assert path.exists()
        if not applied:
            applied.append(request)
            raise OSError("the disk is full")
        applied.append(request)

    inbox = Inbox(directory, threading.Lock(), lambda request: None, apply)
    with pytest.raises(OSError, match="full"):
        inbox.look()
    assert path.exists()
    inbox.look()

    assert applied == [Pinned(7, pinned=True)] * 2
    assert not path.exists()
    directory.release()


def test_a_request_that_can_not_be_read_now_is_applied_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one in object storage that does not answer. It is told of once."""
    directory = RunDirectory(tmp_path)
    directory.acquire()
    submit(directory, Pinned(7, pinned=True))
    applied: list[Request] = []
    inbox = Inbox(directory, threading.Lock(), lambda request: None, applied.append)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "read_posted", _refuse)
        inbox.look()
        inbox.look()
    assert applied == []

    inbox.look()

    assert applied == [Pinned(7, pinned=True)]
    assert caplog.text.count("503 Slow Down") == 1
    directory.release()


def _refuse(*_: object) -> str:
    raise OSError("503 Slow Down")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: cc.report_metrics(d / "no", 1, {"a": 1}), cc.ConfigError, "no run directory"),
        (lambda d: cc.report_metrics(d, 1, {"a": "x"}), cc.ConfigError, "'a' is left out"),
        (lambda d: cc.pin(d, 9), cc.CheckpointNotFound, "no step 9 to pin; it has 0, 1"),
        (lambda d: cc.unpin(d / "no", 9), cc.ConfigError, "no run directory"),
        (lambda d: cc.verify(d / "no"), cc.ConfigError, "no run directory"),
        (lambda d: cc.find(d, "best"), cc.CheckpointNotFound, "it has last and steps 0, 1"),
    ],
)
def test_a_wrong_request_is_refused_where_it_is_made(
    call: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    train(callbacks_in(tmp_path), 2)

    with pytest.raises(error, match=message):
        call(tmp_path)


def test_a_pinned_step_stays_everywhere_until_it_is_unpinned(tmp_path: Path) -> None:
    root, store = tmp_path / "run", MemoryStore()
    train(callbacks_in(root, store), 3, {0: 0.9})
    result = CliRunner().invoke(main, ["pin", str(root), "1"])
    assert (result.exit_code, result.output) == (0, "step 1 is pinned\n")

    train(callbacks_in(root, store), 6)
    assert local_steps(root) == set(store.copies) == {0, 1, 4, 5}
    assert cc.find(root, 1).reason == "pinned"

    assert CliRunner().invoke(main, ["unpin", str(root), "1"]).exit_code == 0
    train(callbacks_in(root, store), 6)
    assert local_steps(root) == set(store.copies) == {0, 4, 5}
    result = CliRunner().invoke(main, ["pin", str(root), "1"])
    assert result.exit_code == 2
    assert "has no step 1 to pin; it has 0, 4, 5" in result.output


def test_the_command_line_verifies(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 3)
    result = CliRunner().invoke(main, ["verify", str(root)])
    assert (result.exit_code, result.output) == (0, "all files are as recorded\n")

    victim = next((root / "2").rglob("_METADATA"))
    victim.unlink()
    result = CliRunner().invoke(main, ["verify", str(root)])
    assert result.exit_code == 1
    assert f"{victim} cannot be read" in result.output


READ = """
import os, sys
import numpy as np
import ckpt_callbacks as cc

directory, which = sys.argv[1], sys.argv[2]
like = {"w": np.zeros(200_000), "v": np.zeros(200_000)}
print("ready", flush=True)
read = set()
try:
    while not os.path.exists(directory + "/stop"):  # a signal would meet Orbax anywhere
        state = cc.restore(directory, like=like, which=int(which) if which != "last" else which)
        assert len({*state["w"], *state["v"]}) == 1, "two checkpoints were mixed"
        read.add(state["w"][0])
    print(len(read), flush=True)
except cc.CheckpointNotFound as error:
    print(error, flush=True)
"""


@contextmanager
def reader(root: Path, which: int | str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", READ, root, str(which)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def big_state(value: float) -> dict[str, Any]:
    import numpy as np

    return {"w": np.full(200_000, value), "v": np.full(200_000, value)}


def test_a_reader_in_another_process_always_gets_a_whole_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with callbacks_in(root, keep=cc.LatestN(1)).run(big_state(0)) as run:
        run.on_step(0, big_state(0))
        run.wait()
        with reader(root, "last") as last:
            for step in range(1, 60):
                run.on_step(step, big_state(step))
            run.wait()
            (root / "stop").touch()
            out, _ = last.communicate(timeout=60)

    assert int(out) > 1, "it read only one"


def test_a_reader_of_a_named_step_is_told_when_it_was_evicted(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with callbacks_in(root, keep=cc.LatestN(1)).run(big_state(0)) as run:
        run.on_step(0, big_state(0))
        run.wait()
        with reader(root, 0) as named:
            run.on_step(1, big_state(1))
            out, _ = named.communicate(timeout=60)

    assert "step 0" in out
    assert "evicted while it was read" in out or "has no step 0; it has 1" in out
    assert local_steps(root) == {1}


def test_a_kept_policy_is_the_one_of_the_run(tmp_path: Path) -> None:
    """A report brings the directory in order by the policy that the run was given."""
    root = tmp_path / "run"
    train(callbacks_in(root, keep=KEEP), 4, {0: 0.5})

    assert cc.report_metrics(root, 3, {"score": 0.9})

    assert local_steps(root) == {2, 3}
    assert cc.find(root, "best").step == 3
