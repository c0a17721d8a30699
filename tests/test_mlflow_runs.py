"""The run of MLflow: our own, or one that the user has open."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

import ckpt_callbacks as cc
import loops
from ckpt_callbacks.stores import MetricPoint, redact
from ckpt_callbacks.testing import make_checkpoint
from ckpt_callbacks_mlflow import MLflowTracker
from embedded import client, models, opened, tracker, uri
from loops import train

callbacks_in = functools.partial(loops.callbacks_in, drain_limit=60)  # on a busy machine too


@pytest.fixture(autouse=True)
def _global_state(tmp_path: Path) -> Iterator[None]:
    mlflow.set_tracking_uri(uri(tmp_path))
    client(tmp_path).create_experiment("mine", str(tmp_path / "mine"))
    mlflow.set_experiment("mine")
    yield
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)


def runs(folder: Path) -> dict[str, str]:
    """Return the status of all runs by their id."""
    ids = [e.experiment_id for e in client(folder).search_experiments()]
    return {r.info.run_id: r.info.status for r in client(folder).search_runs(ids)}


def test_an_open_run_is_used_and_left_open(tmp_path: Path) -> None:
    mine = MLflowTracker(register_as="digits")  # the experiment and the server of the open run
    with mlflow.start_run() as run:
        train(callbacks_in(tmp_path / "run", mine), 4)

        assert mlflow.active_run().info.run_id == run.info.run_id
        assert runs(tmp_path) == {run.info.run_id: "RUNNING"}
        mlflow.log_metric("mine", 1.0)

    assert runs(tmp_path) == {run.info.run_id: "FINISHED"}
    data = client(tmp_path).get_run(run.info.run_id).data
    assert data.metrics["loss"] == 3.0
    assert data.metrics["mine"] == 1.0
    assert {m.source_run_id for m in models(tmp_path).values()} == {run.info.run_id}


def test_a_nested_run_is_used_and_not_its_parent(tmp_path: Path) -> None:
    with mlflow.start_run() as parent, mlflow.start_run(nested=True) as child:
        train(callbacks_in(tmp_path / "run", MLflowTracker()), 3)

    assert runs(tmp_path).keys() == {parent.info.run_id, child.info.run_id}
    assert "loss" in client(tmp_path).get_run(child.info.run_id).data.metrics
    assert not client(tmp_path).get_run(parent.info.run_id).data.metrics


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_run_given_by_its_id_is_used_and_left_open(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = client(tmp_path).create_run("1").info.run_id
    if how == "environment":
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)

    option = run_id if how == "option" else None
    train(callbacks_in(tmp_path / "run", MLflowTracker(run_id=option)), 3)

    assert runs(tmp_path) == {run_id: "RUNNING"}
    assert client(tmp_path).get_run(run_id).data.metrics["loss"] == 2.0


def test_several_runs_in_sequence_share_the_checkpoints(tmp_path: Path) -> None:
    """A script that opens a run at each start goes on, and nothing is sent or kept twice."""
    callbacks = callbacks_in(tmp_path / "run", MLflowTracker(register_as="digits"))
    started: list[str] = []
    for steps in (3, 6):
        with mlflow.start_run() as run:
            train(callbacks, steps)
            started.append(run.info.run_id)

    assert models(tmp_path).keys() == {4, 5}
    assert len(client(tmp_path).search_model_versions("name = 'digits'")) == 2
    history = [client(tmp_path).get_metric_history(r, "loss") for r in started]
    assert [[m.step for m in found] for found in history] == [[0, 1, 2], [3, 4, 5]]


def test_copies_in_every_experiment_are_found(tmp_path: Path) -> None:
    """A directory may go on in runs of other experiments that the user opens."""
    for name in ("a", "b", "c"):
        client(tmp_path).create_experiment(name, str(tmp_path / name))
    steps = {"a": 7, "b": 8, "c": 9}
    refs: dict[str, str] = {}
    for name, step in steps.items():
        mlflow.set_experiment(name)
        with mlflow.start_run() as run:
            refs = refs or {"run_id": run.info.run_id}
            store = opened(tmp_path, MLflowTracker(register_as="digits"), **refs)
            store.put(make_checkpoint(tmp_path, step), [])

    listing = store.listing()
    assert listing
    assert listing.copies.keys() == {7, 8, 9}
    assert store.delete(8)
    assert models(tmp_path).keys() == {7, 9}


def test_an_open_run_on_another_server_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with mlflow.start_run() as run:
        train(callbacks_in(tmp_path / "run", tracker(other)), 2)

    assert not client(tmp_path).get_run(run.info.run_id).data.metrics
    assert models(other).keys() == {0, 1}


def test_what_another_process_needs_is_known_before_the_server_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    tracker = MLflowTracker(run_id="0123", tags={"team": "vision"})

    tracker.entered(["model"])

    settings = tracker.settings()
    assert settings
    assert (settings["run_id"], settings["tracking_uri"]) == ("0123", "http://127.0.0.1:9")
    assert settings["tags"] == {"team": "vision"}
    assert tracker.hint().startswith("http://127.0.0.1:9/#/experiments/")


def test_our_parameters_are_those_that_mlflow_would_log(tmp_path: Path) -> None:
    config = {"augment": True, "none": None, "rates": [0.1, 0.2]}
    with mlflow.start_run():
        train(callbacks_in(tmp_path / "run", MLflowTracker()), 1, config=config)
        mlflow.log_params(config)


def test_a_long_name_stops_neither_metrics_nor_the_start(tmp_path: Path) -> None:
    name = "n" * 249
    store = opened(tmp_path, tracker(tmp_path), config={name: 1})
    store.log_metrics([MetricPoint(0, 1.0, {name: float("inf")})])
    store.close("finished")

    opened(tmp_path, tracker(tmp_path), config={name: 2})


def test_autologging_beside_us_does_no_harm(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    mlflow.sklearn.autolog(log_models=False, silent=True)
    try:
        with mlflow.start_run() as run:
            LogisticRegression(C=0.5).fit([[0.0], [1.0]], [0, 1])
            callbacks = callbacks_in(tmp_path / "run", MLflowTracker(register_as="digits"))
            train(callbacks, 3, config={"C": 2, "lr": 1})
    finally:
        mlflow.sklearn.autolog(disable=True, silent=True)

    data = client(tmp_path).get_run(run.info.run_id).data
    assert {"C": "0.5", "lr": "1", "max_iter": "100"}.items() <= data.params.items()
    assert data.tags["ckpt_callbacks_changed.C"] == "2"
    assert models(tmp_path).keys() == {1, 2}


def test_a_parameter_that_changed_is_a_tag(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow refuses to change a parameter, and with it all that comes in the same call."""
    opened(tmp_path, tracker(tmp_path), config={"lr": 0.1, "a": 1}).close("killed")

    with caplog.at_level(logging.WARNING, "ckpt_callbacks"):
        opened(tmp_path, tracker(tmp_path), config={"lr": 0.2, "a": 1, "b": 2})

    (run,) = (client(tmp_path).get_run(r) for r in runs(tmp_path))
    assert run.data.params == {"lr": "0.1", "a": "1", "b": "2"}
    assert run.data.tags["ckpt_callbacks_changed.lr"] == "0.2"
    assert "the parameter lr, 0.1; the new one, 0.2" in caplog.text


def test_many_parameters_and_tags_are_sent_in_the_pieces_that_mlflow_takes(tmp_path: Path) -> None:
    config = {f"p{n}": n for n in range(250)}
    tags = {f"t{n}": str(n) for n in range(120)}

    opened(tmp_path, tracker(tmp_path, tags=tags), config=config)

    (run,) = (client(tmp_path).get_run(r) for r in runs(tmp_path))
    assert len(run.data.params) == 250
    assert tags.items() <= run.data.tags.items()


def test_an_infinite_metric_is_not_sent_and_a_tag_tells_of_it(tmp_path: Path) -> None:
    """MLflow would store the largest number; NaN it keeps."""
    store = opened(tmp_path, tracker(tmp_path))
    inf, nan = float("inf"), float("nan")

    store.log_metrics([MetricPoint(3, 1.0, {"loss": inf, "odd": nan, "ok": 1.0})])
    store.log_metrics([MetricPoint(4, 2.0, {"loss": -inf})])

    (run,) = (client(tmp_path).get_run(r) for r in runs(tmp_path))
    assert run.data.metrics["ok"] == 1.0
    assert run.data.metrics["odd"] != run.data.metrics["odd"]
    assert "loss" not in run.data.metrics
    assert run.data.tags["ckpt_callbacks_not_finite.loss"] == "inf at step 3"


def test_of_each_run_in_sequence_a_tag_tells_of_infinite_metrics(tmp_path: Path) -> None:
    store = MLflowTracker()
    for step in (0, 1):
        with mlflow.start_run() as run:
            opened(tmp_path, store)
            store.log_metrics([MetricPoint(step, 1.0, {"loss": float("inf")})])
        tags = client(tmp_path).get_run(run.info.run_id).data.tags
        assert tags["ckpt_callbacks_not_finite.loss"] == f"inf at step {step}"


def test_a_checkpoint_has_its_metrics_reason_and_aliases(tmp_path: Path) -> None:
    scores = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2}

    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 4, scores)

    found = models(tmp_path)
    assert found.keys() == {1, 2, 3}
    assert found[1].tags["ckpt_callbacks_reason"] == "best #1"
    assert found[1].tags["ckpt_callbacks_aliases"] == "best"
    assert found[3].tags["ckpt_callbacks_aliases"] == "last"
    assert {m.key: m.value for m in found[1].metrics}["checkpoint/score"] == 0.9


def test_a_late_metric_reaches_the_checkpoint_there(tmp_path: Path) -> None:
    def late(step: int, run: cc.Run[object]) -> None:
        if step == 3:
            run.on_eval(2, {"score": 0.7})

    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 4, before=late)

    model = models(tmp_path)[2]
    assert {m.key: m.value for m in model.metrics}["checkpoint/score"] == 0.7
    assert "best #1" in model.tags["ckpt_callbacks_reason"]


def test_a_metric_of_a_checkpoint_that_changes_is_logged_anew(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 4, {3: 0.2})

    for value in (0.7, 0.2, 0.7):
        assert cc.report_metrics(tmp_path / "run", 3, {"score": value})

    newest = max(models(tmp_path)[3].metrics, key=lambda m: m.timestamp)
    assert (newest.key, newest.value) == ("checkpoint/score", 0.7)


def test_the_index_in_the_runs_artifacts_is_true(tmp_path: Path) -> None:
    scores = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2}
    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 4, scores)

    (run_id,) = runs(tmp_path)
    names = {info.path for info in client(tmp_path).list_artifacts(run_id, "checkpoints")}
    assert names == {"checkpoints/index.html", "checkpoints/index.json"}
    index = mlflow.artifacts.load_dict(f"runs:/{run_id}/checkpoints/index.json")
    assert [row["step"] for row in index["checkpoints"]] == [1, 2, 3]
    assert index["checkpoints"][0]["aliases"] == ["best"]
    assert index["checkpoints"][0]["metrics"]["score"] == 0.9


def test_a_run_that_a_person_deleted_is_named(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    (run_id,) = runs(tmp_path)
    store.close("finished")
    client(tmp_path).delete_run(run_id)

    with pytest.raises(cc.ConfigError, match=f"the MLflow run {run_id} is deleted: restore it"):
        opened(tmp_path, tracker(tmp_path), run_id=run_id)


def test_a_run_that_was_made_twice_is_one_again(tmp_path: Path) -> None:
    """An answer was lost, and MLflow's client asked again."""
    opened(tmp_path, tracker(tmp_path))
    (first,) = runs(tmp_path)
    tags = client(tmp_path).get_run(first).data.tags
    experiment = client(tmp_path).get_run(first).info.experiment_id
    client(tmp_path).create_run(experiment, tags=tags)

    opened(tmp_path, tracker(tmp_path))

    assert runs(tmp_path).keys() == {first}


def test_the_deadlines_are_ours_where_the_user_has_set_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    opened(tmp_path, tracker(tmp_path))

    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach http://me:s3cret@host:5000/api",
        "GET https://host/api?token=s3cret&x=1 failed",
        "postgresql://host/db?user=me&password=s3cret",
        "https://bucket/key?X-Amz-Signature=s3cret",
    ],
)
def test_no_credential_is_told(text: str) -> None:
    assert "s3cret" not in redact(text)
    assert "***" in redact(text)


def test_a_file_of_the_users_is_an_artifact_of_the_run(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    (tmp_path / "0001").write_text("old")
    store.log_artifact(tmp_path / "0001", "plots/loss.txt")
    (tmp_path / "0001").write_text("new")

    store.log_artifact(tmp_path / "0001", "plots/loss.txt")

    (run_id,) = runs(tmp_path)
    assert mlflow.artifacts.load_text(f"runs:/{run_id}/plots/loss.txt") == "new"


def test_status_is_no_filter_for_models(tmp_path: Path) -> None:
    """The reason why whole ones are told from others here and not by the server."""
    store = opened(tmp_path, tracker(tmp_path))
    store.put(make_checkpoint(tmp_path, 7), [])

    found = client(tmp_path).search_logged_models(["1", "2"], "status = 'READY'")

    assert not found
    assert models(tmp_path)[7]


def test_nan_beside_a_model_would_be_a_good_loss(tmp_path: Path) -> None:
    """The reason why only finite metrics are logged with the id of a model."""
    from mlflow.entities import Metric

    store = opened(tmp_path, tracker(tmp_path))
    store.put(make_checkpoint(tmp_path, 7), [])
    model, (run_id,) = models(tmp_path)[7], runs(tmp_path)
    bad = Metric("bad", float("nan"), 1, 7, model_id=model.model_id)
    client(tmp_path).log_batch(run_id, metrics=[bad])

    assert {m.key: m.value for m in models(tmp_path)[7].metrics}["bad"] == 0.0
    with pytest.raises(MlflowException, match=r"(?i)not implemented"):
        mlflow.store.artifact.artifact_repository_registry.get_artifact_repository(
            f"models:/{model.model_id}"
        ).delete_artifacts()
