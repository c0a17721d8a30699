"""Runs on a small disk that fails: full, or read-only. What came of it is printed as JSON.

    unshare -m python full_disk.py SCENARIO FOLDER [HOW]

The disk is a tmpfs that only this process sees, so it is gone with it.
"""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ckpt_callbacks as cc
from ckpt_callbacks import failpoints, worker
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.record import Gone
from ckpt_callbacks.testing import MemoryStore, Recorder

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
LARGE = (4, 256, 256)
"""1 MiB of float32 in all; Orbax stores each as a file of its own."""
SMALL = (1, 64, 64)

Result = dict[str, Any]


class Disk:
    """A tmpfs at `folder/disk`."""

    def __init__(self, folder: Path, size: int) -> None:
        self.path = folder / "disk"
        self._protected = folder / "protected"
        self._filler = self.path / "filler"
        for place in (self.path, self._protected):
            place.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", self.path)
        # A second way in, that does not write. Files that are open for writing, such as the
        # lock, would keep the disk from being made read-only itself; a failing one asks nobody.
        _run("mount", "--bind", self.path, self._protected)
        _run("mount", "-o", "remount,bind,ro", self._protected)

    def free(self) -> int:
        """Return how many pages are free."""
        return os.statvfs(self.path).f_bavail

    def fill(self, leave: int = 0) -> None:
        """Take all pages but some."""
        with self._filler.open("ab") as file:
            while (more := self.free() - leave) > 0:
                size = os.fstat(file.fileno()).st_size
                with contextlib.suppress(OSError):  # another thread took some in between
                    os.posix_fallocate(file.fileno(), size, more * PAGE)

    def empty(self) -> None:
        """Free what `fill` took."""
        self._filler.unlink(missing_ok=True)

    def read_only(self) -> None:
        """Refuse all writing from now on."""
        _run("mount", "--bind", self._protected, self.path)

    def writable(self) -> None:
        """Undo `read_only`."""
        _run("umount", "--lazy", self.path)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=30).stdout


def make_state(step: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    count, *rest = shape
    model = {f"layer{i}": np.full(rest, step, np.float32) for i in range(count)}
    return {"model": model, "optimizer": {"count": np.full(3, step, np.float32)}}


def make_callbacks(root: Path, *plugins: object) -> cc.Callbacks:
    return cc.Callbacks(
        cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(2)),
        *plugins,
        drain_limit=20,
    )


def train(
    callbacks: cc.Callbacks,
    steps: int,
    shape: tuple[int, int, int],
    before: Callable[[int, cc.Run[Any]], None] = lambda step, run: None,
) -> int:
    """Take some steps and return the last."""
    step = -1
    with callbacks.run(make_state(-1, shape)) as run:
        _ = run.state
        for step in range(run.next_step, steps):
            before(step, run)
            run.on_eval(step, {"score": float(step)})
            run.on_step(step, make_state(step, shape), {"loss": float(step)})
    return step


def told(recorder: Recorder) -> Result:
    """Return which steps were said to be saved, and which not."""
    return {
        "saved": [e.step for e in recorder.events if isinstance(e, cc.Saved)],
        "failed": [e.step for e in recorder.events if isinstance(e, cc.SaveFailed)],
    }


def left(root: Path, shape: tuple[int, int, int]) -> Result:
    """Return what is in a run directory: values of every step, and files that are no good."""
    meta = root / ".ckpt_callbacks"
    values: dict[int, list[float] | str] = {}
    for step in (c.step for c in cc.checkpoints(root)):
        try:
            state = cc.restore(root, like=make_state(-1, shape), which=step)
        except cc.CkptCallbacksError as error:
            values[step] = str(error)
        else:
            arrays = [a for item in state.values() for a in item.values()]
            values[step] = sorted({float(v) for a in arrays for v in np.unique(a)})
    return {
        "values": values,
        "steps": sorted(p.name for p in root.iterdir() if p != meta),
        "temporary": [str(p.relative_to(root)) for p in root.rglob("*") if "tmp" in p.name],
        "trash": [p.name for p in (meta / "trash").iterdir()],
        "evicted": [gone.step for gone in RunDirectory(root).read_evicted()],
    }


def error_of(call: Callable[[], object]) -> str:
    """Return which error a call raises, with its message."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# Scenarios


def full(folder: Path) -> Result:
    """Two checkpoints fit and a third does not, until somebody frees space before step 6."""
    disk = Disk(folder, 4 * MIB)
    root = disk.path / "run"
    recorder = Recorder()
    before: Result = {}

    def look(step: int, run: cc.Run[Any]) -> None:
        run.wait()
        if step == 2:
            disk.fill(leave=MIB // 2 // PAGE)
        if step == 6:
            before.update(left(root, LARGE))
            disk.empty()

    last = train(make_callbacks(root, recorder), 10, LARGE, look)
    return {"last": last, **told(recorder), "while full": before, "after": left(root, LARGE)}


def little(folder: Path) -> Result:
    """In steps 2 and 3 only so many pages are free, from none to more than are needed."""
    disk = Disk(folder, 4 * MIB)
    worker.FIRST_RETRY = 0.02
    found: Result = {}
    enough = 0
    for pages in range(100):
        root = disk.path / str(pages)
        recorder, store = Recorder(), MemoryStore()

        def look(step: int, run: cc.Run[Any], pages: int = pages) -> None:
            run.wait()
            if step == 2:
                disk.fill(pages)
            if step == 4:
                disk.empty()

        train(make_callbacks(root, recorder, store), 7, SMALL, look)
        found[str(pages)] = {
            **told(recorder),
            **left(root, SMALL),
            "copies": sorted(store.copies),
            "logged": sorted(p.step for p in store.points if "loss" in p.values),
        }
        _run("rm", "-r", root)
        enough += not found[str(pages)]["failed"]
        if enough == 3:
            break
    return found


class Failure:
    """Makes a disk fail at the first hit of a failpoint, until it is repaired."""

    def __init__(self, disk: Disk, point: str, how: str) -> None:
        self.happened = False
        self._disk = disk
        self._point = point
        self._full = how == "full"
        self._over = False
        self._mutex = threading.Lock()  # failpoints are hit on several threads

    def hit(self, name: str) -> None:
        with self._mutex:
            if name == self._point and not self.happened and not self._over:
                self.happened = True
                self._disk.fill() if self._full else self._disk.read_only()

    def repair(self) -> None:
        with self._mutex:
            self._over = True
            if self.happened:
                self._disk.empty() if self._full else self._disk.writable()


def at_every_point(folder: Path, how: str) -> Result:
    """The disk fails at some failpoint from step 2 on, and is whole again before step 4."""
    disk = Disk(folder, 16 * MIB)
    worker.FIRST_RETRY = 0.02
    found: Result = {}
    for point in failpoints.POINTS:
        root = disk.path / point
        recorder, store = Recorder(), MemoryStore()
        failure = Failure(disk, point, how)

        def look(step: int, run: cc.Run[Any], failure: Failure = failure) -> None:
            run.wait()
            if step == 2:
                failpoints.arm(failure.hit)
            if step == 4:
                failpoints.arm(None)
                failure.repair()

        train(make_callbacks(root, recorder, store), 6, SMALL, look)
        events = told(recorder)
        at_end = left(root, SMALL)
        train(make_callbacks(root, store), 6, SMALL)  # makes good what may be left
        if failure.happened:
            found[point] = {
                **events,
                **left(root, SMALL),
                "at the end of the run": [at_end["values"], at_end["steps"]],
                "copies": sorted(store.copies),
                "aliases": store.aliases,
                "logged": sorted(p.step for p in store.points if "loss" in p.values),
            }
        _run("rm", "-r", root)
    return found


def finished(folder: Path) -> Result:
    """The disk is made read-only after the run."""
    disk = Disk(folder, 8 * MIB)
    root = disk.path / "run"
    train(make_callbacks(root), 3, SMALL)
    disk.read_only()
    command = Path(sys.executable).with_name("ckpt-callbacks")
    return {
        "errors": {
            str(path): error_of(partial(train, make_callbacks(path), 5, SMALL))
            for path in (root, disk.path / "new")
        },
        **left(root, SMALL),
        "ls": _run(command, "ls", root, "--plain"),
    }


def becomes_read_only(folder: Path, when: str) -> Result:
    """For good, in step 3: before it, or at a failpoint in it."""
    disk = Disk(folder, 8 * MIB)
    root = disk.path / "run"
    recorder, store = Recorder(), MemoryStore()
    failure = Failure(disk, when, "read-only")
    done: set[str] = set()
    all_done = threading.Event()

    def notice(name: str) -> None:
        """Find out when the store has all of step 2."""
        sent = name == "record-sent" and store.points[-1].step == 2
        aliased = name == "record-aliased" and store.aliases == {"last": 2}
        if sent or aliased or name == "record-deleted":
            done.add(name)
        if len(done) == 3:
            all_done.set()

    def look(step: int, run: cc.Run[Any]) -> None:
        if step == 1:
            failpoints.arm(notice)
        if step == 3:
            run.wait()
            assert all_done.wait(30)
            failpoints.arm(failure.hit)
            failpoints.hit("between")

    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(2)),
        recorder,
        store,
        drain_limit=2,
    )
    last = train(callbacks, 7, SMALL, look)
    (ended,) = recorder.of(cc.RunEnded)
    return {
        "last": last,
        **told(recorder),
        "values": left(root, SMALL)["values"],
        "newest": cc.restore(root, like=make_state(-1, SMALL))["optimizer"]["count"].tolist(),
        "logged": sorted(p.step for p in store.points if "loss" in p.values),
        "unsent": ended.unsent,  # type: ignore[attr-defined]
    }


def starts(folder: Path) -> Result:
    """Runs on a disk that is full but for some pages already: new ones, and some that go on."""
    disk = Disk(folder, 4 * MIB)
    old = disk.path / "old"
    train(make_callbacks(old), 3, SMALL)
    errors: list[tuple[str, str]] = []
    for pages in range(4):
        for root in (disk.path / f"new{pages}", old):
            disk.fill(pages)
            errors.append((str(root), error_of(partial(train, make_callbacks(root), 5, SMALL))))
            disk.empty()
    train(make_callbacks(old), 5, SMALL)
    return {"errors": errors, **left(old, SMALL)}


def remembers(folder: Path) -> Result:
    """Lines about evicted checkpoints, while the disk is full and afterwards."""
    disk = Disk(folder, MIB)
    directory = RunDirectory(disk.path)
    directory.meta.mkdir()
    gone = Gone(0, 0.0, {"score": 0.5}, "latest #3 of 3, LatestN(2) keeps 2")
    disk.fill(leave=1)
    errors = [error_of(lambda: directory.log_evicted(gone)) for _ in range(100)]
    disk.empty()
    directory.log_evicted(replace(gone, step=1))
    return {
        "written": errors.count(""),
        "error": (error := error_of(directory.read_evicted)),
        "steps": [] if error else [gone.step for gone in directory.read_evicted()],
    }


SCENARIOS = (full, little, at_every_point, finished, becomes_read_only, starts, remembers)


def main() -> None:
    name, folder, *how = sys.argv[1:]
    scenario: Any = next(s for s in SCENARIOS if s.__name__ == name)
    print(json.dumps(scenario(Path(folder), *how)), flush=True)
    # A thread that is left over would hold up the end: then say where it is, and fail.
    faulthandler.dump_traceback_later(20, exit=True)


if __name__ == "__main__":
    main()
