"""The inner parts of W&B's client that the tracker uses: these tests notice when they change."""

from pathlib import Path

import pytest
import wandb
from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

from ckpt_callbacks_wandb._client import forget, remove_unfinished
from ckpt_callbacks_wandb.testing import Fault, WandbServer


def quiet(**options: object) -> wandb.Settings:
    return wandb.Settings(console="off", **options)  # type: ignore[arg-type]


def test_a_run_that_could_not_be_opened_can_be_later(wandb_server: WandbServer) -> None:
    wandb_server.begin(Fault("403", request="UpsertBucket", times=100))
    with pytest.raises(wandb.errors.CommError):
        wandb.init(project="p", id="one", settings=quiet())
    wandb_server.begin()
    with pytest.raises(ServerResponseError, match="in use"):  # else `forget` is not needed
        wandb.init(project="p", id="one", settings=quiet())

    forget("one")

    wandb.init(project="p", id="one", settings=quiet()).finish()
    assert wandb_server.run("p", "one").state == "finished"


def test_a_version_that_never_got_whole_is_removed(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    (tmp_path / "file").write_text("x")
    with wandb.init(project="p", id="one", settings=quiet()) as run:
        for name, key in (("ours", "key"), ("theirs", "other"), ("whole", "key")):
            artifact = wandb.Artifact(name, "model", metadata={"run": key, "step": 3})
            artifact.add_file(str(tmp_path / "file"))
            if name != "whole":
                wandb_server.begin(Fault("403", request="CommitArtifact"))
                with pytest.raises(ValueError, match="403"):
                    run.log_artifact(artifact).wait()
            else:
                run.log_artifact(artifact).wait()

        assert remove_unfinished(wandb.Api(), "me/p/one", "key") == [3]

    states = {v.collection: v.state for v in wandb_server.versions("p")}
    assert states == {"ours": "DELETED", "theirs": "PENDING", "whole": "COMMITTED"}
    assert remove_unfinished(wandb.Api(), "me/p/none", "key") == []
