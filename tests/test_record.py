"""Records survive the disk, and damage never passes as data."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import strategies
from ckpt_callbacks import RecordError
from ckpt_callbacks.record import (
    FORMAT,
    Change,
    Copy,
    File,
    Promotion,
    Record,
    RunFile,
    _dump,
    record_from_json,
    record_to_json,
    run_from_json,
    run_to_json,
)

names = st.text(min_size=1, max_size=8)
records = st.builds(
    Record,
    step=st.integers(0, 1 << 40),
    state=st.sampled_from(["saving", "complete", "evicting", "gone"]),
    owner=names,
    time=st.floats(0, 4e9),
    metrics=strategies.metrics,
    files=st.dictionaries(names, st.builds(File, st.integers(0, 1 << 50), names), max_size=3),
    copies=st.dictionaries(
        names,
        st.builds(Copy, st.sampled_from(["staged", "confirmed"]), names, st.booleans()),
        max_size=3,
    ),
    metadata=st.dictionaries(names, st.integers() | names | st.lists(st.booleans())),
    discarded=names,
    lost=st.booleans(),
)


ODD = {name: File(3, name) for name in ('"size":5', '},"copies":', '"files":{', "size", "a\nb")}


@given(records)
@example(Record(1, "complete", '"files":{', 0.0, {"files": 1.0, "size": 2.0}, files=ODD))
@example(Record(1, "complete", "me", 0.0, metadata={"files": {"size": 1}, "copies": {}}))
def test_a_record_survives_the_disk(record: Record) -> None:
    text = record_to_json(record)

    json.loads(text, parse_constant=pytest.fail)  # JSON has no NaN
    again = record_from_json(text, "7.json")
    assert again.bytes == record.bytes
    assert bool(again.files) == bool(record.files)
    assert record_to_json(again) == text
    assert again.files == record.files
    assert repr(again) == repr(record)  # repr, since NaN is not equal to itself
    laid_out_by_hand = record_from_json(json.dumps(json.loads(text), indent=1), "7.json")
    assert repr(laid_out_by_hand) == repr(record)
    assert laid_out_by_hand.bytes == record.bytes


def test_the_files_of_a_record_wait_until_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of thousands of records a listing asks for none."""
    text = record_to_json(Record(1, "complete", "me", 0.0, files=ODD))
    monkeypatch.setattr("ckpt_callbacks.files.files_from_json", pytest.fail)

    assert record_from_json(text, "1.json").bytes == 15


@given(records, st.data())
def test_a_cut_record_is_an_error(record: Record, data: st.DataObject) -> None:
    text = record_to_json(record)
    cut = data.draw(st.integers(0, len(text) - 1))

    with pytest.raises(RecordError, match=r"7\.json"):
        record_from_json(text[:cut], "7.json")


@pytest.mark.parametrize("field", ["step", "state", "owner", "time", "metrics", "files", "copies"])
@pytest.mark.parametrize("value", [None, "x", [], -1])
def test_a_field_of_the_wrong_kind_is_an_error(field: str, value: object) -> None:
    good = json.loads(record_to_json(Record(1, "complete", "me", 0.0)))
    if field == "owner" and value == "x":
        value = 1
    if field == "time" and value == -1:
        value = {}

    del good["check"]
    with pytest.raises(RecordError, match=r"7\.json is damaged: (?!it does not match)"):
        record_from_json(_dump({**good, field: value}), "7.json")


def test_a_newer_format_is_refused_with_what_to_do() -> None:
    text = json.dumps({"format": FORMAT + 1})

    with pytest.raises(RecordError, match="install the version that wrote it"):
        record_from_json(text, "7.json")
    with pytest.raises(RecordError, match="install the version that wrote it"):
        run_from_json(text, "run.json")


def test_a_run_survives_the_disk() -> None:
    run = RunFile(
        "0123",
        [{"policy": "LatestN", "n": 2}],
        {"mlflow": {"run_id": "a"}},
        {"mlflow": {"best": 3}},
        {"mlflow": {"experiment": "digits"}},
        frozenset({3, 5}),
        Change([{"policy": "LatestN", "n": 1}], 7),
        5,
        "killed",
        {"rate": 1e-3, "layers": [2, {"wide": True}]},
    )

    assert run_from_json(run_to_json(run), "run.json") == run


def test_a_run_is_read_with_fields_that_came_before_or_later() -> None:
    run = RunFile("0123", [{"policy": "LatestN", "n": 2}], config={"rate": 1})
    values = json.loads(run_to_json(run))
    later = {k: v for k, v in values.items() if k not in ("format", "check")} | {"later": [1]}
    before = {k: v for k, v in later.items() if k != "config"}

    assert run_from_json(_dump(later), "run.json") == run
    assert run_from_json(_dump(before), "run.json") == replace(run, config={})
    with pytest.raises(RecordError, match=r"run\.json is damaged: TypeError: expected dict"):
        run_from_json(_dump({**later, "config": [1]}), "run.json")


def test_only_what_an_older_version_would_drop_has_a_newer_format() -> None:
    run = RunFile("0123", [{"policy": "LatestN", "n": 2}])
    promoted = replace(run, promoted={"production": Promotion(3, 1700000000.5)})

    assert json.loads(run_to_json(run))["format"] == 1
    assert json.loads(run_to_json(promoted))["format"] == 2
    assert run_from_json(run_to_json(promoted), "run.json") == promoted
    assert json.loads(record_to_json(Record(1, "complete", "me", 0.0)))["format"] == 1


def test_infinities_and_nan_come_back() -> None:
    record = Record(1, "complete", "me", 0.0, {"a": math.inf, "b": -math.inf, "c": math.nan})

    again = record_from_json(record_to_json(record), "1.json").metrics

    assert again["a"] == math.inf
    assert again["b"] == -math.inf
    assert math.isnan(again["c"])
