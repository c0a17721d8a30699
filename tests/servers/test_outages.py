"""Every request of a run meets a fault: the training is the same, and all is made good."""

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest

import ckpt_callbacks as cc
from servers.backends import Backend, faults
from servers.proxy import KINDS, Fault, Kind, Proxy, proxied
from servers.training import ALIASES, METRICS, expected_weights, train

# After a connection was dropped, MLflow's client leaves a socket to the garbage collector now and
# then, which says so in whatever test comes next.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
    ),
]

MOST = 500
"""Requests of a run, by far; one that makes more has lost its way."""


@dataclass(frozen=True)
class Case:
    """A kind of fault, and how often MLflow calls again by itself, not asking what is left."""

    kind: Kind
    retries: int = 0

    def __str__(self) -> str:
        return self.kind + self.retries * " and called again"


# One of MLflow's own retries makes up for most kinds; for these it may do the work twice.
CASES = [*map(Case, KINDS), *(Case(kind, 1) for kind in ("applied", "half", "applied 503"))]


@dataclass
class Pace:
    """Lets the loop wait for the tracker, so that all runs make the same requests."""

    moved: threading.Event = field(default_factory=threading.Event)
    failed: bool = False

    @cc.hookimpl
    def on_mirrored(self, event: cc.Mirrored) -> None:
        self.moved.set()

    @cc.hookimpl
    def on_mirror_failed(self, event: cc.MirrorFailed) -> None:
        self.failed = True
        self.moved.set()

    def wait(self) -> None:
        # After a failure no more: the run must come to its end in an outage too.
        if not self.failed:
            self.moved.wait(20)
        self.moved.clear()


@pytest.fixture(scope="module")
def proxy(server: Backend) -> Iterator[Proxy]:
    with proxied(server.uri) as running:
        yield running


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # hundreds of warnings that are expected
    for name in ("ckpt_callbacks", "urllib3"):
        caplog.set_level(logging.ERROR, name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def outcome(fault: Fault, proxy: Proxy, server: Backend, folder: Path) -> tuple[list[str], str]:
    """Return what is wrong after a run with a fault and one without, and which request it met.

    The request is empty if the run made fewer.
    """
    name = f"{fault.kind.replace(' ', '-')}-{fault.at}-{uuid4().hex[:6]}"
    through = Backend(proxy.address, server.files)
    # What is down stays so until the end of the run; the next one makes it good.
    drain_limit = 1.0 if fault.kind.endswith("down") else 10.0
    pace = Pace()
    proxy.begin(fault)
    trained = train(
        folder / name, through.tracker(name), pace, drain_limit=drain_limit, after_step=pace.wait
    )
    requests = proxy.requests
    proxy.begin()
    resumed = train(folder / name, through.tracker(name))
    found = faults(server, name, folder / name, ALIASES, METRICS)
    for what, weights in {"trained": trained, "resumed": resumed}.items():
        if weights != expected_weights():
            found.append(f"the {what} weights differ")
    return found, requests[fault.at - 1] if len(requests) >= fault.at else ""


def campaign(
    cases: Sequence[Case],
    proxy: Proxy,
    server: Backend,
    folder: Path,
    part: int = 0,
    parts: int = 1,
) -> tuple[list[str], int]:
    """Give each request its case, in turn, until a run makes fewer; return what was wrong.

    The second value is how far it came. Several parts take the requests in turn.
    """
    failures: list[str] = []
    turns = enumerate(itertools.cycle(cases), 1)
    for at, case in itertools.islice(turns, part, MOST, parts):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(case.retries))
            found, request = outcome(Fault(case.kind, at), proxy, server, folder)
        failures += [f"{case} at {at} ({request}): {what}" for what in found]
        if not request:
            return failures, at - 1
    raise AssertionError(f"a run makes more than {MOST} requests: {proxy.requests}")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", [0, 1])
def test_every_request_meets_a_fault(
    part: int, proxy: Proxy, server: Backend, tmp_path: Path
) -> None:
    """The short form: the kinds in turn, in two parts that may run beside each other."""
    failures, met = campaign(CASES, proxy, server, tmp_path, part, 2)

    assert not failures, "\n".join(failures)
    assert met > len(CASES)


@pytest.mark.every_fault
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_request_meets_every_fault(
    case: Case, proxy: Proxy, server: Backend, tmp_path: Path
) -> None:
    failures, met = campaign([case], proxy, server, tmp_path)

    assert not failures, "\n".join(failures)
    assert met > len(CASES)
