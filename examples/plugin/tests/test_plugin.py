"""Each part alone, and all of them in a real run."""

import inspect
import itertools
import json
import subprocess
import threading
import zipfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_callbacks_zip import Journal, PowersOfTwo, ZipStore
from hypothesis import given
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks.stores import RunInfo
from ckpt_callbacks.testing import StoreContract, make_checkpoint


def opened(tmp_path: Path, run_id: str = "0123456789ab", name: str = "run", **refs: str) -> Any:
    store = ZipStore(tmp_path / "zips")
    store.open(RunInfo(run_id, name, {}, tmp_path / "scratch", refs))
    return store


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The store


class TestZipStore(StoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Callable[[], ZipStore]:
        return lambda: ZipStore(tmp_path / "zips")


def test_a_store_takes_no_more_than_60_lines() -> None:
    assert len(inspect.getsource(ZipStore).splitlines()) <= 60


def test_it_is_found_by_its_name() -> None:
    stores = entry_points(group="ckpt_callbacks.stores")

    assert stores["zip"].load() is ZipStore


def test_a_copy_that_was_cut_is_none_and_its_bytes_can_be_freed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    checkpoint = make_checkpoint(tmp_path, 7, b"x" * 1_000_000)
    (checkpoint.path / list(checkpoint.files)[-1]).unlink()

    with pytest.raises(FileNotFoundError):
        store.put(checkpoint, [])

    assert list(files_in(tmp_path / "zips")) == ["run-0123456789ab/.7.zip.part"]
    assert store.listing().copies == {}
    with pytest.raises(cc.CheckpointNotFound, match="no copy of step 7"):
        store.get(7, tmp_path / "got")
    store.delete(7)
    assert files_in(tmp_path / "zips") == {}


def test_a_replacement_that_was_cut_leaves_the_old_copy(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(make_checkpoint(tmp_path / "one", 7, b"old"), [])
    checkpoint = make_checkpoint(tmp_path / "two", 7, b"new")
    (checkpoint.path / list(checkpoint.files)[-1]).unlink()

    with pytest.raises(FileNotFoundError):
        store.put(checkpoint, [])

    store.get(7, tmp_path / "got")
    assert (tmp_path / "got" / "model" / "d" / "data").read_bytes() == b"old"


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    store = opened(tmp_path)
    path = Path(store.put(make_checkpoint(tmp_path, 7, b"weights"), []).ref)
    path.write_bytes(path.read_bytes().replace(b"weights", b"veights"))

    with pytest.raises(cc.CorruptCheckpoint, match=r"7\.zip is damaged: Bad CRC-32"):
        store.get(7, tmp_path / "got")


@pytest.mark.parametrize("name", ["../escaped", "{}/escaped", "model/../../escaped"])
def test_no_name_in_a_zip_file_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    store = opened(tmp_path)
    checkpoint = make_checkpoint(tmp_path, 7)
    with zipfile.ZipFile(store.put(checkpoint, []).ref, "a") as archive:
        archive.writestr(name.format(tmp_path), "not from here")
    before = set(tmp_path.rglob("*"))

    store.get(7, tmp_path / "got")

    assert "not from here" in [p.read_text() for p in (tmp_path / "got").rglob("escaped")]
    outside = {p for p in tmp_path.rglob("*") if (tmp_path / "got") not in (p, *p.parents)}
    assert outside == before


def test_runs_share_a_folder(tmp_path: Path) -> None:
    one, other = opened(tmp_path, "aaaaaaaaaaaa"), opened(tmp_path, "bbbbbbbbbbbb")
    one.put(make_checkpoint(tmp_path / "one", 7, b"one"), [])
    other.put(make_checkpoint(tmp_path / "other", 7, b"other"), [])
    other.put(make_checkpoint(tmp_path / "other", 8), [])

    one.delete(7)

    assert set(one.listing().copies) == set()
    assert set(other.listing().copies) == {7, 8}


def test_a_run_directory_may_be_renamed(tmp_path: Path) -> None:
    store = ZipStore(tmp_path / "zips")
    refs = store.open(RunInfo("0123456789ab", "first", {}, tmp_path / "scratch", {}))
    store.put(make_checkpoint(tmp_path, 7), [])

    assert set(opened(tmp_path, name="second", **refs).listing().copies) == {7}


def test_what_is_no_copy_is_not_listed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for step in (7, 8):
        path = Path(store.put(make_checkpoint(tmp_path, step), []).ref)
        store.alias(f"best-{step}", step)
    path.rename(path.with_name("8 (copy).zip"))

    assert set(store.listing().copies) == {7}
    assert store.listing().aliases == {"best-7": 7}


def test_an_alias_may_hold_a_slash(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(make_checkpoint(tmp_path, 7), [])

    store.alias("best-val/loss", 7)

    assert store.listing().aliases == {"best-val/loss": 7}


def test_a_person_opens_it_by_the_hint(tmp_path: Path) -> None:
    store = opened(tmp_path, name="run of 'Anna'")
    checkpoint = make_checkpoint(tmp_path, 7)
    store.put(checkpoint, [])
    store.alias("last", 7)

    subprocess.run(["sh", "-c", store.hint()], check=True)

    (unpacked,) = (tmp_path / "zips").glob("*/last")
    assert files_in(unpacked) == files_in(checkpoint.path)


# The policy


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        (range(0), []),
        (range(1), [0]),
        (range(12), [0, 4, 8, 10, 11]),
        (range(65), [0, 32, 48, 56, 60, 62, 63, 64]),
        (range(0, 1001, 50), [0, 550, 800, 900, 950, 1000]),
        ([5, 6, 1000], [5, 6, 1000]),
    ],
)
def test_the_older_the_further_apart(steps: range, kept: list[int]) -> None:
    history = [cc.Candidate(step, {}) for step in steps]

    assert sorted(PowersOfTwo().keep(history)) == kept


def test_for_each_power_of_two_there_is_one_of_that_age() -> None:
    kept: list[cc.Candidate] = []
    for newest in range(600):
        kept.append(cc.Candidate(newest, {}))
        reasons = PowersOfTwo().keep(kept)
        kept = [c for c in kept if c.step in reasons]
        ages = [newest - c.step for c in kept]
        for k in range(newest.bit_length()):
            assert any(2**k <= age < 2 ** (k + 1) for age in ages), (newest, k)
        assert len(kept) <= newest.bit_length() + 2


@given(st.sets(st.integers(0, 5000), max_size=80).map(sorted), st.randoms())
def test_what_was_dropped_is_never_wanted_again(steps: list[int], random: Any) -> None:
    """Of what the policy does not want, another policy may keep any part, and for any time."""
    policy = PowersOfTwo()
    everything: list[cc.Candidate] = []
    there: list[cc.Candidate] = []
    for step in steps:
        everything.append(cc.Candidate(step, {}))
        there.append(everything[-1])
        wanted = policy.keep(everything)

        assert policy.keep(there) == wanted

        there = [c for c in there if c.step in wanted or random.random() < 0.3]


def test_each_step_is_explained() -> None:
    history = [cc.Candidate(step, {}) for step in range(12)]
    policy = cc.LatestN(1) | PowersOfTwo()

    assert policy.explain(history, 8) == "latest #4 of 12, LatestN(1) keeps 1; 2^3: first of 8+"
    assert policy.explain(history, 9).endswith(
        "for no power of two the first in one of the two newest windows"
    )


# The listener


def test_a_line_tells_when_and_what(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", clock=lambda: 12.5)

    journal.on_saved(cc.Saved(7, tmp_path, {"loss": 0.5, "norm": float("nan")}, 100, 0.25))
    journal.on_promoted(cc.Promoted("zip", "best", 7, previous=None))

    assert lines_of(tmp_path / "journal.jsonl") == [
        {"time": 12.5, "event": "saved", "step": 7, "seconds": 0.25, "bytes": 100,
         "metrics": {"loss": 0.5, "norm": "nan"}},
        {"time": 12.5, "event": "promoted", "step": 7, "store": "zip", "alias": "best"},
    ]  # fmt: skip


def test_lines_of_two_threads_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", clock=itertools.count().__next__)

    def evict() -> None:
        for step in range(500):
            journal.on_evicted(cc.Evicted("zip", step, "not needed"))

    threads = [threading.Thread(target=evict) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    lines = lines_of(tmp_path / "journal.jsonl")
    assert [line["time"] for line in lines] == list(range(1000))
    assert sorted(line["step"] for line in lines) == sorted([*range(500), *range(500)])


# All together


def train(tmp_path: Path, steps: range) -> ZipStore:
    """Train in a new process, as far as the plugins can tell: with new objects."""
    store = ZipStore(tmp_path / "zips")
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            tmp_path / "run",
            save=cc.EveryNSteps(10),
            keep=PowersOfTwo() | cc.BestN(1, "score", mode="max"),
        ),
        store,
        Journal(tmp_path / "journal.jsonl"),
    )
    with callbacks.run({"w": np.zeros(8)}) as run:
        state = run.state
        assert run.next_step == steps.start
        for step in steps:
            state = {"w": state["w"] + step}
            if step % 10 == 0:
                run.on_eval(step, {"score": 1.0 if step == 40 else step / 1000})
            run.on_step(step, state)
    assert "Zip" in str(run.summary())
    return store


def test_a_run_that_stops_and_goes_on(tmp_path: Path) -> None:
    train(tmp_path, range(81))
    store = train(tmp_path, range(81, 161))

    kept = [0, 40, 70, 130, 150, 160]
    (folder,) = (tmp_path / "zips").iterdir()
    assert folder.name.startswith("run-")
    assert files_in(folder).keys() == {
        *(f"{step}.zip" for step in kept), "aliases/best", "aliases/last"
    }  # fmt: skip
    assert (folder / "aliases" / "best").read_text() == "40\n"
    assert (folder / "aliases" / "last").read_text() == "160\n"
    for step in kept:
        into = tmp_path / "got" / str(step)
        store.get(step, into)
        assert files_in(into) == files_in(tmp_path / "run" / str(step))
        restored = cc.restore(into, like={"w": np.zeros(8)})
        np.testing.assert_array_equal(restored["w"], np.full(8, sum(range(step + 1))))


def test_a_zip_file_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    train(tmp_path, range(81))
    (path,) = (tmp_path / "zips").glob("*/40.zip")
    path.unlink()

    store = train(tmp_path, range(81, 91))

    assert path.exists()
    assert store.listing().aliases == {"best": 40, "last": 90}


def test_the_journal_of_that_run(tmp_path: Path) -> None:
    train(tmp_path, range(81))
    train(tmp_path, range(81, 161))

    lines = lines_of(tmp_path / "journal.jsonl")
    saved = list(range(0, 161, 10))
    assert [line["step"] for line in lines if line["event"] == "step"] == [0, 81, 100]
    assert [line["step"] for line in lines if line["event"] == "saved"] == saved
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    evicted = {line["step"] for line in lines if line.get("reason") and line["store"] == "local"}
    assert evicted == {*saved} - {0, 40, 70, 130, 150, 160}
    named = {line["alias"]: line["step"] for line in lines if line["event"] == "promoted"}
    assert named == {"best": 40, "last": 160}
