"""What a query can see of people, projects and runs: the held objects as nodes of GraphQL."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable, Sequence
from typing import Any

from ckpt_callbacks_wandb.testing._artifact_nodes import ArtifactNodes
from ckpt_callbacks_wandb.testing._filters import connection, matching, ordered
from ckpt_callbacks_wandb.testing._graphql import Node, Unknown
from ckpt_callbacks_wandb.testing._registry_nodes import RegistryNodes
from ckpt_callbacks_wandb.testing._runs import EVENTS, HISTORY, OUTPUT
from ckpt_callbacks_wandb.testing._store import (
    ORG_ENTITY,
    ORGANIZATION,
    USER,
    Project,
    Run,
    Store,
)
from ckpt_callbacks_wandb.testing._uploads import md5_of

__all__ = ["FEATURES", "Nodes"]

FEATURES = (
    "ARTIFACT_COLLECTIONS_FILTERING_SORTING",
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILES",
    "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE",
    "ARTIFACT_REGISTRY_SEARCH",
    "ARTIFACT_TAGS",
    "CLIENT_IDS",
    "FILESTREAM_GZIP",
    "INCLUDE_ARTIFACT_TYPES_IN_REGISTRY_CREATION",
    "LARGE_FILENAMES",
    "MARK_RUN_FILES_UPLOADED",
    "PROJECT_ARTIFACT_COLLECTION_MEMBERSHIP",
    "TOTAL_COUNT_IN_FILE_CONNECTION",
    "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION",
)
"""What the server says that it can do; the client takes other ways without."""


class Nodes:
    """Makes nodes.

    Args:
        store: that they show.
        url_of: returns the address of stored bytes.
    """

    def __init__(self, store: Store, url_of: Callable[[str], str]) -> None:
        self._store = store
        self._url_of = url_of
        self.artifacts = ArtifactNodes(store, url_of, self.project, self.run)
        self._registries = RegistryNodes(store, self.artifacts)

    def server_info(self) -> Node:
        """Show what the server can do."""
        features = [{"__typename": "Feature", "name": n, "isEnabled": True} for n in FEATURES]
        return {"__typename": "ServerInfo", "features": features}

    def viewer(self) -> Node:
        """Show the only user."""
        return {
            "__typename": "User",
            "id": "user-me",
            "entity": USER,
            "name": "Me",
            "username": USER,
            "email": "me@example.com",
            "admin": False,
            "flags": "{}",
            "deletedAt": None,
            "apiKeys": connection([], dict),
            "teams": connection([], dict),
        }

    def entity(self, name: str | None = None) -> Node | None:
        """Show the user, or the organization as the owner of registries."""
        entity = name or USER
        if entity not in (USER, ORG_ENTITY):
            return None
        return {
            "__typename": "Entity",
            "id": f"entity-{entity}",
            "name": entity,
            "entityType": "user" if entity == USER else "organization",
            "xxhashDigestsEnabled": False,
            "organization": self.organization,
            "user": None,
            "project": lambda name: self.project(self._store.project(entity, name)),
            "projects": lambda filters=None, after=None, first=None, order=None: connection(
                ordered(matching(self._projects(entity), filters, _of_project), order, _of_project),
                self._project,
                after,
                first,
            ),
            **(self._registries.of_entity() if entity == ORG_ENTITY else {}),
        }

    def organization(self, name: str = ORGANIZATION) -> Node | None:
        """Show the organization that the user is in."""
        if name != ORGANIZATION:
            return None
        return {
            "__typename": "Organization",
            "id": "organization",
            "name": ORGANIZATION,
            "coreWeaveOrganizationId": None,
            "orgEntity": lambda: self.entity(ORG_ENTITY),
            "featureFlags": lambda ramp_id_type: [],
            "advancedRegistryFeatures": {
                "__typename": "AdvancedRegistryFeatures",
                "advancedSearch": False,
            },
        }

    def models(
        self, entity_name: str | None = None, after: str | None = None, first: int | None = None
    ) -> Node:
        """Show the projects of an entity."""
        return connection(self._projects(entity_name or USER), self._project, after, first)

    def project(self, project: Project | None) -> Node | None:
        """Show a project, if there is one."""
        return self._project(project) if project else None

    def run(self, run: Run | None) -> Node | None:
        """Show a run, if there is one."""
        return self._run(run) if run else None

    def file(self, run: Run, name: str) -> Node:
        """Show a file of a run, which may not have arrived."""
        content = run.files.get(name, b"")
        url = self._url_of(f"runs/{run.project.entity}/{run.project.name}/{run.name}/{name}")
        return {
            "__typename": "File",
            "id": f"{run.id}/{name}",
            "name": name,
            "displayName": name,
            "url": lambda upload=False: url,
            "directUrl": url,
            "uploadUrl": url,
            "sizeBytes": len(content),
            "mimetype": mimetypes.guess_type(name)[0] or "application/octet-stream",
            "updatedAt": run.heartbeat_at,
            "md5": md5_of(content),
        }

    def _projects(self, entity: str) -> list[Project]:
        return [p for p in self._store.projects.values() if p.entity == entity]

    def _project(self, project: Project) -> Node:
        return {
            "__typename": "Project",
            "id": f"project-{project.number}",
            "internalId": str(project.number),
            "name": project.name,
            "entityName": project.entity,
            "entity": lambda: self.entity(project.entity),
            "user": self.viewer,
            "description": None,
            "createdAt": project.created_at,
            "updatedAt": project.created_at,
            "access": "PRIVATE",
            "views": "{}",
            "readOnly": False,
            "isBenchmark": False,
            "allowAllArtifactTypesInRegistry": project.is_registry,
            "run": lambda name: self.run(project.runs.get(name)),
            "bucket": lambda name, missing_ok=False: self.run(project.runs.get(name)),
            "runCount": lambda filters=None: len(
                matching([*project.runs.values()], filters, _of_run)
            ),
            "runs": lambda filters=None, after=None, first=None, order=None: connection(
                ordered(matching([*project.runs.values()], filters, _of_run), order, _of_run),
                self._run,
                after,
                first,
            ),
            **self.artifacts.of_project(project),
        }

    def _run(self, run: Run) -> Node:
        history = [_as_json(line) for line in run.streamed(HISTORY)]
        events = [_as_json(line) for line in run.streamed(EVENTS)]
        return {
            "__typename": "Run",
            "id": run.id,
            "name": run.name,
            "projectId": run.project.number,
            "project": lambda: self._project(run.project),
            "displayName": run.fields.get("display_name", run.name),
            "description": run.fields.get("description"),
            "notes": run.fields.get("notes"),
            "tags": run.fields.get("tags", []),
            "group": run.fields.get("group"),
            "jobType": run.fields.get("job_type"),
            "commit": run.fields.get("commit"),
            "config": run.fields.get("config", "{}"),
            "wandbConfig": lambda keys: json.dumps(_wandb_config(run, keys)),
            "sweepName": None,
            "state": run.state,
            "readOnly": False,
            "createdAt": run.created_at,
            "heartbeatAt": run.heartbeat_at,
            "user": self.viewer,
            "summaryMetrics": _as_json(run.summary),
            "systemMetrics": events[-1] if events else "{}",
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": len(run.streamed(OUTPUT)),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "historyKeys": lambda: _history_keys(history),
            "history": lambda samples=None, min_step=None, max_step=None: _between(
                history, min_step, max_step
            )[:samples],
            "events": lambda samples=None: events[:samples],
            "sampledHistory": lambda specs: [_sampled(history, json.loads(s)) for s in specs],
            "parquetHistory": lambda live_keys: {
                "__typename": "ParquetHistory",
                "parquetUrls": [],
                "liveData": [json.loads(line) for line in history],
            },
            "fileCount": len(run.files),
            "files": lambda names=None, after=None, first=None, pattern=None: connection(
                _chosen(run, names, pattern), lambda name: self.file(run, name), after, first
            ),
            **self.artifacts.of_run(run),
        }


def _as_json(line: str) -> str:
    """Return a line without what is no JSON: the client sends NaN, and reads it as a string."""
    # Most lines have none, and a node of a run is made often.
    if "NaN" not in line and "Infinity" not in line:
        return line
    return json.dumps(json.loads(line, parse_constant=str))


def _of_project(project: Project) -> dict[str, Any]:
    return {"name": project.name, "created_at": project.created_at}


def _of_run(run: Run) -> dict[str, Any]:
    """Return what runs are filtered and ordered by."""
    return {
        "name": run.name,
        "display_name": run.fields.get("display_name", run.name),
        "displayName": run.fields.get("display_name", run.name),
        "state": run.state,
        "group": run.fields.get("group"),
        "jobType": run.fields.get("job_type"),
        "tags": list(run.fields.get("tags", [])),
        "config": json.loads(run.fields.get("config", "{}")),
        "summary_metrics": json.loads(run.summary),
        "created_at": run.created_at,
        "createdAt": run.created_at,
        "heartbeat_at": run.heartbeat_at,
    }


def _wandb_config(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    config = json.loads(run.fields.get("config", "{}")).get("_wandb", {}).get("value", {})
    return {key: config[key] for key in keys if key in config}


def _history_keys(history: Sequence[str]) -> dict[str, Any]:
    rows = [json.loads(line) for line in history]
    keys = {key for row in rows for key in row}
    return {
        "sets": [],
        "keys": {k: {"typeCounts": [], "monotonic": False} for k in sorted(keys)},
        "lastStep": max((row.get("_step", -1) for row in rows), default=-1),
    }


def _between(history: Sequence[str], least: int | None, end: int | None) -> list[str]:
    steps = [(json.loads(line).get("_step", at), line) for at, line in enumerate(history)]
    return [line for s, line in steps if (least or 0) <= s and (end is None or s < end)]


def _sampled(history: Sequence[str], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that have all the keys that are asked for, with these alone."""
    if unknown := set(spec) - {"keys", "samples", "minStep", "maxStep", "pageSize"}:
        raise Unknown(f"{', '.join(sorted(unknown))} of sampled history")
    rows = map(json.loads, _between(history, spec.get("minStep"), spec.get("maxStep")))
    whole = [row for row in rows if all(key in row for key in spec["keys"])]
    return [{key: row[key] for key in spec["keys"]} for row in whole][: spec.get("samples")]


def _chosen(run: Run, names: Sequence[str] | None, pattern: str | None) -> list[str]:
    if pattern:
        raise Unknown("files of a run by a pattern")
    return [name for name in sorted(run.files) if not names or name in names]
