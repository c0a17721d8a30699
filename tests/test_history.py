"""What happened when: written beside the records, and read whatever happened to the file."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks import history_file
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.history import Entry, entry_from_json, entry_to_json, lives, with_records
from ckpt_callbacks.history_file import HistoryFile
from ckpt_callbacks.record import Copy, File, Record
from ckpt_callbacks.testing import MemoryStore
from loops import callbacks_in, train

FILES = {"a": File(100, "xxh3:0")}
SCORES = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2}


def record(step: int, state: str = "complete", **copies: Copy) -> Record:
    return Record(step, state, "me", 10.0 * step, files=FILES, copies=copies)  # type: ignore[arg-type]


entries = st.builds(
    Entry,
    st.floats(0, 2e9).map(lambda t: round(t, 3)),
    st.sampled_from(["saved", "copied", "gone"]),
    st.text(),
    st.integers(0, 10**12),
    st.integers(0, 2**60),
    st.lists(st.floats(0, 1e6).map(lambda s: float(f"{s:.4g}")), max_size=2).map(tuple),
)


@given(entries)
def test_an_entry_comes_back(entry: Entry) -> None:
    line = entry_to_json(entry)

    assert entry_from_json(line) == entry
    assert len(line.splitlines()) == 1


@given(entries, st.data())
def test_a_line_that_was_cut_is_no_entry(entry: Entry, data: st.DataObject) -> None:
    line = entry_to_json(entry)
    cut = line[: data.draw(st.integers(0, len(line) - 1))]

    with pytest.raises((ValueError, TypeError)):
        entry_from_json(cut)


def test_a_run_writes_down_what_happens_where_and_how_long_it_took(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", MemoryStore()), 4, SCORES)

    found = HistoryFile(RunDirectory(tmp_path / "run").meta).entries()
    assert [e.step for e in found if e.what == "saved"] == [0, 1, 2, 3]
    assert {(e.what, e.store, e.step) for e in found if e.what != "saved"} >= {
        ("copied", "memory", 3),
        ("gone", "local", 0),
    }
    for entry in found:
        expected = {"saved": 2, "copied": 1, "gone": 0}[entry.what]
        assert len(entry.seconds) == expected
        assert all(0 < seconds < 60 for seconds in entry.seconds)
    now = lives(with_records(found, RunDirectory(tmp_path / "run").read_records()))
    assert {life.step for life in now["local"] if life.end is None} == {1, 2, 3}
    assert {life.step for life in now["memory"] if life.end is None} == {1, 2, 3}
    assert all(life.bytes > 0 for life in now["local"])


def test_what_a_kill_cut_spoils_nothing(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path)
    file.note(Entry(1.0, "saved", "local", 1))
    with (tmp_path / "history.jsonl").open("ab") as raw:
        raw.write(b'\n[2.0, "saved", "lo')
    file.note(Entry(3.0, "gone", "local", 1))
    with (tmp_path / "history.jsonl").open("ab") as raw:
        raw.write(
            b'\n[4.0, "moved", "local", 1, 0, []]\n[NaN, "gone", "local", 1, 0, []]\n\xff\xfe'
        )

    assert [entry.time for entry in file.entries()] == [1.0, 3.0]


def test_it_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_file, "MOST_BYTES", 1000)
    file = HistoryFile(tmp_path)
    for step in range(200):
        file.note(Entry(float(step), "saved", "local", step))

    steps = [entry.step for entry in file.entries()]
    assert steps == list(range(steps[0], 200))
    assert 20 < len(steps) < 80
    assert sum(path.stat().st_size for path in tmp_path.glob("history*")) < 2100


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / "none")

    file.note(Entry(1.0, "saved", "local", 1))

    assert file.entries() == []
    assert not (tmp_path / "none").exists()


def test_the_records_know_better(tmp_path: Path) -> None:
    done = Copy("confirmed", "a")
    records = {
        1: record(1, a=done),
        2: record(2, a=Copy("pending", "")),
        3: record(3, "gone", a=done),
    }
    found = [
        Entry(11.0, "saved", "local", 1, 7),
        Entry(21.0, "saved", "local", 2, 7),
        Entry(22.0, "copied", "a", 2, 7),
        Entry(31.0, "saved", "local", 3, 7),
        Entry(41.0, "saved", "local", 4, 7),
    ]

    there = lives(with_records(found, records))

    assert {(x.step, x.begin, x.end) for x in there["local"]} == {
        (1, 11.0, None),
        (2, 21.0, None),
        (3, 31.0, 31.0),  # its end was not written down
        (4, 41.0, 41.0),
    }
    assert {(x.step, x.begin, x.end, x.bytes) for x in there["a"]} == {
        (1, 11.0, None, 100),
        (2, 22.0, 22.0, 7),
        (3, 31.0, None, 100),
    }


@given(st.lists(entries, max_size=30))
def test_whatever_is_written_there_the_records_decide(found: list[Entry]) -> None:
    records = {5: record(5, a=Copy("staged", "x")), 6: record(6, "saving")}

    there = lives(with_records(found, records))

    held = {(place, x.step) for place, some in there.items() for x in some if x.end is None}
    assert held == {("local", 5), ("a", 5)}
    assert all(x.end is None or x.end >= x.begin for some in there.values() for x in some)


def test_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 2, SCORES)
    train(callbacks_in(tmp_path / "run"), 4, SCORES)

    found = HistoryFile(RunDirectory(tmp_path / "run").meta).entries()
    assert [e.step for e in found if e.what == "saved"] == [0, 1, 2, 3]
    assert all(math.isfinite(e.time) for e in found)
    assert cc.verify(tmp_path / "run") == []
