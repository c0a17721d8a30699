"""The MLflow store: every call finds what an earlier one left before it makes anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.errors import CheckpointNotFound, ConfigError
from ckpt_callbacks.extras import load, require
from ckpt_callbacks.manifest import link_tree
from ckpt_callbacks.policy import KeepPolicy, as_keep
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.stores import (
    Checkpoint,
    Copy,
    Listing,
    MetricPoint,
    RunInfo,
    Tracker,
    redact,
)
from ckpt_callbacks_mlflow._database import absolute, create_database, has_secret

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

__all__ = ["MLflowTracker"]

RUN_TAG = "ckpt_callbacks_run"
STEP_TAG = "ckpt_callbacks_step"
FOLDER = "checkpoint"
"""Where the checkpoint lies in the LoggedModel's artifacts."""

_STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
    "preempted": "KILLED",
}
_LONGEST_PARAM = 6000  # characters; MLflow's own limit
_MOST_PARAMS = 100  # in one call; MLflow's own limit


class MLflowTracker(Tracker):
    """Mirrors kept checkpoints and logs metrics to an MLflow tracking server or database.

    Args:
        experiment: name of the experiment; created if need be.
        register_as: name of a registered model for the aliases `best` and `last`.
            Without one they are tags of the run, `ckpt_callbacks_best` and `ckpt_callbacks_last`.
        tracking_uri: as for `mlflow.set_tracking_uri`; MLflow's own default if not given.
        artifact_location: where a new experiment keeps its files; MLflow's default if not given.
        run_name: name of the run; that of the run directory if not given.
        keep: of the checkpoints that are kept, hold only those that this policy keeps, such as
            `BestN(1, "val_accuracy", mode="max", pending=0)`; all if not given.

    Raises:
        MissingExtra: mlflow is not installed.
        ConfigError: a name is empty, or `keep` is no policy.
    """

    name = "mlflow"
    title = "MLflow"
    put_moves_aliases = False

    def __init__(
        self,
        experiment: str,
        *,
        register_as: str | None = None,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
        run_name: str | None = None,
        keep: KeepPolicy | None = None,
    ) -> None:
        require("mlflow", extra="mlflow", who="MLflowTracker")
        names = {"experiment": experiment, "register_as": register_as}
        for option, name in names.items():
            if (not isinstance(name, str) or not name) and (option, name) != ("register_as", None):
                raise ConfigError(f"MLflowTracker: {option} must be a name, not {name!r}")
        self.keep = as_keep("MLflowTracker", keep)
        self._experiment = experiment
        self._register_as = register_as
        self._tracking_uri = tracking_uri
        self._artifact_location = artifact_location
        self._run_name = run_name
        self._client: MlflowClient
        self._run_id = self._experiment_id = self._key = ""

    def settings(self) -> Mapping[str, Any] | None:
        if has_secret(self._tracking_uri) or has_secret(self._artifact_location):
            return None  # rather than a tracker that finds another server
        return {
            "experiment": self._experiment,
            "register_as": self._register_as,
            "tracking_uri": absolute(self._tracking_uri),
            "artifact_location": absolute(self._artifact_location),
            "run_name": self._run_name,
            "keep": self.keep and policy_to_json(self.keep),
        }

    def open(self, run: RunInfo) -> Mapping[str, str]:
        # Here and not above: it takes seconds, and this is the worker's thread.
        load("mlflow")
        from mlflow import MlflowClient
        from mlflow.tracking import get_tracking_uri

        self._tracking_uri = self._tracking_uri or get_tracking_uri()
        self._key = run.run_id
        if run.reading:
            self._client = MlflowClient(self._tracking_uri)
            self._run_id = run.remembered["run_id"]
            self._experiment_id = str(self._client.get_run(self._run_id).info.experiment_id)
            return run.remembered
        create_database(self._tracking_uri, run.run_id)
        self._client = client = MlflowClient(self._tracking_uri)
        self._experiment_id = self._find_or_create_experiment()
        found = self._existing(run.remembered.get("run_id")) or self._find_run()
        if found:
            client.update_run(found, status="RUNNING")
        else:
            name = self._run_name or run.name
            tags = {RUN_TAG: run.run_id}
            found = client.create_run(self._experiment_id, tags=tags, run_name=name).info.run_id
        self._run_id = found
        self._log_params(run.config)
        if self._register_as:
            self._create_registered_model(self._register_as)
        return {"run_id": found}

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        model = self._model(checkpoint.step)
        if model and model.params.get("digest") != checkpoint.digest:
            self.delete(checkpoint.step)  # the step was saved again, with other bytes
            model = None
        model = model or self._create(checkpoint)
        repository = self._repository(model)
        shared = False
        if str(model.status) != "READY":
            shared = self._upload(repository, checkpoint)
            self._client.finalize_logged_model(model.model_id, "READY")
        self._log_model_metrics(model, checkpoint)
        ref = str(model.model_id)
        if self._register_as:
            version = self._version(checkpoint.step) or self._create_version(model, checkpoint)
            ref = self._ref(model, version)
        return Copy("confirmed", ref, shared)

    def listing(self) -> Listing | None:
        ready = {int(m.tags[STEP_TAG]): m for m in self._models() if str(m.status) == "READY"}
        refs = {step: str(m.model_id) for step, m in ready.items()}
        if self._register_as:
            versions = {int(v.tags[STEP_TAG]): v for v in self._versions()}
            refs = {s: self._ref(ready[s], versions[s]) for s in ready.keys() & versions.keys()}
        copies = {step: Copy("confirmed", ref) for step, ref in sorted(refs.items())}
        return Listing(copies, self._aliases())

    def get(self, step: int, into: Path) -> None:
        model = self._model(step)
        if model is None or str(model.status) != "READY":
            raise CheckpointNotFound(f"MLflow has no complete checkpoint of step {step}")
        repository = self._repository(model)
        for name, _ in _files(repository, FOLDER):
            target = into / Path(name).relative_to(FOLDER)
            target.parent.mkdir(parents=True, exist_ok=True)
            repository._download_file(name, str(target))

    def alias(self, name: str, step: int) -> None:
        if not self._register_as:
            self._client.set_tag(self._run_id, f"ckpt_callbacks_{name}", str(step))
            return
        version = self._version(step)
        if version is None:
            raise CheckpointNotFound(f"{self._register_as} has no version of step {step}")
        self._client.set_registered_model_alias(self._register_as, name, str(version.version))

    def delete(self, step: int) -> None:
        if version := self._version(step):
            self._client.delete_model_version(version.name, str(version.version))
        if model := self._model(step):
            # The files before the model: without it nobody would find them again.
            repository = self._repository(model)
            folder = _local_folder(repository)
            if folder is None or folder.exists():
                repository.delete_artifacts()
            if folder and folder.parent.exists():
                folder.parent.rmdir()  # the model's own folder, which MLflow leaves empty
            self._client.delete_logged_model(model.model_id)

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(
            self._run_id,
            metrics=[
                # A point that comes again is the same row and is stored once.
                Metric(_key(k), v, int(p.time * 1000), p.step)
                for p in points
                for k, v in p.values.items()
            ],
        )

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run_id, _STATUS[status])

    def hint(self) -> str:
        uri = redact(self._tracking_uri or "the tracking URI")
        if uri.startswith("http"):
            return f"{uri}/#/experiments/{self._experiment_id}?workflowType=machine_learning"
        return (
            f"mlflow ui --backend-store-uri {uri}, then open "
            f"http://127.0.0.1:5000/#/experiments/{self._experiment_id}/models"
            "?workflowType=machine_learning"
        )

    def _find_or_create_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            return str(self._client.create_experiment(self._experiment, self._artifact_location))
        if found.lifecycle_stage != "active":
            raise ConfigError(f"the MLflow experiment {self._experiment!r} is deleted: restore it")
        return str(found.experiment_id)

    def _existing(self, run_id: str | None) -> str | None:
        """Return the id if there is such a run: a database may have been removed or changed."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.run_id if run_id else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _find_run(self) -> str | None:
        """Return the run of an earlier `open` whose answer never arrived."""
        where = f"tags.{RUN_TAG} = '{self._key}'"
        found = self._client.search_runs([self._experiment_id], where, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _log_params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        # MLflow refuses to change a parameter, so a resumed run sends only new ones.
        known = self._client.get_run(self._run_id).data.params
        params = [
            Param(_key(k), (v if isinstance(v, str) else json.dumps(v))[:_LONGEST_PARAM])
            for k, v in config.items()
            if _key(k) not in known
        ]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MOST_PARAMS])

    def _create_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _create(self, checkpoint: Checkpoint) -> LoggedModel:
        return self._client.create_logged_model(
            self._experiment_id,
            name=f"step-{checkpoint.step}",
            source_run_id=self._run_id,
            params={"step": str(checkpoint.step), "digest": checkpoint.digest},
            tags={
                RUN_TAG: self._key,
                STEP_TAG: str(checkpoint.step),
                "ckpt_callbacks_reason": checkpoint.reason,
            },
            model_type="orbax-checkpoint",
        )

    def _upload(self, repository: ArtifactRepository, checkpoint: Checkpoint) -> bool:
        """Bring the files there and check that all arrived; return whether they are links."""
        linked = False
        if folder := _local_folder(repository):
            linked = link_tree(checkpoint.path, folder / FOLDER)
        else:
            repository.log_artifacts(str(checkpoint.path), FOLDER)
        arrived = dict(_files(repository, FOLDER))
        for name, file in checkpoint.files.items():
            size = arrived.get(f"{FOLDER}/{name}")
            if size != file.size:
                raise OSError(f"{name} has {size} bytes in MLflow instead of {file.size}")
        return linked

    def _log_model_metrics(self, model: LoggedModel, checkpoint: Checkpoint) -> None:
        from mlflow.entities import Metric

        # A metric of a model is one of its run too, so these have a name of their own: the run's
        # history of `loss` stays one value a step. The fixed time makes a repetition harmless.
        at, step, model_id = model.creation_timestamp, checkpoint.step, model.model_id
        metrics = [
            Metric(_key(f"checkpoint/{name}"), value, at, step, model_id=model_id)
            for name, value in checkpoint.metrics.items()
            # With a model's id MLflow stores NaN as 0.0, which would rank as a good loss.
            if math.isfinite(value)
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def _create_version(self, model: LoggedModel, checkpoint: Checkpoint) -> ModelVersion:
        return self._client.create_model_version(
            self._register_as,
            # Not `models:/<id>`, which MLflow would look up in the process's global store.
            source=model.artifact_location,
            run_id=self._run_id,
            model_id=model.model_id,
            tags={RUN_TAG: self._key, STEP_TAG: str(checkpoint.step)},
            await_creation_for=0,
        )

    def _ref(self, model: LoggedModel, version: ModelVersion) -> str:
        return f"{self._register_as} v{version.version} ({model.model_id})"

    def _models(self, step: int | None = None) -> Iterator[LoggedModel]:
        """Yield the LoggedModels of this run, of one step or of all."""
        where = f"tags.{RUN_TAG} = '{self._key}'"
        if step is not None:
            where += f" AND tags.{STEP_TAG} = '{step}'"
        token = None
        while True:
            page = self._client.search_logged_models([self._experiment_id], where, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _model(self, step: int) -> LoggedModel | None:
        return next(self._models(step), None)

    def _versions(self) -> Iterator[ModelVersion]:
        """Yield the versions of the registered model that this run made."""
        where = f"name = '{self._register_as}' and run_id = '{self._run_id}'"
        token = None
        while True:
            page = self._client.search_model_versions(where, page_token=token)
            yield from (v for v in page if v.tags.get(RUN_TAG) == self._key)
            if not (token := page.token):
                return

    def _version(self, step: int) -> ModelVersion | None:
        if not self._register_as:
            return None
        return next((v for v in self._versions() if v.tags.get(STEP_TAG) == str(step)), None)

    def _aliases(self) -> dict[str, int]:
        if not self._register_as:
            tags = self._client.get_run(self._run_id).data.tags
            names = {n: tags.get(f"ckpt_callbacks_{n}") for n in ("best", "last")}
            return {n: int(s) for n, s in names.items() if s}
        # Numbers over SQL, text over REST.
        steps = {str(v.version): int(v.tags[STEP_TAG]) for v in self._versions()}
        aliases = self._client.get_registered_model(self._register_as).aliases
        return {n: steps[str(v)] for n, v in aliases.items() if str(v) in steps}

    def _repository(self, model: LoggedModel) -> ArtifactRepository:
        # MlflowClient has no call that deletes artifacts; the repository classes do.
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(model.artifact_location, tracking_uri=self._tracking_uri)


def _local_folder(repository: ArtifactRepository) -> Path | None:
    """Return the folder of a repository on this machine's disk."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    if isinstance(repository, LocalArtifactRepository):
        return Path(repository.artifact_dir)
    return None


def _files(repository: ArtifactRepository, folder: str) -> Iterator[tuple[str, int]]:
    """Yield path and size of every file below `folder`."""
    for info in repository.list_artifacts(folder):
        if info.is_dir:
            yield from _files(repository, info.path)
        else:
            yield info.path, info.file_size


def _key(name: str) -> str:
    """Return a name that MLflow accepts for a metric or parameter.

    It takes letters, digits and `_-. /:`, at most 250, and refuses names that a path could
    not have, since a name may become a file.
    """
    allowed = "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)
    parts = [part for part in allowed.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:250].rstrip("/") or "_"
