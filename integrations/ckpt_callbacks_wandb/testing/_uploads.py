"""The mutations that bring the files of an artifact, and make it a version when all are there."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_callbacks_wandb.testing._graphql import Refused
from ckpt_callbacks_wandb.testing._store import Store, Version

__all__ = ["Uploads", "key_of", "md5_of"]


def md5_of(content: bytes) -> str:
    """Return the digest of bytes as the client writes it: base64 of the MD5."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def key_of(version: Version, digest: str) -> str:
    """Return where bytes are stored: equal ones once in a project."""
    try:
        name = base64.b64decode(digest, validate=True).hex()
    except binascii.Error as error:
        raise Refused(f"{digest!r} is no MD5 in base64") from error
    project = version.sequence.project
    return f"{project.entity}/{project.name}/{name}"


class Uploads:
    """What is done to upload an artifact.

    Args:
        store: that is changed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def create_manifest(
        self,
        artifact_id: str,
        name: str,
        digest: str,
        entity_name: str,
        project_name: str,
        run_name: str | None = None,
        base_artifact_id: str | None = None,
        type: str = "FULL",
    ) -> tuple[Version, str]:
        """Return an artifact and where its manifest is to be stored."""
        version = self._store.version(artifact_id)
        if type != "FULL":
            raise Refused("the stand-in takes no incremental or patched artifacts")
        version.manifest = f"{version.id}/{name}"
        self._expect_manifest(version.manifest, digest)
        return version, version.manifest

    def update_manifest(
        self,
        artifact_manifest_id: str,
        digest: str | None = None,
        base_artifact_id: str | None = None,
    ) -> tuple[Version, str]:
        """Return an artifact and where its manifest is to be stored, with another digest."""
        version = self._store.version(artifact_manifest_id.removesuffix("-manifest"))
        if version.manifest is None:
            raise Refused(f"no manifest {artifact_manifest_id}", 404)
        if digest:
            self._expect_manifest(version.manifest, digest)
        return version, version.manifest

    def create_files(
        self, artifact_files: Sequence[Mapping[str, Any]], storage_layout: str = "V2"
    ) -> list[tuple[Version, Mapping[str, Any], str]]:
        """Return, for each file, its artifact, what was said of it and its storage key."""
        found = []
        for file in artifact_files:
            version = self._store.version(file["artifact_id"])
            key = key_of(version, file["md5"])
            self._store.expected[key] = file["md5"]
            found.append((version, file, key))
        return found

    def commit(self, artifact_id: str) -> Version:
        """Make a version of an artifact, whose files must all be there."""
        version = self._store.version(artifact_id)
        if version.state == "COMMITTED":
            return version
        if version.manifest not in self._store.blobs:
            raise Refused(f"the manifest of {artifact_id} was not uploaded")
        entries = json.loads(self._store.blobs[version.manifest])["contents"]
        for path, entry in entries.items():
            key = None if "ref" in entry else key_of(version, entry["digest"])
            if key and key not in self._store.blobs:
                raise Refused(f"{path} of {artifact_id} was not uploaded")
        version.entries = entries
        version.state = "COMMITTED"
        member = version.sequence.member(version)
        assert member  # noqa: S101 - `create` has put it there
        for alias in version.asked_aliases:
            version.sequence.move(alias, member)
        return version

    def _expect_manifest(self, key: str, digest: str) -> None:
        """Wait for a manifest with a digest, which is empty before the files are sent."""
        if self._store.expected.get(key) != digest:
            self._store.blobs.pop(key, None)
        self._store.expected[key] = digest
