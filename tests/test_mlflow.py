"""MLflow on its embedded default: a sqlite file and local artifacts."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

import ckpt_callbacks as cc
import embedded
from ckpt_callbacks.manifest import link_tree
from ckpt_callbacks.stores import MetricPoint, Tracker
from ckpt_callbacks.testing import TrackerContract, make_checkpoint
from ckpt_callbacks_mlflow import MLflowTracker
from embedded import client, tracker

Make = Callable[[], MLflowTracker]


def opened(folder: Path, store: MLflowTracker, **refs: str) -> MLflowTracker:
    config = {"lr": 0.1, "layers": [3, 4], "long": "x" * 7000}
    return embedded.opened(folder, store, config=config, **refs)


class TestUnregistered(TrackerContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Make:
        return lambda: tracker(tmp_path, register_as=None)

    def logged_files(self, store: Tracker) -> dict[str, bytes]:
        assert isinstance(store, MLflowTracker)
        root = Path(store._run.info.artifact_uri)
        found = [p for p in root.rglob("*") if p.is_file()]
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


class TestRegistered(TestUnregistered):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Make:
        return lambda: tracker(tmp_path)


def test_a_checkpoint_is_a_ready_model_that_links_the_files(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    checkpoint = make_checkpoint(tmp_path, 7)

    copy = store.put(checkpoint, [])

    (model,) = client(tmp_path).search_logged_models(["1"])
    assert str(model.status) == "READY"
    assert model.params["step"] == "7"
    assert model.params["digest"] == checkpoint.digest
    assert model.params["bytes"] == str(sum(f.size for f in checkpoint.files.values()))
    assert copy.shared
    copied = Path(model.artifact_location) / "checkpoint" / "model" / "d" / "data"
    assert copied.samefile(checkpoint.path / "model" / "d" / "data")
    # NaN would be stored as 0.0 next to the id of a model, and rank as a good loss.
    assert {m.key: m.value for m in model.metrics} == {"checkpoint/loss": 1 / 8}


def test_an_evicted_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    for step in (1, 2):
        store.put(make_checkpoint(tmp_path, step), [])

    store.delete(1)

    (model,) = client(tmp_path).search_logged_models(["1"])
    assert [p.name for p in (tmp_path / "artifacts" / "models").iterdir()] == [model.model_id]
    (version,) = client(tmp_path).search_model_versions("name = 'digits'")
    assert version.tags["ckpt_callbacks_step"] == "2"


def test_a_file_that_did_not_arrive_whole_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    checkpoint = make_checkpoint(tmp_path, 7)

    def half(source: Path, target: Path, names: object) -> bool:
        return link_tree(source / "model", target / "model")

    monkeypatch.setattr("ckpt_callbacks_mlflow._files.link_tree", half)
    with pytest.raises(OSError, match="has None bytes in MLflow instead of"):
        store.put(checkpoint, [])

    (model,) = client(tmp_path).search_logged_models(["1"])
    assert str(model.status) == "PENDING"


def test_an_upload_that_was_cut_is_completed(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    checkpoint = make_checkpoint(tmp_path, 7)
    model = store._models._create(checkpoint)  # pending, and half of its files there
    half = Path(model.artifact_location) / "checkpoint" / "model" / "d"
    half.mkdir(parents=True)
    (half / "data").write_bytes(b"half")
    listing = store.listing()
    assert listing is not None
    assert not listing.copies

    store.put(checkpoint, [])

    (model,) = client(tmp_path).search_logged_models(["1"])
    assert str(model.status) == "READY"
    assert (half / "data").read_bytes() == (checkpoint.path / "model" / "d" / "data").read_bytes()


@pytest.mark.parametrize("call", ["delete_model_version", "delete_logged_model"])
@pytest.mark.parametrize("done", [False, True])
def test_a_deletion_that_was_cut_is_completed(tmp_path: Path, call: str, done: bool) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    store.put(make_checkpoint(tmp_path, 7), [])
    real = getattr(store._client, call)

    def cut(*arguments: object) -> None:
        if done:
            real(*arguments)
        raise ConnectionError("cut")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store._client, call, cut)
        with pytest.raises(ConnectionError):
            store.delete(7)

    store.delete(7)

    assert client(tmp_path).search_logged_models(["1"]) == []
    assert client(tmp_path).search_model_versions("name = 'digits'") == []
    assert not list((tmp_path / "artifacts" / "models").iterdir())


def test_names_that_mlflow_refuses_are_changed(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    odd = {"train//loss": 1.0, "/abs": 2.0, "../up": 3.0, "a@b": 4.0, ".": 5.0}

    store.log_metrics([MetricPoint(0, 1.0, odd)])

    (run,) = client(tmp_path).search_runs(["1"])
    assert set(run.data.metrics) == {"train/loss", "abs", "up", "a_b", "_"}


def test_a_run_that_is_gone_is_made_again(tmp_path: Path) -> None:
    opened(tmp_path, tracker(tmp_path), run_id="0" * 32)

    assert len(client(tmp_path).search_runs(["1"])) == 1


def test_the_hint_holds_no_password() -> None:
    store = MLflowTracker("digits", tracking_uri="postgresql://me:p@ss/w0rd@host/db")

    assert "postgresql://***@host/db" in store.hint()
    assert "w0rd" not in store.hint()


def test_a_run_whose_answer_was_lost_is_found_again(tmp_path: Path) -> None:
    opened(tmp_path, tracker(tmp_path))

    opened(tmp_path, tracker(tmp_path))

    assert len(client(tmp_path).search_runs(["1"])) == 1


def test_a_resumed_run_is_the_same_run_with_its_params(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    store.close("killed")
    (run,) = client(tmp_path).search_runs(["1"])
    assert run.info.status == "KILLED"

    opened(tmp_path, tracker(tmp_path), run_id=run.info.run_id)

    (run,) = client(tmp_path).search_runs(["1"])
    assert run.info.status == "RUNNING"
    assert run.data.params["lr"] == "0.1"
    assert run.data.params["layers"] == "[3, 4]"
    assert len(run.data.params["long"]) == 6000


def test_metrics_sent_twice_are_stored_once(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    points = [MetricPoint(s, 1.5, {"val@loss": s / 2}) for s in range(3)]
    store.log_metrics(points)
    store.log_metrics(points)

    (run,) = client(tmp_path).search_runs(["1"])
    history = client(tmp_path).get_metric_history(run.info.run_id, "val_loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (0, 0.0, 1500), (1, 0.5, 1500), (2, 1.0, 1500),
    ]  # fmt: skip


def test_latest_is_not_ours_to_set(tmp_path: Path) -> None:
    """The reason why the alias is `last`."""
    store = opened(tmp_path, tracker(tmp_path))
    store.put(make_checkpoint(tmp_path, 7), [])

    with pytest.raises(MlflowException, match="latest"):
        store.alias("latest", 7)


def test_versions_of_others_stay(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    store.put(make_checkpoint(tmp_path, 7), [])
    other = client(tmp_path).create_model_version("digits", source=str(tmp_path))
    client(tmp_path).set_registered_model_alias("digits", "champion", str(other.version))

    listing = store.listing()
    assert listing is not None
    assert dict(listing.aliases) == {}
    store.delete(7)

    left = client(tmp_path).get_registered_model("digits")
    assert {str(k): str(v) for k, v in left.aliases.items()} == {"champion": str(other.version)}


KILLED = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from ckpt_callbacks.stores import RunInfo
from ckpt_callbacks_mlflow import MLflowTracker

@event.listens_for(Engine, "before_cursor_execute")
def kill(connection, cursor, statement, *rest):
    if "CREATE TABLE params" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

uri = f"sqlite:///{sys.argv[1]}/mlflow.db"
store = MLflowTracker("digits", tracking_uri=uri)
store.open(RunInfo("0123456789ab", "run", {}, Path(sys.argv[1]), {}))
"""


def test_a_kill_while_mlflow_creates_its_database_does_no_harm(tmp_path: Path) -> None:
    """Its half-made tables could neither be used nor repaired."""
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("mlflow.db*"))

    # Not the finished database that the other tests share.
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    opened(tmp_path, MLflowTracker("digits", tracking_uri=uri))

    assert [p.name for p in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]
    assert len(client(tmp_path).search_runs(["1"])) == 1


def test_without_mlflow_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_callbacks.extras.find_spec", lambda name: None)

    with pytest.raises(cc.MissingExtra, match=r"pip install 'ckpt-callbacks\[mlflow\]'"):
        MLflowTracker("digits")


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(cc.ConfigError, match="experiment must be a name, not ''"):
        MLflowTracker("")
