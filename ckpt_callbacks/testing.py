"""For the tests of plugins: a store in memory, a recorder of events, and the contracts of stores.

A third party's store is tested by subclassing `StoreContract`, a tracker by `TrackerContract`::

    from ckpt_callbacks.testing import StoreContract

    class TestMyStore(StoreContract):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda: MyStore(tmp_path / "service")

with `pytest.register_assert_rewrite("ckpt_callbacks.testing")` in `conftest.py`, so that a failing
contract shows both sides.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ckpt_callbacks.clock import Clock
from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.events import (
    Eval,
    Event,
    Evicted,
    Mirrored,
    MirrorFailed,
    Promoted,
    RunEnded,
    RunStarted,
    Saved,
    SaveFailed,
    Step,
)
from ckpt_callbacks.hookspecs import hookimpl
from ckpt_callbacks.manifest import seal, tree_digest
from ckpt_callbacks.policy import KeepPolicy
from ckpt_callbacks.record import Record, record_to_json
from ckpt_callbacks.stores import Checkpoint, Copy, Listing, MetricPoint, RunInfo, Store, Tracker

__all__ = [
    "FakeClock",
    "MemoryStore",
    "Recorder",
    "StoreContract",
    "TrackerContract",
    "make_checkpoint",
]

S = TypeVar("S", bound=Store)


class Recorder:
    """A plugin that keeps every event it gets in `events`, and its thread's name in `threads`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.threads: list[str] = []
        self._mutex = threading.Lock()

    def _add(self, event: Event) -> None:
        with self._mutex:
            self.events.append(event)
            self.threads.append(threading.current_thread().name)

    def of(self, kind: type[Event]) -> list[Event]:
        """Return the events of one kind, in order."""
        return [e for e in self.events if isinstance(e, kind)]

    @hookimpl
    def on_run_started(self, event: RunStarted) -> None:
        self._add(event)

    @hookimpl
    def on_step(self, event: Step) -> None:
        self._add(event)

    @hookimpl
    def on_eval(self, event: Eval) -> None:
        self._add(event)

    @hookimpl
    def on_saved(self, event: Saved) -> None:
        self._add(event)

    @hookimpl
    def on_save_failed(self, event: SaveFailed) -> None:
        self._add(event)

    @hookimpl
    def on_mirrored(self, event: Mirrored) -> None:
        self._add(event)

    @hookimpl
    def on_mirror_failed(self, event: MirrorFailed) -> None:
        self._add(event)

    @hookimpl
    def on_promoted(self, event: Promoted) -> None:
        self._add(event)

    @hookimpl
    def on_evicted(self, event: Evicted) -> None:
        self._add(event)

    @hookimpl
    def on_run_ended(self, event: RunEnded) -> None:
        self._add(event)


class FakeClock(Clock):
    """A clock that a test sets; give it to `Callbacks`. Both its readings begin at `start`."""

    def __init__(self, start: float = 1_000_000.0) -> None:
        self.wall = self.steady = start

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.steady

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.wall += seconds
        self.steady += seconds


class MemoryStore(Tracker):
    """A tracker whose service is this object. It outlives runs, as a server does.

    Its faults are attributes that a test switches on and off.

    Args:
        name: its name, when a test needs several.
        before: called with the name of each call before it does anything; it may raise or wait.
        put_moves_aliases: whether `put` moves the aliases it is given, as some services do.
        keep: what it keeps of what all keep.
    """

    def __init__(
        self,
        name: str = "memory",
        before: Callable[[str], None] = lambda call: None,
        *,
        put_moves_aliases: bool = False,
        keep: KeepPolicy | None = None,
    ) -> None:
        self.name = name
        self.title = name.capitalize()
        self.before = before
        self.put_moves_aliases = put_moves_aliases
        self.keep = keep
        self.down = False
        """Every call fails."""
        self.lose_reply = False
        """The next change is made, and fails nevertheless; then this is False again."""
        self.lag = False
        """A listing shows nothing yet."""
        self.exact = False
        """What a listing does not show is certainly not there."""
        self.changes = 0
        """How often something was changed."""
        self.copies: dict[int, dict[str, bytes]] = {}
        self.aliases: dict[str, int] = {}
        self.points: list[MetricPoint] = []
        self.files: dict[str, bytes] = {}
        """What was logged with `log_artifact`, by name."""
        self.config: Mapping[str, object] = {}
        self.calls: list[str] = []

    def _called(self, call: str) -> None:
        self.calls.append(call)
        self.before(call)
        if self.down:
            raise ConnectionError(f"{self.name} is down")

    def _changed(self) -> None:
        self.changes += 1
        if self.lose_reply:
            self.lose_reply = False
            raise ConnectionError(f"{self.name} did it, but the reply is lost")

    def open(self, run: RunInfo) -> Mapping[str, str]:
        self._called("open")
        self.config = run.config
        return {"run_id": run.run_id}

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        self._called("put")
        self.copies[checkpoint.step] = {
            name: (checkpoint.path / name).read_bytes() for name in checkpoint.files
        }
        if self.put_moves_aliases:
            self.aliases |= dict.fromkeys(aliases, checkpoint.step)
        self._changed()
        return Copy("confirmed", f"{self.name}/{checkpoint.key}")

    def listing(self) -> Listing | None:
        self._called("listing")
        if self.lag:
            return Listing({}, {})
        copies = {step: Copy("confirmed", f"{self.name}/{step}") for step in self.copies}
        return Listing(copies, dict(self.aliases), self.exact)

    def get(self, step: int, into: Path) -> None:
        self._called("get")
        if step not in self.copies:
            raise CheckpointNotFound(f"no copy of step {step}")
        for name, content in self.copies[step].items():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_bytes(content)

    def alias(self, name: str, step: int) -> None:
        self._called("alias")
        if step not in self.copies:
            raise CheckpointNotFound(f"no copy of step {step}")
        self.aliases[name] = step
        self._changed()

    def delete(self, step: int) -> None:
        self._called("delete")
        # The order of calls is a promise that the end of a run would not show.
        assert step not in self.aliases.values(), f"deleted step {step}, which an alias names"
        self.copies.pop(step, None)
        self._changed()

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        self._called("log_metrics")
        self.points.extend(points)

    def log_artifact(self, path: Path, name: str) -> None:
        self._called("log_artifact")
        self.files[name] = path.read_bytes()
        self._changed()

    def close(self, status: str) -> None:
        self._called("close")

    def hint(self) -> str:
        return "it is in memory"


def make_file(folder: Path, name: str, content: bytes) -> Path:
    """Write a file into a new folder and return it."""
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder / name


def make_checkpoint(folder: Path, step: int, content: bytes = b"") -> Checkpoint:
    """Write a small tree of files as a complete checkpoint of `step` and return it."""
    path = folder / str(step)
    (path / "model" / "d").mkdir(parents=True)
    (path / "_CHECKPOINT_METADATA").write_text("{}")
    (path / "model" / "d" / "data").write_bytes(content or f"step {step}".encode() * 100)
    (path / "empty").write_bytes(b"")
    files = seal(path)
    return Checkpoint(
        run_id="0123456789ab",
        step=step,
        path=path,
        metrics={"loss": 1 / (step + 1), "broken": float("nan")},
        files=files,
        digest=tree_digest(files),
        reason=f"latest #{step}",
        manifest=record_to_json(Record(step, "complete", "0123456789ab", 1.0, files=files)),
    )


class StoreContract:
    """What every store must do. Subclass it and define the fixture `make_store`.

    `make_store()` returns a new object for the same service each time, as a restart does.
    """

    def _open(self, make_store: Callable[[], S], scratch: Path, *, reading: bool = False) -> S:
        store = make_store()
        (scratch / "scratch").mkdir(exist_ok=True)
        remembered = scratch / "remembered"
        known = dict(line.split("\t") for line in _lines(remembered))
        refs = store.open(
            RunInfo("0123456789ab", "contract", {"lr": 0.1}, scratch / "scratch", known, reading)
        )
        remembered.write_text("".join(f"{k}\t{v}\n" for k, v in refs.items()))
        return store

    def _bytes(self, store: Store, step: int, into: Path) -> dict[str, bytes]:
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        store.get(step, into)
        return {
            p.relative_to(into).as_posix(): p.read_bytes() for p in into.rglob("*") if p.is_file()
        }

    def test_gives_back_what_was_put(self, make_store: Callable[[], Store], tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path, 7)
        expected = {n: (checkpoint.path / n).read_bytes() for n in checkpoint.files}
        store = self._open(make_store, tmp_path)

        copy = store.put(checkpoint, ["last"])

        assert copy.ref
        assert self._bytes(store, 7, tmp_path / "got") == expected
        store.close("finished")

    def test_one_that_only_reads_gets_what_is_there(
        self, make_store: Callable[[], Store], tmp_path: Path
    ) -> None:
        checkpoint = make_checkpoint(tmp_path, 7)
        expected = {n: (checkpoint.path / n).read_bytes() for n in checkpoint.files}
        store = self._open(make_store, tmp_path)
        store.put(checkpoint, [])
        store.close("finished")

        reader = self._open(make_store, tmp_path, reading=True)

        assert self._bytes(reader, 7, tmp_path / "got") == expected

    def test_putting_twice_leaves_one_copy(
        self, make_store: Callable[[], Store], tmp_path: Path
    ) -> None:
        checkpoint = make_checkpoint(tmp_path, 7)
        store = self._open(make_store, tmp_path)
        store.put(checkpoint, [])
        store.close("killed")

        again = self._open(make_store, tmp_path)
        again.put(checkpoint, [])

        listing = again.listing()
        assert listing is None or set(listing.copies) == {7}
        again.delete(7)
        self._assert_gone(again, 7, tmp_path)
        again.close("finished")

    def test_aliases_move_and_survive_a_restart(
        self, make_store: Callable[[], Store], tmp_path: Path
    ) -> None:
        store = self._open(make_store, tmp_path)
        for step in (1, 2):
            store.put(make_checkpoint(tmp_path, step), [])
        store.alias("best", 2)
        store.alias("last", 2)
        store.alias("best", 1)
        store.close("killed")

        again = self._open(make_store, tmp_path)

        listing = again.listing()
        assert listing is None or dict(listing.aliases) == {"best": 1, "last": 2}
        again.close("finished")

    def test_deletes_one_and_keeps_the_others(
        self, make_store: Callable[[], Store], tmp_path: Path
    ) -> None:
        store = self._open(make_store, tmp_path)
        checkpoints = [make_checkpoint(tmp_path, step) for step in (1, 2, 12)]
        for checkpoint in checkpoints:
            store.put(checkpoint, [])

        store.delete(1)
        store.delete(1)

        self._assert_gone(store, 1, tmp_path)
        for checkpoint in checkpoints[1:]:
            expected = {n: (checkpoint.path / n).read_bytes() for n in checkpoint.files}
            assert self._bytes(store, checkpoint.step, tmp_path / "got") == expected
        store.close("finished")

    def test_replaces_a_copy_of_other_bytes(
        self, make_store: Callable[[], Store], tmp_path: Path
    ) -> None:
        store = self._open(make_store, tmp_path)
        store.put(make_checkpoint(tmp_path / "one", 7, b"old" * 9), [])
        store.close("killed")
        again = self._open(make_store, tmp_path)
        checkpoint = make_checkpoint(tmp_path / "two", 7, b"new" * 9)  # of the same sizes

        again.put(checkpoint, [])

        assert self._bytes(again, 7, tmp_path / "got")["model/d/data"] == b"new" * 9
        listing = again.listing()
        assert listing is None or set(listing.copies) == {7}
        again.close("finished")

    def _assert_gone(self, store: Store, step: int, tmp_path: Path) -> None:
        try:
            found = self._bytes(store, step, tmp_path / "got")
        except CheckpointNotFound:
            return
        raise AssertionError(f"step {step} was deleted, but get still returns {sorted(found)}")


class TrackerContract(StoreContract):
    """What every tracker must do: all that a store does, and take metrics and files."""

    def logged_files(self, store: Tracker) -> dict[str, bytes] | None:
        """Return what the service holds of the files that were logged, by name.

        Define it where the test can look there; `None` means that it can not.
        """
        return None

    def test_takes_the_same_metrics_again(
        self, make_store: Callable[[], Tracker], tmp_path: Path
    ) -> None:
        store = self._open(make_store, tmp_path)
        points = [
            MetricPoint(0, 1.0, {"loss": 2.0, "grad/norm": float("inf")}),
            MetricPoint(1, 2.0, {"loss": float("nan")}),
        ]
        store.log_metrics(points)
        store.log_metrics(points)
        store.close("finished")

    def test_takes_the_same_file_again(
        self, make_store: Callable[[], Tracker], tmp_path: Path
    ) -> None:
        store = self._open(make_store, tmp_path)
        plot = make_file(tmp_path / "a", "loss [1]*.png", b"a plot")

        store.log_artifact(plot, "plots/loss [1]*.png")
        store.log_artifact(plot, "plots/loss [1]*.png")

        found = self.logged_files(store)
        assert found is None or found == {"plots/loss [1]*.png": b"a plot"}
        store.close("finished")

    def test_a_later_file_replaces_the_one_of_the_same_name(
        self, make_store: Callable[[], Tracker], tmp_path: Path
    ) -> None:
        store = self._open(make_store, tmp_path)
        store.log_artifact(make_file(tmp_path / "a", "config.yaml", b"old"), "config.yaml")
        store.log_artifact(make_file(tmp_path / "b", "config.yaml", b"other"), "b/config.yaml")
        store.close("killed")

        again = self._open(make_store, tmp_path)
        again.log_artifact(make_file(tmp_path / "c", "config.yaml", b"new"), "config.yaml")

        found = self.logged_files(again)
        assert found is None or found == {"config.yaml": b"new", "b/config.yaml": b"other"}
        again.close("finished")

    def test_what_was_logged_stays_when_the_file_is_gone(
        self, make_store: Callable[[], Tracker], tmp_path: Path
    ) -> None:
        store = self._open(make_store, tmp_path)
        vocabulary = make_file(tmp_path / "a", "vocabulary.txt", b"words")

        store.log_artifact(vocabulary, "vocabulary.txt")
        vocabulary.unlink()

        found = self.logged_files(store)
        assert found is None or found == {"vocabulary.txt": b"words"}
        store.close("finished")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
