"""A server that is down when training begins, and for as long as it lasts."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from urllib3.connectionpool import HTTPConnectionPool

import ckpt_callbacks as cc
from ckpt_callbacks.testing import Recorder
from ckpt_callbacks_mlflow import MLflowTracker
from servers.backends import Backend, faults
from servers.processes import free_port
from servers.proxy import proxied
from servers.training import ALIASES, METRICS, expected_weights, train

ASKS_NOBODY = {"entered", "fits", "settings", "hint"}
"""What a tracker says of itself; any thread may ask."""


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """The names of the threads that call each method of the tracker, and that send requests."""
    found: dict[str, set[str]] = {}

    def watch(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            found.setdefault(name, set()).add(threading.current_thread().name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for name, method in vars(MLflowTracker).items():
        if callable(method) and not name.startswith("_") and name not in ASKS_NOBODY:
            watch(MLflowTracker, name)
    watch(HTTPConnectionPool, "urlopen")
    return found


def end_of_workers() -> None:
    """Wait for calls that outlive the drain limit, as they do not outlive a process."""
    for thread in threading.enumerate():
        if thread.name == "ckpt-mlflow":
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("drain_limit", [0.0, 3.0])
def test_training_does_not_notice_and_the_next_run_sends_everything(
    drain_limit: float,
    server: Backend,
    callers: dict[str, set[str]],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    port, name = free_port(), f"down-{uuid4()}"
    absent = Backend(f"http://127.0.0.1:{port}", server.files)
    events = Recorder()
    stopwatch: list[float] = []

    weights = train(
        tmp_path / "run",
        absent.tracker(name),
        events,
        drain_limit=drain_limit,
        after_step=lambda: stopwatch.append(time.monotonic()),
    )
    end = time.monotonic()

    assert weights == expected_weights()
    assert end - stopwatch[-1] < drain_limit + 4  # a save is still under way when the loop ends
    (ended,) = events.of(cc.RunEnded)
    assert set(ended.unsent) == {"mlflow"}
    # Of every library: all of it reaches the terminal.
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    (last,) = [w for w in warnings if "does not have everything yet" in w]
    assert str(tmp_path / "run") in last
    failed = [w for w in warnings if w != last]
    # With no time to drain, the run may end before the first attempt has failed.
    assert len(failed) == 1 if drain_limit else len(failed) <= 1
    assert all("MLflow: could not open" in w and str(port) in w for w in failed)

    end_of_workers()
    with proxied(server.uri, port):
        train(tmp_path / "run", absent.tracker(name))

    assert {"open", "put", "alias", "log_metrics", "close", "urlopen"} <= callers.keys()
    assert threading.current_thread().name not in set().union(*callers.values())
    assert faults(server, name, tmp_path / "run", ALIASES, METRICS) == []


def test_a_server_that_never_answers_holds_up_no_training(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        absent = Backend(f"http://127.0.0.1:{silent.getsockname()[1]}", lambda location: {})
        began = time.monotonic()

        weights = train(tmp_path / "run", absent.tracker("silent"), drain_limit=1.0)

        assert weights == expected_weights()
        # MLflow waits a minute for an answer, and the training takes a second or two.
        assert time.monotonic() - began < 15
    end_of_workers()
