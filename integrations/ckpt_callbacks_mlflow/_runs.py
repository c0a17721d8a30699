"""The run of MLflow, its experiment and its parameters: found before they are made."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks_mlflow._names import as_key, as_tag
from ckpt_callbacks_mlflow._registry import RUN_TAG, is_missing

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = [
    "EXPERIMENTS_TAG",
    "existing",
    "experiments_of",
    "find_experiments",
    "find_or_create_experiment",
    "find_or_create_run",
    "is_active",
    "log_params",
    "logged",
]

logger = logging.getLogger("ckpt_callbacks")

EXPERIMENTS_TAG = "ckpt_callbacks_experiments"

_LONGEST_PARAM = 6000  # characters; MLflow's own limit
_LONGEST_TAG = 5000  # the same of a tag, with room to spare
_MOST = 100  # parameters, and tags, in one call; MLflow's own limit


def existing(client: MlflowClient, run_id: str | None) -> Run | None:
    """Return the run if there is one: a database may have been removed or changed."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if is_missing(error):
            return None
        raise


def find_or_create_run(client: MlflowClient, experiment: str, key: str, name: str) -> Run:
    """Return the run with our tag."""
    if not _find_runs(client, experiment, key):
        client.create_run(experiment, tags={RUN_TAG: key}, run_name=name)
    # An answer may have been lost, here or at an earlier start, and the call come again.
    first, *doubles = _find_runs(client, experiment, key)
    for double in doubles:
        client.delete_run(double.info.run_id)
    return first


def find_or_create_experiment(
    client: MlflowClient, name: str | None, artifact_location: str | None
) -> str:
    """Return the id of the experiment, or of the one that MLflow would take.

    Raises:
        ConfigError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    known, name = _named_experiment(name)
    if known:
        return known
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location))
        except MlflowException as error:
            # Another run was faster, or an answer was lost and the call came again.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise ConfigError(f"the MLflow experiment {name!r} is deleted: restore it")
    return str(found.experiment_id)


def find_experiments(
    client: MlflowClient, name: str | None, run_id: str | None, key: str
) -> list[str]:
    """Return the experiments that may hold checkpoints of the run directory with the id `key`.

    Args:
        client: of MLflow.
        name: of the experiment, as for `find_or_create_experiment`; nothing is made here.
        run_id: of the run of somebody else that is used, which has its own experiment.
        key: our tag.
    """
    if run_id:
        used = existing(client, run_id)
        return [str(used.info.experiment_id)] if used else []
    known, name = _named_experiment(name)
    if not known:
        found = client.get_experiment_by_name(name)
        if found is None:
            return []
        known = str(found.experiment_id)
    homes = _find_runs(client, known, key)
    return list(dict.fromkeys([known, *(e for run in homes for e in experiments_of(run))]))


def _named_experiment(name: str | None) -> tuple[str | None, str]:
    """Return the id of the experiment that is meant, if that is known, and else its name."""
    # `mlflow.set_experiment` leaves the id in the environment.
    known = None if name else os.environ.get("MLFLOW_EXPERIMENT_ID")
    return known, name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"


def is_active(run: Run) -> bool:
    """Return whether a run was not deleted."""
    return bool(run.info.lifecycle_stage == "active")


def experiments_of(run: Run) -> list[str]:
    """Return the experiments that hold checkpoints of the run directory that began with `run`.

    It may have gone on in runs of other experiments that the user had open.
    """
    own = str(run.info.experiment_id)
    return list(dict.fromkeys([own, *run.data.tags.get(EXPERIMENTS_TAG, own).split(",")]))


def logged(client: MlflowClient, run: Run) -> dict[str, int]:
    """Return the last step of which a run has each metric, checkpoints' own left out."""
    return {
        key: max(m.step for m in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
        if not key.startswith("checkpoint/")
    }


def log_params(
    client: MlflowClient, run: Run, config: Mapping[str, Any], tags: Mapping[str, str]
) -> None:
    """Log what is new of the configuration and the tags.

    MLflow refuses to change a parameter, so what has changed since the run began is a tag.
    """
    from mlflow.entities import Param, RunTag

    known = run.data.params
    wanted = {
        as_key(k): str(v)[:_LONGEST_PARAM]  # as `mlflow.log_params` writes it
        for k, v in config.items()
    }
    changed = {k: v for k, v in wanted.items() if known.get(k, v) != v}
    for key, value in changed.items():
        logger.warning(
            "MLflow keeps the first value of the parameter %s, %s; the new one, %s, is a tag",
            key,
            known[key],
            value,
        )
    all_tags = {**tags, **{as_tag(f"ckpt_callbacks_changed.{k}"): v for k, v in changed.items()}}
    new_params = [Param(k, v) for k, v in wanted.items() if k not in known]
    new_tags = [
        RunTag(k, v[:_LONGEST_TAG])
        for k, v in all_tags.items()
        if run.data.tags.get(k) != v[:_LONGEST_TAG]
    ]
    for start in range(0, max(len(new_params), len(new_tags)), _MOST):
        part = slice(start, start + _MOST)
        client.log_batch(run.info.run_id, params=new_params[part], tags=new_tags[part])


def _find_runs(client: MlflowClient, experiment: str, key: str) -> list[Run]:
    """Return the runs with our tag, oldest first."""
    where = f"tags.{RUN_TAG} = '{key}'"
    return list(client.search_runs([experiment], where, order_by=["start_time", "run_id"]))
