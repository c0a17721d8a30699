"""MLflow's embedded default, a sqlite file and local artifacts, and what is in it."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel

from ckpt_callbacks.stores import Rank, RunInfo
from ckpt_callbacks_mlflow import MLflowTracker


@functools.cache
def _empty() -> Path:
    """Return a database with all its tables, which take MLflow seconds to make."""
    path = Path(tempfile.mkdtemp()) / "mlflow.db"
    MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_experiments()
    return path


def uri(folder: Path) -> str:
    """Return the URI of the database in a folder, which is made if need be."""
    path = folder / "mlflow.db"
    if not path.exists():
        shutil.copyfile(_empty(), path)
    return f"sqlite:///{path}"


def client(folder: Path) -> MlflowClient:
    return MlflowClient(uri(folder), uri(folder))


def tracker(folder: Path, **options: Any) -> MLflowTracker:
    options = {"experiment": "digits", "register_as": "digits", **options}
    location = str(folder / "artifacts")
    return MLflowTracker(tracking_uri=uri(folder), artifact_location=location, **options)


def opened(
    folder: Path,
    store: MLflowTracker,
    key: str = "0123456789ab",
    ranks: dict[tuple[str, int], Rank] | None = None,
    config: dict[str, Any] | None = None,
    **refs: str,
) -> MLflowTracker:
    """Open a tracker, as a worker does, for the run with the id `key`."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    known = ranks or {}
    store.entered(["model"])
    store.open(
        RunInfo(key, "run", config or {}, scratch, refs, rank=lambda a, s: known.get((a, s)))
    )
    return store


def models(folder: Path) -> dict[int, LoggedModel]:
    """Return the LoggedModels by step."""
    experiments = [e.experiment_id for e in client(folder).search_experiments()]
    found = client(folder).search_logged_models(experiments)
    return {int(m.params["step"]): m for m in found}


def aliases(folder: Path, name: str = "digits") -> dict[str, str]:
    found = client(folder).get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}
