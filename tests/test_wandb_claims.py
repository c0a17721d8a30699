"""W&B: faults that a review found, each with what is promised instead."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.stores import MetricPoint, Overview, RunInfo, Shown
from ckpt_callbacks.testing import MemoryStore, Recorder, make_checkpoint
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import Fault, StoredVersion, WandbServer
from loops import callbacks_in, local_steps, new_state, train

HERE = Path(__file__).parent
RUN = "0123456789ab"
REGISTRY = "wandb-registry-model"


@pytest.fixture
def server(wandb_server: WandbServer) -> WandbServer:
    return wandb_server


def tracker(project: str | None = "p", **options: Any) -> WandbTracker:
    return WandbTracker(project, **{"artifact": "digits", **options})


def opened(tmp_path: Path, key: str = RUN, **options: Any) -> WandbTracker:
    """Return a tracker of the run with an id of ours, with its scratch folder in `tmp_path`."""
    scratch = tmp_path / key
    scratch.mkdir(exist_ok=True)
    store = tracker(**options)
    store.entered([])
    store.open(RunInfo(key, "digits", {}, scratch, {}))
    return store


def points(*steps: int) -> list[MetricPoint]:
    return [MetricPoint(step, 100.0 + step, {"loss": float(step)}) for step in steps]


def losses(server: WandbServer, run_id: str = RUN, project: str = "p") -> list[float]:
    """Return those of a run, in order of our step."""
    rows = [row for row in server.run(project, run_id).history if "loss" in row]
    return [row["loss"] for row in sorted(rows, key=lambda row: row["trainer/step"])]


def there(server: WandbServer, project: str = "p") -> dict[int, StoredVersion]:
    """Return what is complete, by step."""
    found = server.versions(project, "digits")
    return {v.metadata["step"]: v for v in found if v.state == "COMMITTED"}


def aliases(server: WandbServer) -> dict[str, int]:
    """Return the step that each alias names, but for `step-N` and W&B's own."""
    found = {alias: step for step, v in there(server).items() for alias in v.aliases}
    return {a: s for a, s in found.items() if a != "latest" and not a.startswith("step-")}


def own_service() -> dict[str, str]:
    """Return the environment of a process with a W&B service of its own."""
    environment = {k: v for k, v in os.environ.items() if "SERVICE" not in k}
    return {**environment, "JAX_PLATFORMS": "cpu"}


def without_a_folder(monkeypatch: pytest.MonkeyPatch, working_directory: Path) -> None:
    """Let W&B's client start as in a new process there, without `WANDB_DIR`."""
    import wandb

    wandb.teardown()
    monkeypatch.delenv("WANDB_DIR", raising=False)
    working_directory.mkdir(exist_ok=True)
    monkeypatch.chdir(working_directory)


# runs that the user has open --------------------------------------------------------------------


def test_the_users_metrics_keep_their_own_rule(tmp_path: Path, server: WandbServer) -> None:
    import wandb

    with wandb.init(project="p", id="theirs") as theirs:
        theirs.define_metric("epoch")
        theirs.define_metric("*", step_metric="epoch")
        train(callbacks_in(tmp_path / "digits", tracker(None)), 3)
        theirs.log({"mine": 1.0, "epoch": 1})

    (mine,) = [row for row in server.run("p", "theirs").history if "mine" in row]
    assert mine["epoch"] == 1
    assert "trainer/step" not in mine
    assert losses(server, "theirs") == [0, 1, 2]


def test_a_config_reaches_the_users_run_and_changes_none_of_theirs(
    tmp_path: Path, server: WandbServer
) -> None:
    import wandb

    config = {"lr": 0.1, "width": 32}
    with wandb.init(project="p", id="theirs", config={"lr": 0.5}):
        train(callbacks_in(tmp_path / "digits", tracker(None)), 1, config=config)

    found = server.run("p", "theirs").config
    assert (found["lr"], found["width"]) == (0.5, 32)


def test_init_of_the_user_does_not_return_our_run(tmp_path: Path, server: WandbServer) -> None:
    import wandb

    store = opened(tmp_path)

    mine = wandb.init(project="mine", id="mine")
    assert (mine.project, mine.id) == ("mine", "mine")
    mine.log({"theirs": 1.0})
    mine.finish()

    store.log_metrics(points(0, 1))
    store.put(make_checkpoint(tmp_path, 1), [])
    store.close("finished")
    assert losses(server) == [0, 1]
    assert set(there(server)) == {1}
    (theirs,) = server.runs("mine")
    assert [row["theirs"] for row in theirs.history] == [1.0]


def test_two_trackers_may_use_one_run_by_its_id(tmp_path: Path, server: WandbServer) -> None:
    first = opened(tmp_path, "aaaa", artifact="a", run_id="theirs")
    second = opened(tmp_path, "bbbb", artifact="b", run_id="theirs")
    first.log_metrics(points(0))
    second.log_metrics(points(1))
    second.close("finished")

    first.log_metrics(points(2))
    first.put(make_checkpoint(tmp_path, 1), [])

    first.close("finished")
    assert losses(server, "theirs") == [0, 1, 2]
    assert [v.collection for v in server.versions("p") if v.state == "COMMITTED"] == ["a"]


def test_one_callbacks_follows_the_user_into_another_project(
    tmp_path: Path, server: WandbServer
) -> None:
    import wandb

    callbacks = callbacks_in(tmp_path / "digits", tracker(None))
    for project, steps in (("first", 2), ("second", 4)):
        with wandb.init(project=project, id=f"theirs-{project}"):
            train(callbacks, steps)

    assert [run.id for run in server.runs("first")] == ["theirs-first"]
    assert [run.id for run in server.runs("second")] == ["theirs-second"]
    assert losses(server, "theirs-second", "second") == [2, 3]
    assert set(there(server, "second")) >= {3}


def test_a_run_that_logs_nothing_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "run", None)  # W&B leaves a disabled one there when it is finished
    with (
        wandb.init(project="p", mode="disabled"),
        pytest.raises(cc.ConfigError, match=r"logs nothing .*mode='disabled'"),
    ):
        train(callbacks_in(tmp_path / "digits", tracker(None)), 2)


def test_a_sync_goes_on_in_the_offline_run_of_the_user(tmp_path: Path, server: WandbServer) -> None:
    import wandb

    # Without it each upload waits for W&B's own 15 s.
    settings = wandb.Settings(x_transaction_log_flush_interval=0.1)
    with wandb.init(project="p", id="theirs", mode="offline", settings=settings):
        train(callbacks_in(tmp_path / "digits", tracker(None)), 3, {1: 0.9})

    assert cc.sync(tmp_path / "digits", timeout=60) == {}

    assert [run.id for run in server.runs("p")] == ["theirs"]
    assert losses(server, "theirs") == [0, 1, 2]
    assert set(there(server)) == {1, 2}


def test_what_follows_the_users_finish_is_sent_by_a_sync(
    tmp_path: Path, server: WandbServer
) -> None:
    import wandb

    def before(step: int, run: cc.Run[Any]) -> None:
        if step == 3:
            wandb.finish()

    wandb.init(project="p", id="theirs")
    train(callbacks_in(tmp_path / "digits", tracker(None), drain_limit=2), 6, {1: 0.9}, before)

    assert cc.sync(tmp_path / "digits", timeout=60) == {}

    assert [run.id for run in server.runs("p")] == ["theirs"]
    assert losses(server, "theirs") == [0, 1, 2, 3, 4, 5]
    assert set(there(server)) == {1, 4, 5}


# versions and links -----------------------------------------------------------------------------


def test_an_alias_of_somebody_else_stays_with_its_bytes(
    tmp_path: Path, server: WandbServer
) -> None:
    import wandb

    store = opened(tmp_path)
    first = make_checkpoint(tmp_path / "first", 1, b"one")
    store.put(first, [])
    store.alias("last", 1)
    version = wandb.Api().artifact("me/p/digits:step-1")
    version.aliases.append("production")
    version.save()

    again = make_checkpoint(tmp_path / "again", 1, b"other bytes")
    store.put(again, [])

    found = {v.metadata["digest"]: v for v in server.versions("p") if v.state == "COMMITTED"}
    assert set(found) == {first.digest, again.digest}
    assert "production" in found[first.digest].aliases
    assert set(found[again.digest].aliases) >= {"step-1", "last"}
    assert "production" not in found[again.digest].aliases
    store.close("finished")


def test_a_refused_link_holds_up_nothing_else(
    tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    events = Recorder()
    server.refuse("LinkArtifact", "permission denied for registry", times=1000)

    linking = tracker(link_to=f"{REGISTRY}/digits")
    train(callbacks_in(tmp_path / "run", linking, events), 6, {1: 0.9, 3: 0.5})

    assert set(there(server)) == {1, 4, 5}
    assert aliases(server) == {"best": 1, "last": 5}
    assert not events.of(cc.MirrorFailed)
    told = [r.getMessage() for r in caplog.records if "permission denied" in r.getMessage()]
    assert told
    assert f"step 1 could not be linked to {REGISTRY}/digits" in told[-1]


def test_a_link_that_was_refused_is_made_when_something_changes(
    tmp_path: Path, server: WandbServer
) -> None:
    store = opened(tmp_path, link_to=f"{REGISTRY}/digits")
    store.put(make_checkpoint(tmp_path, 1), [])
    server.refuse("LinkArtifact", "the registry is down")
    assert store.alias("best", 1)
    assert not server.linked(REGISTRY, "digits")

    store.show(Overview("digits", "", [Shown(1, 0.0, "best #1", ("best",), {}, 1, "")], []))

    (linked,) = server.linked(REGISTRY, "digits")
    assert "best" in linked.aliases
    store.close("finished")


def test_a_version_that_is_not_ours_is_no_way_to_go_on(tmp_path: Path, server: WandbServer) -> None:
    import wandb

    with wandb.init(project="p", id="x") as run:
        for content in ("one", "two"):
            (tmp_path / "file").write_text(content)
            artifact = wandb.Artifact("theirs", "model")
            artifact.add_file(str(tmp_path / "file"))
            run.log_artifact(artifact).wait()

    with pytest.raises(cc.CheckpointNotFound, match="was not made by ckpt_callbacks"):
        train(callbacks_in(tmp_path / "run", tracker()), 2, resume="wandb:me/p/theirs:latest")


def test_a_step_that_is_being_sent_is_not_forgotten(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    server.begin(Fault("hang", request="CommitArtifact"))
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_callbacks_wandb._online.UPLOAD_SECONDS", 0.3)
        with pytest.raises(TimeoutError):
            store.put(make_checkpoint(tmp_path, 1), [])
        with pytest.raises(TimeoutError, match="step 1 is not confirmed"):
            store.delete(1)
    server.release()

    assert store.delete(1)

    assert {v.state for v in server.versions("p")} == {"DELETED"}
    store.close("finished")


def test_an_upload_that_failed_leaves_nothing_unfinished(
    tmp_path: Path, server: WandbServer
) -> None:
    store = opened(tmp_path)
    server.begin(Fault("403", request="CommitArtifact"))

    with pytest.raises(ValueError, match="403"):
        store.put(make_checkpoint(tmp_path, 1), [])

    assert "PENDING" not in {v.state for v in server.versions("p")}
    store.close("finished")


def test_an_upload_that_fails_when_it_is_not_wanted_any_more_leaves_nothing(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    server.begin(
        Fault("hang", request="CommitArtifact"), Fault("403", request="CommitArtifact", at=2)
    )
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_callbacks_wandb._online.UPLOAD_SECONDS", 0.3)
        with pytest.raises(TimeoutError):
            store.put(make_checkpoint(tmp_path, 1), [])
    server.release()

    assert store.delete(1)

    assert not {v.state for v in server.versions("p")} & {"PENDING", "COMMITTED"}
    store.close("finished")


# what a person took away, and names -------------------------------------------------------------


class Arrivals:
    """Waits until an alias in a store names a step."""

    def __init__(self, alias: str, step: int) -> None:
        self._awaited = (alias, step)
        self._arrived = threading.Event()

    @cc.hookimpl
    def on_promoted(self, event: cc.Promoted) -> None:
        if (event.alias, event.step) == self._awaited:
            self._arrived.set()

    def wait(self) -> None:
        assert self._arrived.wait(30)


def test_what_a_person_removed_from_a_store_is_sent_again(tmp_path: Path) -> None:
    store, arrivals = MemoryStore(), Arrivals("last", 3)
    store.exact = True
    keep = cc.LatestN(1) | cc.BestN(2, "score", mode="max")
    callbacks = callbacks_in(tmp_path, store, arrivals, keep=keep)
    with callbacks.run(new_state()) as run:
        for step, score in enumerate([0.1, 0.9, 0.8, 0.2]):
            run.on_eval(step, {"score": score})
            run.on_step(step, new_state())
        arrivals.wait()
        del store.copies[2]

        run.on_eval(1, {"score": 0.5})  # `best` is to name what is not there
        run.on_eval(4, {"score": 0.3})
        run.on_step(4, new_state())

    assert set(store.copies) == local_steps(tmp_path) == {1, 2, 4}
    assert store.aliases == {"best": 2, "last": 4}


def test_an_alias_has_no_character_that_a_service_refuses(tmp_path: Path) -> None:
    store = MemoryStore()
    keep = (
        cc.LatestN(1)
        | cc.BestN(1, "val/acc", mode="max")
        | cc.BestN(1, "val:loss", mode="min")
        | cc.BestN(1, "a.b c", mode="min")
    )
    with callbacks_in(tmp_path, store, keep=keep).run(new_state()) as run:
        run.on_eval(0, {"val/acc": 0.5, "val:loss": 2.0, "a.b c": 1.0})
        run.on_step(0, new_state())

    assert set(store.aliases) == {"last", "best", "best-val-acc", "best-val-loss", "best-a-b-c"}


# metrics ----------------------------------------------------------------------------------------


def test_no_metric_of_the_user_replaces_the_step_or_the_time(
    tmp_path: Path, server: WandbServer
) -> None:
    store = opened(tmp_path)
    values = {"trainer/step": 10.0, "_timestamp": 8.0, "loss": 1.0}
    store.log_metrics([MetricPoint(5, 105.0, values)])
    store.close("finished")

    (row,) = [row for row in server.run("p", RUN).history if "loss" in row]
    assert (row["trainer/step"], row["_timestamp"], row["loss"]) == (5, 105.0, 1.0)


def test_after_an_error_of_the_client_each_row_is_sent_once(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = opened(tmp_path), 0
    log = store._run.log

    def fail_at_the_second(row: Mapping[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ConnectionResetError("connection lost")
        log(row)

    monkeypatch.setattr(store._run, "log", fail_at_the_second)
    with pytest.raises(ConnectionResetError):
        store.log_metrics(points(0, 1, 2, 3))

    store.log_metrics(points(0, 1, 2, 3))

    store.close("finished")
    assert losses(server) == [0, 1, 2, 3]


def test_rows_do_not_count_as_sent_until_they_are_there(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, stuck = opened(tmp_path), list[Mapping[str, Any]]()
    log = store._run.log
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_callbacks_wandb._rows.LOG_SECONDS", 0.3)
        patch.setattr(store._run, "log", stuck.append)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                store.log_metrics(points(0, 1, 2, 3))
    for row in stuck:
        log(row)

    store.log_metrics(points(0, 1, 2, 3))

    store.close("finished")
    assert losses(server) == [0, 1, 2, 3]


def test_late_rows_do_not_stand_for_those_after_them(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, late = opened(tmp_path), list[Mapping[str, Any]]()
    log = store._run.log
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_callbacks_wandb._rows.LOG_SECONDS", 0.3)
        patch.setattr(store._run, "log", late.append)
        with pytest.raises(TimeoutError):
            store.log_metrics(points(0))

        def only_what_is_late(row: Mapping[str, Any]) -> None:
            log(late[0])

        patch.setattr(store._run, "log", only_what_is_late)
        with pytest.raises(TimeoutError):
            store.log_metrics(points(0, 1))
    store.close("finished")


def test_a_point_without_values_repeats_no_row(tmp_path: Path, server: WandbServer) -> None:
    """After a kill the points come again that are in the log and not noted as sent."""
    store = opened(tmp_path)
    store.log_metrics(points(0, 1, 2, 3))
    store.close("killed")
    store = opened(tmp_path)

    store.log_metrics([MetricPoint(0, 99.0, {})])
    store.log_metrics(points(0, 1, 2, 3))

    store.close("finished")
    assert losses(server) == [0, 1, 2, 3]


# what is left on the disk -----------------------------------------------------------------------


def train_offline(root: Path, **options: Any) -> None:
    train(callbacks_in(root, tracker(mode="offline", **options)), 3, {1: 0.9})


def test_what_was_not_sent_does_not_depend_on_the_working_directory(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    without_a_folder(monkeypatch, tmp_path / "one")
    train_offline(root)
    without_a_folder(monkeypatch, tmp_path / "two")

    assert cc.sync(root, timeout=60) == {}

    (run,) = server.runs("p")
    assert losses(server, run.id) == [0, 1, 2]
    assert set(there(server)) == {1, 2}


def test_what_was_not_sent_moves_with_the_run_directory(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_folder(monkeypatch, tmp_path / "one")
    train_offline(tmp_path / "run")
    root = Path(shutil.move(tmp_path / "run", tmp_path / "moved"))
    without_a_folder(monkeypatch, tmp_path / "two")
    shutil.rmtree(tmp_path / "one")

    assert cc.sync(root, timeout=60) == {}

    (run,) = server.runs("p")
    assert losses(server, run.id) == [0, 1, 2]


def test_a_start_with_another_folder_sends_what_the_first_one_has(
    tmp_path: Path, server: WandbServer
) -> None:
    train_offline(tmp_path / "run", dir=tmp_path / "a")
    train(callbacks_in(tmp_path / "run", tracker(dir=tmp_path / "b")), 5)

    (run,) = server.runs("p")
    assert losses(server, run.id) == [0, 1, 2, 3, 4]


def test_a_folder_that_is_gone_is_told(
    tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    train_offline(tmp_path / "run", dir=tmp_path / "a")
    shutil.rmtree(tmp_path / "a")

    for steps in (5, 6):
        train(callbacks_in(tmp_path / "run", tracker(dir=tmp_path / "b")), steps)

    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len([m for m in told if str(tmp_path / "a") in m and "is gone" in m]) == 1


def test_a_damaged_log_costs_what_is_damaged(
    tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut leaves such ends."""
    store = opened(tmp_path, mode="offline")
    for point in [*points(0, 1, 2), MetricPoint(3, 103.0, {"loss": 1234.5})]:
        store.log_metrics([point])
    store.close("finished")
    (log,) = (tmp_path / "wandb_dir").glob("wandb/offline-*/run-*.wandb")
    content = bytearray(log.read_bytes())
    at = content.index(b"1234.5")
    for place in range(at - 2, at + 6):  # in the last row, and nothing of its frame
        content[place] ^= 0x5A
    log.write_bytes(content)

    store = opened(tmp_path)
    store.log_metrics(points(4))
    store.put(make_checkpoint(tmp_path, 4), [])
    store.close("finished")

    assert losses(server) == [0, 1, 2, 4]
    assert set(there(server)) == {4}
    told = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert len(told) == 1
    assert str(log) in told[0]


HANGING = """
import sys, time
from pathlib import Path
from loops import callbacks_in, train
from ckpt_callbacks_wandb import WandbTracker

train(callbacks_in(Path(sys.argv[1]), WandbTracker("p", artifact="digits"), drain_limit=1), 2)
print(time.time(), flush=True)
"""


def test_a_process_ends_soon_although_the_server_does_not_answer(
    tmp_path: Path, server: WandbServer
) -> None:
    server.begin(Fault("hang", request="UpsertBucket", times=1000))
    command = [sys.executable, "-c", HANGING, str(tmp_path / "run")]

    done = subprocess.run(
        command, cwd=HERE, env=own_service(), stdout=subprocess.PIPE, text=True, check=True
    )

    assert "UpsertBucket" in server.requests
    assert time.time() - float(done.stdout) < 15  # and not W&B's own limit of 30 s
