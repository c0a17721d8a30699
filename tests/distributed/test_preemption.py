"""The notice of a preemption on one process stops all of them at one step, which is saved."""

import signal
from pathlib import Path

import pytest

from distributed.launch import Ended, job, run
from loops import local_steps

ENDLESS = {"steps": 100_000, "slow": 0.01}


def check_stopped(directory: Path, ended: list[Ended], of_a_job: dict[str, int]) -> None:
    """All stopped after one step, which the next start goes on from."""
    (last,) = {process.last("last") for process in ended}
    (digest,) = {str(process.last("digest")) for process in ended}
    assert all(process.last("stopped") for process in ended)
    assert last in local_steps(directory)
    assert last < ENDLESS["steps"] - 1

    for process in run(directory, steps=last + 1, **of_a_job):
        assert process.last("next_step") == last + 1
        assert str(process.last("restored")) == digest


@pytest.fixture
def of_a_job(count: int) -> dict[str, int]:
    return {"count": count, "devices": 4 // count}


def test_in_a_step(tmp_path: Path, of_a_job: dict[str, int]) -> None:
    with job(tmp_path / "run", every=10**6, **ENDLESS, **of_a_job) as processes:
        for process in processes:
            process.until("step")
        processes[-1].signal(signal.SIGTERM)
        ended = processes.end()

    check_stopped(tmp_path / "run", ended, of_a_job)


def test_in_a_save(tmp_path: Path, of_a_job: dict[str, int]) -> None:
    only = {0: {"terminate_at": "orbax-committed"}}
    with job(tmp_path / "run", every=10, only=only, **ENDLESS, **of_a_job) as processes:
        ended = processes.end()

    check_stopped(tmp_path / "run", ended, of_a_job)


def test_in_every_process_at_once_as_schedulers_do(
    tmp_path: Path, of_a_job: dict[str, int]
) -> None:
    with job(tmp_path / "run", every=10, **ENDLESS, **of_a_job) as processes:
        for process in processes:
            process.until("step")
        for process in processes:
            process.signal(signal.SIGTERM)
        ended = processes.end()

    check_stopped(tmp_path / "run", ended, of_a_job)
