"""W&B in offline mode: the real client, and what it wrote to its log."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ckpt_callbacks as cc
import wandb_log
from ckpt_callbacks.stores import MetricPoint, RunInfo, Tracker
from ckpt_callbacks.testing import TrackerContract, make_checkpoint
from ckpt_callbacks_wandb import WandbTracker
from loops import callbacks_in, train


def opened(tmp_path: Path, **options: str) -> WandbTracker:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    store = WandbTracker(project="digits", mode="offline", dir=tmp_path / "logs", **options)  # type: ignore[arg-type]
    store.open(RunInfo("0123456789ab", "my run", {"lr": 0.1}, tmp_path / "scratch", {}))
    return store


class TestOffline(TrackerContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Callable[[], WandbTracker]:
        self.logs = tmp_path / "logs"
        return lambda: WandbTracker(project="digits", mode="offline", dir=self.logs)

    def logged_files(self, store: Tracker) -> dict[str, bytes]:
        return wandb_log.files(self.logs)


def test_a_checkpoint_is_an_artifact_whose_files_are_held(tmp_path: Path) -> None:
    store = opened(tmp_path)
    checkpoint = make_checkpoint(tmp_path, 7)

    copy = store.put(checkpoint, ["best"])
    store.close("finished")

    assert (copy.state, copy.ref, copy.shared) == ("staged", "model-0123456789ab:step-7", True)
    (logged,) = wandb_log.artifacts(tmp_path / "logs")
    assert logged.name == "model-0123456789ab"
    assert logged.aliases == {"best", "step-7", "latest"}  # `latest` is W&B's own
    assert logged.metadata["step"] == 7
    assert logged.metadata["digest"] == checkpoint.digest
    assert logged.metadata["metrics"] == {"loss": 1 / 8}
    held = Path(logged.files["checkpoint/model/d/data"])
    assert held.samefile(checkpoint.path / "model" / "d" / "data")  # no copy
    assert "checkpoint.json" in logged.files


def test_nothing_is_staged_or_cached_by_wandb(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(make_checkpoint(tmp_path, 7, b"x" * 1_000_000), [])
    store.close("finished")

    for folder in ("wandb_data_dir", "wandb_cache_dir", "logs"):
        files = [p for p in (tmp_path / folder).rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) < 200_000


def test_files_are_held_until_the_checkpoint_is_no_longer_wanted(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(make_checkpoint(tmp_path, 1), [])
    store.put(make_checkpoint(tmp_path, 2), [])

    store.delete(1)

    assert [p.name for p in (tmp_path / "scratch").iterdir() if p.is_dir()] == ["2"]
    store.close("finished")


def test_metrics_have_a_step_of_their_own(tmp_path: Path) -> None:
    """W&B drops values at a step below its current one: a resumed run would lose them."""
    store = opened(tmp_path)
    store.log_metrics([MetricPoint(5, 1.0, {"loss": 1.0}), MetricPoint(3, 2.0, {"loss": 2.0})])
    store.close("finished")

    rows = wandb_log.history(tmp_path / "logs")
    assert [(r["trainer/step"], r["loss"]) for r in rows] == [(5, 1.0), (3, 2.0)]
    (log,) = (tmp_path / "logs").rglob("*.wandb")
    assert b"trainer/step" in log.read_bytes()


def test_a_mode_that_is_set_after_the_client_began_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client reads it once a process, such as in a notebook's first cell."""
    import wandb

    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.setup()
    monkeypatch.setenv("WANDB_MODE", "offline")

    train(callbacks_in(tmp_path / "run", WandbTracker("digits")), 1)

    (row,) = cc.checkpoints(tmp_path / "run")
    assert row.where == ["local", "W&B (staged)"]


KILLED = """
import os, signal, sys
from pathlib import Path
from ckpt_callbacks.stores import MetricPoint, RunInfo
from ckpt_callbacks.testing import make_checkpoint
from ckpt_callbacks_wandb import WandbTracker

root = Path(sys.argv[1])
store = WandbTracker(project="digits", mode="offline", dir=root / "logs")
(root / "scratch").mkdir()
store.open(RunInfo("0123456789ab", "run", {}, root / "scratch", {}))
store.put(make_checkpoint(root, 7), ["last"])
store.log_metrics([MetricPoint(s, 1.0, {"loss": s}) for s in range(3)])
(root / "plot.svg").write_text("<svg/>")
store.log_artifact(root / "plot.svg", "plots/plot.svg")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_right_after_loses_nothing(tmp_path: Path) -> None:
    """The client's default loses up to 15 s."""
    # With a W&B service of its own, which dies with it.
    environment = {k: v for k, v in os.environ.items() if "SERVICE" not in k}
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False, env=environment)

    assert wandb_log.aliases(tmp_path / "logs") == {"last": 7, "step-7": 7, "latest": 7}
    assert [r["loss"] for r in wandb_log.history(tmp_path / "logs")] == [0, 1, 2]
    assert wandb_log.files(tmp_path / "logs") == {"plots/plot.svg": b"<svg/>"}


def test_points_that_come_again_after_a_kill_are_logged_once(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.log_metrics([MetricPoint(s, 1.0, {"loss": float(s)}) for s in range(3)])
    store.close("killed")

    again = opened(tmp_path)
    again.log_metrics([MetricPoint(s, 1.0, {"loss": float(s)}) for s in range(1, 5)])
    again.close("finished")

    assert [r["loss"] for r in wandb_log.history(tmp_path / "logs")] == [0, 1, 2, 3, 4]


def test_two_points_of_one_step_are_both_logged(tmp_path: Path) -> None:
    """Such as two samples of the machine, or two evaluations."""
    store = opened(tmp_path)
    store.log_metrics([MetricPoint(3, 1.0, {"loss": 1.0}), MetricPoint(3, 2.0, {"loss": 2.0})])
    store.close("finished")

    assert [row["loss"] for row in wandb_log.history(tmp_path / "logs")] == [1.0, 2.0]


def test_what_did_not_reach_the_log_is_not_listed(tmp_path: Path) -> None:
    """As after a kill just before W&B wrote: the files are held, but nothing will send them."""
    store = opened(tmp_path)
    store.put(make_checkpoint(tmp_path, 7), ["best"])
    store.close("finished")
    shutil.copytree(tmp_path / "scratch" / "7", tmp_path / "scratch" / "8")

    listing = store.listing()

    assert listing is not None
    assert listing.exact
    assert set(listing.copies) == {7}
    assert dict(listing.aliases) == {"best": 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"project": ""}, "project must be a name, not ''"),
        ({"run_id": " "}, "run_id must be a name, not ' '"),
        ({"mode": "shared"}, r"mode must be one of \('online', 'offline'\), not 'shared'"),
        ({"send": "all"}, r"send must be one of \('checkpoint', 'weights', 'reference'\)"),
        ({"link_to": "digits"}, "link_to must be a collection such as 'wandb-registry-model/digi"),
        ({"reference": "gs://b/x"}, "needs send='reference'; it is 'gs://b/x' with send='check"),
        ({"send": "reference", "reference": "/x"}, "reference must be a URI such as 'gs://"),
        ({"send": "reference", "reference": "http://a:b@h/x"}, "must not hold a password"),
        ({"project": "me/digits"}, "project 'me/digits' must be a name alone"),
        ({"tags": "abc"}, "tags must be a list of names, not 'abc'"),
        ({"link": "bset"}, "link must be an alias, 'best', 'best-METRIC' or 'last', not 'bset'"),
        ({"ttl": "30d"}, "ttl must be a timedelta or seconds, not '30d'"),
        ({"ttl": 0}, "ttl must be positive, not 0"),
        ({"project": "p", "artifact": "a/b"}, "artifact 'a/b' must be letters, digits"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(cc.ConfigError, match=message):
        WandbTracker(**options)  # type: ignore[arg-type]


def test_without_wandb_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_callbacks.extras.find_spec", lambda name: None)

    with pytest.raises(cc.MissingExtra, match=r"pip install 'ckpt-callbacks\[wandb\]'"):
        WandbTracker("digits")


def test_the_page_of_the_checkpoints_is_held_for_later(tmp_path: Path) -> None:
    tracker = WandbTracker(project="digits", mode="offline", dir=tmp_path / "logs")

    train(callbacks_in(tmp_path / "run", tracker, drain_limit=60), 3, {1: 0.9})

    key = "checkpoints/report/path"
    (path,) = [row[key] for row in wandb_log.history(tmp_path / "logs") if key in row]
    (page,) = (tmp_path / "logs").rglob(path)
    assert "<h2>Where each checkpoint was</h2>" in page.read_text()
    assert path in wandb_log.files(tmp_path / "logs")


def test_who_wants_no_metrics_there_gets_no_page(tmp_path: Path) -> None:
    options = {"project": "digits", "mode": "offline", "dir": tmp_path / "logs", "metrics": False}

    train(callbacks_in(tmp_path / "run", WandbTracker(**options)), 2)  # type: ignore[arg-type]

    assert wandb_log.history(tmp_path / "logs") == []
