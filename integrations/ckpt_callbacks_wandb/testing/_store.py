"""What the stand-in holds, as it changes; only its own modules touch these."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from ckpt_callbacks_wandb.testing._graphql import Refused

__all__ = [
    "ORGANIZATION",
    "ORG_ENTITY",
    "USER",
    "Collection",
    "Member",
    "Project",
    "Run",
    "Store",
    "Version",
    "now",
]

USER = "me"
ORGANIZATION = "our-organization"
ORG_ENTITY = "our-organization-entity"
"""The entity whose projects are the registries of the organization."""

_REGISTRY = "wandb-registry-"


def now() -> str:
    """Return the time as the server writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")


@dataclass(eq=False)
class Run:
    """A run with all that was streamed of it."""

    id: str
    name: str
    project: Project
    fields: dict[str, Any] = field(default_factory=dict)
    """What `upsertBucket` set last, by the name of its argument."""
    state: str = "running"
    exit_code: int | None = None
    summary: str = "{}"
    lines: dict[str, dict[tuple[int, int], str]] = field(default_factory=dict)
    """The streamed files, such as `wandb-history.jsonl`: their lines by writer and offset."""
    writers: list[str] = field(default_factory=list)
    """Those that write to the run in the client's shared mode; else one without a name."""
    files: dict[str, bytes] = field(default_factory=dict)
    created_at: str = field(default_factory=now)
    heartbeat_at: str = field(default_factory=now)

    def streamed(self, name: str) -> list[str]:
        """Return the lines of a streamed file in order."""
        lines = self.lines.get(name, {})
        return [lines[at] for at in sorted(lines)]


@dataclass(eq=False)
class Version:
    """An artifact; it has its number from the start, and can be found when it is committed."""

    id: str
    sequence: Collection
    index: int
    digest: str
    client_ids: list[str | None] = field(default_factory=list)
    """Those that clients gave it; several if the same content was logged again."""
    run: Run | None = None
    asked_aliases: list[str] = field(default_factory=list)
    """Those that it gets when it is committed."""
    fields: dict[str, Any] = field(default_factory=dict)
    """What a client may set of it: `description`, `metadata`, `ttl`, `history_step`.

    The TTL is in seconds; 0 is none, None that of the project.
    """
    tags: list[str] = field(default_factory=list)
    state: Literal["PENDING", "COMMITTED", "DELETED"] = "PENDING"
    manifest: str | None = None
    """Key of the stored manifest."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The manifest's, by path, once it is committed."""
    used_by: list[Run] = field(default_factory=list)
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)


@dataclass(eq=False)
class Member:
    """A version in a collection, with its number and aliases there."""

    id: str
    collection: Collection
    version: Version
    index: int
    aliases: list[str] = field(default_factory=list)
    created_at: str = field(default_factory=now)


@dataclass(eq=False)
class Collection:
    """A sequence holds what runs logged under a name, a portfolio has links to such versions."""

    id: str
    kind: Literal["ArtifactSequence", "ArtifactPortfolio"]
    project: Project
    name: str
    type: str
    members: list[Member] = field(default_factory=list)
    next_index: int = 0
    description: str | None = None
    tags: list[str] = field(default_factory=list)
    created_at: str = field(default_factory=now)

    def member(self, version: Version) -> Member | None:
        """Return the place of a version in here."""
        return next((m for m in self.members if m.version is version), None)

    def named(self, alias: str) -> Member | None:
        """Return the committed one that has an alias or, as `v3`, a number."""
        members = [m for m in self.members if m.version.state == "COMMITTED"]
        by_alias = (m for m in members if alias in m.aliases)
        by_index = (m for m in members if alias == f"v{m.index}")
        return next(by_alias, next(by_index, None))

    def move(self, alias: str, member: Member) -> None:
        """Give an alias to one, and take it from all others."""
        for other in self.members:
            if alias in other.aliases and other is not member:
                other.aliases.remove(alias)
        if alias not in member.aliases:
            member.aliases.append(alias)


@dataclass(eq=False)
class Project:
    """A project or, in the entity of the organization, a registry."""

    number: int
    entity: str
    name: str
    runs: dict[str, Run] = field(default_factory=dict)
    collections: dict[str, Collection] = field(default_factory=dict)
    created_at: str = field(default_factory=now)

    @property
    def is_registry(self) -> bool:
        """Whether it is a registry."""
        return self.entity == ORG_ENTITY and self.name.startswith(_REGISTRY)


class Store:
    """Everything that the server holds."""

    def __init__(self) -> None:
        self.projects: dict[tuple[str, str], Project] = {}
        self.versions: dict[str, Version] = {}
        """By id, and in order of their creation."""
        self.blobs: dict[str, bytes] = {}
        """Files of artifacts and manifests, by storage key."""
        self.expected: dict[str, str] = {}
        """The digest that a client named before an upload, by storage key."""
        self.protected: set[str] = set()
        """Aliases that keep a version from being deleted, when it has them in a registry."""
        self._numbers = itertools.count(1)

    def new_id(self, kind: str) -> str:
        """Return an id that none had before."""
        # Nor one of another server in this process: the client keeps artifacts by their id.
        return f"{kind}-{uuid.uuid4().hex[:12]}"

    def project(self, entity: str | None, name: str | None) -> Project | None:
        """Return a project, if there is one."""
        return self.projects.get((entity or USER, name or "uncategorized"))

    def make_project(self, entity: str | None, name: str | None) -> Project:
        """Return a project, made if need be."""
        entity, name = entity or USER, name or "uncategorized"
        if entity not in (USER, ORG_ENTITY):
            raise Refused(f"entity {entity} not found", 404)
        if (entity, name) not in self.projects:
            self.projects[entity, name] = Project(next(self._numbers), entity, name)
        return self.projects[entity, name]

    def run(self, run_id: str) -> Run | None:
        """Return a run by the server's id."""
        runs = (run for project in self.projects.values() for run in project.runs.values())
        return next((run for run in runs if run.id == run_id), None)

    def version(self, version_id: str | None, client_id: str | None = None) -> Version:
        """Return a version that is not deleted, by one of its ids.

        Raises:
            Refused: there is none.
        """
        for version in self.versions.values():
            known = version.id == version_id or (client_id and client_id in version.client_ids)
            if known and version.state != "DELETED":
                return version
        raise Refused(f"artifact {version_id or client_id} not found", 404)

    def collection(self, collection_id: str) -> Collection | None:
        """Return a collection by its id."""
        found = (c for p in self.projects.values() for c in p.collections.values())
        return next((c for c in found if c.id == collection_id), None)

    def members_of(self, version: Version) -> list[Member]:
        """Return the places of a version, that in its own sequence first."""
        collections = (c for p in self.projects.values() for c in p.collections.values())
        found = [m for c in collections if (m := c.member(version))]
        return sorted(found, key=lambda m: m.collection is not version.sequence)
