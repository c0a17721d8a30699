"""Checkpoints in MLflow by their address.

`mlflow:/NAME@ALIAS` and `mlflow:/NAME/VERSION` name a version of a registered model, and
`mlflow:/runs/RUN_ID/STEP` the checkpoint of a step of a run, and `mlflow:/MODEL_ID` a LoggedModel.
MLflow's own `models:/NAME@ALIAS` is understood too. The server is the one that MLflow's own
settings name, such as `MLFLOW_TRACKING_URI`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ckpt_callbacks.errors import CheckpointNotFound, CkptCallbacksError, ConfigError, UsageError
from ckpt_callbacks.extras import load, require
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.record import Record
from ckpt_callbacks.stores import Store, redact
from ckpt_callbacks_mlflow._connection import exists, set_deadlines
from ckpt_callbacks_mlflow._fetch import fetch as fetch_files
from ckpt_callbacks_mlflow._fetch import is_ready, known_of, manifest, search, step_of
from ckpt_callbacks_mlflow._registry import MODEL_TAG, RUN_TAG, STEP_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

    from ckpt_callbacks_mlflow._tracker import MLflowTracker

__all__ = ["fetch"]

_FORMS = "mlflow:/NAME@ALIAS, mlflow:/NAME/VERSION, mlflow:/runs/RUN_ID/STEP or mlflow:/MODEL_ID"


def fetch(
    address: str,
    into: Path,
    *,
    only: Selection | None = None,
    tracker: Store | None = None,
    go_on: bool = False,
) -> Record:
    """Copy the files of the checkpoint at `address` into the empty folder `into`.

    Args:
        address: of one of the forms above.
        into: an empty folder.
        only: the leaves that are wanted, of which the items are fetched; all if not given.
        tracker: the `MLflowTracker` of the run, whose server is asked then.
        go_on: whether its run is to go on from it.

    Raises:
        ConfigError: it is not of one of the forms, or two run directories have what it names.
        CheckpointNotFound: there is no such checkpoint, it has no such item, or MLflow can not be
            asked.
        UsageError: the run is to go on, and has newer checkpoints.
    """
    require("mlflow", extra="mlflow", who=address)
    load("mlflow")
    from mlflow import MlflowClient
    from mlflow.tracking import get_tracking_uri

    set_deadlines()
    uri = cast("MLflowTracker", tracker).tracking_uri if tracker else get_tracking_uri()
    if not exists(uri):  # and is not made by looking
        raise CheckpointNotFound(
            f"MLflow has no {address}: there is no database {uri}. MLFLOW_TRACKING_URI names the "
            "one to look in"
        )
    client = MlflowClient(uri)
    try:
        model = _resolve(client, address)
        if go_on:
            _check_newest(client, model, address)
        record = manifest(model, uri)
        fetch_files(model, uri, into, only, or_weights=True)
    except (CkptCallbacksError, OSError):
        raise
    except Exception as error:  # MLflow's, or of the client of where the artifacts are
        # Without the cause, whose text may hold a password.
        raise CheckpointNotFound(f"MLflow does not give {address}: {redact(str(error))}") from None
    # What was measured since the record was sent.
    return replace(record, metrics={**record.metrics, **known_of(model).metrics})


def _check_newest(client: MlflowClient, model: LoggedModel, address: str) -> None:
    """Check that a run has no newer checkpoint, which would be taken for one of this way.

    Raises:
        UsageError: it has.
    """
    step, where = step_of(model), f"tags.{RUN_TAG} = '{model.tags[RUN_TAG]}'"
    models = search(client, [model.experiment_id], where)
    newer = sorted({step_of(m) for m in models if is_ready(m) and step_of(m) > step})
    if newer:
        raise UsageError(
            f"{address} is step {step}, and its run has newer checkpoints there: "
            f"{', '.join(map(str, newer))}. A run can only go on from its newest one, "
            f"mlflow:/runs/{model.source_run_id}/{newer[-1]}; to begin a new run with the weights "
            f"of this one, give the address to `restore`"
        )


def _resolve(client: MlflowClient, address: str) -> LoggedModel:
    path = re.sub(r"^(mlflow|models):/*", "", address)
    if match := re.fullmatch(r"runs/(\w+)/(\d+)", path):
        return _of_run(client, address, *match.groups())
    if re.fullmatch(r"m-\w+", path):
        return _ours(client.get_logged_model(path), address)
    if match := re.fullmatch(r"([^/@]+)@([^/@]+)", path):
        version = client.get_model_version_by_alias(*match.groups())
    elif match := re.fullmatch(r"([^/@]+)/(\d+)", path):
        version = client.get_model_version(*match.groups())
    else:
        raise ConfigError(f"{address!r} is none of {_FORMS}")
    model_id = version.tags.get(MODEL_TAG)
    if model_id is None:
        raise CheckpointNotFound(f"{address} was not made by ckpt_callbacks")
    return client.get_logged_model(model_id)


def _ours(model: LoggedModel, address: str) -> LoggedModel:
    if RUN_TAG not in model.tags:
        raise CheckpointNotFound(f"{address} was not made by ckpt_callbacks")
    return model


def _of_run(client: MlflowClient, address: str, run_id: str, step: str) -> LoggedModel:
    experiment = client.get_run(run_id).info.experiment_id
    where = f"source_run_id = '{run_id}' AND tags.{STEP_TAG} = '{step}'"
    models = [m for m in search(client, [experiment], where) if is_ready(m)]
    if not models:
        raise CheckpointNotFound(f"MLflow has no {address}: the run has no checkpoint of this step")
    if len({m.tags.get(RUN_TAG) for m in models}) > 1:
        raise ConfigError(
            f"{address} can not be told apart: several run directories have logged step {step} to "
            "this run; give each a registered model, and the address of a version"
        )
    return models[0]
