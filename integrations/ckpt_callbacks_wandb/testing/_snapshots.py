"""What tests see of the server's data: copies that do not change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_callbacks_wandb.testing._runs import EVENTS, HISTORY, OUTPUT
from ckpt_callbacks_wandb.testing._store import Collection, Member, Run, Store, Version
from ckpt_callbacks_wandb.testing._uploads import key_of

__all__ = ["StoredRun", "StoredVersion", "run_of", "version_of", "versions_in"]


@dataclass(frozen=True)
class StoredRun:
    """A run as the server holds it."""

    entity: str
    project: str
    id: str
    """What `wandb.init(id=…)` says."""
    display_name: str
    group: str | None
    job_type: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    """With the client's own key `_wandb`."""
    summary: Mapping[str, Any]
    state: str
    """`running`, `finished` or, with an exit code that is not 0, `failed`."""
    exit_code: int | None
    history: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    output: tuple[str, ...]
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class StoredVersion:
    """An artifact as the server holds it, in one of the collections that it is in."""

    id: str
    entity: str
    project: str
    collection: str
    type: str
    index: int
    """Its number there."""
    state: str
    """`PENDING`, `COMMITTED` or `DELETED`."""
    aliases: tuple[str, ...]
    """Those that it has there."""
    digest: str
    description: str | None
    metadata: Mapping[str, Any]
    ttl: int | None
    """In seconds; 0 if it never ends, None if it is the project's."""
    tags: tuple[str, ...]
    files: Mapping[str, bytes]
    """Those of its manifest that have arrived."""
    references: Mapping[str, str]
    run: str | None
    """Id of the run that logged it."""
    used_by: tuple[str, ...]
    """Ids of the runs that use it."""
    links: Mapping[str, tuple[str, ...]]
    """The other collections that it is in, as `entity/project/name`, with its aliases there."""

    @property
    def name(self) -> str:
        """Its name, such as `model:v3`."""
        return f"{self.collection}:v{self.index}"


def run_of(run: Run) -> StoredRun:
    """Return a copy of a run."""
    fields = run.fields
    config = json.loads(fields.get("config", "{}"))
    return StoredRun(
        entity=run.project.entity,
        project=run.project.name,
        id=run.name,
        display_name=fields.get("display_name", run.name),
        group=fields.get("group"),
        job_type=fields.get("job_type"),
        tags=tuple(fields.get("tags", ())),
        config={key: item["value"] for key, item in config.items()},
        summary=json.loads(run.summary),
        state=run.state,
        exit_code=run.exit_code,
        history=tuple(json.loads(line) for line in run.streamed(HISTORY)),
        events=tuple(json.loads(line) for line in run.streamed(EVENTS)),
        output=tuple(run.streamed(OUTPUT)),
        files=dict(run.files),
    )


def versions_in(store: Store, collection: Collection) -> tuple[StoredVersion, ...]:
    """Return copies of all that were ever in a sequence, or of all that a portfolio links."""
    if collection.kind == "ArtifactPortfolio":
        return tuple(_version(store, m.version, m, collection) for m in collection.members)
    return tuple(version_of(store, v) for v in store.versions.values() if v.sequence is collection)


def version_of(store: Store, version: Version) -> StoredVersion:
    """Return a copy of a version, as it is in its own sequence."""
    return _version(store, version, version.sequence.member(version), version.sequence)


def _version(
    store: Store, version: Version, member: Member | None, collection: Collection
) -> StoredVersion:
    entries = version.entries
    keys = {p: key_of(version, e["digest"]) for p, e in entries.items() if "ref" not in e}
    return StoredVersion(
        id=version.id,
        entity=collection.project.entity,
        project=collection.project.name,
        collection=collection.name,
        type=collection.type,
        index=member.index if member else version.index,
        state=version.state,
        aliases=tuple(member.aliases) if member else (),
        digest=version.digest,
        description=version.fields["description"],
        metadata=json.loads(version.fields["metadata"] or "{}"),
        ttl=version.fields["ttl"],
        tags=tuple(version.tags),
        files={path: store.blobs[key] for path, key in keys.items() if key in store.blobs},
        references={path: e["ref"] for path, e in entries.items() if "ref" in e},
        run=version.run.name if version.run else None,
        used_by=tuple(run.name for run in version.used_by),
        links={
            f"{m.collection.project.entity}/{m.collection.project.name}/{m.collection.name}": tuple(
                m.aliases
            )
            for m in store.members_of(version)
            if m.collection is not collection
        },
    )
