"""Runs of several processes: they save together, go on after kills, and disagree by name."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
from distributed.launch import Ended, job, run
from loops import local_steps

DEVICES = 4
"""In all of a job, however many processes there are."""


@pytest.fixture
def of_a_job(count: int) -> dict[str, int]:
    return {"count": count, "devices": DEVICES // count}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, str]:
    """Digests of the state after 12 steps that nothing has cut."""
    count: int = request.config.getoption("--processes")
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run(directory, count, devices=DEVICES // count, steps=12)
    digests = [process.last("digest") for process in ended]
    assert digests == digests[:1] * count
    assert local_steps(directory) == {9, 11}
    digest: dict[str, str] = digests[0]
    return digest


def cut(directory: Path, count: int, devices: int) -> dict[str, str]:
    """Train until step 6 is complete, and kill all processes after step 7; return digests of 6."""
    with job(directory, count, devices=devices, steps=12, pause=7, show=6) as processes:
        shown = [process.until("shown") for process in processes]
        for process in processes:
            process.until("paused")
        processes.killed()
    assert local_steps(directory) >= {3, 6}
    assert shown == shown[:1] * count
    saved: dict[str, str] = shown[0]
    return saved


@pytest.mark.parametrize("then", [1, 2])
def test_after_a_kill_other_processes_go_on_to_the_same_weights(
    then: int, tmp_path: Path, of_a_job: dict[str, int], undisturbed: dict[str, str]
) -> None:
    cut(tmp_path / "run", **of_a_job)

    ended = run(tmp_path / "run", then, devices=DEVICES // then, steps=12)

    for process in ended:
        assert process.last("next_step") == 7
        assert process.last("digest") == undisturbed
    assert local_steps(tmp_path / "run") == {9, 11}
    assert cc.find(tmp_path / "run", "last").step == 11
    assert not cc.verify(tmp_path / "run")


@pytest.mark.parametrize(("then", "devices"), [(1, 1), (2, 1)])
def test_on_other_devices_the_restored_state_is_the_same_and_training_goes_on(
    then: int, devices: int, tmp_path: Path, of_a_job: dict[str, int]
) -> None:
    saved = cut(tmp_path / "run", **of_a_job)

    for process in run(tmp_path / "run", then, devices=devices, steps=12):
        assert process.last("restored") == saved
        assert process.last("last") == 11
    assert local_steps(tmp_path / "run") == {9, 11}


@pytest.mark.parametrize("point", ["orbax-started:3", "orbax-committed:3"])
def test_process_0_is_killed_in_a_save(
    point: str, tmp_path: Path, of_a_job: dict[str, int], undisturbed: dict[str, str]
) -> None:
    only = {0: {"env": {"CKPT_CALLBACKS_FAILPOINT": point}}}
    with job(tmp_path / "run", steps=12, heartbeat=10, only=only, **of_a_job) as processes:
        ended = processes.end()
    assert ended[0].code == -signal.SIGKILL
    assert all(process.code != 0 for process in ended)

    assert run(tmp_path / "run", steps=12, **of_a_job)[-1].last("digest") == undisturbed
    assert local_steps(tmp_path / "run") == {9, 11}


@pytest.mark.parametrize("dies", ["first", "last"])
def test_when_a_process_dies_the_others_end_soon(
    dies: str, tmp_path: Path, of_a_job: dict[str, int]
) -> None:
    rank = 0 if dies == "first" else of_a_job["count"] - 1
    options = {"steps": 100_000, "slow": 0.01, "heartbeat": 10, "pause": 7}
    with job(tmp_path / "run", **options, **of_a_job) as processes:
        for process in processes:
            process.until("paused")
        processes[rank].signal(signal.SIGKILL)
        for process in [p for i, p in enumerate(processes) if i != rank]:
            process.go_on()
        ended = processes.end()

    assert ended.pop(rank).code == -signal.SIGKILL
    for process in ended:
        assert process.code != 0
        assert process.seconds < 60
        assert "Gloo" in process.err or "JAX distributed service detected fatal" in process.err
    assert run(tmp_path / "run", steps=9, **of_a_job)[-1].last("next_step") == 7


def failed(directory: Path, **options: Any) -> list[Ended]:
    """Return what the processes of a job left that ends badly in all of them."""
    with job(directory, **options) as processes:
        ended = processes.end()
    assert all(process.code != 0 for process in ended)
    return ended


def test_processes_that_disagree_are_named(tmp_path: Path, of_a_job: dict[str, int]) -> None:
    last = of_a_job["count"] - 1
    others = ", ".join(map(str, range(last)))
    only = {last: {"every": 4, "extra": True, "own": 5}}

    for process in failed(tmp_path / "run", only=only, **of_a_job):
        named = process.err.partition("ConfigError: the processes of this run disagree:")[2]
        lines = [line.strip() for line in named.splitlines()]
        first = "process 0" if last == 1 else f"processes {others}"
        assert (
            f"save: {first}: EveryNSteps(3) | AtEnd(); process {last}: EveryNSteps(4) | " in named
        )
        assert any(line.startswith(f"leaves of more: {first}: none; process") for line in lines)
        assert any(line.startswith(f"values of key: {first}: digest") for line in lines)
        assert "values of params" not in named
        assert "let all have the same" in named
    assert not (tmp_path / "run").exists()


def test_processes_at_other_steps_are_named(tmp_path: Path, of_a_job: dict[str, int]) -> None:
    last = of_a_job["count"] - 1

    for process in failed(tmp_path / "run", only={last: {"start": 3}}, **of_a_job):
        assert "ConfigError: the processes of this run are not at the same point" in process.err
        assert f"process {last}: the save of step 3" in process.err


def test_a_directory_that_is_not_shared_is_told(tmp_path: Path, of_a_job: dict[str, int]) -> None:
    """One path that leads to another place in each, as a disk of its own does on each host."""
    last = of_a_job["count"] - 1
    (tmp_path / "elsewhere").mkdir()
    directory = Path("/proc/self/cwd/run")
    only = {last: {"cwd": str(tmp_path / "elsewhere")}}

    for process in failed(directory, only=only, timeout=4, cwd=str(tmp_path), **of_a_job):
        assert f"ConfigError: process {last}: does not see the run that process 0" in process.err


def test_a_process_that_does_not_come_is_named(tmp_path: Path, of_a_job: dict[str, int]) -> None:
    last = of_a_job["count"] - 1
    only = {last: {"late": True}}
    with job(tmp_path / "run", timeout=3, shutdown=3, only=only, **of_a_job) as processes:
        processes[last].until("waits")
        begun = time.monotonic()
        found = processes[0].end(begun)

    assert f"ProcessLost: process {last} of {of_a_job['count']} did not come to" in found.err
    assert "the start of the run within 3 s" in found.err


@pytest.mark.parametrize(
    ("save", "saved"), [("seconds", {6, 7}), ("function", {5, 9}), ("evaluation", {4})]
)
def test_process_0_decides_what_could_differ(
    save: str, saved: set[int], tmp_path: Path, of_a_job: dict[str, int]
) -> None:
    steps = 8 if save == "seconds" else 12
    ended = run(tmp_path / "run", save=save, steps=steps, evaluate=save == "evaluation", **of_a_job)

    assert local_steps(tmp_path / "run") == saved
    assert [process.last("last") for process in ended] == [steps - 1] * of_a_job["count"]


def test_a_state_that_one_process_cannot_save_is_saved_by_none(
    tmp_path: Path, of_a_job: dict[str, int]
) -> None:
    last = of_a_job["count"] - 1
    ended = run(tmp_path / "run", keep=9, steps=8, only={last: {"fails": 3}}, **of_a_job)

    for process in ended:
        assert "the checkpoint of step 3 could not be saved" in process.err
        assert "count was donated or deleted" in process.err
    assert local_steps(tmp_path / "run") == {0, 6, 7}
