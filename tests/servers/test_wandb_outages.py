"""W&B while its server is down, and while every request meets a fault.

The client is W&B's own, and the server a stand-in.
"""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

import pytest
import wandb

import ckpt_callbacks as cc
from ckpt_callbacks.testing import Recorder
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import Fault, WandbServer
from servers import backends
from servers.backends import Backend, digest, files_in
from servers.processes import free_port
from servers.training import ALIASES, METRICS, expected_weights, train

NAME = "model"
"""Of the artifact; each run has a project of its own."""
ASKS_NOBODY = {"entered", "fits", "settings", "hint"}
"""What a tracker says of itself; any thread may ask."""
Kind = Literal["500", "403", "hang", "drop", "digest", "applied", "down"]
MOST = 500
"""Requests of a run, by far; one that makes more has lost its way."""

# The client takes whole seconds only, and 0 for its default, also where it counts.
_IMPATIENT = {
    "WANDB_HTTP_TIMEOUT": "1",
    "WANDB_FILE_PUSHER_TIMEOUT": "1",
    "WANDB__FILE_STREAM_TIMEOUT_SECONDS": "1",
    "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.1",
    "WANDB__GRAPHQL_RETRY_MAX": "1",
    "WANDB__FILE_TRANSFER_RETRY_MAX": "1",
    "WANDB__FILE_STREAM_RETRY_MAX": "1",
    # What a run sends of its machine is no business of ours.
    "WANDB__DISABLE_META": "true",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
} | {
    f"WANDB__{what}_RETRY_WAIT_{bound}_SECONDS": "1"
    for what in ("GRAPHQL", "FILE_TRANSFER", "FILE_STREAM")
    for bound in ("MIN", "MAX")
}


@dataclass(frozen=True)
class Case:
    """A kind of fault, and how many requests in a row meet it."""

    kind: Kind
    times: int = 1

    def __str__(self) -> str:
        return self.kind + (self.times - 1) * " and once more"


# The client's one retry makes up for most kinds; where it meets the same, the tracker has to.
CASES = [
    *map(Case, get_args(Kind)),
    *(Case(kind, 2) for kind in ("500", "hang", "drop", "applied")),
]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _IMPATIENT.items():
        monkeypatch.setenv(name, value)
    # A limit of ours on top of the client's own.
    monkeypatch.setattr("ckpt_callbacks_wandb._tracker.QUERY_SECONDS", 3)
    for name in ("MAX_RETRIES", "BACKOFF_FACTOR", "BACKOFF_JITTER"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "0")


@pytest.fixture
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ckpt_callbacks", "wandb"):
        caplog.set_level(logging.CRITICAL, name)  # hundreds of failures that are expected


def faults(server: WandbServer, name: str, directory: Path) -> list[str]:
    """Return in what the project `name` differs from exactly the checkpoints in `directory`.

    The server is asked itself, so what the tracker and the client believe does not count.
    """
    found: list[str] = []

    def expect(what: str, actual: object, expected: object) -> None:
        if actual != expected:
            found.append(f"{what}: {actual}, not {expected}")

    kept = sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())
    versions = [v for v in server.versions(name) if v.state != "DELETED"]
    expect("unfinished", [v.name for v in versions if v.state != "COMMITTED"], [])
    whole = [v for v in versions if v.state == "COMMITTED"]
    expect("steps", sorted(v.metadata["step"] for v in whole), kept)
    aliases = {alias: v.metadata["step"] for v in whole for alias in v.aliases}
    aliases.pop("latest", None)  # W&B's own
    expect("aliases", aliases, {**ALIASES, **{f"step-{step}": step for step in kept}})
    for version in whole:
        files = {path: digest(content) for path, content in version.files.items()}
        files.pop("checkpoint.json", None)
        local = files_in(directory / str(version.metadata["step"]))
        expect(f"files of {version.name}", files, {f"checkpoint/{p}": d for p, d in local.items()})

    runs = server.runs(name)
    expect("runs", [run.state for run in runs], ["finished"])
    for run in runs:
        for key, values in METRICS.items():
            rows = Counter((r["trainer/step"], r[key]) for r in run.history if key in r)
            expect(f"values of {key} that are not there", [v for v in values if v not in rows], [])
            expect(f"other values of {key}", [v for v in rows if v not in values], [])
            expect(f"values of {key} there twice", [v for v, n in rows.items() if n > 1], [])
    return found


def tracker_of(name: str) -> WandbTracker:
    return WandbTracker(name, artifact=NAME)


@dataclass
class Pace:
    """Lets the loop wait for a tracker, so that all runs make the same requests."""

    store: str = "wandb"
    moved: threading.Event = field(default_factory=threading.Event)
    failed: bool = False

    @cc.hookimpl
    def on_mirrored(self, event: cc.Mirrored) -> None:
        if event.store == self.store:
            self.moved.set()

    @cc.hookimpl
    def on_mirror_failed(self, event: cc.MirrorFailed) -> None:
        if event.store == self.store:
            self.failed = True
            self.moved.set()

    def wait(self) -> None:
        # After a failure no more: the run must come to its end in an outage too.
        if not self.failed:
            self.moved.wait(20)
        self.moved.clear()


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The names of the threads that call each method of the tracker, and W&B's client."""
    found: dict[str, set[str]] = {}

    def watch(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)
        title = f"{owner.__name__}.{name}"

        def watched(*arguments: Any, **options: Any) -> Any:
            found.setdefault(title, set()).add(threading.current_thread().name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for name, method in vars(WandbTracker).items():
        if callable(method) and not name.startswith("_") and name not in ASKS_NOBODY:
            watch(WandbTracker, name)
    for owner, names in {
        wandb: ["init"],
        wandb.Run: ["log", "log_artifact", "finish", "define_metric"],
        wandb.Artifact: ["wait", "save", "delete"],
    }.items():
        for name in names:
            watch(owner, name)
    return found


def end_of_workers(store: str) -> None:
    """Wait for calls that outlive the drain limit, as they do not outlive a process."""
    for thread in threading.enumerate():
        if thread.name == f"ckpt-{store}":
            thread.join(60)
            assert not thread.is_alive()


def test_the_thread_of_the_loop_calls_neither_the_tracker_nor_the_client(
    wandb_server: WandbServer, callers: dict[str, set[str]], tmp_path: Path
) -> None:
    pace = Pace()

    train(tmp_path / "run", tracker_of("threads"), pace, after_step=pace.wait)

    assert faults(wandb_server, "threads", tmp_path / "run") == []
    tracker = {"open", "put", "listing", "alias", "delete", "show", "log_metrics", "close"}
    assert {f"WandbTracker.{name}" for name in tracker} <= callers.keys()
    client = {"Run.log", "Run.log_artifact", "Run.finish", "wandb.init"}
    client |= {f"Artifact.{name}" for name in ("wait", "save", "delete")}
    assert client <= callers.keys()
    assert threading.current_thread().name not in set().union(*callers.values())


@pytest.mark.parametrize("drain_limit", [0.0, 3.0])
def test_training_does_not_notice_and_the_next_run_sends_everything(
    drain_limit: float,
    wandb_server: WandbServer,
    callers: dict[str, set[str]],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    wandb_server.stop()
    events = Recorder()
    stopwatch: list[float] = []

    weights = train(
        tmp_path / "run",
        tracker_of("down"),
        events,
        drain_limit=drain_limit,
        after_step=lambda: stopwatch.append(time.monotonic()),
    )
    end = time.monotonic()

    assert weights == expected_weights()
    assert end - stopwatch[-1] < drain_limit + 4  # a save is still under way when the loop ends
    (ended,) = events.of(cc.RunEnded)
    assert set(ended.unsent) == {"wandb"}
    ours = [r for r in caplog.records if r.name.startswith("ckpt_callbacks")]
    warnings = [r.getMessage() for r in ours if r.levelno >= logging.WARNING]
    (last,) = [w for w in warnings if "does not have everything yet" in w]
    assert str(tmp_path / "run") in last
    # The run may end before the first attempt has failed.
    failed = [w for w in warnings if w != last]
    assert len(failed) <= 1
    assert all("W&B: could not open" in w for w in failed)

    wandb_server.start()
    weights = train(tmp_path / "run", tracker_of("down"))

    assert weights == expected_weights()
    assert threading.current_thread().name not in set().union(*callers.values())
    assert faults(wandb_server, "down", tmp_path / "run") == []


@dataclass
class Times:
    """When each store got its last checkpoint."""

    mirrored: dict[str, float] = field(default_factory=dict)

    @cc.hookimpl
    def on_mirrored(self, event: cc.Mirrored) -> None:
        self.mirrored[event.store] = time.monotonic()


@pytest.mark.parametrize("down", ["wandb", "mlflow"])
def test_a_tracker_that_is_down_does_not_delay_the_other(
    down: str, wandb_server: WandbServer, embedded: Backend, tmp_path: Path
) -> None:
    name, directory, drain_limit = f"both-{uuid4()}", tmp_path / "run", 5.0
    absent = Backend(f"http://127.0.0.1:{free_port()}", lambda location: {})
    if down == "wandb":
        wandb_server.stop()
    trackers = {
        "wandb": tracker_of(name),
        "mlflow": (absent if down == "mlflow" else embedded).tracker(name),
    }
    (up,) = trackers.keys() - {down}
    events, times, pace = Recorder(), Times(), Pace(up)
    left: list[float] = []

    def after_step() -> None:
        pace.wait()
        left.append(time.monotonic())

    weights = train(
        directory,
        trackers[down],
        trackers[up],
        events,
        times,
        pace,
        drain_limit=drain_limit,
        after_step=after_step,
    )

    assert weights == expected_weights()
    assert not [e for e in events.of(cc.MirrorFailed) if e.store == up]
    (ended,) = events.of(cc.RunEnded)
    assert set(ended.unsent) == {down}
    assert times.mirrored.keys() == {up}
    assert times.mirrored[up] < left[-1] + drain_limit
    if up == "wandb":
        assert faults(wandb_server, name, directory) == []
    else:
        assert backends.faults(embedded, name, directory, ALIASES, METRICS) == []
        wandb_server.start()
        train(directory, tracker_of(name))
        assert faults(wandb_server, name, directory) == []
    end_of_workers(down)


def outcome(fault: Fault, server: WandbServer, folder: Path) -> tuple[list[str], str]:
    """Return what is wrong after a run with a fault and one without, and which request it met.

    The request is empty if the run made fewer.
    """
    name = f"{fault.kind}-{fault.at}-{uuid4().hex[:6]}"
    # What is down stays so until the end of the run; the next one makes it good.
    drain_limit = 1.0 if fault.kind == "down" else 10.0
    pace = Pace()
    server.begin(fault)
    trained = train(
        folder / name, tracker_of(name), pace, drain_limit=drain_limit, after_step=pace.wait
    )
    requests = [request for request in server.requests if request != "other"]
    server.begin()
    server.release()
    resumed = train(folder / name, tracker_of(name))
    found = faults(server, name, folder / name)
    for what, weights in {"trained": trained, "resumed": resumed}.items():
        if weights != expected_weights():
            found.append(f"the {what} weights differ")
    return found, requests[fault.at - 1] if len(requests) >= fault.at else ""


def campaign(
    cases: Sequence[Case], server: WandbServer, folder: Path, part: int = 0, parts: int = 1
) -> tuple[list[str], int]:
    """Give each request its case, in turn, until a run makes fewer; return what was wrong.

    The second value is how far it came. Several parts take the requests in turn.
    """
    failures: list[str] = []
    turns = enumerate(itertools.cycle(cases), 1)
    for at, case in itertools.islice(turns, part, MOST, parts):
        found, request = outcome(Fault(case.kind, at, times=case.times), server, folder)
        failures += [f"{case} at {at} ({request}): {what}" for what in found]
        if not request:
            return failures, at - 1
    raise AssertionError(f"a run makes more than {MOST} requests: {server.requests}")


@pytest.mark.usefixtures("_quiet")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", [0, 1])
def test_every_request_meets_a_fault(part: int, wandb_server: WandbServer, tmp_path: Path) -> None:
    """The short form: the kinds in turn, in two parts that may run beside each other."""
    failures, met = campaign(CASES, wandb_server, tmp_path, part, 2)

    assert not failures, "\n".join(failures)
    assert met > len(CASES)
    assert wandb_server.unknown == []


@pytest.mark.every_fault
@pytest.mark.usefixtures("_quiet")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_request_meets_every_fault(
    case: Case, wandb_server: WandbServer, tmp_path: Path
) -> None:
    failures, met = campaign([case], wandb_server, tmp_path)

    assert not failures, "\n".join(failures)
    assert met > len(CASES)
    assert wandb_server.unknown == []
