"""A run that goes on wherever it is: with nothing on the disk, or with what is behind."""

import functools
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
import loops
from ckpt_callbacks.arrival import arriving
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks_mlflow import MLflowTracker
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import Fault, WandbServer
from embedded import client, models, tracker
from folder_store import FolderStore
from loops import local_steps

RUN = "digits-42"
SCORES = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2}
BEST = cc.BestN(1, "score", mode="max", pending=0)

callbacks_in = functools.partial(loops.callbacks_in, drain_limit=60)
train = functools.partial(loops.train, resume="anywhere", run_id=RUN)


def weight(state: dict[str, Any]) -> float:
    return float(state["model"]["w"][0, 0])


def both(folder: Path, **options: Any) -> cc.Callbacks:
    return callbacks_in(folder / "run", tracker(folder), WandbTracker("p"), **options)


def wipe(folder: Path) -> None:
    shutil.rmtree(folder / "run")


def mlflow_losses(folder: Path) -> list[int]:
    (run,) = client(folder).search_runs(["1"])
    return [m.step for m in client(folder).get_metric_history(run.info.run_id, "loss")]


def wandb_losses(server: WandbServer) -> list[float]:
    (run,) = server.runs("p")
    return [row["loss"] for row in run.history if "loss" in row]


def damage(path: Path) -> None:
    """Flip a byte of the largest file, of which a copy may be a hard link."""
    file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)


# Which run it is


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": "anywhere"}, "resume='anywhere' needs run_id=, a name by which an empty"),
        ({"run_id": "a/b"}, "run_id must be up to 64 letters, .* not 'a/b'"),
        ({"run_id": ""}, "run_id must be up to 64 letters"),
        ({"run_id": 7}, "run_id must be up to 64 letters"),
        ({"run_id": "a", "resume": "mlflow:/a@last"}, "says which run it is: leave out run_id"),
    ],
)
def test_a_name_that_can_not_work_is_told_at_once(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(cc.ConfigError, match=message):
        loops.train(callbacks_in(tmp_path / "run"), 1, **options)
    assert not (tmp_path / "run").exists()


def test_without_a_directory_there_is_nothing_to_go_on_in() -> None:
    with pytest.raises(cc.ConfigError, match="resume='anywhere' needs an OrbaxCheckpoint"):
        train(cc.Callbacks(), 1)


def test_a_run_that_is_nowhere_begins_and_has_its_name_everywhere(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    train(both(tmp_path), 2)

    run = RunDirectory(tmp_path / "run").read_run()
    assert run
    assert run.run_id == RUN
    assert {m.tags["ckpt_callbacks_run"] for m in models(tmp_path).values()} == {RUN}
    assert wandb_server.run("p", RUN).state == "finished"
    assert {v.collection for v in wandb_server.versions("p")} == {f"model-{RUN}"}


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 2)

    with pytest.raises(cc.ConfigError, match=f"holds the run {RUN}, not other: give it another"):
        loops.train(callbacks_in(tmp_path / "run"), 4, run_id="other")


def test_checkpoints_of_somebody_else_are_refused(tmp_path: Path) -> None:
    loops.train(callbacks_in(tmp_path / "run"), 2)
    shutil.rmtree(tmp_path / "run" / ".ckpt_callbacks")

    with pytest.raises(cc.ConfigError, match="were not saved by ckpt_callbacks"):
        train(callbacks_in(tmp_path / "run"), 4)


# On an empty disk


def test_on_an_empty_disk_it_goes_on_in_the_same_runs(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps that were logged after the last checkpoint are taken again, and logged once."""
    train(both(tmp_path, every=2), 6, SCORES)
    wipe(tmp_path)

    state = train(both(tmp_path, every=2), 9)

    assert weight(state) == 9.0
    assert "run digits-42 goes on there after step 4, which was fetched from MLflow" in caplog.text
    assert mlflow_losses(tmp_path) == list(range(9))
    assert wandb_losses(wandb_server) == list(range(9))
    # The best of the lost disk is still the best in both.
    assert models(tmp_path).keys() == {0, 6, 8}
    kept = {v.metadata["step"] for v in wandb_server.versions("p") if v.state == "COMMITTED"}
    assert kept == {0, 6, 8}
    assert cc.verify(tmp_path / "run") == []


@pytest.mark.parametrize("newest", ["mlflow", "wandb"])
def test_the_tracker_with_the_newest_one_gives_it(
    newest: str, tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    def callbacks() -> cc.Callbacks:
        less = {"mlflow": None, "wandb": None} | {"wandb" if newest == "mlflow" else "mlflow": BEST}
        mirrors = tracker(tmp_path, keep=less["mlflow"]), WandbTracker("p", keep=less["wandb"])
        return callbacks_in(tmp_path / "run", *mirrors)

    train(callbacks(), 4, SCORES)
    wipe(tmp_path)

    assert weight(train(callbacks(), 6)) == 6.0

    title = {"mlflow": "MLflow", "wandb": "W&B"}[newest]
    assert f"after step 3, which was fetched from {title}" in caplog.text


def test_a_flipped_byte_in_one_tracker_leaves_the_copy_of_the_other(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    train(both(tmp_path), 4)
    wipe(tmp_path)
    damage(Path(models(tmp_path)[3].artifact_location, "checkpoint"))

    state = train(both(tmp_path), 6)

    assert weight(state) == 6.0
    assert "step 3 of MLflow: " in caplog.text
    assert "is damaged: its digest is" in caplog.text
    assert "after step 3, which was fetched from W&B" in caplog.text


def test_what_arrives_damaged_from_wandb_is_taken_from_mlflow(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    def callbacks() -> cc.Callbacks:
        return callbacks_in(tmp_path / "run", WandbTracker("p"), tracker(tmp_path))

    train(callbacks(), 4)
    wipe(tmp_path)
    wandb_server.begin(Fault("digest", request="GET file", times=1000))

    state = train(callbacks(), 6)

    assert weight(state) == 6.0
    assert "step 3 of W&B: " in caplog.text
    assert "after step 3, which was fetched from MLflow" in caplog.text


def test_where_every_copy_is_damaged_an_older_step_is_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = callbacks_in(tmp_path / "run", tracker(tmp_path))
    train(callbacks, 4)
    wipe(tmp_path)
    damage(Path(models(tmp_path)[3].artifact_location, "checkpoint"))

    state = train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 6)

    assert weight(state) == 6.0
    assert "goes on there after step 2" in caplog.text
    assert mlflow_losses(tmp_path) == list(range(6))
    assert models(tmp_path).keys() == {4, 5}


def test_a_run_of_which_nothing_can_be_read_does_not_begin_anew(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 1)
    wipe(tmp_path)
    damage(Path(models(tmp_path)[0].artifact_location, "checkpoint"))

    with pytest.raises(cc.CheckpointNotFound, match="no copy of its checkpoints can be read"):
        train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 6)
    assert not (tmp_path / "run" / ".ckpt_callbacks" / "run.json").exists()


@pytest.mark.parametrize("behind", [False, True])
def test_a_newest_one_that_does_not_arrive_is_waited_for_and_not_left_behind(
    behind: bool, tmp_path: Path
) -> None:
    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 2)
    if behind:
        shutil.copytree(tmp_path / "run", tmp_path / "old")
    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 4)
    wipe(tmp_path)
    if behind:
        (tmp_path / "old").rename(tmp_path / "run")
    files = Path(models(tmp_path)[3].artifact_location, "checkpoint")
    files.rename(tmp_path / "away")

    other = "resume='last' goes on from step 1" if behind else "without it, delete it there"
    with pytest.raises(cc.CheckpointNotFound, match=rf"(?s)step 3 of MLflow.*Start again.*{other}"):
        train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 6)
    assert models(tmp_path).keys() == {2, 3}

    (tmp_path / "away").rename(files)
    with callbacks_in(tmp_path / "run", tracker(tmp_path)).run(
        loops.new_state(), resume="anywhere", run_id=RUN
    ) as run:
        assert run.next_step == 4


def test_what_does_not_arrive_from_one_tracker_is_taken_from_the_other(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    train(both(tmp_path), 4)
    wipe(tmp_path)
    shutil.rmtree(Path(models(tmp_path)[3].artifact_location, "checkpoint"))

    with both(tmp_path).run(loops.new_state(), resume="anywhere", run_id=RUN) as run:
        assert run.next_step == 4


@pytest.mark.parametrize("send", ["weights", "reference"])
def test_a_part_of_a_checkpoint_is_none_to_go_on_from(
    send: Any, tmp_path: Path, wandb_server: WandbServer
) -> None:
    mirrors = tracker(tmp_path, send=send), WandbTracker("p", send=send)
    train(callbacks_in(tmp_path / "run", *mirrors), 2)
    for store in mirrors:
        store.entered(["model", "moments"])
        assert store.find(RUN) == {}


# A tracker that is down


def absent() -> MLflowTracker:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return MLflowTracker("digits", tracking_uri=f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.usefixtures("impatient")
def test_a_tracker_that_is_down_is_told_of_and_passed_over(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    train(callbacks_in(tmp_path / "run", WandbTracker("p")), 4)
    wipe(tmp_path)

    down = callbacks_in(tmp_path / "run", absent(), WandbTracker("p"), drain_limit=20)
    with down.run(loops.new_state(), resume="anywhere", run_id=RUN) as run:
        assert run.next_step == 4
        assert weight(run.state) == 4.0

    assert "MLflow could not be asked for run digits-42: " in caplog.text
    assert "If it has a checkpoint after step 3, the run goes on without that one" in caplog.text


@pytest.mark.usefixtures("impatient")
def test_where_nothing_answers_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    with pytest.raises(cc.CheckpointNotFound, match="whether a tracker does is not known"):
        train(callbacks_in(tmp_path / "run", absent()), 2)
    assert not (tmp_path / "run" / ".ckpt_callbacks" / "run.json").exists()

    train(callbacks_in(tmp_path / "run", absent(), drain_limit=0), 2, resume="last")


@pytest.mark.usefixtures("impatient")
def test_the_directory_is_enough_where_nothing_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(callbacks_in(tmp_path / "run"), 2)

    state = train(callbacks_in(tmp_path / "run", absent(), drain_limit=0), 4)

    assert weight(state) == 4.0
    assert "If it has a checkpoint after step 1" in caplog.text


# A directory that is there


def test_the_directorys_own_checkpoint_wins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 2)
    train(callbacks_in(tmp_path / "run"), 4)
    caplog.clear()

    state = train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 6)

    assert weight(state) == 6.0
    assert "fetched" not in caplog.text
    assert mlflow_losses(tmp_path) == list(range(6))


def test_a_directory_that_is_behind_catches_up(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    train(both(tmp_path), 3, SCORES)
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    train(both(tmp_path), 6)
    wipe(tmp_path)
    (tmp_path / "old").rename(tmp_path / "run")

    state = train(both(tmp_path), 8)

    assert weight(state) == 8.0
    assert "is behind: run digits-42 goes on there after step 5" in caplog.text
    assert local_steps(tmp_path / "run") == {1, 6, 7}
    assert models(tmp_path).keys() == {1, 6, 7}
    assert mlflow_losses(tmp_path) == list(range(8))
    assert wandb_losses(wandb_server) == list(range(8))
    assert cc.verify(tmp_path / "run") == []


def test_a_directory_that_is_behind_stays_as_it_is_until_the_newer_one_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 2)
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 4)
    wipe(tmp_path)
    (tmp_path / "old").rename(tmp_path / "run")
    for step in (2, 3):
        damage(Path(models(tmp_path)[step].artifact_location, "checkpoint"))

    state = train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 5)

    assert weight(state) == 5.0
    assert "newer checkpoints could not be read: the run goes on from step 1" in caplog.text


def test_what_was_discarded_here_is_not_brought_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tracker that is to delete it may have it still."""
    keep = cc.LatestN(3)
    train(callbacks_in(tmp_path / "run", tracker(tmp_path), keep=keep), 4)
    with callbacks_in(tmp_path / "run", keep=keep).run(
        loops.new_state(), run_id=RUN, resume=1, discard_newer=True
    ) as run:
        assert run.next_step == 2

    with callbacks_in(tmp_path / "run", tracker(tmp_path), keep=keep).run(
        loops.new_state(), run_id=RUN, resume="anywhere"
    ) as run:
        assert run.next_step == 2

    assert "fetched" not in caplog.text
    assert models(tmp_path).keys() == {1}


@pytest.mark.parametrize("until", [4, 7], ids=["still there", "evicted"])
@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_what_the_run_saved_elsewhere_is_not_replaced_by_what_it_left_behind_here(
    kind: str, until: int, tmp_path: Path, wandb_server: WandbServer
) -> None:
    """This machine took step 2 before its tracker got it, and another one took it again."""

    def callbacks() -> cc.Callbacks:
        store = tracker(tmp_path) if kind == "mlflow" else WandbTracker("p")
        return callbacks_in(tmp_path / "run", store)

    train(callbacks(), 2)
    left = {2: 0.3, 3: 0.4} if until == 7 else {2: 0.3}
    train(callbacks_in(tmp_path / "run"), until, left)
    assert (2 in local_steps(tmp_path / "run")) == (until == 4)
    (tmp_path / "run").rename(tmp_path / "left behind")
    train(callbacks(), 9, {2: 0.9})
    elsewhere = RunDirectory(tmp_path / "run").read_record(2)
    assert elsewhere
    digest = tree_digest(elsewhere.files)
    wipe(tmp_path)
    (tmp_path / "left behind").rename(tmp_path / "run")

    train(callbacks(), 11)

    back = RunDirectory(tmp_path / "run").read_record(2)
    assert back
    assert (back.metrics["score"], back.lost) == (0.9, True)
    if kind == "mlflow":
        assert models(tmp_path).keys() == {2, 9, 10}
        assert models(tmp_path)[2].params["digest"] == digest
    else:
        kept = {v.metadata["step"]: v for v in wandb_server.versions("p") if v.state == "COMMITTED"}
        assert kept.keys() == {2, 9, 10}
        assert kept[2].metadata["digest"] == digest
    assert cc.verify(tmp_path / "run") == []


# What is in a tracker alone


def test_the_best_is_the_same_one_for_all_who_ask(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    root, callbacks = tmp_path / "run", functools.partial(callbacks_in, tmp_path / "run")
    train(callbacks(WandbTracker("p")), 4, SCORES)
    wipe(tmp_path)
    train(callbacks(WandbTracker("p")), 6, {4: 0.3})
    assert local_steps(root) == {4, 5}

    assert cc.find(root, "best").step == 1
    there = {alias: v.metadata["step"] for v in wandb_server.versions("p") for alias in v.aliases}
    assert there["best"] == 1
    for asks in (
        lambda: cc.restore(root, which="best"),
        lambda: loops.train(
            callbacks(WandbTracker("p")), 8, resume="best", discard_newer=True, run_id=RUN
        ),
    ):
        with pytest.raises(cc.CheckpointNotFound, match="step 1 was saved on another machine"):
            asks()
    assert local_steps(root) == {4, 5}


def test_the_best_whose_folder_was_removed_is_gone_on_from(tmp_path: Path) -> None:
    root, store = tmp_path / "run", FolderStore(tmp_path / "store")
    loops.train(callbacks_in(root, store, keep=cc.LatestN(3) | BEST), 6, {1: 0.9, 4: 0.5})
    shutil.rmtree(root / "1")
    shutil.rmtree(root / "3")

    with callbacks_in(root, store).run(loops.new_state(), resume="best", discard_newer=True) as run:
        assert run.next_step == 2

    assert local_steps(root) == {1}
    listing = store.listing()
    assert listing
    assert set(listing.copies) == {1}


# How far a download is


def test_without_a_terminal_there_are_lines_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "ckpt_callbacks"), arriving("step 3", 2048, tmp_path):
        pass

    first, last = (r.getMessage() for r in caplog.records)
    assert first == "step 3: 2.0 KiB are fetched"
    assert last.startswith("step 3: fetched in ")
    assert capsys.readouterr().err == ""
