"""What a LoggedModel says of its checkpoint, and its files, brought to this machine."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_callbacks import publication
from ckpt_callbacks.errors import CheckpointNotFound, RecordError
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.record import Record, record_from_json
from ckpt_callbacks.remote import copy_referenced
from ckpt_callbacks.stores import Found, Known
from ckpt_callbacks_mlflow._files import FOLDER, download, repository
from ckpt_callbacks_mlflow._registry import RUN_TAG, STEP_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

__all__ = [
    "KNOWN_TAG",
    "MANIFEST",
    "PATH_TAG",
    "fetch",
    "is_ready",
    "known_of",
    "manifest",
    "search",
    "step_of",
    "whole",
]

MANIFEST = "checkpoint.json"
"""The record of the files, beside them."""
PATH_TAG = "ckpt_callbacks_path"
"""Where the checkpoint was saved."""
KNOWN_TAG = "ckpt_callbacks_known"
"""Time, finite metrics under their own names, and whether it is pinned, as JSON. What is longer
than a tag goes on in `ckpt_callbacks_known.1` and so on."""


def search(client: MlflowClient, experiments: Sequence[str], where: str) -> list[LoggedModel]:
    """Return all LoggedModels that a filter finds."""
    found: list[LoggedModel] = []
    token = None
    while True:
        page = client.search_logged_models(list(experiments), where, page_token=token)
        found += page
        if not (token := page.token):
            return found


def fetch(
    model: LoggedModel,
    tracking_uri: str,
    into: Path,
    only: Selection | None = None,
    *,
    or_weights: bool = False,
) -> None:
    """Copy the files of a LoggedModel's checkpoint into a folder.

    Args:
        model: a whole one.
        tracking_uri: of its server.
        into: an empty folder.
        only: the leaves that are wanted, of which the items are fetched; all if not given.
        or_weights: whether to fetch the published weights where the checkpoint is not to be had.

    Raises:
        CheckpointNotFound: it is a reference, and the checkpoint is no longer there; or it has
            no such item.
    """
    store = repository(model.artifact_location, tracking_uri)
    if model.params.get("sent") == "reference":
        path = model.tags[PATH_TAG]
        if copy_referenced(path, into, only):
            return
        if or_weights and "payload" in model.params:
            download(store, [publication.FOLDER, publication.MANIFEST], into)
        else:
            raise CheckpointNotFound(
                f"MLflow has a reference to {path} only, and there is nothing there"
            )
        return
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        if only is None:
            names = [FOLDER]
        else:
            listed = store.list_artifacts(FOLDER)
            there = {info.path.rpartition("/")[2] for info in listed if info.is_dir}
            chosen = only.items(there, f"the copy of step {step_of(model)} in MLflow")
            names = [i.path for i in listed if not i.is_dir] + [f"{FOLDER}/{n}" for n in chosen]
        download(store, names, Path(scratch))
        for path in (Path(scratch) / FOLDER).iterdir():
            path.rename(into / path.name)


def manifest(model: LoggedModel, tracking_uri: str) -> Record:
    """Return the record of a LoggedModel's checkpoint, checked against the model's own digest.

    Raises:
        RecordError: it is damaged.
    """
    with tempfile.TemporaryDirectory() as scratch:
        download(repository(model.artifact_location, tracking_uri), [MANIFEST], Path(scratch))
        text = (Path(scratch) / MANIFEST).read_text(encoding="utf-8")
    where = f"{MANIFEST} of the LoggedModel {model.model_id}"
    record = record_from_json(text, where)
    if tree_digest(record.files) != model.params.get("digest"):
        raise RecordError(f"{where} is not the one that was sent: its digest differs")
    return record


def known_of(model: LoggedModel) -> Known:
    """Return what is known of a checkpoint beside its files."""
    parts = (model.tags.get(f"{KNOWN_TAG}.{n}", "") for n in range(1, 100))
    text = model.tags.get(KNOWN_TAG, "") + "".join(itertools.takewhile(bool, parts))
    known = json.loads(text or "{}")
    return Known(
        digest=model.params.get("digest", ""),
        time=float(known.get("time", 0.0)),
        metrics=known.get("metrics", {}),
        pinned=bool(known.get("pinned")),
    )


def whole(client: MlflowClient, experiments: Sequence[str], key: str) -> dict[int, Found]:
    """Return what a run can go on from, by step: all that was sent, and not a part of it."""
    models = search(client, experiments, f"tags.{RUN_TAG} = '{key}'") if experiments else []
    ready = [m for m in models if is_ready(m) and m.params.get("sent") == "checkpoint"]
    return {
        step_of(m): Found(
            f"mlflow:/{m.model_id}", int(m.params["bytes"]), m.params.get("digest", "")
        )
        for m in sorted(ready, key=lambda m: m.creation_timestamp)
    }


def is_ready(model: LoggedModel) -> bool:
    """Return whether all files are there."""
    return str(model.status) == "READY"


def step_of(model: LoggedModel) -> int:
    """Return the step of which a LoggedModel is the checkpoint."""
    return int(model.tags[STEP_TAG])
