"""What W&B's client has no public way for. `tests/test_wandb_client.py` notices if it changes."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb

__all__ = ["forget", "has_key", "hide", "remove_unfinished"]

_END_SECONDS = 10.0

_MADE = """
query CheckpointsMade($entity: String!, $project: String!, $run: String!, $cursor: String) {
  project(name: $project, entityName: $entity) {
    run(name: $run) {
      outputArtifacts(first: 200, after: $cursor) {
        pageInfo { endCursor hasNextPage }
        edges { node { id state metadata } }
      }
    }
  }
}
"""
_DELETE = """
mutation DeleteArtifact($input: DeleteArtifactInput!) {
  deleteArtifact(input: $input) { artifact { id } }
}
"""


def forget(run_id: str) -> None:
    """Let a run be opened again whose `wandb.init` failed.

    The client 0.31 keeps such a run open in its own process, and then answers that its id is in
    use; `wandb.teardown` would end the runs of the user too.
    """
    import wandb
    from wandb.sdk.interface.interface_sock import InterfaceSock

    service = wandb.setup().ensure_service()
    interface = InterfaceSock(service._asyncer, service._client, stream_id=run_id)
    # Before the word that it is over, which else waits for this one for ever.
    interface.deliver_exit(1).wait_or(timeout=_END_SECONDS)
    service.inform_finish(run_id=run_id)


def has_key() -> bool:
    """Return whether W&B's client has a key for its server.

    `wandb.init` asks the user for one, from whatever thread.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="ckpt_callbacks", prompt=False) is not None


def hide(run: wandb.Run) -> None:
    """Keep a run of ours from being what `wandb.init` gives a user who asks for one.

    It returns the last one that was opened, whoever did, although ours is asked for as a new one
    and is not `wandb.run`.
    """
    from wandb.sdk import wandb_setup

    wandb_setup.singleton().remove_active_run(run)


def remove_unfinished(
    api: wandb.Api, run_path: str, key: str, but: Collection[int] = ()
) -> list[int]:
    """Remove the versions that never got whole, of a kill or of files that were gone.

    The client 0.31 fails when it lists one, and refuses to delete it; the server does both.

    Args:
        api: of W&B.
        run_path: of W&B's run that made them, `ENTITY/PROJECT/ID`.
        key: id of our run, in their metadata.
        but: steps to leave, which are being sent.

    Returns:
        Their steps.
    """
    entity, project, run_id = run_path.split("/")
    cursor, nodes = None, list[dict[str, Any]]()
    while True:
        variables = {"entity": entity, "project": project, "run": run_id, "cursor": cursor}
        answer = api._service_api.execute_graphql(_MADE, variables)
        made = ((answer["project"] or {}).get("run") or {}).get("outputArtifacts")
        if not made:
            break
        nodes += [edge["node"] for edge in made["edges"]]
        if not made["pageInfo"]["hasNextPage"]:
            break
        cursor = made["pageInfo"]["endCursor"]
    steps = []
    for node in nodes:
        about = json.loads(node["metadata"] or "{}")
        ours = about.get("run") == key and about.get("step") not in but
        if node["state"] == "PENDING" and ours:
            variables = {"input": {"artifactID": node["id"], "deleteAliases": True}}
            api._service_api.execute_graphql(_DELETE, variables)
            steps.append(int(about["step"]))
    return steps
