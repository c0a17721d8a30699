"""The roots of GraphQL: each query and mutation that the stand-in knows, by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckpt_callbacks_wandb.testing._artifacts import Artifacts
from ckpt_callbacks_wandb.testing._graphql import Node
from ckpt_callbacks_wandb.testing._nodes import Nodes
from ckpt_callbacks_wandb.testing._runs import Runs
from ckpt_callbacks_wandb.testing._store import Member, Project, Run, Store, Version
from ckpt_callbacks_wandb.testing._uploads import Uploads

__all__ = ["mutations", "queries"]


def queries(store: Store, nodes: Nodes) -> Node:
    """Return the fields of a query."""

    def project(name: str | None = None, entity_name: str | None = None) -> Node | None:
        return nodes.project(store.project(entity_name, name))

    def artifact(id: str) -> Node | None:
        version = store.versions.get(id)
        return nodes.artifacts.version(version) if version else None

    def artifact_collection(id: str) -> Node | None:
        collection = store.collection(id)
        return nodes.artifacts.collection(collection) if collection else None

    def client_id_mapping(client_id: str) -> Node | None:
        found = (v.id for v in store.versions.values() if client_id in v.client_ids)
        server_id = next(found, None)
        return {"__typename": "ClientIDMapping", "serverID": server_id} if server_id else None

    return {
        "__typename": "Query",
        "serverInfo": nodes.server_info,
        "viewer": nodes.viewer,
        "entity": nodes.entity,
        "organization": nodes.organization,
        "project": project,
        "model": project,
        "models": nodes.models,
        "artifact": artifact,
        "artifactCollection": artifact_collection,
        "clientIDMapping": client_id_mapping,
    }


def mutations(store: Store, nodes: Nodes) -> Node:
    """Return the fields of a mutation."""
    runs, artifacts, uploads = Runs(store), Artifacts(store), Uploads(store)
    shown = nodes.artifacts

    def upserted(result: tuple[Run, bool]) -> Node:
        return {"bucket": nodes.run(result[0]), "inserted": result[1]}

    def run_files(result: tuple[Run, Any]) -> Node:
        run, names = result
        files = [nodes.file(run, name) for name in names]
        return {"runID": run.id, "uploadHeaders": [], "files": files}

    def files(result: list[tuple[Version, Any, str]]) -> Node:
        edges = [
            {"__typename": "Edge", "node": shown.upload(v, f["name"], f["md5"], key)}
            for v, f, key in result
        ]
        return {"files": {"__typename": "FileConnection", "edges": edges}}

    def manifest(result: tuple[Version, str]) -> Node:
        return {"artifactManifest": shown.manifest(result[0])}

    def version(result: Version) -> Node:
        return {"artifact": shown.version(result)}

    def linked(member: Member) -> Node:
        return {"versionIndex": member.index, "artifactMembership": shown.membership(member)}

    actions: dict[str, tuple[Callable[..., Any], Callable[[Any], Node]]] = {
        "upsertBucket": (runs.upsert, upserted),
        "upsertModel": (_upsert_project(store), lambda made: _project(nodes, *made)),
        "createRunFiles": (runs.create_files, run_files),
        "markRunFilesUploaded": (runs.mark_uploaded, _success),
        "updateRunState": (runs.update_state, _success),
        "deleteRun": (runs.delete, lambda _: {"clientMutationId": None}),
        "createArtifact": (artifacts.create, version),
        "createArtifactManifest": (uploads.create_manifest, manifest),
        "updateArtifactManifest": (uploads.update_manifest, manifest),
        "createArtifactFiles": (uploads.create_files, files),
        "commitArtifact": (uploads.commit, version),
        "updateArtifact": (artifacts.update, version),
        "deleteArtifact": (artifacts.delete, version),
        "useArtifact": (artifacts.use, version),
        "addAliases": (artifacts.add_aliases, _success),
        "deleteAliases": (artifacts.delete_aliases, _success),
        "linkArtifact": (artifacts.link, linked),
        "unlinkArtifact": (artifacts.unlink, _success),
    }
    made = {name: _mutation(name, *action) for name, action in actions.items()}
    return {"__typename": "Mutation", **made}


def _mutation(
    name: str, action: Callable[..., Any], show: Callable[[Any], Node]
) -> Callable[..., Node]:
    """Return a mutation: it does something and shows the result."""
    kind = f"{name[0].upper()}{name[1:]}Payload"

    def mutation(**arguments: Any) -> Node:
        return {"__typename": kind, **show(action(**arguments))}

    # So that the arguments that a client gives are checked against those of the action.
    mutation.__wrapped__ = action  # type: ignore[attr-defined]
    return mutation


def _success(_: None) -> Node:
    return {"success": True}


def _upsert_project(store: Store) -> Callable[..., tuple[Project, bool]]:
    def upsert(
        name: str,
        entity_name: str | None = None,
        description: str | None = None,
        access: str | None = None,
    ) -> tuple[Project, bool]:
        inserted = store.project(entity_name, name) is None
        return store.make_project(entity_name, name), inserted

    return upsert


def _project(nodes: Nodes, project: Project, inserted: bool) -> Node:
    shown = nodes.project(project)
    return {"project": shown, "model": shown, "inserted": inserted}
