"""The files of checkpoints that are held for W&B, as hard links, until they are sent.

W&B's own ways are a second copy of all bytes, or the user's files by their path, which are gone
when a sync comes too late. A link costs nothing and stays. One folder a step:

::

    files/             the files, as Orbax wrote them
    checkpoint.json    their record, with size and digest of each; goes into the artifact too
    weights/           with `payload=`: the weights as a file of another library
    weights.json       with size and digest of each of its files; goes there too
    about.json         what becomes the artifact's metadata; written last
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_callbacks import publication
from ckpt_callbacks.bucket import is_bucket
from ckpt_callbacks.directory import replace_text
from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.manifest import files_in, link_tree
from ckpt_callbacks.payload import Send, chosen
from ckpt_callbacks.published import Safetensors
from ckpt_callbacks.stores import Checkpoint

if TYPE_CHECKING:
    import wandb

__all__ = ["FOLDER", "MANIFEST", "TYPE", "Held", "changing"]

TYPE = "model"
"""W&B's type of our artifacts: the only one that its registry takes."""
FOLDER = "checkpoint"
"""Where an artifact has the files."""
MANIFEST = "checkpoint.json"
"""Where it has their record."""


def changing(metrics: Mapping[str, float], reason: str) -> dict[str, Any]:
    """Return that part of an artifact's metadata which may change after it was sent."""
    return {
        "reason": reason,
        "pinned": "pinned" in reason.split(", "),
        # W&B makes NaN `None`.
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
    }


class Held:
    """The checkpoints of one run that are held.

    Args:
        folder: where they are held.
        name: of the artifact.
        send: what is sent of a checkpoint.
        reference: for `send="reference"`, the URI at which others find the run directory; its
            path on this machine if not given.
        ttl: how long W&B keeps a version that nobody prolongs; for ever if not given.
        payload: what is published beside a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        send: Send = "checkpoint",
        reference: str | None = None,
        ttl: timedelta | None = None,
        payload: Safetensors | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.send = send
        self._reference = reference
        self._ttl = ttl
        self._payload = payload

    def steps(self) -> set[int]:
        """Return the steps that are held, whole."""
        found = {int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()}
        return {step for step in found if self.about(step)}

    def about(self, step: int) -> dict[str, Any]:
        """Return the metadata of a checkpoint that is held, empty if it is not, or not whole."""
        try:
            text = (self._of(step) / "about.json").read_text("utf-8")
        except FileNotFoundError:
            return {}
        about: dict[str, Any] = json.loads(text)
        return about

    def hold(self, checkpoint: Checkpoint, began: float) -> None:
        """Hold a checkpoint, if it is not; one of other bytes is replaced.

        Raises:
            CheckpointNotFound: its files are not there any more.
        """
        if self.about(checkpoint.step).get("digest") == checkpoint.digest:
            return
        if (self.send != "reference" or self._payload) and not checkpoint.path.is_dir():
            raise CheckpointNotFound(f"the files of step {checkpoint.step} are gone")
        self.release(checkpoint.step)
        folder = self._of(checkpoint.step)
        files = chosen("WandbTracker", checkpoint.files, self.send)
        if self._payload:
            text = self._payload.write(checkpoint, folder / publication.FOLDER)
            (folder / publication.MANIFEST).write_text(text, encoding="utf-8")
        (folder / "files").mkdir(parents=True)
        link_tree(checkpoint.path, folder / "files", files)
        # In the artifact too, so that equal weights at two steps are two versions, not one.
        (folder / MANIFEST).write_text(checkpoint.manifest, encoding="utf-8")
        ours = is_bucket(checkpoint.address)
        where = checkpoint.address if ours else checkpoint.path.as_uri()
        root = self._reference or where.rpartition("/")[0]
        place: dict[str, Any] = {"path": f"{root}/{checkpoint.step}"}
        if ours and not self._reference:
            place["bucket"] = True  # which others read as a run directory
        about = {
            "run": checkpoint.run_id,
            "began": began,
            "step": checkpoint.step,
            "digest": checkpoint.digest,
            "time": checkpoint.time,
            "sent": self.send,
            **({"payload": self._payload.to_json()} if self._payload else {}),
            "bytes": sum(file.size for file in checkpoint.files.values()),
            **(place if self.send == "reference" else {}),
            **changing(checkpoint.metrics, checkpoint.reason),
        }
        replace_text(folder / "about.json", json.dumps(about, indent=1))

    def release(self, step: int) -> None:
        """Hold a checkpoint no longer."""
        folder = self._of(step)
        (folder / "about.json").unlink(missing_ok=True)  # first: it says that the rest is there
        shutil.rmtree(folder, ignore_errors=True)

    def get(self, step: int, into: Path) -> None:
        """Copy the files of a checkpoint that is held into a folder.

        Raises:
            CheckpointNotFound: it is not held.
        """
        if not self.about(step):
            raise CheckpointNotFound(f"no files of step {step} are held for W&B")
        shutil.copytree(self._of(step) / "files", into, dirs_exist_ok=True)

    def artifact(self, step: int) -> wandb.Artifact:
        """Return the artifact of a checkpoint that is held, to be logged.

        The files are hashed here, in the thread that asks.
        """
        import wandb

        folder, about = self._of(step), self.about(step)
        artifact = wandb.Artifact(self.name, TYPE, metadata=about)
        if self._ttl:
            artifact.ttl = self._ttl
        held = {n: path for n in (MANIFEST, publication.MANIFEST) if (path := folder / n).exists()}
        for name, place in ("files", FOLDER), (publication.FOLDER, publication.FOLDER):
            for path in files_in(folder / name):
                held[f"{place}/{path.relative_to(folder / name).as_posix()}"] = path
        # Immutable and without the cache: W&B reads the held links themselves and copies nothing.
        for name, path in sorted(held.items()):
            artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
        if "path" in about:
            # Without its checksums, for which W&B would read or ask for every file.
            artifact.add_reference(about["path"], name=FOLDER, checksum=False)
        return artifact

    def _of(self, step: int) -> Path:
        return self.folder / str(step)
