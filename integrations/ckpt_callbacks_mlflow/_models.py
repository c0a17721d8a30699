"""The LoggedModels of a run: one a checkpoint, found by its tags before it is made.

A LoggedModel is `READY` only when all its files arrived. Its artifacts are

::

    checkpoint/        the files, as Orbax wrote them
    checkpoint.json    their record, with size and digest of each
    weights/           with `payload=`: the weights as a file of another library
    weights.json       with size and digest of each of its files
    MLmodel            how MLflow loads it
    README.md          what it is, for people
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_callbacks import publication
from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.payload import Send, chosen
from ckpt_callbacks.publication import files_of
from ckpt_callbacks.published import Safetensors
from ckpt_callbacks.stores import Checkpoint
from ckpt_callbacks_mlflow._fetch import (
    KNOWN_TAG,
    MANIFEST,
    PATH_TAG,
    fetch,
    is_ready,
    search,
    step_of,
)
from ckpt_callbacks_mlflow._files import FOLDER, Tree, is_local, remove, repository, upload
from ckpt_callbacks_mlflow._names import as_key
from ckpt_callbacks_mlflow._registry import RUN_TAG, STEP_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

__all__ = ["FLAVOR", "Models"]

FLAVOR = "ckpt_callbacks"
_REASON_TAG = "ckpt_callbacks_reason"
_ALIASES_TAG = "ckpt_callbacks_aliases"
_NOT_FINITE_TAG = "ckpt_callbacks_not_finite"

_LONGEST = 5000  # characters of a tag; less than MLflow's own limit


class Models:
    """The LoggedModels of one run.

    Args:
        client: of MLflow.
        tracking_uri: of the client.
        experiments: ids of those that are searched; new ones are made in the last.
        run_id: of the MLflow run that new ones belong to.
        key: id of the run, their tag.
        send: what is sent of a checkpoint.
        payload: what is published beside it.
        flavor: options of the flavor, for `MLmodel`.
        scratch: a folder for what is on its way.
    """

    def __init__(
        self,
        client: MlflowClient,
        tracking_uri: str,
        experiments: Sequence[str],
        run_id: str,
        key: str,
        send: Send,
        payload: Safetensors | None,
        flavor: Mapping[str, str],
        scratch: Path,
    ) -> None:
        self._client = client
        self._tracking_uri = tracking_uri
        self._experiments = experiments
        self._run_id = run_id
        self._key = key
        self._sent: dict[str, str] = {"sent": send}
        if payload:
            self._sent["payload"] = json.dumps(payload.to_json())
        self._send = send
        self._payload = payload
        self._flavor = flavor
        self._made = scratch / "payload"

    def find(self, step: int | None = None) -> list[LoggedModel]:
        """Return those of one step or of all, whole ones first, of these the newest first."""
        where = f"tags.{RUN_TAG} = '{self._key}'"
        if step is not None:
            where += f" AND tags.{STEP_TAG} = '{step}'"
        found = search(self._client, self._experiments, where)
        return sorted(found, key=lambda m: (not is_ready(m), -m.creation_timestamp, m.model_id))

    def ready(self) -> dict[int, LoggedModel]:
        """Return the whole ones by step."""
        return {step_of(model): model for model in reversed(self.find()) if is_ready(model)}

    def is_of(self, model: LoggedModel, checkpoint: Checkpoint) -> bool:
        """Return whether one is of these bytes: whole, or begun and to be completed."""
        same = model.params.get("digest") == checkpoint.digest
        begun = {k: v for k, v in model.params.items() if k in ("sent", "payload")}
        return same and (is_ready(model) or begun == self._sent)

    def publish(
        self, checkpoint: Checkpoint, found: LoggedModel | None
    ) -> tuple[LoggedModel, bool]:
        """Return the LoggedModel of a checkpoint, made or completed if need be.

        The second value tells whether it is no second copy of all bytes: hard links, or a part.
        """
        files = chosen("MLflowTracker", checkpoint.files, self._send)
        part = len(files) < len(checkpoint.files)
        if found and is_ready(found):
            return found, part or self.is_shared(found)
        # Before there is a LoggedModel, since a leaf may be none that the format can tell.
        with self._weights(checkpoint) as (made, text), tempfile.TemporaryDirectory() as about:
            folders: dict[str, Tree] = {FOLDER: (checkpoint.path, files)}
            if text:
                folders[publication.FOLDER] = (made, files_of(text, publication.MANIFEST))
                Path(about, publication.MANIFEST).write_text(text, encoding="utf-8")
            model = found or self._create(checkpoint)
            store = repository(model.artifact_location, self._tracking_uri)
            self._describe(model, checkpoint, Path(about))
            linked = upload(store, folders, Path(about), new=found is None)
        self._client.finalize_logged_model(model.model_id, "READY")
        return model, part or linked

    def is_shared(self, model: LoggedModel) -> bool:
        """Return whether one may be no second copy of all bytes: hard links, or a part."""
        if model.params.get("sent") != "checkpoint":
            return True
        return is_local(repository(model.artifact_location, self._tracking_uri))

    def show(
        self,
        model: LoggedModel,
        at: float,
        metrics: Mapping[str, float],
        reason: str,
        aliases: Sequence[str],
    ) -> None:
        """Bring the metrics and tags of a LoggedModel up to date."""
        from mlflow.entities import Metric

        tags = _tags(at, metrics, reason, aliases)
        if new := {k: v for k, v in tags.items() if model.tags.get(k, "") != v}:
            self._client.set_logged_model_tags(model.model_id, new)
        # A metric of a model is one of its run too, so these have a name of their own: the run's
        # history of `loss` stays one value a step. The fixed time of the first makes a repetition
        # harmless; a value that has changed needs a later one.
        known = {m.key: m.value for m in sorted(model.metrics or (), key=lambda m: m.timestamp)}
        first, now = model.creation_timestamp, int(time.time() * 1000)
        step, model_id = step_of(model), model.model_id
        new_metrics = [
            Metric(key, value, now if key in known else first, step, model_id=model_id)
            # With a model's id MLflow stores NaN as 0.0, which would rank as a good loss.
            for name, value in _finite(metrics).items()
            if known.get(key := as_key(f"checkpoint/{name}")) != value
        ]
        if new_metrics:
            self._client.log_batch(self._run_id, metrics=new_metrics)

    def get(self, step: int, into: Path) -> None:
        """Copy the files of a step into the empty folder `into`.

        Raises:
            CheckpointNotFound: there is no whole LoggedModel of it.
        """
        for model in self.find(step):
            if is_ready(model):
                fetch(model, self._tracking_uri, into)
                return
        raise CheckpointNotFound(f"MLflow has no complete checkpoint of step {step}")

    def delete(self, model: LoggedModel) -> None:
        """Delete one, and free the bytes of its files."""
        # The files before the model: without it nobody would find them again.
        remove(repository(model.artifact_location, self._tracking_uri))
        self._client.delete_logged_model(model.model_id)

    def _create(self, checkpoint: Checkpoint) -> LoggedModel:
        tags = _tags(checkpoint.time, checkpoint.metrics, checkpoint.reason, ())
        return self._client.create_logged_model(
            self._experiments[-1],
            name=f"step-{checkpoint.step}",
            source_run_id=self._run_id,
            params={
                "step": str(checkpoint.step),
                "digest": checkpoint.digest,
                "bytes": str(sum(f.size for f in checkpoint.files.values())),
                **self._sent,
            },
            tags={
                RUN_TAG: self._key,
                STEP_TAG: str(checkpoint.step),
                **{k: v for k, v in tags.items() if v},
                PATH_TAG: checkpoint.address or str(checkpoint.path),
            },
            model_type="orbax-checkpoint",
        )

    @contextmanager
    def _weights(self, checkpoint: Checkpoint) -> Iterator[tuple[Path, str]]:
        """Make what is published beside a checkpoint; yield where, and what describes it."""
        shutil.rmtree(self._made, ignore_errors=True)  # of a process that was killed
        folder = self._made / publication.FOLDER
        try:
            yield folder, self._payload.write(checkpoint, folder) if self._payload else ""
        finally:
            shutil.rmtree(self._made, ignore_errors=True)

    def _describe(self, model: LoggedModel, checkpoint: Checkpoint, folder: Path) -> None:
        """Write what lies beside the checkpoint into `folder`."""
        from mlflow.models import Model

        (folder / MANIFEST).write_text(checkpoint.manifest, encoding="utf-8")
        about = Model(
            run_id=self._run_id,
            model_id=model.model_id,
            model_uuid=model.model_id,
            utc_time_created=str(model.creation_timestamp),
        )
        # The whole folder is given to the loader, since the digests lie beside the checkpoint.
        about.add_flavor(
            "python_function",
            loader_module="ckpt_callbacks_mlflow.flavor",
            python_version=".".join(map(str, sys.version_info[:3])),
        )
        about.add_flavor(FLAVOR, version=version("ckpt-callbacks"), **self._flavor)
        about.save(str(folder / "MLmodel"))
        name = f"{checkpoint.run_id}, step {checkpoint.step}"
        text = _README.format(name=name, step=checkpoint.step, run_id=self._run_id)
        text += _WEIGHTS * (self._payload is not None)
        (folder / "README.md").write_text(text, encoding="utf-8")


_README = """# {name}

A checkpoint of a training run, as [Orbax](https://orbax.readthedocs.io) wrote it, in the folder
`checkpoint`. `checkpoint.json` has its metrics and the size and digest of every file.

```python
import ckpt_callbacks as cc

state = cc.restore("mlflow:/runs/{run_id}/{step}", like=state)
```
"""
_WEIGHTS = """
The folder `weights` has its weights as a file for other libraries, and `weights.json` says how they
were chosen.
"""


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _tags(
    time: float, metrics: Mapping[str, float], reason: str, aliases: Sequence[str]
) -> dict[str, str]:
    """Return what tags say of a checkpoint, and change with it."""
    odd = ", ".join(f"{k} = {v}" for k, v in sorted(metrics.items()) if not math.isfinite(v))
    pinned = "pinned" in reason.split(", ")
    known = json.dumps({"time": time, "pinned": pinned, "metrics": _finite(metrics)})
    parts = [known[at : at + _LONGEST] for at in range(0, len(known), _LONGEST)]
    return {
        _REASON_TAG: reason,
        _ALIASES_TAG: ", ".join(aliases),
        _NOT_FINITE_TAG: odd[:_LONGEST],
        **{f"{KNOWN_TAG}.{n}" if n else KNOWN_TAG: part for n, part in enumerate(parts)},
        f"{KNOWN_TAG}.{len(parts)}": "",  # it may have been longer
    }
