"""A machine whose disk is wiped goes on from the trackers: MLflow on PostgreSQL and S3, and W&B."""

import shutil
from pathlib import Path
from uuid import uuid4

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import Fault, WandbServer
from servers.backends import Backend, faults
from servers.test_wandb_outages import faults as wandb_faults
from servers.training import (
    ALIASES,
    KEEP,
    METRICS,
    SCORES,
    STEPS,
    advance,
    expected_weights,
    new_state,
    weights,
)

LOST_AT = 2
"""The step at which the first machine goes."""


def train(directory: Path, name: str, *plugins: object, until: int = STEPS) -> tuple[int, bytes]:
    """Train wherever the run is; return the first step that was taken, and the weights."""
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(1), keep=KEEP),
        *plugins,
        drain_limit=60,
    )
    with callbacks.run(new_state(), config={"rate": 0.5}, resume="anywhere", run_id=name) as run:
        state = run.state
        for step in range(run.next_step, until):
            state = advance(state, step)
            run.on_eval(step, {"score": SCORES[step]})
            run.on_step(step, state, {"loss": step / 2})
    return run.next_step, weights(state)


@pytest.mark.parametrize("backend", ["server", "cloud", "direct"], indirect=True)
def test_it_goes_on_from_mlflow(
    backend: Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"wiped-{uuid4()}"
    train(tmp_path / "run", name, backend.tracker(name), until=LOST_AT)
    (before,) = backend.client().search_runs(
        [backend.client().get_experiment_by_name(name).experiment_id]
    )
    shutil.rmtree(tmp_path / "run")

    first, trained = train(tmp_path / "elsewhere", name, backend.tracker(name))

    assert (first, trained) == (LOST_AT, expected_weights())
    assert f"goes on there after step {LOST_AT - 1}, which was fetched from MLflow" in caplog.text
    (after,) = backend.client().search_runs([before.info.experiment_id])
    assert after.info.run_id == before.info.run_id
    assert {int(m.params["step"]) for m in models(backend, name)} == set(ALIASES.values())
    # The best is on the lost disk and in MLflow: here is what was fetched, and what came after.
    assert faults(backend, name, tmp_path / "elsewhere", ALIASES, METRICS) == []


@pytest.mark.parametrize("backend", ["direct"], indirect=True)
@pytest.mark.parametrize("also_wandb", [False, True])
def test_the_object_storage_behind_mlflow_is_down(
    also_wandb: bool,
    backend: Backend,
    wandb_server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, directory = f"down-{uuid4()}", tmp_path / "run"

    def trackers() -> list[object]:
        return [backend.tracker(name)] + [WandbTracker(name, artifact="model")] * also_wandb

    train(directory, name, *trackers(), until=LOST_AT)
    shutil.rmtree(directory)
    with monkeypatch.context() as down:
        down.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
        if also_wandb:
            assert train(directory, name, *trackers(), until=LOST_AT)[0] == LOST_AT
        else:
            with pytest.raises(cc.CheckpointNotFound, match=r"(?s)Could not connect.*Start again"):
                train(directory, name, *trackers(), until=LOST_AT)

    assert train(directory, name, *trackers()) == (LOST_AT, expected_weights())


def models(backend: Backend, name: str) -> list:  # type: ignore[type-arg]
    experiment = backend.client().get_experiment_by_name(name)
    return list(backend.client().search_logged_models([experiment.experiment_id]))


def test_it_goes_on_from_wandb(
    wandb_server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"wiped-{uuid4()}"
    train(tmp_path / "run", name, WandbTracker(name, artifact="model"), until=LOST_AT)
    shutil.rmtree(tmp_path / "run")

    first, trained = train(tmp_path / "elsewhere", name, WandbTracker(name, artifact="model"))

    assert (first, trained) == (LOST_AT, expected_weights())
    assert f"goes on there after step {LOST_AT - 1}, which was fetched from W&B" in caplog.text
    assert [run.id for run in wandb_server.runs(name)] == [name]
    assert wandb_faults(wandb_server, name, tmp_path / "elsewhere") == []


@pytest.mark.parametrize("damaged", ["mlflow", "wandb"])
def test_a_damaged_copy_in_one_leaves_that_of_the_other(
    damaged: str,
    cloud: Backend,
    wandb_server: WandbServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = f"damaged-{uuid4()}"

    def trackers() -> list[object]:
        both = [cloud.tracker(name), WandbTracker(name, artifact="model")]
        return both if damaged == "mlflow" else both[::-1]

    train(tmp_path / "run", name, *trackers(), until=LOST_AT)
    shutil.rmtree(tmp_path / "run")
    if damaged == "mlflow":
        flip_a_byte(cloud, name, LOST_AT - 1)
    else:
        wandb_server.begin(Fault("digest", request="GET file", times=1000))

    first, trained = train(tmp_path / "elsewhere", name, *trackers())

    assert (first, trained) == (LOST_AT, expected_weights())
    assert "Another copy is looked for" in caplog.text
    other = "W&B" if damaged == "mlflow" else "MLflow"
    assert f"after step {LOST_AT - 1}, which was fetched from {other}" in caplog.text


def flip_a_byte(backend: Backend, name: str, step: int) -> None:
    """Change the largest file of a checkpoint there, by the API that anybody has."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    (model,) = [m for m in models(backend, name) if m.params["step"] == str(step)]
    store = get_artifact_repository(model.artifact_location, tracking_uri=backend.uri)

    def files(folder: str) -> list[tuple[int, str]]:
        found = []
        for info in store.list_artifacts(folder):
            found += files(info.path) if info.is_dir else [(info.file_size or 0, info.path)]
        return found

    _, path = max(files("checkpoint"))
    local = Path(store.download_artifacts(path))
    content = bytearray(local.read_bytes())
    content[len(content) // 2] ^= 1
    local.chmod(0o644)
    local.write_bytes(content)
    store.log_artifact(str(local), path.rpartition("/")[0])
