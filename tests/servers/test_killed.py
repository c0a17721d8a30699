"""A training process that is killed while it sends weights; the next one completes them."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from uuid import uuid4

import mlflow
import pytest

import ckpt_callbacks as cc
from servers.backends import Backend, faults
from servers.proxy import Proxy, serving
from servers.training import ALIASES, METRICS, advance, new_state, train

FILE = "weights/model.safetensors"
SCRIPT = Path(__file__).with_name("killed.py")


class Gate(Proxy):
    """Holds the first request that begins and goes on as given, until the test lets it go."""

    def __init__(self, upstream: str, method: str, part: str) -> None:
        super().__init__(upstream)
        self.method, self.part = method, part
        self.met, self.go = threading.Event(), threading.Event()

    def harm(self, request: str) -> str | None:
        if not self.go.is_set() and request.startswith(self.method) and self.part in request:
            self.met.set()
            self.go.wait(60)
            return "reset"
        return super().harm(request)


def weights(step: int) -> bytes:
    state = new_state()
    for at in range(step + 1):
        state = advance(state, at)
    content: bytes = state["w"].tobytes()
    return content


@pytest.mark.parametrize("backend", ["server", "cloud"], indirect=True)
@pytest.mark.parametrize(
    ("method", "part"),
    [("PUT", FILE), ("PUT", "weights.json"), ("PATCH", "logged-models")],
    ids=["while the weights are sent", "while what describes them is", "before the copy is whole"],
)
def test_a_process_is_killed_while_it_publishes(
    method: str, part: str, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, directory = f"killed-{uuid4().hex[:8]}", tmp_path / "run"
    path = os.pathsep.join([str(SCRIPT.parents[1]), *sys.path])
    with serving(Gate(backend.uri, method, part)) as gate:
        training = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(directory), gate.address, name],
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            assert gate.met.wait(120), gate.requests
        finally:
            training.kill()
            training.wait()
            gate.go.set()
    client = backend.client()
    experiment = client.get_experiment_by_name(name)
    (begun,) = client.search_logged_models([experiment.experiment_id])
    assert str(begun.status) == "PENDING"

    train(directory, backend.tracker(name, payload=cc.Safetensors("w")), drain_limit=60.0)

    assert faults(backend, name, directory, ALIASES, METRICS) == []
    files = backend.files(experiment.artifact_location)
    models = client.search_logged_models([experiment.experiment_id])
    for model in models:
        folder = f"models/{model.model_id}/artifacts"
        published = {p.removeprefix(f"{folder}/") for p in files if f"{folder}/weights" in p}
        assert published == {FILE, "weights.json"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", backend.uri)
    for alias, step in ALIASES.items():
        found = mlflow.artifacts.download_artifacts(f"models:/{name}@{alias}/{FILE}")
        assert cc.load_params(found)["w"].tobytes() == weights(step)
