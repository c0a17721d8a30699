"""Metrics on their way: read off the loop's thread, kept in a file, sent once."""

import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ckpt_callbacks.metrics import MetricBuffer, MetricLog, host_floats
from ckpt_callbacks.stores import MetricPoint


def points(*steps: int, **values: float) -> list[MetricPoint]:
    return [MetricPoint(s, 1.0, values or {"loss": float(s)}) for s in steps]


def all_steps(log: MetricLog, store: str = "s") -> list[int]:
    found, offset = log.unsent(store)
    log.sent(store, offset)
    return [p.step for p in found]


def test_every_kind_of_number_is_read() -> None:
    given = {"a": 1, "b": np.float32(2), "c": jnp.float32(3), "d": jnp.ones((1,)).sum(), "e": True}

    assert host_floats(given)[0] == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 1.0, "e": 1.0}


def test_what_is_no_number_is_left_out_and_told() -> None:
    values, problems = host_floats({"text": "abc", "loss": 1.0, "vector": np.ones(3)})

    assert values == {"loss": 1.0}
    assert problems["text"].startswith("metric 'text' is left out: str is no number")
    assert problems["vector"].startswith("metric 'vector' is left out: ndarray is no number")


def test_a_donated_metric_is_left_out_once_and_the_others_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = jnp.float32(1)
    dead.delete()
    log = MetricLog(tmp_path, -1)
    read = threading.Event()
    buffer = MetricBuffer(log, read.set)
    buffer.append((3, {"dead": dead, "loss": jnp.float32(2)}))
    buffer.append((4, {"dead": dead}))
    buffer.close()

    assert read.is_set()
    assert [(p.step, dict(p.values)) for p in log.unsent("s")[0]] == [(3, {"loss": 2.0})]
    assert caplog.text.count("metric 'dead' is left out") == 1


def test_each_store_reads_on_from_where_it_stopped(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, -1)
    log.append(points(1, 2))
    assert all_steps(log, "a") == [1, 2]
    log.append(points(3))

    assert all_steps(log, "a") == [3]
    assert all_steps(log, "b") == [1, 2, 3]
    assert all_steps(MetricLog(tmp_path, -1), "b") == []  # after a restart


def test_steps_taken_again_after_a_kill_are_not_logged_twice(tmp_path: Path) -> None:
    first = MetricLog(tmp_path, -1)
    first.append(points(*range(8)))
    first.append(points(5, val=0.5))

    again = MetricLog(tmp_path, resumed=4)
    again.append(points(5, 6, 7, 8))
    again.append(points(5, 10, val=0.5))

    found = [(p.step, *p.values) for p in again.unsent("s")[0]]
    assert [s for s, name in found if name == "loss"] == list(range(9))
    assert [s for s, name in found if name == "val"] == [5, 10]


def test_a_late_metric_of_an_earlier_step_is_logged(tmp_path: Path) -> None:
    MetricLog(tmp_path, -1).append(points(10, val=0.1))

    again = MetricLog(tmp_path, resumed=10)
    again.append(points(5, val=0.5))

    assert [p.step for p in again.unsent("s")[0]] == [10, 5]


def test_repeats_are_known_after_the_file_was_emptied(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, -1)
    log.append(points(1, 2, 3))
    all_steps(log)
    log.compact()
    assert (tmp_path / "metrics.jsonl").stat().st_size == 0

    again = MetricLog(tmp_path, resumed=1)
    again.append(points(2, 3, 4))

    assert all_steps(again) == [4]


def test_the_file_is_not_emptied_while_a_store_needs_it(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, -1)
    log.expect(["a", "b"])
    log.append(points(1))
    all_steps(log, "a")

    log.compact()
    MetricLog(tmp_path, -1).compact()  # a process that does not use b

    assert all_steps(log, "b") == [1]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    MetricLog(tmp_path, -1).append(points(1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])

    log = MetricLog(tmp_path, -1)
    log.append(points(9))

    assert all_steps(log) == [1, 9]


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, -1)
    log.append(points(1))
    with pytest.MonkeyPatch.context() as full:
        real = Path.open

        def cut(path: Path, *arguments: Any, **options: Any) -> Any:
            with real(path, *arguments, **options) as file:
                file.write("[2, 1.0, ")
            raise OSError(28, "No space left on device")

        full.setattr(Path, "open", cut)
        with pytest.raises(OSError, match="No space"):
            log.append(points(2))
    log.append(points(2, 3))

    assert all_steps(log) == [1, 2, 3]


def test_a_rewound_run_logs_everything_again(tmp_path: Path) -> None:
    MetricLog(tmp_path, -1).append(points(1, 2))

    again = MetricLog(tmp_path, resumed=0, rewound=0)
    again.append(points(1))

    assert all_steps(again) == [1, 2, 1]
    # A kill later it still knows which way it goes.
    third = MetricLog(tmp_path, resumed=0)
    third.append(points(1, 2))
    assert all_steps(third) == [2]
    third.compact()
    MetricLog(tmp_path, resumed=2, rewound=2)
    last = MetricLog(tmp_path, resumed=2)
    assert all_steps(last) == []
    last.compact()
    assert not (tmp_path / "metrics.jsonl").read_text(), "a mark that nobody needs was kept"


def test_nan_and_infinities_pass(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, -1)
    log.append(points(1, a=float("nan"), b=float("inf")))

    assert str(log.unsent("s")[0][0].values) == "{'a': nan, 'b': inf}"
