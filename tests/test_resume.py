"""From which checkpoint a run goes on, and what becomes of the others."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.testing import MemoryStore, Recorder
from loops import callbacks_in, local_steps, new_state, train, weight


def resumed(recorder: Recorder) -> int | None:
    (event,) = recorder.of(cc.RunStarted)
    assert isinstance(event, cc.RunStarted)
    return event.resumed_from


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file that is read-only."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def data_file(step_folder: Path) -> Path:
    """Return the largest file of a checkpoint."""
    return max((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_an_older_step_than_the_newest_is_an_error_that_names_the_choices(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 5, {1: 0.9})

    for resume in (3, "best", None):
        with (
            pytest.raises(cc.UsageError, match="newer checkpoints") as error,
            callbacks_in(tmp_path / "run").run(new_state(), resume=resume),  # type: ignore[arg-type]
        ):
            pass
        for choice in ("resume='last'", "discard_newer=True", "choose a new directory"):
            assert choice in str(error.value)
    assert local_steps(tmp_path / "run") == {1, 3, 4}


def test_going_back_discards_the_newer_ones_everywhere(tmp_path: Path) -> None:
    store, recorder = MemoryStore(), Recorder()
    train(callbacks_in(tmp_path / "run", store), 6, {2: 0.9})
    assert store.aliases == {"best": 2, "last": 5}

    state = train(callbacks_in(tmp_path / "run", store, recorder), 4, resume=2, discard_newer=True)

    assert resumed(recorder) == 2
    assert float(state["model"]["w"][0, 0]) == 4.0
    assert local_steps(tmp_path / "run") == {2, 3}
    assert set(store.copies) == {2, 3}
    assert store.aliases == {"best": 2, "last": 3}
    reasons = {e.reason for e in recorder.events if isinstance(e, cc.Evicted) and e.step > 3}
    assert reasons == {"discarded: the run went back to step 2"}
    # The steps are taken anew, so their metrics are too.
    assert [p.step for p in store.points if "loss" in p.values] == [0, 1, 2, 3, 4, 5, 3]


def test_a_step_that_was_discarded_can_be_saved_again(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store), 4, {1: 0.9})

    def other_way(step: int, run: cc.Run[Any]) -> None:
        run.save(step, new_state(-1.0))

    train(callbacks_in(tmp_path / "run", store), 4, before=other_way, resume=1, discard_newer=True)

    assert weight(tmp_path / "run", 3) == -1.0
    assert set(store.copies) == local_steps(tmp_path / "run") == {1, 2, 3}


def test_starting_over_needs_to_be_asked_for(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 3)
    recorder = Recorder()

    train(callbacks_in(tmp_path / "run", recorder), 1, resume=None, discard_newer=True)

    assert resumed(recorder) is None
    assert local_steps(tmp_path / "run") == {0}


@pytest.mark.parametrize("resume", [-1, True, "newest", 1.5])
def test_a_resume_that_is_none_is_refused(tmp_path: Path, resume: Any) -> None:
    with pytest.raises(cc.ConfigError, match="resume must be 'last', 'best', a step, None, or"):
        callbacks_in(tmp_path / "run").run(new_state(), resume=resume)


def test_a_step_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for steps in ("holds no checkpoint", "it has steps 0, 1"):
        with (
            pytest.raises(cc.CheckpointNotFound, match=steps),
            callbacks_in(tmp_path / "run").run(new_state(), resume=7),
        ):
            pass
        train(callbacks_in(tmp_path / "run"), 2)


def test_a_damaged_newest_checkpoint_is_left_out_and_the_run_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, recorder = tmp_path / "run", Recorder()
    train(callbacks_in(root), 4)
    name = data_file(root / "3")
    damage(name)

    state = train(callbacks_in(root, recorder), 5)

    assert resumed(recorder) == 2
    assert float(state["model"]["w"][0, 0]) == 5.0
    assert f"{name} is damaged" in caplog.text
    assert "the run goes on from step 2" in caplog.text
    (kept,) = (root / ".ckpt_callbacks" / "damaged").iterdir()
    assert kept.name.startswith("3-")
    assert local_steps(root) == {3, 4}
    assert weight(root, 3) == 4.0


def test_a_named_step_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 4)
    name = data_file(tmp_path / "run" / "3")
    damage(name)

    with (
        pytest.raises(cc.CorruptCheckpoint, match=str(name)),
        callbacks_in(tmp_path / "run").run(new_state(), resume=3),
    ):
        pass


def test_a_damaged_checkpoint_is_repaired_from_a_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, store, recorder = tmp_path / "run", MemoryStore(), Recorder()
    train(callbacks_in(root, store), 4)
    damage(data_file(root / "3"))

    assert weight_from(root, store) == 4.0
    assert cc.verify(root)  # reading changes nothing
    train(callbacks_in(root, store, recorder), 4)

    assert resumed(recorder) == 3
    assert "It is repaired from another copy" in caplog.text
    assert not cc.verify(root)
    assert weight(root) == 4.0


def weight_from(root: Path, store: MemoryStore) -> float:
    return float(cc.restore(root, like=new_state(), stores=[store])["model"]["w"][0, 0])


def test_a_copy_that_shares_its_bytes_or_is_damaged_repairs_nothing(tmp_path: Path) -> None:
    root, store = tmp_path / "run", MemoryStore()
    train(callbacks_in(root, store), 4)
    name = data_file(root / "3")
    damage(name)
    relative = name.relative_to(root / "3").as_posix()
    store.copies[3][relative] = name.read_bytes()

    with pytest.raises(cc.CorruptCheckpoint, match=str(name)):
        weight_from(root, store)


def test_verify_names_every_damaged_file_and_record(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 4)
    assert cc.verify(root) == []

    damage(data_file(root / "2"))
    next((root / "3").rglob("_METADATA")).unlink()
    records = RunDirectory(root).records
    (records / "9.json").write_text("{}")

    found = cc.verify(root)

    assert [p.step for p in found] == [None, 2, 3]
    assert str(records / "9.json") in found[0].text
    assert str(data_file(root / "2")) in found[1].text
    assert "No such file" in found[2].text


def test_a_damaged_record_is_moved_away_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, store = tmp_path / "run", MemoryStore()
    train(callbacks_in(root, store), 4)
    path = RunDirectory(root).records / "3.json"
    path.write_text(path.read_text().replace("complete", "comqlete"))
    with pytest.raises(cc.RecordError, match=str(path)):
        cc.checkpoints(root)

    train(callbacks_in(root, store), 4)

    assert f"{path} is damaged" in caplog.text
    assert cc.find(root).step == 3
    assert weight(root) == 4.0
    assert set(store.copies) == local_steps(root) == {2, 3}


def test_a_record_of_a_newer_version_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 4)
    records = RunDirectory(root).records
    (records / "2.json").write_text('{"format": 99}')
    (records / "3.json").write_text("damaged")

    with (
        pytest.raises(cc.NewerFormat, match="install the version that wrote it"),
        callbacks_in(root).run(new_state()),
    ):
        pass

    assert (records / "3.json").read_text() == "damaged"


def test_a_changed_policy_is_shown_and_waits_until_its_first_decision_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    down = False

    def before(call: str) -> None:
        if down and call == "put":
            raise ConnectionError("down")

    store = MemoryStore(before=before)
    train(callbacks_in(root, store), 6, {1: 0.9, 2: 0.5})
    assert local_steps(root) == set(store.copies) == {1, 4, 5}

    # A misspelled metric: nothing is lost by looking, nor by one save that no store has.
    wrong = cc.LatestN(1) | cc.BestN(1, "scroe", mode="max", pending=0)
    caplog.clear()
    train(callbacks_in(root, store, keep=wrong), 6)
    assert "Once a newer checkpoint is complete everywhere, these go: step 1 (" in caplog.text
    assert local_steps(root) == set(store.copies) == {1, 4, 5}
    assert "until LatestN(1)" in cc.find(root, 1).reason
    down = True
    train(callbacks_in(root, store, keep=wrong), 7)
    assert local_steps(root) == {1, 5, 6}  # the old policy goes on
    assert set(store.copies) == {1, 5}

    down = False
    train(callbacks_in(root, store, keep=wrong), 7)
    assert local_steps(root) == {6}
    assert set(store.copies) == {1, 6}  # `best` has no candidate, and what it names stays
    caplog.clear()
    train(callbacks_in(root, store, keep=wrong), 7)
    assert "these go" not in caplog.text


def test_steps_without_their_metric_are_listed_to_be_measured(tmp_path: Path) -> None:
    with callbacks_in(tmp_path / "run").run(new_state()) as run:
        run.on_eval(0, {"score": 0.5})
        run.on_step(0, new_state(1.0))
        run.on_step(1, new_state(2.0))
        run.wait()

    with callbacks_in(tmp_path / "run").run(new_state()) as run:
        assert run.unmeasured == [1]
        run.on_eval(1, {"score": 0.9})
        assert run.unmeasured == []
    assert cc.find(tmp_path / "run", "best").step == 1


def test_a_removed_directory_of_the_newest_step_is_no_reason_to_fail(tmp_path: Path) -> None:
    recorder = Recorder()
    train(callbacks_in(tmp_path / "run"), 4)
    shutil.rmtree(tmp_path / "run" / "3")

    train(callbacks_in(tmp_path / "run", recorder), 5)

    assert resumed(recorder) == 2


@pytest.fixture(autouse=True)
def _all_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ckpt_callbacks")
