"""The places where MLflow keeps its data here, and what is found there without us."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from ckpt_callbacks_mlflow import MLflowTracker

Files = Mapping[str, str]
"""Digest of every file by its path."""


@dataclass(frozen=True)
class Backend:
    uri: str
    files: Callable[[str], Files]
    """Returns the files below an artifact location, read past MLflow."""
    artifacts: str | None = None
    """Where experiments keep their files, if that is not the server's business."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What whoever sends files there needs in its environment."""

    def tracker(self, name: str, **options: Any) -> MLflowTracker:
        """Return a tracker for an experiment and a registered model of this name."""
        location = {"artifact_location": f"{self.artifacts}/{name}"} if self.artifacts else {}
        everything = {"register_as": name, "tracking_uri": self.uri} | location | options
        return MLflowTracker(name, **everything)

    def client(self) -> MlflowClient:
        return MlflowClient(self.uri, self.uri)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_in(folder: Path) -> Files:
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): digest(p.read_bytes()) for p in found}


def faults(
    backend: Backend,
    name: str,
    directory: Path,
    aliases: Mapping[str, int],
    metrics: Mapping[str, list[tuple[int, float]]],
) -> list[str]:
    """Return in what the run `name` differs there from exactly the checkpoints in `directory`.

    Asked with MLflow's own client, so what the tracker believes does not count.
    """
    client, found = backend.client(), []

    def expect(what: str, actual: object, expected: object) -> None:
        if actual != expected:
            found.append(f"{what}: {actual}, not {expected}")

    kept = sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return ["there is no such experiment"]
    runs = client.search_runs([experiment.experiment_id])
    expect("runs", [r.info.status for r in runs], ["FINISHED"])
    models = client.search_logged_models([experiment.experiment_id])
    expect("models", sorted(int(m.params["step"]) for m in models), kept)
    expect("status of models", {str(m.status) for m in models}, {"READY"})

    files = backend.files(experiment.artifact_location)
    owners = {p.split("/")[1] for p in files if p.startswith("models/")}
    expect("models that have files", owners, {m.model_id for m in models})
    for model in models:
        folder = f"models/{model.model_id}/artifacts/checkpoint/"
        copy = {p.removeprefix(folder): d for p, d in files.items() if p.startswith(folder)}
        expect(f"files of {model.name}", copy, files_in(directory / model.params["step"]))

    # By the source, since a search leaves out the model.
    step_of = {m.model_id: int(m.params["step"]) for m in models}
    versions = {
        str(v.version): next((s for i, s in step_of.items() if i in v.source), f"of {v.source}")
        for v in client.search_model_versions(f"name = '{name}'")
    }
    expect("versions", sorted(versions.values(), key=str), sorted(kept, key=str))
    current = client.get_registered_model(name).aliases
    expect("aliases", {a: versions.get(str(v)) for a, v in current.items()}, dict(aliases))

    for run in runs:
        for key, values in metrics.items():
            history = client.get_metric_history(run.info.run_id, key)
            expect(f"history of {key}", [(m.step, m.value) for m in history], values)
    return found
