"""What was held while W&B was out of reach arrives later: each thing whole, and once."""

import base64
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from wandb.proto.wandb_internal_pb2 import Record

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.plan import Alias, Delete, Publish, View, next_action
from ckpt_callbacks.policy import Candidate
from ckpt_callbacks.retention import decide
from ckpt_callbacks.stores import Checkpoint, MetricPoint, RunInfo
from ckpt_callbacks.testing import Recorder, make_checkpoint
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import Fault, StoredVersion, WandbServer
from loops import KEEP, callbacks_in, train

HERE = Path(__file__).parent
SCORES = {1: 0.9, 3: 0.5, 5: 0.7}
KEPT = {1, 6, 7}
"""What `KEEP` keeps of 8 steps with these scores."""


class Mirrors:
    """Waits until the tracker has a checkpoint."""

    def __init__(self) -> None:
        self._there: defaultdict[int, threading.Event] = defaultdict(threading.Event)

    @cc.hookimpl
    def on_mirrored(self, event: cc.Mirrored) -> None:
        self._there[event.step].set()

    def wait_before(self, step: int, run: cc.Run[Any]) -> None:
        """Wait for the checkpoint before `step`; without, some are passed over."""
        if step > run.next_step:
            assert self._there[step - 1].wait(30), f"step {step - 1} was not mirrored"


def offline(**options: Any) -> WandbTracker:
    return WandbTracker("p", mode="offline", artifact="digits", **options)


def online(**options: Any) -> WandbTracker:
    return WandbTracker("p", mode="online", artifact="digits", **options)


def train_all(root: Path, tracker: WandbTracker, *plugins: object, **options: Any) -> None:
    """Take 8 steps, of which the tracker gets every checkpoint."""
    mirrors = Mirrors()
    callbacks = callbacks_in(root, tracker, mirrors, *plugins, drain_limit=60)
    train(callbacks, 8, SCORES, before=mirrors.wait_before, **options)


def logs() -> list[Path]:
    """Return the logs of all starts, oldest first."""
    found = Path(os.environ["WANDB_DIR"]).glob("wandb/*run-*/run-*.wandb")
    return sorted(found, key=lambda p: p.stat().st_mtime)


def records_in(path: Path) -> Iterator[Record]:
    """Yield the records of a log, whose chunks must all be whole."""
    content, at, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at < len(content):
        room = 32 * 1024 - at % (32 * 1024)
        if room < 7:
            at += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + data) == checksum
        at, parts = at + 7 + length, parts + data
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def logged(kind: str) -> list[Any]:
    """Return what all logs hold of one kind."""
    records = [r for path in logs() for r in records_in(path)]
    return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]


def values_of(items: Iterable[Any]) -> dict[str, Any]:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def held(root: Path) -> set[int]:
    """Return the steps of which something is held for W&B."""
    scratch = RunDirectory(root).scratch("wandb")
    return {int(p.name) for p in scratch.iterdir() if p.name.isdecimal()}


def states(root: Path) -> dict[int, str]:
    """Return what the records say of W&B's copies."""
    records = RunDirectory(root).read_records()
    return {s: r.copies["wandb"].state for s, r in records.items() if "wandb" in r.copies}


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def remove(folder: Path) -> None:
    """Remove a checkpoint as a person does, although its files are read-only."""
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def there(server: WandbServer) -> dict[int, StoredVersion]:
    """Return the complete versions by step, of which there is one each."""
    found = [v for v in server.versions("p", "digits") if v.state == "COMMITTED"]
    by_step = {v.metadata["step"]: v for v in found}
    assert len(by_step) == len(found)
    return by_step


def checkpoint_in(version: StoredVersion) -> dict[str, bytes]:
    prefix = "checkpoint/"
    files = version.files.items()
    return {n.removeprefix(prefix): content for n, content in files if n.startswith(prefix)}


def aliases(server: WandbServer) -> dict[str, int]:
    """Return the step that each alias names, but for W&B's own."""
    found = {a: step for step, version in there(server).items() for a in version.aliases}
    found.pop("latest", None)
    return found


def values(server: WandbServer, name: str) -> list[tuple[int, float]]:
    """Return the values of a metric that the one run has, with our own step, in order of both."""
    (run,) = server.runs("p")
    return sorted((row["trainer/step"], row[name]) for row in run.history if name in row)


def losses(steps: int) -> list[tuple[int, float]]:
    return [(step, float(step)) for step in range(steps)]


def own_service() -> dict[str, str]:
    """Return the environment of a process with a W&B service of its own."""
    environment = {k: v for k, v in os.environ.items() if "SERVICE" not in k}
    return {**environment, "JAX_PLATFORMS": "cpu"}


# what an offline run leaves ----------------------------------------------------------------------


def test_the_log_of_an_offline_run_has_all_of_it(tmp_path: Path) -> None:
    train_all(tmp_path / "run", offline(), config={"lr": 0.1, "width": 32})

    named: dict[str, int] = {}
    for artifact in logged("artifact"):
        assert artifact.name == "digits"
        about = json.loads(artifact.metadata)
        named |= dict.fromkeys(artifact.aliases, about["step"])
    assert {named.pop(f"step-{step}") for step in range(8)} == set(range(8))
    assert named == {"best": 1, "last": 7, "latest": 7}
    rows = [values_of(record.item) for record in logged("history")]
    assert [(r["trainer/step"], r["loss"]) for r in rows if "loss" in r] == losses(8)
    assert {r["trainer/step"]: r["score"] for r in rows if "score" in r} == SCORES
    (run,) = logged("run")
    config = values_of(run.config.update)
    assert (config["lr"], config["width"]) == (0.1, 32)


def test_what_is_held_offline_is_called_staged(tmp_path: Path) -> None:
    recorder = Recorder()

    train_all(tmp_path / "run", offline(), recorder)

    assert states(tmp_path / "run") == dict.fromkeys(KEPT, "staged")
    assert [(e.step, e.state) for e in recorder.events if isinstance(e, cc.Mirrored)] == [
        (step, "staged") for step in range(8)
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
import ckpt_callbacks as cc
from ckpt_callbacks_wandb import WandbTracker
from loops import KEEP, callbacks_in, train

class Killer:
    @cc.hookimpl
    def on_mirrored(self, event):
        if event.step == 3:
            os.killpg(0, signal.SIGKILL)

tracker = WandbTracker("p", mode="offline", artifact="digits")
train(callbacks_in(Path(sys.argv[1]), tracker, Killer()), 4, before=lambda step, run: run.wait())
"""


def test_what_was_handed_over_offline_survives_a_kill_right_after(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "run"],
        cwd=HERE,
        env=own_service(),
        start_new_session=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL

    named = {a: json.loads(r.metadata)["step"] for r in logged("artifact") for a in r.aliases}
    assert named["step-3"] == named["last"] == 3


class Measures:
    """Notes how much is held, whenever that changes or may have changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.size = 0
        self.most_bytes = self.most_steps = 0

    def measure(self) -> None:
        scratch = RunDirectory(self._root).scratch("wandb")
        files = [p.stat() for p in scratch.glob("*/files/**/*") if p.is_file()]
        self.most_bytes = max(self.most_bytes, sum(s.st_size for s in files))
        self.most_steps = max(self.most_steps, len(held(self._root)))

    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        self.size = max(self.size, event.bytes)

    @cc.hookimpl
    def on_mirrored(self, event: cc.Mirrored) -> None:
        self.measure()  # on the thread that holds and releases

    @cc.hookimpl
    def on_evicted(self, event: cc.Evicted) -> None:
        if event.store == "wandb":
            self.measure()


def test_a_run_holds_no_more_than_is_kept_and_one(tmp_path: Path) -> None:
    root, measures = tmp_path / "run", Measures(tmp_path / "run")

    train(
        callbacks_in(root, offline(), measures, drain_limit=60),
        60,
        {1: 0.9, 30: 0.95},
        before=lambda step, run: run.wait(),
    )

    assert held(root) == {30, 58, 59}
    assert measures.most_steps <= 4
    assert 0 < measures.most_bytes <= 4 * measures.size


@pytest.mark.slow
def test_over_many_saves_no_more_is_held_than_is_kept_and_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker does what the plan says; Orbax alone would take a minute for so many."""
    monkeypatch.setattr("ckpt_callbacks_wandb._run.FLUSH_SECONDS", 0.001)
    monkeypatch.setattr("ckpt_callbacks_wandb._log._POLL_SECONDS", 0.001)
    scratch, tracker, view = tmp_path / "scratch", offline(), View(frozenset(), {})
    scratch.mkdir()
    tracker.open(RunInfo("0123456789ab", "digits", {}, scratch, {}))
    there: dict[int, Checkpoint] = {}

    for step in range(1000):
        score = {"score": float(step)} if step % 100 == 1 else {}
        there[step] = replace(make_checkpoint(tmp_path, step, b"x" * 1000), metrics=score)
        size = sum(file.size for file in there[step].files.values())
        history = [Candidate(c.step, c.metrics, 0.0) for c in there.values()]
        decision = decide(KEEP, history)
        while action := next_action(KEEP, history, decision, view, there.keys()):
            match action:
                case Publish(which, names):
                    tracker.put(there[which], names)
                    view = replace(view, aliases={**view.aliases, **dict.fromkeys(names, which)})
                case Alias(name, which):
                    tracker.alias(name, which)
                case Delete(which):
                    tracker.delete(which)
            view = view.after(action)
            files = [p.stat() for p in scratch.glob("*/files/**/*") if p.is_file()]
            assert sum(s.st_size for s in files) <= (len(decision.kept) + 1) * size
        assert {int(p.name) for p in scratch.glob("[0-9]*")} == set(decision.kept)
        for gone in there.keys() - decision.kept.keys():
            remove(there.pop(gone).path)
    tracker.close("finished")


# what a sync sends -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sync", "the next run"])
def test_what_a_person_removed_here_still_arrives_whole(
    tmp_path: Path, wandb_server: WandbServer, how: str
) -> None:
    root = tmp_path / "run"
    train_all(root, offline())
    saved = files_in(root / "1")
    remove(root / "1")

    if how == "sync":
        assert cc.sync(root, timeout=60) == {}
    else:
        train(callbacks_in(root, online(), drain_limit=60), 9)

    assert checkpoint_in(there(wandb_server)[1]) == saved
    assert aliases(wandb_server)["best"] == 1
    assert held(root) == set()


def test_a_sync_sends_all_that_is_held_even_if_nothing_is_here(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    root = tmp_path / "run"
    train_all(root, offline())
    saved = {step: files_in(root / str(step)) for step in KEPT}
    for step in KEPT:
        remove(root / str(step))

    assert cc.sync(root, timeout=60) == {}

    assert {s: checkpoint_in(v) for s, v in there(wandb_server).items()} == saved


def test_a_sync_uploads_only_what_is_still_kept(tmp_path: Path, wandb_server: WandbServer) -> None:
    root = tmp_path / "run"
    train_all(root, offline())
    saved = {step: files_in(root / str(step)) for step in KEPT}

    assert cc.sync(root, timeout=60) == {}

    assert {v.metadata["step"] for v in wandb_server.versions("p")} == KEPT
    assert wandb_server.requests.count("CreateArtifact") == 3
    assert {s: checkpoint_in(v) for s, v in there(wandb_server).items()} == saved
    assert aliases(wandb_server) == {"best": 1, "last": 7} | {f"step-{s}": s for s in KEPT}
    assert wandb_server.unknown == []


def test_a_sync_sends_every_value_once(tmp_path: Path, wandb_server: WandbServer) -> None:
    train_all(tmp_path / "run", offline(), config={"lr": 0.1})

    assert cc.sync(tmp_path / "run", timeout=60) == {}

    assert values(wandb_server, "loss") == losses(8)
    assert values(wandb_server, "score") == sorted(SCORES.items())


def test_what_an_offline_run_knew_of_itself_is_there_after_a_sync(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    train_all(tmp_path / "run", offline(run_name="first"), config={"lr": 0.1})

    assert cc.sync(tmp_path / "run", timeout=60) == {}

    (run,) = wandb_server.runs("p")
    assert (run.display_name, run.state) == ("first", "finished")
    assert run.config["lr"] == 0.1


def test_files_logged_offline_are_there_after_a_sync(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    plot = tmp_path / "plot.svg"
    plot.write_bytes(b"<svg/>")
    train(
        callbacks_in(tmp_path / "run", offline(), drain_limit=60),
        2,
        before=lambda step, run: run.log_artifact(plot),
    )
    plot.unlink()

    assert cc.sync(tmp_path / "run", timeout=60) == {}

    (run,) = wandb_server.runs("p")
    assert run.files["artifacts/plot.svg"] == b"<svg/>"


def test_after_a_sync_nothing_is_held_and_all_is_confirmed(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    train_all(tmp_path / "run", offline())
    assert held(tmp_path / "run") == KEPT

    assert cc.sync(tmp_path / "run", timeout=60) == {}

    assert held(tmp_path / "run") == set()
    assert states(tmp_path / "run") == dict.fromkeys(KEPT, "confirmed")


def test_a_second_sync_sends_nothing(tmp_path: Path, wandb_server: WandbServer) -> None:
    root = tmp_path / "run"
    train_all(root, offline())
    cc.sync(root, timeout=60)
    before = wandb_server.versions("p"), wandb_server.run("p", wandb_server.runs("p")[0].id).history
    wandb_server.begin()

    assert cc.sync(root, timeout=60) == {}

    assert "CreateArtifact" not in wandb_server.requests
    after = wandb_server.versions("p"), wandb_server.run("p", wandb_server.runs("p")[0].id).history
    assert after == before


# W&B's own sync ----------------------------------------------------------------------------------


def sync_with_wandb() -> None:
    """Send all that is there with W&B's own command, as a person may."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(p.parent) for p in logs())]
    done = subprocess.run(command, env=own_service(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_wandbs_own_sync_left_unfinished_is_told_and_removed(
    tmp_path: Path, wandb_server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It begins the versions whose files are released, and says nothing."""
    root = tmp_path / "run"
    train_all(root, offline())
    sync_with_wandb()
    pending = {v.metadata["step"] for v in wandb_server.versions("p") if v.state == "PENDING"}
    assert pending == set(range(8)) - KEPT

    assert cc.sync(root, timeout=60) == {}

    assert "PENDING" not in {v.state for v in wandb_server.versions("p")}
    assert set(there(wandb_server)) == KEPT
    (message,) = [m for m in caplog.messages if "never finished" in m]
    assert "removed 5 version(s)" in message


def test_what_wandbs_own_sync_sent_is_not_sent_again(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    root = tmp_path / "run"
    train_all(root, offline())
    sync_with_wandb()
    wandb_server.begin()

    assert cc.sync(root, timeout=60) == {}

    assert "CreateArtifact" not in wandb_server.requests
    assert values(wandb_server, "loss") == losses(8)
    assert values(wandb_server, "score") == sorted(SCORES.items())
    assert aliases(wandb_server) == {"best": 1, "last": 7} | {f"step-{s}": s for s in KEPT}
    assert held(root) == set()
    assert states(root) == dict.fromkeys(KEPT, "confirmed")


# each value once ---------------------------------------------------------------------------------


def test_values_of_several_offline_starts_are_sent_once_each(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    for steps in (3, 6, 9):
        train(callbacks_in(tmp_path / "run", offline()), steps, {1: 0.9, 4: 0.5})

    assert cc.sync(tmp_path / "run", timeout=60) == {}

    assert values(wandb_server, "loss") == losses(9)
    assert values(wandb_server, "score") == [(1, 0.9), (4, 0.5)]


def test_values_of_starts_within_one_second_are_all_sent(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    """W&B names the folder of a start by the second."""
    info = RunInfo("0123456789ab", "digits", {}, tmp_path / "scratch", {})
    info.scratch.mkdir()
    for step in range(6):  # of a few hundredths of a second each
        tracker = offline()
        tracker.open(info)
        tracker.log_metrics([MetricPoint(step, float(step), {"loss": float(step)})])
        tracker.close("finished")
    assert len(logs()) == 6

    tracker = online()
    tracker.open(info)
    tracker.close("finished")

    assert values(wandb_server, "loss") == losses(6)


ONLINE = """
import sys
from pathlib import Path
from ckpt_callbacks_wandb import WandbTracker
from loops import KEEP, callbacks_in, train

class Tells(WandbTracker):
    def log_metrics(self, points):
        super().log_metrics(points)
        print(max(point.step for point in points), flush=True)

def stay(step, run):
    if step in (10, 20):
        input()

train(callbacks_in(Path(sys.argv[1]), Tells("p", artifact="digits")), 30, before=stay)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at"), [("hang", 1), ("applied", 2)])
def test_after_a_kill_while_the_server_does_not_answer_a_resumed_run_has_every_value_once(
    tmp_path: Path, wandb_server: WandbServer, kind: Literal["hang", "applied"], at: int
) -> None:
    """With `applied` some rows have arrived, and the client does not know it."""
    wandb_server.begin(Fault(kind, at=at, request="POST file_stream", times=1000))
    with subprocess.Popen(
        [sys.executable, "-c", ONLINE, str(tmp_path / "run")],
        cwd=HERE,
        env=own_service(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        assert child.stdin
        assert child.stdout
        assert "9" in (line.strip() for line in child.stdout)
        while kind == "applied" and not wandb_server.runs("p")[0].history:
            time.sleep(0.02)  # the client streams every 15 s; of a request that is done none tells
        child.stdin.write("go on\n")
        child.stdin.flush()
        assert "19" in (line.strip() for line in child.stdout)
        os.killpg(child.pid, signal.SIGKILL)
    assert "POST file_stream" in wandb_server.requests
    wandb_server.begin()
    wandb_server.release()
    arrived = len(wandb_server.runs("p")[0].history)
    assert (arrived > 0, arrived < 20) == (kind == "applied", True)

    train(callbacks_in(tmp_path / "run", online(), drain_limit=60), 30)

    assert values(wandb_server, "loss") == losses(30)


def test_a_run_that_went_back_loses_no_value_and_discards_the_newer_versions(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    root = tmp_path / "run"
    scores = {0: 0.1, 1: 0.2, 2: 0.9, 3: 0.3, 4: 0.4, 5: 0.5}
    train(callbacks_in(root, online(), drain_limit=60), 6, scores)
    discarded = {s: v.id for s, v in there(wandb_server).items() if s > 2}
    assert set(discarded) == {4, 5}

    again = {3: 0.6, 4: 0.7}
    callbacks = callbacks_in(root, online(), drain_limit=60)
    train(callbacks, 5, again, resume=2, discard_newer=True)

    assert values(wandb_server, "score") == sorted([*scores.items(), *again.items()])
    assert values(wandb_server, "loss") == sorted([*losses(6), (3, 3.0), (4, 4.0)])
    assert set(there(wandb_server)) == {2, 3, 4}
    assert {wandb_server.version(v).state for v in discarded.values()} == {"DELETED"}


# the key -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault("403", request="UpsertBucket"),
        Fault("403", request="CreateArtifact"),
        Fault("403", request="PUT file", times=20),  # the client asks for another address first
    ],
    ids=lambda fault: fault.request,
)
def test_the_key_is_written_nowhere(
    tmp_path: Path,
    wandb_server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    fault: Fault,
) -> None:
    key = "4e1243bd22c66e76c2ba9eddc1f91394e57f9f83"
    monkeypatch.setenv("WANDB_API_KEY", key)
    recorder = Recorder()
    wandb_server.begin(fault)

    with caplog.at_level("DEBUG"):
        train(callbacks_in(tmp_path / "run", online(), recorder, drain_limit=60), 3)

    assert recorder.of(cc.MirrorFailed)
    written, output = files_in(tmp_path), capfd.readouterr()
    texts = [caplog.text, repr(recorder.events), output.out, output.err]
    for secret in (key, base64.b64encode(f"api:{key}".encode()).decode()):
        assert not [name for name, content in written.items() if secret.encode() in content]
        assert not [text for text in texts if secret in text]
