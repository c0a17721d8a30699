"""Kill a real process at every point where something outlives it, and go on."""

import ast
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt_callbacks
import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.failpoints import POINTS
from ckpt_callbacks.stores import Tracker
from ckpt_callbacks.testing import TrackerContract
from folder_store import FolderStore
from killed_run import SCORES

REPAIRS = {"copy-fetched", "damage-set-aside"}
"""These come only where a checkpoint is damaged and a store has a true copy of it."""
RETURNS = ("copy-brought", "copy-taken-in")
"""These come only where the newest that is kept is in a store alone."""
LEAVING = ("leaving-begins", "record-left", "left-for-trash")
"""These come only where the directory keeps less than the run."""
EVICTING = {"eviction-begins", "record-evicting", "moved-to-trash", "record-evicted"}
"""These come only where the directory holds all that is kept: else it is in a store by then."""
REMOTE = {"objects-sent", "objects-removed"}
"""These come only where the directory is in object storage."""
SCRIPT = Path(__file__).parent / "killed_run.py"
NEWEST = len(SCORES) - 1


def run(root: Path, failpoint: str | None = None, *options: str) -> int:
    environment = dict(os.environ)
    if failpoint:
        environment["CKPT_CALLBACKS_FAILPOINT"] = failpoint
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, root],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def outcome(root: Path) -> dict[str, Any]:
    """Return all that a run leaves behind, but for names and times of the run itself."""
    meta = root / "run" / ".ckpt_callbacks"
    records = {p.name: json.loads(p.read_text()) for p in (meta / "records").iterdir()}
    store = FolderStore(root / "store")
    listing = store.listing()
    assert listing is not None
    return {
        "folders": sorted(p.name for p in (root / "run").iterdir()),
        "evicted": sorted({gone.step for gone in RunDirectory(root / "run").read_evicted()}),
        "records": {
            n: (r["state"], r["metrics"], r["logged"], r["lost"]) for n, r in records.items()
        },
        "trash": list((meta / "trash").iterdir()),
        # What a request left that was cut when it was written goes after some time only.
        "inbox": list((meta / "inbox").glob("*.json")),
        "temporary": [p for p in root.rglob(".*.tmp") if p.parent.name != "inbox"],
        "copies": sorted(p.name for p in (root / "store" / "steps").iterdir()),
        "complete": sorted(listing.copies),
        "aliases": dict(listing.aliases),
        "metrics": store.metrics(),
        "files": store.files(),
        "spool": list((meta / "artifacts").iterdir()),
        "weights": {
            c.step: weights(root, c.step, *([] if "local" in c.where else [store]))
            for c in cc.checkpoints(root / "run")
        },
    }


def weights(root: Path, which: int | str, *stores: Tracker) -> list[float]:
    found = cc.restore(root / "run", like={"w": np.zeros(1000)}, which=which, stores=stores)
    values: list[float] = found["w"].tolist()
    return values


def damage(checkpoint: Path) -> None:
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("plain")
    assert run(root) == 0
    found = outcome(root)
    assert found["complete"] == [1, 5]
    assert found["evicted"] == [0, 2, 3, 4]
    assert found["aliases"] == {"best": 1, "last": 5}
    assert (found["files"], found["spool"]) == ({"notes/latest.txt": b"at step 5"}, [])
    return found


@pytest.mark.parametrize(
    "point", [point for point in POINTS if point not in REMOTE.union(LEAVING, RETURNS)]
)
def test_killed_at_a_failpoint_it_ends_as_if_it_never_was(
    point: str, uninterrupted: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """At the first hit, or with --all-hits at each one until none fires."""
    for nth in itertools.count(1):
        root = tmp_path / str(nth)
        if point in REPAIRS:
            assert run(root) == 0
            damage(root / "run" / "5")
        killed = run(root, f"{point}:{nth}") == -signal.SIGKILL
        assert killed or nth > 1
        run(root, f"{point}:{nth + 1}")  # once more, in the recovery or after it
        assert run(root) == 0

        assert outcome(root) == uninterrupted
        if not killed or not request.config.getoption("--all-hits"):
            break


class SmallDisk:
    """A run whose directory has room for one checkpoint; `root` outlives its processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.newest = -1
        self.kills = 0

    def run(self, failpoint: str | None = None) -> bool:
        """Start it, and see what it began with and what it left; return whether it was killed."""
        before = len(self.noted("starts"))
        killed = run(self.root, failpoint, "--small-disk") == -signal.SIGKILL
        self.kills += killed
        for next_step, state in self.noted("starts")[before:]:
            assert next_step > self.newest
            assert state == trained(next_step - 1)
        if not (killed and str(failpoint).startswith("damage-set-aside")):
            # Else the repaired one is whole, but not under its name yet, so that nobody reads it.
            self.assert_that_nothing_is_lost()
        return killed

    def assert_that_nothing_is_lost(self) -> None:
        """What the policy keeps of what was saved is whole in the directory or in the store."""
        store = FolderStore(self.root / "store")
        listing = store.listing()
        assert listing is not None
        assert set(listing.aliases.values()) <= listing.copies.keys()
        if not (acknowledged := self.noted("acknowledged")):
            return
        rows = cc.checkpoints(self.root / "run")
        there = {row.step for row in rows if row.complete and row.reason}
        self.newest = max(there)
        assert self.newest >= max(acknowledged)
        best = max(range(self.newest + 1), key=SCORES.__getitem__)
        kept = {best, max(0, self.newest - 1), self.newest}
        assert kept <= there
        for which, step in [*((step, step) for step in kept), ("best", best), ("last", max(kept))]:
            assert weights(self.root, which, store) == trained(step)

    def assert_that_nothing_is_sent_twice_without_need(self) -> None:
        """A kill cuts one copy at most, which begins again."""
        sent = self.noted("sent")
        assert len(sent) - len(set(sent)) <= self.kills

    def noted(self, name: str) -> list[Any]:
        path = self.root / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(step: int) -> list[float]:
    """Return the weights after a step."""
    return [float(sum(range(step + 1)))] * 1000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    disk = SmallDisk(tmp_path_factory.mktemp("small"))
    assert not disk.run()
    found = outcome(disk.root)
    assert found["folders"] == [".ckpt_callbacks", "5"]
    assert found["complete"] == [1, 4, 5]
    assert found["evicted"] == [0, 2, 3]
    assert found["aliases"] == {"best": 1, "last": 5}
    assert sorted(disk.noted("sent")) == list(range(len(SCORES)))
    assert disk.noted("fetched") == []
    return found


def test_killed_again_and_again_while_checkpoints_leave_a_small_disk_nothing_is_lost(
    small: dict[str, Any], tmp_path: Path
) -> None:
    disk = SmallDisk(tmp_path)
    for point in (*LEAVING, "deleted"):
        assert disk.run(point)
    assert not disk.run()
    assert outcome(tmp_path) == small
    assert disk.noted("fetched") == []

    shutil.rmtree(tmp_path / "run" / str(NEWEST))
    for point in RETURNS:
        assert disk.run(point)
    assert not disk.run()

    assert outcome(tmp_path) == small
    assert disk.noted("fetched") == [NEWEST] * 2  # the first was not in its place yet
    disk.assert_that_nothing_is_sent_twice_without_need()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point_of_all" in metafunc.fixturenames:
        points: list[Any] = [point for point in POINTS if point not in REMOTE | EVICTING]
        if not metafunc.config.getoption("--all-hits"):
            points = [pytest.param("", marks=pytest.mark.skip("runs with --all-hits"))]
        metafunc.parametrize("point_of_all", points)


def test_killed_at_a_failpoint_on_a_small_disk_it_ends_as_if_it_never_was(
    point_of_all: str, small: dict[str, Any], tmp_path: Path
) -> None:
    """At each hit until none fires."""
    for nth in itertools.count(1):
        disk = SmallDisk(tmp_path / str(nth))
        newest = disk.root / "run" / str(NEWEST)
        if point_of_all in REPAIRS.union(RETURNS):
            assert not disk.run()
            (damage if point_of_all in REPAIRS else shutil.rmtree)(newest)
        killed = disk.run(f"{point_of_all}:{nth}")
        assert killed or nth > 1
        disk.run(f"{point_of_all}:{nth + 1}")  # once more, in the recovery or after it
        assert not disk.run()

        assert outcome(disk.root) == small
        disk.assert_that_nothing_is_sent_twice_without_need()
        if point_of_all not in REPAIRS.union(RETURNS):
            assert disk.noted("fetched") == []
        if not killed:
            break


def test_all_failpoints_in_the_code_are_listed() -> None:
    package = Path(ckpt_callbacks.__file__).parent
    found = [
        node.args[0].value
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "hit"
        and isinstance(node.args[0], ast.Constant)
    ]

    assert sorted(found) == sorted(POINTS)


class TestFolderStore(TrackerContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Any:
        return lambda: FolderStore(tmp_path / "service")

    def logged_files(self, store: Tracker) -> dict[str, bytes]:
        assert isinstance(store, FolderStore)
        return store.files()
