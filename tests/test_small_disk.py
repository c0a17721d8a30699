"""A directory that holds less than is kept, since trackers have the rest."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.cli.doctor import checks
from ckpt_callbacks.cli.places import step_in
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.record import Record, RunFile
from ckpt_callbacks.report import why
from ckpt_callbacks.situation import Situation
from ckpt_callbacks.stores import Checkpoint, Copy, RunInfo
from ckpt_callbacks.testing import MemoryStore, Recorder
from ckpt_callbacks_mlflow import MLflowTracker
from ckpt_callbacks_wandb import WandbTracker
from folder_store import FolderStore
from loops import callbacks_in, local_steps, new_state, train, weight

SCORES = {1: 0.9, 2: 0.3, 5: 0.5}
ONE = {"keep_here": cc.LatestN(1)}


def test_the_directory_holds_the_newest_and_the_store_all(tmp_path: Path) -> None:
    store, events = MemoryStore(), Recorder()

    train(callbacks_in(tmp_path / "run", store, events, **ONE), 6, SCORES)

    assert local_steps(tmp_path / "run") == {5}
    assert set(store.copies) == {1, 4, 5}
    assert store.aliases == {"best": 1, "last": 5}
    gone = {
        e.step for e in events.of(cc.Evicted) if isinstance(e, cc.Evicted) and e.store == "local"
    }
    assert gone == {0, 1, 2, 3, 4}
    rows = {row.step: row for row in cc.checkpoints(tmp_path / "run")}
    assert rows.keys() == {1, 4, 5}
    assert rows[1].where == ["Memory"]
    assert rows[1].aliases == ["best"]
    assert "best #1" in str(why(tmp_path / "run", 1))


def test_what_is_decided_is_what_is_decided_without_it(tmp_path: Path) -> None:
    scores = dict(enumerate([0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6, 0.5]))
    keep = cc.LatestN(2) | cc.BestN(2, "score", mode="max")
    plain, small = MemoryStore(), MemoryStore()

    train(callbacks_in(tmp_path / "plain", plain, keep=keep), 8, scores)
    train(callbacks_in(tmp_path / "small", small, keep=keep, **ONE), 8, scores)

    assert set(small.copies) == set(plain.copies) == local_steps(tmp_path / "plain")
    assert small.aliases == plain.aliases
    assert local_steps(tmp_path / "small") == {7}


def test_a_store_that_is_down_lets_nothing_go(tmp_path: Path) -> None:
    store = MemoryStore()
    store.down = True

    train(callbacks_in(tmp_path / "run", store, drain_limit=0, **ONE), 6, SCORES)
    assert local_steps(tmp_path / "run") == {1, 4, 5}

    store.down = False
    train(callbacks_in(tmp_path / "run", store, **ONE), 6)
    assert local_steps(tmp_path / "run") == {5}


def test_every_store_that_is_to_have_it_has_it_before(tmp_path: Path) -> None:
    best = MemoryStore("best", keep=cc.BestN(1, "score", mode="max", pending=0))
    other = MemoryStore("other")
    other.down = True

    train(callbacks_in(tmp_path / "run", best, other, drain_limit=1, **ONE), 6, SCORES)

    assert set(best.copies) == {1}
    assert local_steps(tmp_path / "run") == {1, 4, 5}


@pytest.mark.parametrize("several", [False, True])
def test_the_only_copy_stays_in_a_store_that_keeps_less(several: bool, tmp_path: Path) -> None:
    """A tracker that keeps the best only may have the only copy when a better one comes."""
    others = [MemoryStore("also", keep=cc.LatestN(1))] * several
    best = MemoryStore("best", keep=cc.BestN(1, "score", mode="max", pending=0))
    keep = cc.LatestN(3) | cc.BestN(1, "score", mode="max", pending=0)

    def callbacks() -> cc.Callbacks:
        return callbacks_in(tmp_path / "run", best, *others, keep=keep, **ONE)

    train(callbacks(), 3, {1: 0.5})
    assert 1 not in local_steps(tmp_path / "run")
    train(callbacks(), 4, {3: 0.9})

    assert [row.step for row in cc.checkpoints(tmp_path / "run")] == [1, 2, 3]
    held = [step for store in (best, *others) for step in store.copies]
    assert (held.count(1), held.count(0)) == (1, 0)
    assert best.aliases == {"best": 3, "last": 3}
    train(callbacks(), 5)
    assert [row.step for row in cc.checkpoints(tmp_path / "run")] == [2, 3, 4]
    assert set(best.copies) == {3}


def test_a_step_that_is_in_a_store_alone_may_lack_its_evaluation(tmp_path: Path) -> None:
    store = MemoryStore()
    keep = cc.BestN(2, "score", mode="max", pending=3)
    train(callbacks_in(tmp_path / "run", store, keep=keep, **ONE), 3)
    assert local_steps(tmp_path / "run") == {2}

    with callbacks_in(tmp_path / "run", store, keep=keep, **ONE).run(new_state()) as run:
        assert run.unmeasured == [0, 1, 2]


class Linking(MemoryStore):
    """One whose copies are the same bytes."""

    def put(self, checkpoint: Checkpoint, aliases: Any) -> Copy:
        copy = super().put(checkpoint, aliases)
        return Copy(copy.state, copy.ref, shared=True)


def test_a_copy_that_shares_its_bytes_is_not_enough(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", Linking(), **ONE), 6, SCORES)

    assert local_steps(tmp_path / "run") == {1, 4, 5}


@pytest.mark.parametrize("which", [1, "best"])
def test_what_leaves_the_disk_while_it_is_read_is_read_from_the_store(
    which: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, lend = MemoryStore(), RunDirectory.lend
    train(callbacks_in(tmp_path / "run", store), 6, SCORES)
    assert local_steps(tmp_path / "run") == {1, 4, 5}

    def leaving(directory: RunDirectory, record: Record, *rest: Any, **options: Any) -> Any:
        monkeypatch.setattr(RunDirectory, "lend", lend)
        train(callbacks_in(tmp_path / "run", store, **ONE), 6)
        assert local_steps(tmp_path / "run") == {5}
        return lend(directory, record, *rest, **options)

    monkeypatch.setattr(RunDirectory, "lend", leaving)

    found = cc.restore(tmp_path / "run", like=new_state(), which=which, stores=[store])

    assert float(found["model"]["w"][0, 0]) == 2.0


def test_what_is_pinned_stays(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, **ONE), 3)
    cc.pin(tmp_path / "run", 2)

    train(callbacks_in(tmp_path / "run", store, **ONE), 6)

    assert local_steps(tmp_path / "run") == {2, 5}


def test_what_is_promoted_stays(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, **ONE), 3)
    cc.promote(tmp_path / "run", 2, "production")

    train(callbacks_in(tmp_path / "run", store, **ONE), 6)

    assert local_steps(tmp_path / "run") == {2, 5}


def test_what_was_let_go_is_restored_from_the_store(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    train(callbacks_in(tmp_path / "run", store, **ONE), 6, SCORES)
    assert local_steps(tmp_path / "run") == {5}

    def restored(which: int | str) -> float:
        state = cc.restore(tmp_path / "run", like=new_state(), which=which, stores=[store])
        return float(state["model"]["w"][0, 0])

    assert restored("best") == restored(1) == 2.0
    assert restored("last") == 6.0
    with pytest.raises(cc.CheckpointNotFound, match=r"step 1 is not in .* and no store gives it"):
        cc.restore(tmp_path / "run", like=new_state(), which="best", stores=[])


def test_a_run_goes_back_to_what_was_let_go(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    train(callbacks_in(tmp_path / "run", store, **ONE), 6, SCORES)

    with pytest.raises(cc.UsageError, match=r"newer checkpoints \(steps 4, 5\)"):
        train(callbacks_in(tmp_path / "run", store, **ONE), 6, resume="best")
    state = train(
        callbacks_in(tmp_path / "run", store, **ONE), 4, resume="best", discard_newer=True
    )

    assert float(state["model"]["w"][0, 0]) == 4.0
    assert local_steps(tmp_path / "run") == {3}
    listing = store.listing()
    assert listing
    assert set(listing.copies) == {1, 2, 3}


def test_what_left_and_is_removed_later_is_remembered_as_evicted(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, **ONE), 3, {1: 0.5})
    assert local_steps(tmp_path / "run") == {2}

    train(callbacks_in(tmp_path / "run", store, **ONE), 6, {4: 0.7})

    assert set(store.copies) == {4, 5}
    found = why(tmp_path / "run", 1)
    assert (found.state, found.metrics["score"]) == ("evicted", 0.5)
    assert "score 0.5 is best #2 of" in found.reason
    gone = [one.step for one in RunDirectory(tmp_path / "run").read_evicted()]
    assert sorted(gone) == [0, 1, 2, 3]


class Anew(MemoryStore):
    """One whose run somebody has deleted, with all that it held."""

    def open(self, run: RunInfo) -> Mapping[str, str]:
        return {**super().open(run), "begun": "anew"}


def test_what_a_tracker_alone_had_and_lost_is_remembered_as_evicted(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", MemoryStore(), **ONE), 3, {1: 0.5})
    assert local_steps(tmp_path / "run") == {2}

    train(callbacks_in(tmp_path / "run", Anew(), **ONE), 4)

    found = why(tmp_path / "run", 1)
    assert (found.state, found.reason) == ("evicted", "memory has it no longer")


def test_a_better_one_replaces_it_in_the_store(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, **ONE), 4, {1: 0.5})

    train(callbacks_in(tmp_path / "run", store, **ONE), 8, {5: 0.7})

    assert set(store.copies) == {5, 6, 7}
    assert store.aliases == {"best": 5, "last": 7}
    assert local_steps(tmp_path / "run") == {7}
    assert RunDirectory(tmp_path / "run").read_records().keys() == {5, 6, 7}


KEEP = cc.LatestN(1) | cc.BestN(2, "score", mode="max", pending=0)


def best_ones_away(folder: Path) -> FolderStore:
    """Return what alone has steps 1 and 2; step 5 is here, damaged and unsent."""
    store = FolderStore(folder / "store")
    train(callbacks_in(folder / "run", store, keep=KEEP, **ONE), 4, {1: 0.8, 2: 0.9})
    train(callbacks_in(folder / "run", keep=KEEP, **ONE), 6)
    assert local_steps(folder / "run") == {5}
    flip(folder / "run" / "5")
    return store


def flip(path: Path) -> None:
    file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_where_the_only_one_here_is_damaged_the_newest_in_the_store_is_gone_on_from(
    tmp_path: Path,
) -> None:
    store = best_ones_away(tmp_path)

    with callbacks_in(tmp_path / "run", store, keep=KEEP, **ONE).run(new_state()) as run:
        assert run.next_step == 3
        assert float(run.state["model"]["w"][0, 0]) == 3.0


def test_a_store_that_does_not_give_one_back_gives_an_older_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = best_ones_away(tmp_path)
    flip(tmp_path / "store" / "steps" / "2")

    state = train(callbacks_in(tmp_path / "run", store, keep=KEEP, **ONE), 8)

    assert float(state["model"]["w"][0, 0]) == 8.0
    assert "step 2 is not in" in caplog.text
    assert "The run goes on from step 1" in caplog.text
    assert local_steps(tmp_path / "run") == {7}


def test_a_run_whose_checkpoints_no_store_gives_back_does_not_start_over(tmp_path: Path) -> None:
    store = best_ones_away(tmp_path)
    (tmp_path / "store" / "steps").rename(tmp_path / "out-of-reach")

    with pytest.raises(cc.CheckpointNotFound, match=r"step 2 is not in .* and no store gives it"):
        train(callbacks_in(tmp_path / "run", store, keep=KEEP, **ONE), 8)
    (tmp_path / "out-of-reach").rename(tmp_path / "store" / "steps")

    train(callbacks_in(tmp_path / "run", store, keep=KEEP, **ONE), 8)
    assert local_steps(tmp_path / "run") == {7}


def test_what_somebody_removed_here_comes_back_from_the_store(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    train(callbacks_in(tmp_path / "run", store, **ONE), 6, SCORES)
    shutil.rmtree(tmp_path / "run" / "5")

    with callbacks_in(tmp_path / "run", store, **ONE).run(new_state()) as run:
        assert run.next_step == 6
        assert RunDirectory(tmp_path / "run").open_run().rewound is None


def test_the_newest_here_stays_where_a_newer_one_is_in_a_store_alone() -> None:
    copies = {"memory": Copy("confirmed", "memory/9")}
    records = {
        3: Record(3, "complete", "me", 0.0),
        9: Record(9, "complete", "me", 0.0, copies=copies, lost=True),
    }
    keep = cc.LatestN(1)

    situation = Situation(records, RunFile("me", []), keep, {"memory": None}, keep)

    assert situation.decision.kept.keys() == {9}
    assert situation.evictable([]) == []


@pytest.mark.parametrize("payload", [None, cc.Safetensors()])
@pytest.mark.parametrize("kind", [MLflowTracker, WandbTracker])
def test_references_to_what_leaves_are_refused(kind: Any, payload: Any, tmp_path: Path) -> None:
    callbacks = callbacks_in(tmp_path / "run", kind(send="reference", payload=payload), **ONE)

    with pytest.raises(cc.ConfigError, match=r"references to the files .* leave it: leave"):
        train(callbacks, 1)
    assert not (tmp_path / "run").exists()


def test_what_was_let_go_is_no_damage(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", MemoryStore(), **ONE), 6, SCORES)

    assert cc.verify(tmp_path / "run") == []
    found = {c.text: c.status for c in checks(tmp_path / "run") if c.what == "directory"}
    assert found.pop("2 checkpoints only in a tracker") == "ok"
    assert set(found.values()) == {"ok"}


def test_what_was_let_go_is_pinned_and_promoted(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, **ONE), 6, SCORES)

    assert cc.find(tmp_path / "run", "best").where == ["Memory"]
    assert cc.pin(tmp_path / "run", step_in(tmp_path / "run", "best"), stores=[store])
    assert cc.promote(tmp_path / "run", 4, "production", stores=[store])
    with pytest.raises(cc.CheckpointNotFound, match="no step 3 to pin; it has 1, 4, 5"):
        cc.pin(tmp_path / "run", 3, stores=[store])
    assert store.aliases == {"best": 1, "last": 5, "production": 4}

    train(callbacks_in(tmp_path / "run", store, **ONE), 9, {7: 0.95})
    assert set(store.copies) == {1, 4, 7, 8}
    assert store.aliases == {"best": 7, "last": 8, "production": 4}


def test_prune_removes_what_is_in_the_store_alone(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, **ONE), 6, SCORES)

    plan = cc.prune(tmp_path / "run", cc.LatestN(1), stores=[store])

    assert [(gone.step, gone.bytes, gone.where) for gone in plan.goes] == [
        (1, 0, ["memory"]),
        (4, 0, ["memory"]),
    ]
    assert set(store.copies) == {5}
    assert [row.step for row in cc.checkpoints(tmp_path / "run")] == [5]
    assert local_steps(tmp_path / "run") == {5}


def test_prune_leaves_the_newest_here(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, keep=cc.LatestN(3)), 4)
    shutil.rmtree(tmp_path / "run" / "3")
    cc.sync(tmp_path / "run", stores=[store])

    plan = cc.prune(tmp_path / "run", cc.LatestN(1), stores=[store])

    assert plan.kept == {3: "latest #1", 2: "newest in the directory"}
    assert local_steps(tmp_path / "run") == {2}
    assert set(store.copies) == {2, 3}


def test_without_it_all_that_is_kept_is_here(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", MemoryStore()), 6, SCORES)

    assert local_steps(tmp_path / "run") == {1, 4, 5}
    assert weight(tmp_path / "run", "best") == 2.0


def test_a_policy_that_says_nothing_of_keeping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cc.ConfigError, match="OrbaxCheckpoint: keep_here: "):
        callbacks_in(tmp_path / "run", keep_here=np.zeros(1))
