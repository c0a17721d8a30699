"""What a query can see of artifacts, their versions and collections: nodes of GraphQL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ckpt_callbacks_wandb.testing._filters import connection, matching, ordered
from ckpt_callbacks_wandb.testing._graphql import Node
from ckpt_callbacks_wandb.testing._store import Collection, Member, Project, Run, Store, Version
from ckpt_callbacks_wandb.testing._uploads import key_of

__all__ = ["ArtifactNodes", "of_collection", "of_member"]


class ArtifactNodes:
    """Makes nodes of artifacts.

    Args:
        store: that they show.
        url_of: returns the address of stored bytes.
        project: makes the node of a project.
        run: makes the node of a run.
    """

    def __init__(
        self,
        store: Store,
        url_of: Callable[[str], str],
        project: Callable[[Project], Node | None],
        run: Callable[[Run | None], Node | None],
    ) -> None:
        self._store = store
        self._url_of = url_of
        self._project = project
        self._run = run

    def of_project(self, project: Project) -> Node:
        """Return the fields that a project has by its artifacts."""
        collections = list(project.collections.values())
        types = sorted({c.type for c in collections})
        return {
            "artifactType": lambda name: self._type(project, name) if name in types else None,
            "artifactTypes": lambda after=None, first=None, include_all=False: connection(
                types, lambda name: self._type(project, name), after, first
            ),
            "artifactCollections": self.collections(collections),
            "artifactCollection": lambda name: self._found(project.collections.get(name)),
            "artifactCollectionMembership": lambda name: self._membership_by_name(project, name),
            "artifact": lambda name: _artifact_of(self._membership_by_name(project, name)),
        }

    def of_run(self, run: Run) -> Node:
        """Return the fields that a run has by its artifacts; those in transfer are among them."""
        versions = [v for v in self._store.versions.values() if v.state != "DELETED"]
        made = [v for v in versions if v.run is run]
        used = [v for v in versions if run in v.used_by]
        return {
            "outputArtifacts": lambda after=None, first=None: connection(
                made, self.version, after, first
            ),
            "inputArtifacts": lambda after=None, first=None: connection(
                used, self.version, after, first
            ),
        }

    def version(self, version: Version) -> Node:
        """Show an artifact."""
        ttl = version.fields["ttl"]
        files = [e for e in version.entries.values() if "ref" not in e]
        return {
            "__typename": "Artifact",
            "id": version.id,
            "artifactSequence": lambda: self.collection(version.sequence),
            "versionIndex": version.index,
            "artifactType": lambda: self._type(version.sequence.project, version.sequence.type),
            "description": version.fields["description"],
            "metadata": version.fields["metadata"],
            "ttlDurationSeconds": ttl or -1,
            "ttlIsInherited": ttl is None,
            "tags": [_tag(name) for name in version.tags],
            "historyStep": version.fields["history_step"],
            "state": version.state,
            "size": sum(e["size"] for e in version.entries.values()),
            "digest": version.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": version.id,
            "fileCount": len(files),
            "createdAt": version.created_at,
            "updatedAt": version.updated_at,
            "aliases": lambda: [
                self._alias(m, a) for m in self._store.members_of(version) for a in m.aliases
            ],
            "artifactMemberships": lambda: connection(
                self._store.members_of(version), self.membership
            ),
            "currentManifest": lambda: self.manifest(version) if version.manifest else None,
            "usedBy": lambda: connection(version.used_by, lambda run: self._run(run) or {}),
            "createdBy": lambda: self._run(version.run),
            "filesByManifestEntries": lambda entries, **layout: connection(
                [e["path"] for e in entries], lambda path: self._file(version, path)
            ),
        }

    def manifest(self, version: Version) -> Node:
        """Show the manifest of an artifact, which may not have arrived."""
        key = version.manifest or ""
        return {
            "__typename": "ArtifactManifest",
            "id": f"{version.id}-manifest",
            "file": {
                "__typename": "File",
                "id": f"{version.id}-manifest-file",
                "directUrl": self._url_of(key),
                "uploadUrl": self._url_of(key),
                "uploadHeaders": _headers(self._store.expected.get(key, "")),
            },
        }

    def upload(self, version: Version, name: str, md5: str, key: str) -> Node:
        """Show where to send a file of an artifact; what is there already has no address."""
        is_new = key not in self._store.blobs
        return {
            "__typename": "File",
            "id": f"{version.id}/{name}",
            "name": name,
            "displayName": name,
            "storagePath": key,
            "uploadUrl": self._url_of(key) if is_new else None,
            "uploadHeaders": _headers(md5),
            "uploadMultipartUrls": None,
            "artifact": lambda: self.version(version),
        }

    def collection(self, collection: Collection) -> Node:
        """Show a sequence or a portfolio."""
        committed = [m for m in collection.members if m.version.state == "COMMITTED"]
        return {
            "__typename": collection.kind,
            "id": collection.id,
            "name": collection.name,
            "description": collection.description,
            "createdAt": collection.created_at,
            "updatedAt": collection.created_at,
            "state": "READY",
            "project": lambda: self._project(collection.project),
            "defaultArtifactType": lambda: self._type(collection.project, collection.type),
            "digestAlgorithm": "MANIFEST_MD5",
            "tags": lambda: connection(collection.tags, _tag),
            "latestArtifact": lambda: self.version(committed[-1].version) if committed else None,
            "artifactMembership": lambda alias_name: self._named(collection, alias_name),
            "aliases": lambda after=None, first=None: connection(
                [(m, a) for m in collection.members for a in m.aliases],
                lambda pair: self._alias(*pair),
                after,
                first,
            ),
            "artifacts": lambda after=None, first=None, order=None, filters=None: connection(
                _listed(collection, filters, order),
                lambda m: self.version(m.version),
                after,
                first,
                lambda m: {"version": f"v{m.index}"},
            ),
        }

    def membership(self, member: Member) -> Node:
        """Show a version in a collection."""
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": member.id,
            "versionIndex": member.index,
            "createdAt": member.created_at,
            "aliases": [self._alias(member, alias) for alias in member.aliases],
            "artifactCollection": lambda: self.collection(member.collection),
            "artifact": lambda: self.version(member.version),
            "files": lambda names=None, after=None, first=None: connection(
                [
                    path
                    for path, entry in member.version.entries.items()
                    if "ref" not in entry and (not names or path in names)
                ],
                lambda path: self._file(member.version, path),
                after,
                first,
            ),
        }

    def _file(self, version: Version, path: str) -> Node:
        entry = version.entries[path]
        key = None if "ref" in entry else key_of(version, entry["digest"])
        url = key and self._url_of(key)
        return {
            "__typename": "File",
            "id": f"{version.id}/{path}",
            "name": path,
            "displayName": path,
            "url": url,
            "directUrl": url,
            "storagePath": key,
            "sizeBytes": entry["size"],
            "mimetype": "application/octet-stream",
            "updatedAt": version.updated_at,
            "digest": entry["digest"],
            "md5": entry["digest"],
        }

    def _type(self, project: Project, name: str) -> Node:
        of_type = [c for c in project.collections.values() if c.type == name]
        return {
            "__typename": "ArtifactType",
            "id": f"type-{project.number}-{name}",
            "name": name,
            "description": None,
            "createdAt": project.created_at,
            "artifactCollections": self.collections(of_type),
            "artifactCollection": lambda name: self._found(
                next((c for c in of_type if c.name == name), None)
            ),
        }

    def collections(self, collections: Sequence[Collection]) -> Callable[..., Node]:
        """Return the field that lists collections."""

        def listed(
            after: str | None = None,
            first: int | None = None,
            filters: str | None = None,
            order: str | None = None,
        ) -> Node:
            found = matching(collections, filters, of_collection)
            return connection(ordered(found, order, of_collection), self.collection, after, first)

        return listed

    def _found(self, collection: Collection | None) -> Node | None:
        return self.collection(collection) if collection else None

    def _named(self, collection: Collection, alias: str) -> Node | None:
        member = collection.named(alias)
        return self.membership(member) if member else None

    def _membership_by_name(self, project: Project, name: str) -> Node | None:
        collection_name, _, alias = name.partition(":")
        collection = project.collections.get(collection_name)
        return self._named(collection, alias or "latest") if collection else None

    def _alias(self, member: Member, alias: str) -> Node:
        return {
            "__typename": "ArtifactAlias",
            "id": f"{member.id}/{alias}",
            "alias": alias,
            "artifactCollection": lambda: self.collection(member.collection),
        }


def _listed(collection: Collection, filters: str | None, order: str | None) -> list[Member]:
    """Return the members that a listing shows, the newest first if it asks for no order."""
    newest_first = list(reversed(collection.members))
    return ordered(matching(newest_first, filters, of_member), order, of_member)


def _artifact_of(membership: Node | None) -> Node | None:
    return membership and membership["artifact"]()


def _headers(md5: str) -> list[str]:
    return [f"Content-MD5:{md5}"] if md5 else []


def _tag(name: str) -> Node:
    return {"__typename": "Tag", "id": f"tag-{name}", "name": name}


def of_collection(collection: Collection) -> dict[str, Any]:
    return {
        "name": collection.name,
        "description": collection.description,
        "tag": list(collection.tags),
        "created_at": collection.created_at,
        "createdAt": collection.created_at,
        "updated_at": collection.created_at,
    }


def of_member(member: Member) -> dict[str, Any]:
    """Return what versions are filtered and ordered by."""
    version = member.version
    return {
        "state": version.state,
        "alias": list(member.aliases),
        "tag": list(version.tags),
        "versionIndex": member.index,
        "version_index": member.index,
        "digest": version.digest,
        "created_at": (version.created_at, member.index),
        "createdAt": (version.created_at, member.index),
        "updated_at": (version.updated_at, member.index),
        "updatedAt": (version.updated_at, member.index),
    }
