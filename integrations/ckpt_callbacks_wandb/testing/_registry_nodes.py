"""What a search in the registries of the organization can see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt_callbacks_wandb.testing._artifact_nodes import ArtifactNodes, of_collection, of_member
from ckpt_callbacks_wandb.testing._filters import connection, matching, ordered
from ckpt_callbacks_wandb.testing._graphql import Node
from ckpt_callbacks_wandb.testing._store import Collection, Project, Store

__all__ = ["RegistryNodes"]


class RegistryNodes:
    """Makes nodes of what is in registries.

    Args:
        store: that they show.
        artifacts: makes the nodes of collections and versions.
    """

    def __init__(self, store: Store, artifacts: ArtifactNodes) -> None:
        self._store = store
        self._artifacts = artifacts

    def of_entity(self) -> Node:
        """Return the fields that an entity has by its registries."""
        return {
            "artifactCollections": self._collections,
            "artifactMemberships": self._memberships,
        }

    def _collections(
        self,
        project_filters: str | None = None,
        filters: str | None = None,
        collection_types: Sequence[str] = ("PORTFOLIO",),
        **page: Any,
    ) -> Node:
        return self._artifacts.collections(self._found(project_filters))(filters=filters, **page)

    def _memberships(
        self,
        project_filters: str | None = None,
        collection_filters: str | None = None,
        filters: str | None = None,
        after: str | None = None,
        first: int | None = None,
        order: str | None = None,
    ) -> Node:
        chosen = matching(self._found(project_filters), collection_filters, of_collection)
        members = matching([m for c in chosen for m in c.members], filters, of_member)
        found = ordered(members, order, of_member)
        return connection(found, self._artifacts.membership, after, first)

    def _found(self, project_filters: str | None) -> list[Collection]:
        registries = [p for p in self._store.projects.values() if p.is_registry]
        found = matching(registries, project_filters, _of_registry)
        return [c for p in found for c in p.collections.values()]


def _of_registry(project: Project) -> dict[str, Any]:
    return {"name": project.name, "created_at": project.created_at}
