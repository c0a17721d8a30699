"""Kill a real process at every point where something outlives it, and go on."""

import ast
import itertools
import json
import os
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

REPAIRS = {"copy-fetched", "damage-set-aside"}
"""These come only where a checkpoint is damaged and a store has a true copy of it."""
REMOTE = {"objects-sent", "objects-removed"}
"""These come only where the directory is in object storage."""
SCRIPT = Path(__file__).parent / "killed_run.py"


def run(root: Path, failpoint: str | None = None) -> int:
    environment = dict(os.environ)
    if failpoint:
        environment["CKPT_CALLBACKS_FAILPOINT"] = failpoint
    done = subprocess.run(
        [sys.executable, SCRIPT, root], env=environment, capture_output=True, text=True, check=False
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
        "records": {n: (r["state"], r["metrics"], r["logged"]) for n, r in records.items()},
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
            c.step: cc.restore(root / "run", like={"w": np.zeros(1000)}, which=c.step)["w"].tolist()
            for c in cc.checkpoints(root / "run")
        },
    }


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


@pytest.mark.parametrize("point", [point for point in POINTS if point not in REMOTE])
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
