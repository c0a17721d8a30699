"""Checkpoints in MLflow by their address.

`mlflow:/NAME@ALIAS` and `mlflow:/NAME/VERSION` name a version of a registered model, and
`mlflow:/runs/RUN_ID/STEP` the checkpoint of a step of a run. The server is the one that MLflow's
own settings name, such as `MLFLOW_TRACKING_URI`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_callbacks.errors import CheckpointNotFound, ConfigError
from ckpt_callbacks.extras import load, require
from ckpt_callbacks.record import Record
from ckpt_callbacks_mlflow._connection import set_deadlines
from ckpt_callbacks_mlflow._fetch import fetch as fetch_files
from ckpt_callbacks_mlflow._fetch import is_ready, manifest, search
from ckpt_callbacks_mlflow._registry import MODEL_TAG, STEP_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

__all__ = ["fetch"]

_FORMS = "mlflow:/NAME@ALIAS, mlflow:/NAME/VERSION or mlflow:/runs/RUN_ID/STEP"


def fetch(address: str, into: Path, only: Collection[str] | None = None) -> Record:
    """Copy the files of the checkpoint at `address` into the empty folder `into`.

    Raises:
        ConfigError: it is not of one of the forms.
        CheckpointNotFound: there is no such checkpoint, or it has no such item.
    """
    require("mlflow", extra="mlflow", who=address)
    load("mlflow")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import get_tracking_uri

    set_deadlines()
    uri = get_tracking_uri()
    try:
        model = _resolve(MlflowClient(uri), address)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise CheckpointNotFound(f"MLflow has no {address}: {error}") from error
        raise
    record = manifest(model, uri)
    fetch_files(model, uri, into, only)
    return record


def _resolve(client: MlflowClient, address: str) -> LoggedModel:
    path = re.sub(r"^mlflow:/*", "", address)
    if match := re.fullmatch(r"runs/(\w+)/(\d+)", path):
        return _of_run(client, address, *match.groups())
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


def _of_run(client: MlflowClient, address: str, run_id: str, step: str) -> LoggedModel:
    experiment = client.get_run(run_id).info.experiment_id
    where = f"source_run_id = '{run_id}' AND tags.{STEP_TAG} = '{step}'"
    for model in search(client, [experiment], where):
        if is_ready(model):
            return model
    raise CheckpointNotFound(f"MLflow has no {address}: the run has no checkpoint of this step")
