"""Runs of several processes, of which this one is process 0; the others are not there."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.processes import Processes
from ckpt_callbacks.testing import Recorder
from loops import callbacks_in, new_state


class Client:
    """What process 0 uses of the coordination service."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.deleted: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        self.kept[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.kept.items() if key.startswith(folder)]

    def key_value_delete(self, folder: str) -> None:
        self.deleted |= {k: v for k, v in self.kept.items() if k.startswith(f"{folder}/")}
        self.kept = {k: v for k, v in self.kept.items() if k not in self.deleted}

    def told(self, topic: str) -> list[Any]:
        """Return what was raised at a point of the run, `None` for nothing."""
        there = {**self.deleted, **self.kept}
        words = [json.loads(v) for key, v in there.items() if key.endswith("/word")]
        return [raised for at, _, raised in words if at == topic]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr("ckpt_callbacks.run.here", lambda timeout: Processes(client, 0, 1, timeout))
    return client


def fail(self: Engine) -> Any:
    raise ArithmeticError("a function of the user's")


def test_what_fails_while_the_others_are_told_of_the_run_ends_it_in_all(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "word", fail)
    recorder, before = Recorder(), set(threading.enumerate())

    with pytest.raises(ArithmeticError, match="the user's"):
        callbacks_in(tmp_path, recorder).run(new_state()).__enter__()

    raised = ["ArithmeticError", "a function of the user's"]
    assert client.told("the opening of the run directory") == [raised]
    assert not RunDirectory(tmp_path).is_mine
    assert not {t for t in set(threading.enumerate()) - before if t.name.startswith("ckpt-")}
    assert [e.status for e in recorder.of(cc.RunEnded) if isinstance(e, cc.RunEnded)] == ["failed"]


def test_a_start_that_fails_ends_the_run_once(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "begin", fail)
    recorder = Recorder()

    with pytest.raises(ArithmeticError, match="the user's"):
        callbacks_in(tmp_path, recorder).run(new_state()).__enter__()

    assert len(client.told("the opening of the run directory")) == 1
    assert len(recorder.of(cc.RunEnded)) == 1


def test_what_fails_after_the_last_step_is_told_to_the_others(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "finish_saving", fail)

    with (
        pytest.raises(ArithmeticError, match="the user's"),
        callbacks_in(tmp_path).run(new_state()) as run,
    ):
        run.on_step(0, new_state())

    assert client.told("the last checkpoint") == [["ArithmeticError", "a function of the user's"]]


def test_what_is_told_at_every_step_does_not_pile_up() -> None:
    """A run may be asked at each of millions of steps, and save at none."""
    client = Client()
    processes = Processes(client, 0, 1, 1.0)

    for step in range(12_000):
        processes.agree(f"step {step}", lambda: False)

    assert len(client.kept) < 6_000
    assert len(client.kept) + len(client.deleted) > 12_000


def test_a_run_without_checkpoints_has_nothing_to_do_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One process alone may have such a run; runs are counted alike in all."""
    monkeypatch.setattr("ckpt_callbacks.run.here", fail)

    with cc.Callbacks(Recorder()).run(new_state()) as run:
        run.on_step(0, new_state())


def test_a_run_whose_end_fails_has_failed(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "finish_saving", fail)

    with pytest.raises(ArithmeticError), callbacks_in(tmp_path).run(new_state()):
        pass

    assert RunDirectory(tmp_path).open_run().status == "failed"
