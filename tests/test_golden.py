"""Files of every format that was ever written are still read as what they meant."""

import json
import math
import shutil
from pathlib import Path

import pytest

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.inbox import Measured, Pinned, _from_json
from ckpt_callbacks.metrics import MetricLog
from ckpt_callbacks.record import FORMAT, Change, Copy, File, Gone, Promotion

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    shutil.copytree(GOLDEN / "format-1", tmp_path / ".ckpt_callbacks")
    return RunDirectory(tmp_path)


def test_the_present_format_has_its_files() -> None:
    assert sorted(p.name for p in GOLDEN.iterdir()) == [f"format-{n + 1}" for n in range(FORMAT)]


def test_records_of_format_1(directory: RunDirectory) -> None:
    records = directory.read_records()

    assert [(s, r.state) for s, r in records.items()] == [(s, "complete") for s in (1, 2, 3)]
    one = records[1]
    assert (one.owner, one.time, one.logged) == ("7734299b49ad", 1700000120.0, True)
    assert one.metrics == {"loss": 0.5, "score": 0.9}
    assert one.metadata == {"tokens": 1000, "shards": ["a"]}
    assert one.copies == {"folder": Copy("confirmed", "steps/1", shared=False)}
    assert one.files["state/_METADATA"] == File(262, "xxh3:bdb415afbb21d246ec2447227e6adbb0")
    assert len(one.files) == 9
    assert math.isnan(records[2].metrics["score"])
    assert records[3].metrics["score"] == math.inf
    assert (one.discarded, records[3].discarded) == ("", "discarded: the run went back to step 1")


def test_run_and_evictions_of_format_1(directory: RunDirectory) -> None:
    run = directory.read_run()

    assert run
    assert (run.run_id, run.status, run.pins) == ("7734299b49ad", "finished", frozenset({2}))
    assert run.policy == [{"policy": "LatestN", "n": 1}]
    assert run.aliases == {"folder": {"best": 1, "last": 3}}
    assert run.stores == {"folder": {"title": "Folder"}}
    assert run.config == {}  # which came later
    assert run.settings["folder"] == {"root": "store", "keep": [{"policy": "LatestN", "n": 1}]}
    best = {"policy": "BestN", "n": 1, "metric": "score", "mode": "max", "pending": None}
    assert run.change == Change([{"policy": "LatestN", "n": 2}, best], 3)
    (gone,) = directory.read_evicted()
    assert gone == Gone(0, 1700000060.0, {"loss": 1.0, "score": 0.1}, gone.reason)


def test_metrics_and_requests_of_format_1(directory: RunDirectory) -> None:
    log = MetricLog(directory.meta, 2)
    points, _ = log.unsent("folder")
    assert str([(p.step, p.values) for p in points]) == str(
        [(2, {"score": math.nan}), (2, {"loss": math.inf})]
    )
    assert log.unsent("another")[0][0].step == 0

    texts = [p.read_text() for p in sorted(directory.inbox.iterdir())]
    measured, *pins = [_from_json(text, "here") for text in texts]
    assert isinstance(measured, Measured)
    assert (measured.step, measured.time, measured.metrics["score"]) == (3, 1700000999.5, 0.95)
    assert math.isnan(measured.metrics["x"])
    assert pins == [Pinned(1, pinned=True), Pinned(1, pinned=False)]
    assert json.loads(texts[0])["format"] == 1


def test_run_of_format_2(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-2", tmp_path / ".ckpt_callbacks")

    run = RunDirectory(tmp_path).read_run()

    assert run
    assert (run.run_id, run.pins) == ("7734299b49ad", frozenset({2}))
    assert run.promoted == {"production": Promotion(3, 1700000240.5)}
