"""The files of a version, from W&B or from where it says that they are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ckpt_callbacks import publication
from ckpt_callbacks.errors import CheckpointNotFound, RecordError
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.record import Record, record_from_json
from ckpt_callbacks.remote import copy_referenced
from ckpt_callbacks.stores import Found, Known
from ckpt_callbacks_wandb._held import FOLDER, MANIFEST

if TYPE_CHECKING:
    import wandb

    from ckpt_callbacks_wandb._versions import Versions

__all__ = ["fetch", "known_of", "manifest", "whole"]


def fetch(
    version: wandb.Artifact,
    into: Path,
    only: Selection | None = None,
    *,
    or_weights: bool = False,
) -> None:
    """Copy the files of a version's checkpoint into the empty folder `into`.

    Args:
        version: a whole one.
        into: an empty folder.
        only: the leaves that are wanted, of which the items are fetched; all if not given.
        or_weights: whether to fetch the published weights where the checkpoint is not to be had.

    Raises:
        CheckpointNotFound: it is a reference, and the checkpoint is no longer there; or it has
            no such item.
    """
    where = version.metadata.get("path", "")
    reference = urlsplit(where)
    if reference.scheme == "file" or version.metadata.get("bucket"):
        path = unquote(reference.path) if reference.scheme == "file" else where
        if copy_referenced(path, into, only):
            return
        if or_weights and publication.MANIFEST in version.manifest.entries:
            for name in publication.MANIFEST, f"{publication.FOLDER}/":
                version.download(root=str(into), path_prefix=name, skip_cache=True)
        else:
            raise CheckpointNotFound(
                f"W&B has a reference to {path} only, and there is nothing there"
            )
        return
    prefixes = [f"{FOLDER}/"]
    if only is not None:
        names = [name.split("/") for name in version.manifest.entries]
        items = {parts[1] for parts in names if parts[0] == FOLDER and len(parts) > 2}
        where = f"the copy of step {version.metadata['step']} in W&B"
        chosen = only.items(items, where)
        tops = [parts[1] for parts in names if parts[0] == FOLDER and len(parts) == 2]
        prefixes = [f"{FOLDER}/{name}" for name in [*tops, *(f"{item}/" for item in chosen)]]
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        for prefix in prefixes:
            version.download(root=scratch, path_prefix=prefix, skip_cache=True)
        for path in (Path(scratch) / FOLDER).iterdir():
            path.rename(into / path.name)


def manifest(version: wandb.Artifact) -> Record:
    """Return the record of a version's checkpoint, checked against the version's own digest.

    Raises:
        CheckpointNotFound: the version was not made by ckpt_callbacks.
        RecordError: it is damaged.
    """
    where = f"{MANIFEST} of {version.qualified_name}"
    if MANIFEST not in version.manifest.entries or "digest" not in version.metadata:
        raise CheckpointNotFound(f"{version.qualified_name} was not made by ckpt_callbacks")
    with tempfile.TemporaryDirectory() as scratch:
        version.download(root=scratch, path_prefix=MANIFEST, skip_cache=True)
        record = record_from_json((Path(scratch) / MANIFEST).read_text("utf-8"), where)
    if tree_digest(record.files) != version.metadata["digest"]:
        raise RecordError(f"{where} is not the one that was sent: its digest differs")
    return record


def whole(versions: Versions) -> dict[int, Found]:
    """Return what a run can go on from, by step: all that was sent, and not a part of it."""
    return {
        step: Found(
            f"wandb:{version.qualified_name}", version.size, version.metadata.get("digest", "")
        )
        for step, version in versions.own().items()
        if version.metadata.get("sent", "checkpoint") == "checkpoint"
    }


def known_of(version: wandb.Artifact) -> Known:
    """Return what is known of a checkpoint beside its files."""
    about = version.metadata
    return Known(
        digest=about.get("digest", ""),
        time=float(about.get("time", 0.0)),
        metrics=about.get("metrics", {}),
        pinned=bool(about.get("pinned")),
    )
