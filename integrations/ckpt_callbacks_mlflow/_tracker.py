"""The MLflow tracker: every call finds what an earlier one left before it makes anything."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ckpt_callbacks import page
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.extras import load, require
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.payload import Send, as_send, weights_among
from ckpt_callbacks.policy import KeepPolicy, as_keep
from ckpt_callbacks.published import Safetensors, as_payload
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.stores import (
    Checkpoint,
    Copy,
    Found,
    Listing,
    MetricPoint,
    Overview,
    Rank,
    RunInfo,
    Tracker,
    redact,
)
from ckpt_callbacks_mlflow._connection import (
    absolute,
    create_database,
    exists,
    has_secret,
    set_deadlines,
)
from ckpt_callbacks_mlflow._fetch import known_of, whole
from ckpt_callbacks_mlflow._files import repository, send
from ckpt_callbacks_mlflow._models import Models
from ckpt_callbacks_mlflow._names import as_key, as_tag
from ckpt_callbacks_mlflow._registry import Registry, is_claimed, keeps
from ckpt_callbacks_mlflow._runs import (
    EXPERIMENTS_TAG,
    existing,
    experiments_of,
    find_experiments,
    find_or_create_experiment,
    find_or_create_run,
    is_active,
    log_params,
    logged,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

__all__ = ["MLflowTracker"]

_STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
    "preempted": "KILLED",
}
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_VERSION = re.compile(r" v(\d+) \(")
"""In what `_ref` returns."""


class MLflowTracker(Tracker):
    """Mirrors kept checkpoints and logs metrics to an MLflow tracking server or database.

    A run that is open on the thread of the loop (`mlflow.start_run()`), or named by `run_id` or by
    `MLFLOW_RUN_ID`, is used and left open; else one is made, and goes on when training does.

    Where you have set none of `MLFLOW_HTTP_REQUEST_MAX_RETRIES`, `_BACKOFF_FACTOR` and `_TIMEOUT`,
    they are set for the process, since MLflow's own let a call wait four minutes for a server
    that is down. An open run on another server than `tracking_uri` is left alone.

    Args:
        experiment: name of the experiment, made if need be. MLflow's own default if not given; a
            run that is used has its own.
        register_as: name of a registered model for the aliases `best` and `last`.
            Without one they are tags of the run, `ckpt_callbacks_best` and `ckpt_callbacks_last`.
        tracking_uri: as for `mlflow.set_tracking_uri`; MLflow's own default if not given.
        artifact_location: where a new experiment keeps its files; MLflow's default if not given.
        run_name: name of the run; that of the run directory if not given.
        run_id: of the MLflow run to use.
        tags: of the run.
        send: of a checkpoint, all of it (`checkpoint`), its items that are weights (`weights`:
            those named `model`, `params` or `weights`), or where it is and no bytes (`reference`).
        payload: what is published besides, such as `cc.Safetensors(only="params")`; with
            `send="reference"` it is all that is sent.
        predict: `package.module:function` for `mlflow.pyfunc.load_model(...).predict`. The
            function gets the weights and the input, and returns the predictions.
        like: `package.module:function` that returns a state for the weights to be restored into,
            such as a Flax NNX or Equinox module; without it they are nested dicts of arrays.
        keep: of the checkpoints that are kept, hold only those that this policy keeps, such as
            `BestN(1, "val_accuracy", mode="max", pending=0)`; all if not given.

    Raises:
        MissingExtra: mlflow is not installed.
        ConfigError: an option is not as said above.
    """

    name = "mlflow"
    title = "MLflow"
    put_moves_aliases = False

    def __init__(
        self,
        experiment: str | None = None,
        *,
        register_as: str | None = None,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        send: Send = "checkpoint",
        payload: Safetensors | Mapping[str, Any] | None = None,
        predict: str | None = None,
        like: str | None = None,
        keep: KeepPolicy | None = None,
    ) -> None:
        require("mlflow", extra="mlflow", who="MLflowTracker")
        names = {"experiment": experiment, "register_as": register_as, "run_id": run_id}
        for option, name in names.items():
            if name is not None and (not isinstance(name, str) or not name.strip()):
                raise ConfigError(f"MLflowTracker: {option} must be a name, not {name!r}")
        if register_as and re.search(r"[/:']", register_as):
            raise ConfigError(
                f"MLflowTracker: register_as must not contain '/', ':' or a quote: {register_as!r}"
            )
        self._send = as_send("MLflowTracker", send)
        self._payload = as_payload("MLflowTracker", payload)
        self.reads_files = send != "reference" or self._payload is not None
        self.refers_here = send == "reference"
        if send == "reference" and predict and not payload:
            raise ConfigError(
                "MLflowTracker: predict needs the weights, but send='reference' sends no bytes: "
                "payload=cc.Safetensors() sends them"
            )
        for option, name in (("predict", predict), ("like", like)):
            if name is not None and not _FUNCTION.fullmatch(name):
                raise ConfigError(
                    f"MLflowTracker: {option} must be 'package.module:function', not {name!r}"
                )
        self.keep = as_keep("MLflowTracker", keep)
        self._experiment = experiment
        self._register_as = register_as
        self._tracking_uri = tracking_uri
        self._artifact_location = artifact_location
        self._run_name = run_name
        self._run_id = run_id
        self._tags = {str(k): str(v) for k, v in (tags or {}).items()}
        self._flavor = {k: v for k, v in (("predict", predict), ("like", like)) if v}
        # From here on what `entered` and `open` find out.
        self._adopts = run_id
        """Id of the run of somebody else that is used and left open."""
        self._uri = tracking_uri or ""
        self._client: MlflowClient
        self._run: Run
        self._home: Run
        self._experiment_id = "…"
        self._models: Models
        self._registry: Registry | None = None
        self._not_finite: dict[str, str] = {}
        self._info: RunInfo
        self._ranks: dict[str, tuple[int, Rank | None] | None] = {}
        """What each alias was last moved for; `None` where another run's version kept it."""
        self._logged: dict[str, int] = {}

    def settings(self) -> Mapping[str, Any] | None:
        uri = self._uri or self._tracking_uri
        if has_secret(uri) or has_secret(self._artifact_location):
            return None  # rather than a tracker that finds another server
        return {
            "experiment": self._experiment,
            "register_as": self._register_as,
            "tracking_uri": absolute(uri),
            "artifact_location": absolute(self._artifact_location),
            "run_name": self._run_name,
            "run_id": self._adopts,
            "tags": self._tags,
            "send": self._send,
            "payload": self._payload and self._payload.to_json(),
            **self._flavor,
            "keep": self.keep and policy_to_json(self.keep),
        }

    def ping(self, run: RunInfo) -> str:
        load("mlflow")
        from mlflow import MlflowClient
        from mlflow.tracking import get_tracking_uri

        set_deadlines()
        uri = self._tracking_uri or get_tracking_uri()
        if not exists(uri):  # and is not made by looking
            raise FileNotFoundError(f"there is no database {redact(uri)}")
        MlflowClient(uri).search_experiments(max_results=1)
        return f"{redact(uri)} answers"

    def address(self, step: int, copy: Copy, remembered: Mapping[str, str]) -> str | None:
        if copy.state != "confirmed":
            return None
        if self._register_as and (version := _VERSION.search(copy.ref)):
            return f"mlflow:/{self._register_as}/{version[1]}"
        run_id = remembered.get("run_id")
        return run_id and f"mlflow:/runs/{run_id}/{step}"

    def entered(self, items: Sequence[str]) -> None:
        if self._send == "weights":
            weights_among("MLflowTracker", items)
        if self._payload:
            self._payload.check("MLflowTracker", items)
        # Which run is open is known to this thread only. Where mlflow is not imported there is
        # none, and where it is just being imported, on a worker's thread, it has no functions yet.
        mlflow = sys.modules.get("mlflow")
        active = getattr(mlflow, "active_run", lambda: None)()
        uri = str(getattr(mlflow, "get_tracking_uri", str)())
        self._adopts, self._uri = self._run_id, self._tracking_uri or uri
        # One on another server than the one that was asked for is left alone.
        if active and self._adopts is None and self._uri == uri:
            self._adopts = str(active.info.run_id)
        self._adopts = self._adopts or os.environ.get("MLFLOW_RUN_ID")
        self._uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI", "")

    def fits(self, leaves: Mapping[tuple[str, ...], Leaf]) -> None:
        if self._payload:
            self._payload.fits("MLflowTracker", leaves)

    @property
    def tracking_uri(self) -> str:
        """The server or database, which MLflow says where nobody else does."""
        from mlflow.tracking import get_tracking_uri

        return self._uri or self._tracking_uri or str(get_tracking_uri())

    def find(self, run_id: str) -> Mapping[int, Found]:
        load("mlflow")
        from mlflow import MlflowClient

        set_deadlines()
        if not exists(self.tracking_uri):  # and is not made by asking
            return {}
        client = MlflowClient(self.tracking_uri)
        experiments = find_experiments(client, self._experiment, self._adopts, run_id)
        return whole(client, experiments, run_id)

    def open(self, run: RunInfo) -> Mapping[str, str]:
        # Here and not above: it takes seconds, and this is the worker's thread.
        load("mlflow")
        from mlflow import MlflowClient

        set_deadlines()
        self._info, self._ranks, self._not_finite = run, {}, {}
        self._uri = self.tracking_uri
        if not run.reading:
            create_database(self._uri, run.run_id)
        self._client = MlflowClient(self._uri)
        if run.reading:
            self._run = self._home = self._client.get_run(run.remembered["run_id"])
        else:
            self._begin(run)
        self._experiment_id = str(self._run.info.experiment_id)
        self._models = Models(
            self._client,
            self._uri,
            self._experiments(),
            self._run.info.run_id,
            run.run_id,
            self._send,
            self._payload,
            self._flavor,
            run.scratch,
        )
        self._registry = None
        if self._register_as:
            self._registry = Registry(self._client, self._register_as, run.run_id, run.rank)
            if not run.reading:
                self._registry.create()
        return {"run_id": str(self._home.info.run_id)}

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        found = self._models.find(checkpoint.step)
        same = next((m for m in found if self._models.is_of(m, checkpoint)), None)
        if others := [m for m in found if m is not same]:
            # The step was saved again, with other bytes; or an answer was lost, and the call
            # came again.
            self._delete(checkpoint.step, others, spare=[same.model_id] if same else ())
        model, shared = self._models.publish(checkpoint, same)
        if same is None:  # an answer to MLflow's own client may have been lost
            now = self._models.find(checkpoint.step)
            if doubles := [m for m in now if m.model_id != model.model_id]:
                self._delete(checkpoint.step, doubles, spare=[model.model_id])
        self._models.show(model, checkpoint.time, checkpoint.metrics, checkpoint.reason, ())
        ref = str(model.model_id)
        if self._registry:
            began = int(self._home.info.start_time)
            version = self._registry.publish(model, self._run.info.run_id, began)
            ref = self._ref(model, str(version.version))
        return Copy("confirmed", ref, shared)

    def listing(self) -> Listing | None:
        ready = self._models.ready()
        refs = {step: str(model.model_id) for step, model in ready.items()}
        if self._registry:
            versions = self._registry.numbers()
            refs = {
                step: self._ref(model, versions[model.model_id])
                for step, model in ready.items()
                if model.model_id in versions
            }
        copies = {
            step: Copy("confirmed", ref, self._models.is_shared(ready[step]))
            for step, ref in sorted(refs.items())
        }
        # A database answers with what it has.
        known = {step: known_of(ready[step]) for step in copies}
        return Listing(copies, self._aliases(), exact=True, known=known)

    def get(self, step: int, into: Path) -> None:
        self._models.get(step, into)

    def alias(self, name: str, step: int) -> bool:
        if self._registry:
            moved = self._registry.alias(name, step)
            # Where it was refused, it may be our turn later.
            self._ranks[name] = (step, self._info.rank(name, step)) if moved else None
            return moved
        for run_id in {r.info.run_id for r in (self._home, self._run) if is_active(r)}:
            self._client.set_tag(run_id, f"ckpt_callbacks_{name}", str(step))
        return True

    def delete(self, step: int) -> bool:
        return self._delete(step, self._models.find(step))

    def show(self, overview: Overview) -> None:
        models = self._models.ready()
        for row in overview.rows:
            if model := models.get(row.step):
                self._models.show(model, row.time, row.metrics, row.reason, row.aliases)
            for alias in row.aliases if self._registry else ():
                if self._ranks.get(alias) != (row.step, self._info.rank(alias, row.step)):
                    self.alias(alias, row.step)  # it was measured again, or refused before
        run_id = self._run.info.run_id
        self._client.log_text(run_id, page.as_json(overview), "checkpoints/index.json")
        self._client.log_text(run_id, page.html(overview), "checkpoints/index.html")

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        values = [(p, as_key(k), v) for p in points for k, v in p.values.items()]
        # MLflow keeps NaN, but of an infinity it makes the largest number.
        for point, key, value in values:
            if math.isinf(value):
                self._tell(key, f"{value} at step {point.step}")
        self._client.log_batch(
            self._run.info.run_id,
            # A point that comes again is the same row and is stored once.
            metrics=[
                Metric(key, value, int(point.time * 1000), point.step)
                for point, key, value in values
                if not math.isinf(value) and point.step > self._logged.get(key, -1)
            ],
        )

    def log_artifact(self, path: Path, name: str) -> None:
        store = repository(self._run.info.artifact_uri, self._uri)
        with tempfile.TemporaryDirectory() as folder:
            renamed = Path(folder) / PurePosixPath(name).name
            renamed.symlink_to(path.absolute())  # MLflow takes the name from the file's
            send(store, renamed, name)

    def close(self, status: str) -> None:
        if not self._adopts:
            self._client.set_terminated(self._run.info.run_id, _STATUS[status])

    def hint(self) -> str:
        uri = redact(self._uri or self._tracking_uri or "the tracking URI")
        experiment = self._experiment_id
        if uri.startswith("http"):
            return f"{uri}/#/experiments/{experiment}?workflowType=machine_learning"
        return (
            f"mlflow ui --backend-store-uri {uri}, then open "
            f"http://127.0.0.1:5000/#/experiments/{experiment}/models"
            "?workflowType=machine_learning"
        )

    def _delete(self, step: int, models: Sequence[LoggedModel], spare: Sequence[str] = ()) -> bool:
        """Delete LoggedModels of a step with their versions; return False if one must stay."""
        numbers = self._registry.numbers() if self._registry else {}
        kept = {
            m.model_id
            for m in models
            if keeps(m.tags)
            or is_claimed(self._client, m, numbers.get(m.model_id), self._register_as or "")
        }
        if self._registry:
            kept |= self._registry.delete(step, but=kept.union(spare))
        for model in models:
            if model.model_id not in kept:
                self._models.delete(model)
        return not kept

    def _begin(self, info: RunInfo) -> None:
        """Find or make the run of MLflow, and the one that it goes on from."""
        home = existing(self._client, info.remembered.get("run_id"))
        if self._adopts:
            self._run = self._client.get_run(self._adopts)
        elif home:
            self._run = home
        else:
            experiment = find_or_create_experiment(
                self._client, self._experiment, self._artifact_location
            )
            name = self._run_name or info.name
            self._run = find_or_create_run(self._client, experiment, info.run_id, name)
        self._home = home or self._run
        # A directory that took over a run does not know how far its metrics were logged, and MLflow
        # can not take one back.
        taken_over = not self._adopts and not info.remembered
        self._logged = logged(self._client, self._run) if taken_over else {}
        if not is_active(self._run):
            raise ConfigError(
                f"the MLflow run {self._run.info.run_id} is deleted: restore it, or use another "
                "run directory"
            )
        if not self._adopts and self._run.info.status != "RUNNING":
            self._client.update_run(self._run.info.run_id, status="RUNNING")
        log_params(self._client, self._run, info.config, self._tags)

    def _tell(self, key: str, what: str) -> None:
        """Say once in a tag what MLflow cannot hold of a metric."""
        if key not in self._not_finite:
            tag = as_tag(f"ckpt_callbacks_not_finite.{key}")
            self._client.set_tag(self._run.info.run_id, tag, what)
            self._not_finite[key] = what

    def _experiments(self) -> list[str]:
        """Return the experiments that hold checkpoints of this run; new ones go into the last."""
        known = experiments_of(self._home)
        if self._experiment_id not in known and is_active(self._home):
            known.append(self._experiment_id)
            self._client.set_tag(self._home.info.run_id, EXPERIMENTS_TAG, ",".join(known))
        return [e for e in known if e != self._experiment_id] + [self._experiment_id]

    def _aliases(self) -> dict[str, int]:
        if self._registry:
            return self._registry.aliases()
        run = self._home if is_active(self._home) else self._run
        tags = self._client.get_run(run.info.run_id).data.tags
        names = {k.removeprefix("ckpt_callbacks_"): v for k, v in tags.items()}
        return {
            n: int(s) for n, s in names.items() if n in ("best", "last") or n.startswith("best-")
        }

    def _ref(self, model: LoggedModel, version: str) -> str:
        return f"{self._register_as} v{version} ({model.model_id})"
