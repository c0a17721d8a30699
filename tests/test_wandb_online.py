"""W&B online: the real client, against a stand-in for the server."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.stores import MetricPoint, Rank, RunInfo, Tracker
from ckpt_callbacks.testing import Recorder, TrackerContract, make_checkpoint
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import Fault, StoredVersion, WandbServer
from loops import callbacks_in, new_state, train

RUN = "0123456789ab"


@pytest.fixture(autouse=True)
def _server(wandb_server: WandbServer) -> None:
    """Every test here has one."""


def opened(
    tmp_path: Path,
    *,
    run_id: str = RUN,
    ranks: dict[tuple[str, int], Rank] | None = None,
    **options: object,
) -> WandbTracker:
    """Return a tracker of a run whose directory is called `digits`."""
    scratch = tmp_path / run_id
    scratch.mkdir(exist_ok=True)
    store = WandbTracker(**{"project": "p", "artifact": "digits", **options})  # type: ignore[arg-type]
    store.entered([])
    known = ranks or {}
    store.open(RunInfo(run_id, "digits", {"lr": 0.1}, scratch, {}, rank=lambda *k: known.get(k)))
    return store


def there(server: WandbServer, name: str = "digits") -> dict[int, StoredVersion]:
    """Return what is complete, by step."""
    found = server.versions("p", name)
    return {v.metadata["step"]: v for v in found if v.state == "COMMITTED"}


def aliases(server: WandbServer, name: str = "digits") -> dict[str, int]:
    """Return the step that each alias names, but for `step-N` and W&B's own."""
    found = {alias: step for step, v in there(server, name).items() for alias in v.aliases}
    return {a: s for a, s in found.items() if a != "latest" and not a.startswith("step-")}


class TestOnline(TrackerContract):
    @pytest.fixture
    def make_store(self, wandb_server: WandbServer) -> Callable[[], WandbTracker]:
        self.server = wandb_server
        return lambda: WandbTracker(project="p")

    def logged_files(self, store: Tracker) -> dict[str, bytes]:
        files = self.server.run("p", RUN).files
        prefix = "artifacts/"
        return {n.removeprefix(prefix): b for n, b in files.items() if n.startswith(prefix)}


def test_a_run_leaves_exactly_what_is_kept(tmp_path: Path, wandb_server: WandbServer) -> None:
    tracker = WandbTracker(
        "p", artifact="digits", link_to="wandb-registry-model/digits", run_name="first"
    )
    events = Recorder()
    scores = {1: 0.9, 3: 0.5, 5: 0.7}

    train(callbacks_in(tmp_path / "run", tracker, events), 8, scores, config={"lr": 0.1})

    assert not events.of(cc.MirrorFailed)
    found = there(wandb_server)
    assert set(found) == {1, 6, 7}
    assert aliases(wandb_server) == {"best": 1, "last": 7}
    assert all(f"step-{step}" in version.aliases for step, version in found.items())
    (linked,) = wandb_server.linked("wandb-registry-model", "digits")
    assert (linked.metadata["step"], "best" in linked.aliases) == (1, True)
    (run,) = wandb_server.runs("p")
    assert (run.display_name, run.state, run.config["lr"]) == ("first", "finished", 0.1)
    assert [(row["trainer/step"], row["loss"]) for row in run.history if "loss" in row] == [
        (step, float(step)) for step in range(8)
    ]


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 3, {1: 0.9})
    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 6, {4: 0.5})

    (run,) = wandb_server.runs("p")
    assert [row["loss"] for row in run.history if "loss" in row] == [0, 1, 2, 3, 4, 5]
    assert set(there(wandb_server)) == {1, 4, 5}
    assert aliases(wandb_server) == {"best": 1, "last": 5}


def test_best_moves_to_an_older_version_without_an_upload(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    store = opened(tmp_path)
    for step in (1, 2):
        store.put(make_checkpoint(tmp_path, step), [])
    store.alias("best", 2)
    wandb_server.begin()

    store.alias("best", 1)

    assert aliases(wandb_server) == {"best": 1}
    assert "PUT file" not in wandb_server.requests
    store.close("finished")


def test_a_version_says_what_it_is(tmp_path: Path, wandb_server: WandbServer) -> None:
    store = opened(tmp_path, ranks={("best", 7): Rank("accuracy", "max", 0.5)})
    checkpoint = make_checkpoint(tmp_path, 7)

    copy = store.put(checkpoint, [])
    store.alias("best", 7)

    assert (copy.state, copy.ref, copy.shared) == ("confirmed", "digits:v0", False)
    about = there(wandb_server)[7].metadata
    assert (about["step"], about["digest"], about["reason"]) == (7, checkpoint.digest, "latest #7")
    assert about["metrics"] == {"loss": 1 / 8}
    assert about["ranks"] == {"best": {"metric": "accuracy", "mode": "max", "value": 0.5}}
    files = there(wandb_server)[7].files
    assert files["checkpoint.json"].decode() == checkpoint.manifest
    assert {name for name in files if name != "checkpoint.json"} == {
        f"checkpoint/{name}" for name in checkpoint.files
    }
    store.close("finished")


def test_wandb_copies_no_bytes_and_nothing_stays_held(tmp_path: Path) -> None:
    store = opened(tmp_path)

    store.put(make_checkpoint(tmp_path, 7, b"x" * 1_000_000), [])

    for folder in ("wandb_data_dir", "wandb_cache_dir", "wandb_dir", RUN):
        files = [p for p in (tmp_path / folder).rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) < 200_000
    store.close("finished")


def test_the_alias_of_somebody_else_keeps_a_version(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    store = opened(tmp_path)
    for step in (1, 2):
        store.put(make_checkpoint(tmp_path, step), [])
    version = wandb.Api().artifact("me/p/digits:step-1")
    version.aliases.append("production")
    version.save()

    assert [store.delete(1), store.delete(1)] == [False, False]

    assert set(there(wandb_server)) == {1, 2}
    (told,) = [r.getMessage() for r in caplog.records if r.name == "ckpt_callbacks"]
    assert "me/p/digits:v0 of step 1 is no longer wanted, but stays: it has the alias" in told
    assert "'production'" in told
    store.close("finished")


def test_a_version_that_somebody_linked_stays(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    store = opened(tmp_path)
    for step in (1, 2):
        store.put(make_checkpoint(tmp_path, step), [])
    wandb.Api().artifact("me/p/digits:step-1").link("wandb-registry-model/theirs")

    assert store.delete(1) is False

    assert set(there(wandb_server)) == {1, 2}
    assert "it is linked to wandb-registry-model/theirs" in caplog.text
    store.close("finished")


def test_a_refused_deletion_is_told_and_tried_again_by_the_next_run(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    directory, gone = tmp_path / "digits", threading.Event()

    class Pace:
        """Lets the loop wait until the server has a step."""

        sent = threading.Event()

        @cc.hookimpl
        def on_mirrored(self, event: cc.Mirrored) -> None:
            self.sent.set()

        @cc.hookimpl
        def on_evicted(self, event: cc.Evicted) -> None:
            if event.store == "wandb":
                gone.set()

    def before(step: int, run: cc.Run[Any]) -> None:
        assert step == 0 or Pace.sent.wait(30)
        Pace.sent.clear()

    wandb_server.refuse("DeleteArtifact", "permission denied: protected")
    train(
        callbacks_in(directory, WandbTracker("p", artifact="digits"), Pace()), 4, {1: 0.9}, before
    )
    assert set(there(wandb_server)) == {0, 1, 2, 3}
    told = [r.getMessage() for r in caplog.records if "permission denied" in r.getMessage()]
    assert len(told) == 1
    assert "v0 of step 0 is no longer wanted, but stays: W&B refuses to delete it" in told[0]

    assert not gone.is_set()
    cc.sync(directory)

    assert set(there(wandb_server)) == {1, 2, 3}


def test_latest_is_handed_on_before_the_newest_version_goes(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    """W&B gives it to what was sent last, and to nothing once that is deleted."""
    store = opened(tmp_path)
    for step in (5, 2):  # an old step that comes late
        store.put(make_checkpoint(tmp_path, step), [])
    assert "latest" in there(wandb_server)[2].aliases

    store.delete(2)

    assert "latest" in there(wandb_server)[5].aliases
    store.close("finished")


@pytest.mark.parametrize(("value", "taken"), [(0.9, True), (0.5, False), (0.7, False)])
def test_best_leaves_another_runs_version_only_for_a_better_one(
    value: float, taken: bool, tmp_path: Path, wandb_server: WandbServer
) -> None:
    """So does the link in the registry."""
    target = "wandb-registry-model/digits"
    first = opened(
        tmp_path, ranks={("best", 1): Rank("acc", "max", 0.7)}, artifact="all", link_to=target
    )
    first.put(make_checkpoint(tmp_path / "a", 1), [])
    assert first.alias("best", 1)
    first.close("finished")
    second = opened(
        tmp_path,
        run_id="second",
        ranks={("best", 2): Rank("acc", "max", value)},
        artifact="all",
        link_to=target,
    )
    checkpoint = make_checkpoint(tmp_path / "b", 2)
    second.put(replace(checkpoint, run_id="second"), [])

    assert second.alias("best", 2) is taken

    assert aliases(wandb_server, "all") == {"best": 2 if taken else 1}
    linked = wandb_server.linked("wandb-registry-model", "digits")
    assert [v.metadata["step"] for v in linked if "best" in v.aliases] == [2 if taken else 1]
    second.close("finished")


def test_last_goes_to_the_run_that_began_last(tmp_path: Path, wandb_server: WandbServer) -> None:
    first = opened(tmp_path, artifact="all")
    first.put(make_checkpoint(tmp_path / "a", 9), [])
    first.alias("last", 9)
    second = opened(tmp_path, run_id="second", artifact="all")
    second.put(replace(make_checkpoint(tmp_path / "b", 2), run_id="second"), [])

    assert second.alias("last", 2)
    assert not first.alias("last", 9)

    assert aliases(wandb_server, "all") == {"last": 2}
    first.close("finished")
    second.close("finished")


def test_the_link_follows_best_and_leaves_what_is_protected(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    store = opened(tmp_path, link_to="wandb-registry-model/digits")
    for step in (1, 2, 3):
        store.put(make_checkpoint(tmp_path, step), [])
    store.alias("best", 1)
    store.alias("best", 2)
    assert [v.metadata["step"] for v in wandb_server.linked("wandb-registry-model", "digits")] == [
        2
    ]
    linked = wandb.Api().artifact("wandb-registry-model/digits:best")
    linked.aliases.append("production")
    linked.save()

    store.alias("best", 3)

    found = wandb_server.linked("wandb-registry-model", "digits")
    assert {v.metadata["step"]: "production" in v.aliases for v in found} == {2: True, 3: False}
    assert "stays linked: it has the alias 'production'" in caplog.text
    assert store.delete(2) is False
    store.close("finished")


def test_the_run_that_the_user_has_open_is_used_and_left_open(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    import wandb

    with wandb.init(project="p", id="theirs") as theirs:
        train(callbacks_in(tmp_path / "digits", WandbTracker(artifact="digits")), 3, {1: 0.9})
        theirs.log({"mine": 1.0})
        train(callbacks_in(tmp_path / "other", WandbTracker(artifact="other")), 2)
        assert wandb_server.run("p", "theirs").state == "running"

    (run,) = wandb_server.runs("p")
    assert [row["loss"] for row in run.history if "loss" in row] == [0, 1, 2, 0, 1]
    assert [row["mine"] for row in run.history if "mine" in row] == [1.0]
    assert set(there(wandb_server)) == {1, 2}
    assert set(there(wandb_server, "other")) == {0, 1}


def test_a_run_of_another_project_is_left_alone(tmp_path: Path, wandb_server: WandbServer) -> None:
    import wandb

    with wandb.init(project="theirs"):
        train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 2)

    assert not [row for row in wandb_server.runs("theirs")[0].history if "loss" in row]
    assert len(wandb_server.runs("p")) == 1


def test_a_run_named_by_its_id_is_used_and_not_ended(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    import wandb

    wandb.init(project="p", id="theirs", name="mine").finish()
    train(
        callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits", run_id="theirs")), 2
    )

    (run,) = wandb_server.runs("p")
    assert (run.id, run.display_name) == ("theirs", "mine")
    assert [row["loss"] for row in run.history if "loss" in row] == [0, 1]


def test_group_job_type_and_tags_pass_through(tmp_path: Path, wandb_server: WandbServer) -> None:
    store = opened(tmp_path, group="sweep", job_type="train", tags=["a", "b"])
    store.close("finished")

    (run,) = wandb_server.runs("p")
    assert (run.group, run.job_type, run.tags) == ("sweep", "train", ("a", "b"))


def test_one_callbacks_serves_several_runs(tmp_path: Path, wandb_server: WandbServer) -> None:
    callbacks = callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits"))
    train(callbacks, 2)
    train(callbacks, 4)

    (run,) = wandb_server.runs("p")
    assert [row["loss"] for row in run.history if "loss" in row] == [0, 1, 2, 3]
    assert set(there(wandb_server)) == {2, 3}


@pytest.mark.parametrize("address", ["me/p/digits:best", "wandb-registry-model/digits:best"])
def test_a_checkpoint_is_restored_by_its_address(
    address: str, tmp_path: Path, wandb_server: WandbServer
) -> None:
    tracker = WandbTracker("p", artifact="digits", link_to="wandb-registry-model/digits")
    train(callbacks_in(tmp_path / "digits", tracker), 4, {1: 0.9})

    state = cc.restore(f"wandb:{address}", like=new_state())

    assert float(state["model"]["w"][0, 0]) == 2.0


def test_one_item_alone_is_fetched(tmp_path: Path, wandb_server: WandbServer) -> None:
    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 2)
    wandb_server.begin()

    state = cc.restore("wandb:me/p/digits:last", like=new_state(), only="model")

    assert float(state["model"]["w"][0, 0]) == 2.0
    assert wandb_server.requests.count("GET file") < len(there(wandb_server)[1].files)


def test_what_was_used_is_recorded_with_the_run_that_used_it(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    import wandb

    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 2)
    with wandb.init(project="p", id="evaluation"):
        cc.restore("wandb:me/p/digits:last", like=new_state())

    assert there(wandb_server)[1].used_by == ("evaluation",)


def test_a_machine_with_an_empty_disk_goes_on(tmp_path: Path, wandb_server: WandbServer) -> None:
    """In a directory of another name, and in the same collection."""
    train(callbacks_in(tmp_path / "one", WandbTracker("p")), 4, {1: 0.9})
    (name,) = {v.collection for v in wandb_server.versions("p")}

    state = train(
        callbacks_in(tmp_path / "two", WandbTracker("p")), 6, resume=f"wandb:me/p/{name}:last"
    )

    assert float(state["model"]["w"][0, 0]) == 6.0
    assert set(there(wandb_server, name)) == {1, 4, 5}
    (run,) = wandb_server.runs("p")
    assert [row["loss"] for row in run.history if "loss" in row] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("wandb:me/p/digits", cc.ConfigError, "is not wandb:ENTITY/PROJECT/NAME:ALIAS"),
        ("wandb:me/p/digits:v7", cc.CheckpointNotFound, "W&B does not give wandb:me/p/digits:v7"),
    ],
)
def test_an_address_of_nothing_is_an_error(
    address: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        cc.restore(address, like=new_state())


def test_a_damaged_download_is_an_error(tmp_path: Path, wandb_server: WandbServer) -> None:
    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 2)
    wandb_server.begin(Fault("digest", request="GET file", times=100))

    with pytest.raises((cc.CorruptCheckpoint, cc.CheckpointNotFound, cc.RecordError)):
        cc.restore("wandb:me/p/digits:last", like=new_state())


def test_only_the_weights_are_sent(tmp_path: Path, wandb_server: WandbServer) -> None:
    train(
        callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits", send="weights")), 2
    )

    names = {name.split("/")[1] for name in there(wandb_server)[1].files if "/" in name}
    assert "model" in names
    assert "moments" not in names
    state = cc.restore("wandb:me/p/digits:last", like=new_state(), only="model")
    assert float(state["model"]["w"][0, 0]) == 2.0


def test_a_reference_says_where_the_checkpoint_is(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    train(
        callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits", send="reference")), 2
    )

    version = there(wandb_server)[1]
    assert set(version.files) == {"checkpoint.json"}
    assert version.references
    assert all(
        ref.startswith((tmp_path / "digits" / "1").as_uri()) for ref in version.references.values()
    )
    state = cc.restore("wandb:me/p/digits:last", like=new_state())
    assert float(state["model"]["w"][0, 0]) == 2.0


def test_what_a_reference_to_a_bucket_needs_is_said_at_once() -> None:
    with pytest.raises(cc.ConfigError, match=r"needs the package google.*pip install 'wandb\[gcp"):
        WandbTracker("p", artifact="digits", send="reference", reference="gs://bucket/runs/digits")


def test_a_version_may_have_a_time_to_live(tmp_path: Path, wandb_server: WandbServer) -> None:
    store = opened(tmp_path, ttl=timedelta(days=3))
    store.put(make_checkpoint(tmp_path, 1), [])

    assert there(wandb_server)[1].ttl == 3 * 24 * 3600
    store.close("finished")


def test_metrics_that_come_late_are_shown(tmp_path: Path, wandb_server: WandbServer) -> None:
    callbacks = callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits"))
    with callbacks.run(new_state()) as run:
        run.on_step(0, new_state())
        run.on_step(1, new_state())
        run.wait()
        run.on_eval(0, {"score": 0.5})

    assert there(wandb_server)[0].metadata["metrics"] == {"score": 0.5}
    assert "best #1" in there(wandb_server)[0].metadata["reason"]


def test_the_mode_is_that_of_wandb_if_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb_server: WandbServer
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 2)
    assert not wandb_server.runs("p")

    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(cc.ConfigError, match=r"W&B's mode is 'disabled' \(WANDB_MODE\)"):
        train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 2)


def test_a_run_in_one_process_may_follow_one_that_could_not_be_opened(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    wandb_server.begin(Fault("403", request="UpsertBucket", times=1))
    events = Recorder()

    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits"), events), 2)

    assert len(events.of(cc.MirrorFailed)) == 1
    assert set(there(wandb_server)) == {0, 1}


def test_without_a_key_training_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wandb")  # as if nothing had imported it
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(cc.ConfigError, match=r"no API key for W&B: run `wandb login`"):
        train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 2)


KILLED = """
import os
import subprocess
import sys
from pathlib import Path
from ckpt_callbacks_wandb import WandbTracker
from loops import callbacks_in, train

train(callbacks_in(Path(sys.argv[1]), WandbTracker("p", artifact="digits")), 8, {1: 0.9})
"""


@pytest.mark.parametrize("request_name", ["PUT file", "CommitArtifact", "AddAliases"])
def test_a_run_that_was_killed_during_an_upload_is_made_good(
    request_name: str, tmp_path: Path, wandb_server: WandbServer
) -> None:
    directory, reached = tmp_path / "digits", threading.Event()
    # With a W&B service of its own, which dies with it.
    environment = {k: v for k, v in os.environ.items() if "SERVICE" not in k}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    wandb_server.begin(Fault("hang", request=request_name, at=2))
    wandb_server.on_request = lambda _: (
        reached.set() if wandb_server.requests.count(request_name) >= 2 else None
    )
    with subprocess.Popen([sys.executable, "-c", KILLED, directory], env=environment) as process:
        assert reached.wait(60)
        process.kill()
    wandb_server.on_request = None
    wandb_server.release()
    wandb_server.begin()

    state = train(callbacks_in(directory, WandbTracker("p", artifact="digits")), 8, {1: 0.9})

    assert float(state["model"]["w"][0, 0]) == 8.0
    assert set(there(wandb_server)) == {1, 6, 7}
    assert aliases(wandb_server) == {"best": 1, "last": 7}
    assert {v.state for v in wandb_server.versions("p")} <= {"COMMITTED", "DELETED"}
    (run,) = wandb_server.runs("p")
    assert [row["loss"] for row in run.history if "loss" in row] == [0, 1, 2, 3, 4, 5, 6, 7]
    for step, version in there(wandb_server).items():
        sent = {n.removeprefix("checkpoint/"): b for n, b in version.files.items()}
        del sent["checkpoint.json"]
        assert sent == {
            p.relative_to(directory / str(step)).as_posix(): p.read_bytes()
            for p in (directory / str(step)).rglob("*")
            if p.is_file()
        }


def test_what_did_not_arrive_is_sent_though_others_log_to_the_run(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    import wandb

    def start() -> WandbTracker:
        store = WandbTracker("p", run_id="theirs")
        info = RunInfo(RUN, "digits", {}, tmp_path / "scratch", {}, drain_limit=1.0)
        store.open(info)
        return store

    (tmp_path / "scratch").mkdir()
    wandb_server.begin(Fault("hang", request="POST file_stream", times=1000))
    store = start()
    store.log_metrics([MetricPoint(s, 1.0 + s, {"loss": float(s)}) for s in range(4)])
    with pytest.raises(TimeoutError, match="W&B has not taken all in time"):
        store.close("finished")
    wandb_server.begin()
    wandb_server.release()
    with wandb.init(project="p", id="theirs", resume="must") as other:
        for number in range(20):
            other.log({"other": number})

    start().close("finished")

    rows = wandb_server.run("p", "theirs").history
    assert [row["loss"] for row in rows if "loss" in row] == [0, 1, 2, 3]


def test_an_alias_of_somebody_else_may_move(tmp_path: Path, wandb_server: WandbServer) -> None:
    import wandb

    api: list[wandb.Artifact] = []

    def before(step: int, run: cc.Run[Any]) -> None:
        run.wait()
        if step == 3:
            for name in ("step-0", "step-1"):
                api.append(wandb.Api().artifact(f"me/p/digits:{name}"))
                api[-1].aliases.append("production")
                api[-1].save()

    keep = cc.LatestN(10)
    for steps in (3, 6, 7):
        tracker = WandbTracker("p", artifact="digits")
        train(callbacks_in(tmp_path / "digits", tracker, keep=keep), steps, None, before)

    assert aliases(wandb_server) == {"production": 1, "last": 6}


def test_a_version_whose_metadata_somebody_edited_is_left_alone(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    import wandb

    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits")), 3)
    version = wandb.Api().artifact("me/p/digits:step-1")
    version.metadata = {"run": version.metadata["run"], "note": "mine"}
    version.save()
    events = Recorder()

    train(callbacks_in(tmp_path / "digits", WandbTracker("p", artifact="digits"), events), 5)

    assert not events.of(cc.MirrorFailed)
    steps = [v.metadata.get("step") for v in wandb_server.versions("p") if v.state == "COMMITTED"]
    assert {3, 4, None} <= set(steps)


def test_a_link_that_failed_keeps_no_version(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path, link_to="wandb-registry-model/digits")
    for step in (1, 2):
        store.put(make_checkpoint(tmp_path, step), [])
    store.alias("best", 1)
    wandb_server.refuse("LinkArtifact", "permission denied")
    assert store.alias("best", 2)
    assert "step 2 could not be linked to wandb-registry-model/digits" in caplog.text

    assert store.delete(1)

    (linked,) = wandb_server.linked("wandb-registry-model", "digits")
    assert linked.metadata["step"] == 2
    assert set(there(wandb_server)) == {2}
    store.close("finished")


def test_the_page_of_the_checkpoints_is_among_the_panels_once(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    train(callbacks_in(tmp_path / "run", WandbTracker("p", artifact="digits")), 4, {1: 0.9})
    assert not cc.sync(tmp_path / "run")  # which changes nothing

    (run,) = wandb_server.runs("p")
    (row,) = [row for row in run.history if "checkpoints/report" in row]
    text = run.files[row["checkpoints/report"]["path"]].decode()
    assert "<h2>Where each checkpoint was</h2>" in text
    assert "digits:v" in text
    assert "http" not in text
