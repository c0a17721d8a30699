"""The stand-in for the W&B server, with the real client."""

import base64
import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from ckpt_callbacks_wandb.testing import Fault, WandbServer, wandb_server

__all__ = ["wandb_server"]

REGISTRY = "wandb-registry-model"


def quiet() -> wandb.Settings:
    # Made anew each time: `wandb.init` writes its own arguments into it.
    return wandb.Settings(
        x_disable_stats=True,
        x_disable_meta=True,
        x_save_requirements=False,
        console="off",
        x_graphql_retry_wait_min_seconds=0.05,
        x_graphql_retry_wait_max_seconds=0.1,
        x_file_transfer_retry_wait_min_seconds=0.05,
        x_file_transfer_retry_wait_max_seconds=0.1,
    )


@pytest.fixture
def run(wandb_server: WandbServer) -> Iterator[wandb.Run]:
    with wandb.init(project="p", id="a", settings=quiet()) as run:
        yield run


@pytest.fixture(autouse=True)
def _nothing_unknown(request: pytest.FixtureRequest) -> Iterator[None]:
    if "wandb_server" not in request.fixturenames:
        yield
        return
    server = request.getfixturevalue("wandb_server")
    yield
    assert server.unknown == []


def artifact(content: str, step: int = 0) -> wandb.Artifact:
    path = Path(f"{content}.txt")
    path.write_text(content)
    made = wandb.Artifact("model", "model", metadata={"step": step})
    made.add_file(str(path), name="file.txt", policy="immutable", skip_cache=True)
    return made


def log(run: wandb.Run, content: str, *aliases: str) -> wandb.Artifact:
    return run.log_artifact(artifact(content), aliases=[*aliases]).wait()


def aliases(server: WandbServer) -> dict[str, set[str]]:
    return {v.name: set(v.aliases) for v in server.versions("p", "model")}


def states(server: WandbServer) -> list[str]:
    return [v.state for v in server.versions("p", "model")]


def test_a_run_has_what_was_logged(wandb_server: WandbServer) -> None:
    with wandb.init(project="p", id="a", config={"lr": 0.1}, tags=["x"], settings=quiet()) as run:
        for step in range(100):
            run.log({"loss": float(step)})
    stored = wandb_server.run("p", "a")
    assert [row["loss"] for row in stored.history] == list(range(100))
    assert stored.config["lr"] == 0.1
    assert stored.summary["loss"] == 99
    assert (stored.state, stored.tags) == ("finished", ("x",))
    read = wandb.Api().run("me/p/a")
    assert [row["loss"] for row in read.scan_history()] == list(range(100))
    assert read.config == {"lr": 0.1}


def test_a_run_with_an_exit_code_has_failed(wandb_server: WandbServer) -> None:
    wandb.init(project="p", id="a", settings=quiet()).finish(exit_code=3)
    assert wandb_server.run("p", "a").state == "failed"
    assert wandb_server.run("p", "a").exit_code == 3


def test_a_resumed_run_goes_on_after_its_last_row(wandb_server: WandbServer) -> None:
    for start in (0, 3):
        with wandb.init(project="p", id="a", resume="allow", settings=quiet()) as run:
            assert run.starting_step == start
            for step in range(start, start + 3):
                run.log({"x": step, "bad": float("nan")})
    assert [row["x"] for row in wandb_server.run("p", "a").history] == list(range(6))


def test_an_artifact_comes_back_as_it_was_sent(wandb_server: WandbServer, run: wandb.Run) -> None:
    log(run, "hello", "best")
    (version,) = wandb_server.versions("p", "model")
    assert version.files == {"file.txt": b"hello"}
    assert set(version.aliases) == {"best", "latest"}
    found = wandb.Api().artifact("me/p/model:best")
    assert (Path(found.download()) / "file.txt").read_text() == "hello"
    assert found.metadata == {"step": 0}
    assert found.logged_by().id == "a"
    run.use_artifact("model:best")
    assert [r.id for r in found.used_by()] == ["a"]


def test_an_alias_moves_to_an_older_version(wandb_server: WandbServer, run: wandb.Run) -> None:
    log(run, "one")
    log(run, "two", "best")
    older = wandb.Api().artifact("me/p/model:v0")
    older.aliases.append("best")
    older.metadata["note"] = "better"
    older.save()
    assert aliases(wandb_server) == {"model:v0": {"best"}, "model:v1": {"latest"}}
    assert wandb_server.versions("p", "model")[0].metadata == {"step": 0, "note": "better"}


def test_a_deleted_version_gives_nothing_to_others(
    wandb_server: WandbServer, run: wandb.Run
) -> None:
    log(run, "one")
    log(run, "two")
    newest = wandb.Api().artifact("me/p/model:latest")
    with pytest.raises(wandb.errors.CommError, match="has aliases"):
        newest.delete()
    newest.delete(delete_aliases=True)
    assert states(wandb_server) == ["COMMITTED", "DELETED"]
    assert not wandb.Api().artifact_exists("me/p/model:latest")
    assert [v.version for v in wandb.Api().artifacts("model", "me/p/model")] == ["v0"]
    assert log(run, "three").version == "v2"


def test_equal_content_is_one_version(wandb_server: WandbServer, run: wandb.Run) -> None:
    log(run, "one", "step-1")
    log(run, "two")
    assert log(run, "one", "step-3").version == "v0"
    assert aliases(wandb_server) == {"model:v0": {"step-1", "step-3", "latest"}, "model:v1": set()}


def test_links_have_aliases_and_numbers_of_their_own(
    wandb_server: WandbServer, run: wandb.Run
) -> None:
    log(run, "one")
    second = log(run, "two")
    linked = run.link_artifact(second, f"{REGISTRY}/digits", aliases=["prod"])
    assert linked.version == "v0"
    assert linked.source_version == "v1"
    wandb.Api().artifact("me/p/model:v0").link(f"{REGISTRY}/digits")
    assert [(v.index, v.aliases) for v in wandb_server.linked(REGISTRY, "digits")] == [
        (0, ("prod",)),
        (1, ("latest",)),
    ]
    assert [a.name for a in second.linked_artifacts] == ["digits:v0"]
    wandb.Api().artifact(f"{REGISTRY}/digits:prod").unlink()
    assert [v.index for v in wandb_server.linked(REGISTRY, "digits")] == [1]
    assert states(wandb_server) == ["COMMITTED", "COMMITTED"]


def test_a_protected_alias_keeps_a_version(wandb_server: WandbServer, run: wandb.Run) -> None:
    wandb_server.protect("prod")
    version = log(run, "one")
    version.link(f"{REGISTRY}/digits", aliases=["prod"])
    with pytest.raises(wandb.errors.CommError, match="protected alias"):
        wandb.Api().artifact("me/p/model:v0").delete(delete_aliases=True)
    assert states(wandb_server) == ["COMMITTED"]


def test_a_refusal_comes_as_often_as_wanted(wandb_server: WandbServer, run: wandb.Run) -> None:
    version = log(run, "one")
    wandb_server.refuse("DeleteArtifact", "not today")
    with pytest.raises(wandb.errors.CommError, match="not today"):
        version.delete(delete_aliases=True)
    version.delete(delete_aliases=True)
    assert states(wandb_server) == ["DELETED"]


LOG_IT = """
import wandb
from pathlib import Path
run = wandb.init(project="p", id="a", settings=wandb.Settings(x_disable_stats=True, console="off"))
Path("f").write_text("hello")
artifact = wandb.Artifact("model", "model")
artifact.add_file("f")
run.log_artifact(artifact, aliases=["best"]).wait()
"""


def test_a_killed_upload_stays_pending(wandb_server: WandbServer) -> None:
    sending = threading.Event()
    wandb_server.on_request = lambda name: sending.set() if name == "PUT file" else None
    wandb_server.begin(Fault("hang", request="PUT file", times=1000))
    with subprocess.Popen([sys.executable, "-c", LOG_IT], start_new_session=True) as child:
        assert sending.wait(60)
        os.killpg(child.pid, signal.SIGKILL)
    assert states(wandb_server) == ["PENDING"]
    api = wandb.Api()
    assert list(api.artifacts("model", "me/p/model")) == []
    assert not api.artifact_exists("me/p/model:best")
    assert pending_in(api, "me/p/a") == [wandb_server.versions("p")[0].id]
    # The client knows such ones only as drafts, of which it shows no id and deletes none.
    with pytest.raises(AssertionError):
        list(api.run("me/p/a").logged_artifacts())


def pending_in(api: wandb.Api, path: str) -> list[str]:
    entity, project, run = path.split("/")
    query = """
    query Made($entity: String!, $project: String!, $run: String!) {
      project(name: $project, entityName: $entity) {
        run(name: $run) { outputArtifacts { edges { node { id state } } } }
      }
    }
    """
    variables = {"entity": entity, "project": project, "run": run}
    answer = api._service_api.execute_graphql(query, variables)
    nodes = [e["node"] for e in answer["project"]["run"]["outputArtifacts"]["edges"]]
    return [n["id"] for n in nodes if n["state"] == "PENDING"]


def test_an_upload_that_was_cut_is_taken_up_again(
    wandb_server: WandbServer, run: wandb.Run
) -> None:
    wandb_server.begin(Fault("403", request="CommitArtifact"))
    with pytest.raises(ValueError, match="403"):
        log(run, "one", "old")
    assert states(wandb_server) == ["PENDING"]
    log(run, "one", "new")
    assert states(wandb_server) == ["COMMITTED"]
    assert aliases(wandb_server) == {"model:v0": {"new", "latest"}}


@pytest.mark.parametrize(
    ("kind", "request_"),
    [("500", "CreateArtifact"), ("drop", "PUT file"), ("applied", "CommitArtifact")],
)
def test_the_client_gets_over_a_fault(
    wandb_server: WandbServer, run: wandb.Run, kind: Any, request_: str
) -> None:
    wandb_server.begin(Fault(kind, request=request_))
    log(run, "one", "best")
    assert states(wandb_server) == ["COMMITTED"]
    assert wandb_server.versions("p")[0].files == {"file.txt": b"one"}
    # The file and the manifest are two.
    assert wandb_server.requests.count(request_) == 2 + (request_ == "PUT file")


def test_damaged_bytes_are_refused(wandb_server: WandbServer, run: wandb.Run) -> None:
    wandb_server.begin(Fault("digest", request="PUT file"))
    with pytest.raises(ValueError, match="uploads"):
        log(run, "one")
    assert states(wandb_server) == ["PENDING"]


def test_the_client_does_not_see_that_a_download_is_damaged(
    wandb_server: WandbServer, run: wandb.Run
) -> None:
    version = log(run, "one")
    # The first file is the manifest.
    wandb_server.begin(Fault("digest", at=2, request="GET file"))
    folder = version.download()
    assert (Path(folder) / "file.txt").read_bytes() == b"nne"
    with pytest.raises(ValueError, match="Digest mismatch"):
        version.verify(folder)


def test_a_server_that_was_down_still_has_everything(
    wandb_server: WandbServer, run: wandb.Run
) -> None:
    log(run, "one")
    address = wandb_server.url
    wandb_server.stop()
    with pytest.raises(OSError, match="refused"):
        post(wandb_server, "{viewer{id}}")
    wandb_server.start()
    assert wandb_server.url == address
    log(run, "two")
    assert states(wandb_server) == ["COMMITTED", "COMMITTED"]


def test_an_offline_run_can_be_synced(wandb_server: WandbServer) -> None:
    with wandb.init(project="p", id="a", mode="offline", settings=quiet()) as run:
        run.log({"x": 1.0})
        run.log_artifact(artifact("one"), aliases=["best"])
        run.log_artifact(artifact("two"))
    Path("one.txt").unlink()
    (folder,) = Path(os.environ["WANDB_DIR"]).glob("wandb/offline-run-*")
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)], check=True)
    assert [row["x"] for row in wandb_server.run("p", "a").history] == [1.0]
    # Of a file that is gone the client says nothing.
    assert states(wandb_server) == ["PENDING", "COMMITTED"]


def post(server: WandbServer, query: str, **variables: Any) -> dict[str, Any]:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{server.url}/graphql", body)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("query Q { viewer { shoeSize } }", 'field "shoeSize" on type "User"'),
        ("mutation M { makeCoffee { id } }", 'field "makeCoffee" on type "Mutation"'),
        (
            'mutation M { deleteArtifact(input: {artifactID: "1", how: "hard"}) { artifact {id}}}',
            "unexpected keyword argument 'how'",
        ),
        ("query Q {", "not a GraphQL request"),
    ],
)
def test_what_is_not_known_is_an_error(query: str, message: str) -> None:
    with WandbServer() as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, query)
        with caught.value as answer:
            assert message in json.load(answer)["errors"][0]["message"]
        assert len(server.unknown) == 1


def test_what_a_query_names_is_selected() -> None:
    query = """
    query Q($no: Boolean = false, $entity: String = "me") {
      a: entity(name: $entity) { ...E id @skip(if: $no) name @include(if: $no) }
      none: entity(name: "nobody") { id }
    }
    fragment E on Entity { organization { ... on Organization { name orgEntity { __typename } } } }
    """
    with WandbServer() as server:
        data = post(server, query)["data"]
    organization = {"name": "our-organization", "orgEntity": {"__typename": "Entity"}}
    assert data == {"a": {"organization": organization, "id": "entity-me"}, "none": None}


@pytest.mark.parametrize("kind", ["drop", "down", "applied", "hang"])
def test_a_fault_without_an_answer(kind: Any) -> None:
    make = 'mutation Make { upsertBucket(input: {name: "a", modelName: "p"}) { inserted } }'
    with WandbServer() as server:
        server.begin(Fault(kind, at=2))
        post(server, "query First { viewer { id } }")
        if kind == "hang":
            server.on_request = lambda _: server.release()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            post(server, make)
        assert len(server.runs("p")) == (kind == "applied")
        assert server.requests == ["First", "Make"]
        if kind == "down":
            with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
                post(server, "query Third { viewer { id } }")
            server.begin()
        assert post(server, make)["data"]["upsertBucket"]["inserted"] == (kind != "applied")


def test_closing_ends_what_hangs() -> None:
    arrived, ended = threading.Event(), threading.Event()

    def ask() -> None:
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            post(server, "query Q { viewer { id } }")
        ended.set()

    with WandbServer() as server:
        server.begin(Fault("hang", request="Q"))
        server.on_request = lambda _: arrived.set()
        asking = threading.Thread(target=ask)
        asking.start()
        assert arrived.wait(10)
    asking.join(10)
    assert ended.is_set()


def test_an_answer_may_have_another_digest(wandb_server: WandbServer, run: wandb.Run) -> None:
    digest = log(run, "one").digest
    wandb_server.begin(Fault("digest", request="ArtifactMembershipByName"))
    assert wandb.Api().artifact("me/p/model:v0").digest == digest[::-1]
    assert wandb.Api().artifact("me/p/model:v0").digest == digest


def test_bytes_must_be_those_of_the_header() -> None:
    def put(content: bytes) -> int:
        md5 = base64.b64encode(hashlib.md5(b"right").digest()).decode()
        request = urllib.request.Request(
            f"{server.url}/storage/key", content, {"Content-MD5": md5}, method="PUT"
        )
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)

    with WandbServer() as server:
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            put(b"wrong")
        caught.value.close()
        assert put(b"right") == 200
