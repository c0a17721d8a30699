"""What the machine is busy with, as metrics of the loop's steps."""

import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks import system
from ckpt_callbacks.metrics import MetricLog
from ckpt_callbacks.stores import MetricPoint
from ckpt_callbacks.system import Machine, SystemMetrics
from ckpt_callbacks.testing import MemoryStore
from loops import new_state

MLFLOW = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
    "system/disk_usage_megabytes",
    "system/disk_usage_percentage",
    "system/disk_available_megabytes",
    "system/network_receive_megabytes",
    "system/network_transmit_megabytes",
}


def test_the_names_and_units_are_those_of_mlflow(tmp_path: Path) -> None:
    values = Machine(tmp_path).sample()

    assert values.keys() == MLFLOW
    for name, value in values.items():
        assert math.isfinite(value)
        assert value >= 0
        assert value <= 100 or "percentage" not in name
    assert values["system/network_receive_megabytes"] < 1e6, "not since the start"


def test_mlflow_calls_them_the_same() -> None:
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, network_monitor

    names = set()
    for monitor in (
        cpu_monitor.CPUMonitor(),
        disk_monitor.DiskMonitor(),
        network_monitor.NetworkMonitor(),
    ):
        monitor.collect_metrics()
        names |= {f"system/{name}" for name in monitor.metrics}

    assert names == MLFLOW


def test_a_machine_without_network_is_sampled_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)

    assert Machine(tmp_path).sample().keys() == {n for n in MLFLOW if "network" not in n}


def test_devices_that_report_their_memory_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = [None, {"bytes_in_use": 3_000_000, "other": 1}, {"other": 1}]
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(local_devices=lambda: devices))

    values = Machine(tmp_path).sample()

    assert {n: v for n, v in values.items() if n not in MLFLOW} == {
        "system/gpu_1_memory_usage_megabytes": 3.0
    }


class Sampled:
    """Takes points, and tells when there are some."""

    def __init__(self, wanted: int) -> None:
        self.points: list[tuple[int, Mapping[str, float]]] = []
        self.enough = threading.Event()
        self._wanted = wanted

    def __call__(self, point: tuple[int, Mapping[str, float]]) -> None:
        self.points.append(point)
        if len(self.points) >= self._wanted:
            self.enough.set()


def test_samples_are_of_the_step_that_the_loop_is_at(tmp_path: Path) -> None:
    steps = iter([None, None, 3, 3])
    sampled = Sampled(3)
    metrics = SystemMetrics(tmp_path, 0.001, lambda: next(steps, 7), sampled)
    metrics.start()
    assert sampled.enough.wait(60)
    metrics.close()

    assert [step for step, _ in sampled.points[:3]] == [3, 3, 7]
    assert not metrics._thread.is_alive()


def test_one_that_waits_ends_at_once(tmp_path: Path) -> None:
    sampled = Sampled(1)
    metrics = SystemMetrics(tmp_path, 1e6, lambda: 0, sampled)
    metrics.start()
    assert sampled.enough.wait(60)
    metrics.close()

    assert len(sampled.points) == 1


def test_a_machine_that_does_not_tell_is_reported_once_and_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, tries = Machine.sample, 0

    def sample(self: Machine) -> dict[str, float]:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise PermissionError("/proc is hidden")
        return real(self)

    monkeypatch.setattr(system.Machine, "sample", sample)
    sampled = Sampled(1)
    metrics = SystemMetrics(tmp_path, 0.001, lambda: 0, sampled)
    metrics.start()
    assert sampled.enough.wait(60)
    metrics.close()

    assert caplog.text.count("the machine can not be sampled: /proc is hidden") == 1


def run_of(root: Path, store: MemoryStore, **options: Any) -> cc.Run[Any]:
    checkpoint = cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    return cc.Callbacks(checkpoint, store, **options).run(new_state())


def test_a_run_sends_them_to_its_trackers(tmp_path: Path) -> None:
    store, arrived = MemoryStore(), threading.Event()

    def system_points() -> list[MetricPoint]:
        return [p for p in store.points if "system/disk_usage_percentage" in p.values]

    def look(call: str) -> None:
        if len(system_points()) > 2:
            arrived.set()

    store.before = look
    with run_of(tmp_path / "run", store, system_metrics=0.01) as run:
        run.on_step(4, new_state(), {"loss": 1.0})
        assert arrived.wait(60)

    assert {p.step for p in system_points()} == {4}
    assert set(system_points()[0].values) >= MLFLOW
    assert not cc.find(tmp_path / "run").metrics.keys() & MLFLOW, "they rank nothing"
    assert not [t for t in threading.enumerate() if t.name == "ckpt-system"]


def test_by_default_nothing_is_sampled(tmp_path: Path) -> None:
    store = MemoryStore()
    with run_of(tmp_path / "run", store) as run:
        assert not [t for t in threading.enumerate() if t.name == "ckpt-system"]
        run.on_step(0, new_state(), {"loss": 1.0})

    assert [dict(p.values) for p in store.points] == [{"loss": 1.0}]


def test_several_points_of_one_step_are_all_kept(tmp_path: Path) -> None:
    """Only what an earlier process has logged is taken for a repetition."""
    log = MetricLog(tmp_path, -1)
    log.expect(["s"])
    for at in range(3):
        log.append([MetricPoint(5, float(at), {"a": 1.0, "b": 2.0})])

    assert [p.time for p in log.unsent("s")[0]] == [0.0, 1.0, 2.0]
    assert log.unsent_values("s") == 6
    log.sent("s", log.unsent("s", 2)[1])
    assert log.unsent_values("s") == 2
    assert log.unsent_values("another") == 6


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "10"])
def test_an_interval_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(cc.ConfigError, match="system_metrics must be a number of seconds above 0"):
        cc.Callbacks(system_metrics=value)


def test_without_psutil_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_callbacks.extras.find_spec", lambda name: None)

    with pytest.raises(cc.MissingExtra, match=r"pip install 'ckpt-callbacks\[system\]'"):
        cc.Callbacks(system_metrics=10)
    cc.Callbacks()
