"""A directory that holds less than is kept, since trackers have the rest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.report import why
from ckpt_callbacks.stores import Checkpoint, Copy
from ckpt_callbacks.testing import MemoryStore, Recorder
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


class Linking(MemoryStore):
    """One whose copies are the same bytes."""

    def put(self, checkpoint: Checkpoint, aliases: Any) -> Copy:
        copy = super().put(checkpoint, aliases)
        return Copy(copy.state, copy.ref, shared=True)


def test_a_copy_that_shares_its_bytes_is_not_enough(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", Linking(), **ONE), 6, SCORES)

    assert local_steps(tmp_path / "run") == {1, 4, 5}


def test_what_is_pinned_stays(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, **ONE), 3)
    cc.pin(tmp_path / "run", 2)

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


def test_a_better_one_replaces_it_in_the_store(tmp_path: Path) -> None:
    store = MemoryStore()
    train(callbacks_in(tmp_path / "run", store, **ONE), 4, {1: 0.5})

    train(callbacks_in(tmp_path / "run", store, **ONE), 8, {5: 0.7})

    assert set(store.copies) == {5, 6, 7}
    assert store.aliases == {"best": 5, "last": 7}
    assert local_steps(tmp_path / "run") == {7}
    assert RunDirectory(tmp_path / "run").read_records().keys() == {5, 6, 7}


def test_without_it_all_that_is_kept_is_here(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", MemoryStore()), 6, SCORES)

    assert local_steps(tmp_path / "run") == {1, 4, 5}
    assert weight(tmp_path / "run", "best") == 2.0


def test_a_policy_that_says_nothing_of_keeping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cc.ConfigError, match="OrbaxCheckpoint: keep_here: "):
        callbacks_in(tmp_path / "run", keep_here=np.zeros(1))
