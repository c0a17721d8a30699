"""Files of the user's: copied at once, sent to every tracker, whatever happens on the way."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks import failpoints
from ckpt_callbacks.artifacts import Spool
from ckpt_callbacks.testing import MemoryStore, Recorder
from loops import callbacks_in, new_state, train

HERE = Path(__file__).parent


def spooled(root: Path) -> list[str]:
    """Return what is in the spool of a run directory, hidden names too."""
    return sorted(p.name for p in (root / ".ckpt_callbacks" / "artifacts").iterdir())


def short(root: Path, *stores: object) -> cc.Run[Any]:
    """Return a run that waits a moment only for its stores."""
    checkpoint = cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(2))
    return cc.Callbacks(checkpoint, *stores, drain_limit=0.5).run(new_state())


def log(run: cc.Run[Any], folder: Path, content: str, name: str | None = None) -> None:
    """Log a file that is gone when this returns."""
    path = folder / "plot.svg"
    path.write_text(content)
    run.log_artifact(path, name)
    path.write_text("it was changed afterwards")
    path.unlink()


def test_a_file_reaches_every_tracker_and_then_its_copy_goes(tmp_path: Path) -> None:
    root, one, two = tmp_path / "run", MemoryStore("one"), MemoryStore("two")
    with callbacks_in(root, one, two).run(new_state()) as run:
        log(run, tmp_path, "<svg/>")
        log(run, tmp_path, "old", "plots/loss.svg")
        log(run, tmp_path, "new", "plots/loss.svg")

    assert one.files == two.files == {"plot.svg": b"<svg/>", "plots/loss.svg": b"new"}
    assert spooled(root) == []


@pytest.mark.parametrize("name", ["a", "a/b c/d.txt", "äöü.txt", "..a", ".hidden", "x" * 255])
def test_a_name_goes_through_as_it_is(name: str, tmp_path: Path) -> None:
    store = MemoryStore()
    with callbacks_in(tmp_path / "run", store).run(new_state()) as run:
        log(run, tmp_path, "text", name)

    assert store.files == {name: b"text"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        (7, "is no text"),
        ("/etc/passwd", "is absolute"),
        ("plots/", "has an empty part"),
        ("plots//a", "has an empty part"),
        ("../a", r"has a part '.' or '..'"),
        ("a/../b", r"has a part '.' or '..'"),
        ("./a", r"has a part '.' or '..'"),
        ("a\\b", "has a backslash"),
        ("a\nb", "is not printable"),
        ("\udc80", "is not printable"),
        ("a/" + "ä" * 128, "more than 255 bytes"),
        ("checkpoints/5", "is in checkpoints/"),
        ("checkpoints", "is in checkpoints/"),
    ],
)
@pytest.mark.parametrize("plugins", [True, False])
def test_a_name_that_can_not_be_used_is_refused_at_once(
    name: str, problem: str, plugins: bool, tmp_path: Path
) -> None:
    callbacks = callbacks_in(tmp_path / "run", MemoryStore()) if plugins else cc.Callbacks()
    with callbacks.run(new_state()) as run, pytest.raises(cc.ConfigError, match=problem):
        log(run, tmp_path, "text", name)


@pytest.mark.parametrize("path", [".", "no/such/file", "/dev/null"])
def test_what_is_no_file_is_refused_at_once(path: str, tmp_path: Path) -> None:
    callbacks = callbacks_in(tmp_path / "run")
    refused = pytest.raises(cc.ConfigError, match=r"log_artifact: .* is no file")
    with callbacks.run(new_state()) as run, refused:
        run.log_artifact(path, "name")


def test_outside_of_the_run_it_is_an_error_and_without_a_directory_it_does_nothing(
    tmp_path: Path,
) -> None:
    run = callbacks_in(tmp_path / "run").run(new_state())
    for _ in range(2):  # before and after
        with pytest.raises(cc.UsageError, match="log_artifact was called outside of the with"):
            log(run, tmp_path, "text")
        if not run._entered:
            with run:
                log(run, tmp_path, "text")
    assert not (tmp_path / "run" / ".ckpt_callbacks" / "artifacts").exists(), "nobody wants it"

    with cc.Callbacks().run(new_state()) as alone:
        log(alone, tmp_path, "text")


def test_what_an_outage_held_up_is_sent_by_the_next_run_in_order(tmp_path: Path) -> None:
    root, store, other = tmp_path / "run", MemoryStore("one"), MemoryStore("two")
    store.down = True
    with short(root, store, other) as run:
        log(run, tmp_path, "old", "a.txt")
        log(run, tmp_path, "text", "b.txt")
        log(run, tmp_path, "new", "a.txt")
    assert other.files == {"a.txt": b"new", "b.txt": b"text"}
    assert len(spooled(root)) == 3
    store.down = False
    other.calls.clear()

    with callbacks_in(root, store, other).run(new_state()) as run:
        log(run, tmp_path, "newer", "a.txt")

    assert store.files == other.files == {"a.txt": b"newer", "b.txt": b"text"}
    assert other.calls.count("log_artifact") == 1, "it was sent again"
    assert spooled(root) == []


def test_a_lost_reply_means_that_it_is_sent_again(tmp_path: Path) -> None:
    store = MemoryStore()

    def lose(call: str) -> None:
        if call == "log_artifact" and store.calls.count(call) == 1:
            store.lose_reply = True

    store.before = lose
    with callbacks_in(tmp_path / "run", store).run(new_state()) as run:
        log(run, tmp_path, "text")

    assert store.calls.count("log_artifact") == 2
    assert store.files == {"plot.svg": b"text"}
    assert spooled(tmp_path / "run") == []


def refusing(*refused: str) -> Any:
    def before(call: str) -> None:
        if call in refused:
            raise ConnectionError(f"no {call} today")

    return before


def test_a_file_that_is_refused_for_good_holds_back_no_other_file(tmp_path: Path) -> None:
    class Picky(MemoryStore):
        def log_artifact(self, path: Path, name: str) -> None:
            if path.read_text() == "bad":
                raise ValueError("not this one")
            super().log_artifact(path, name)

    store = Picky()
    with short(tmp_path / "run", store) as run:
        for content, name in (("bad", "a"), ("later", "a"), ("good", "b"), ("good", "c")):
            (tmp_path / "file").write_text(content)
            run.log_artifact(tmp_path / "file", name)

    # A later one of the same name waits, else it would be replaced by the earlier one.
    assert store.files == {"b": b"good", "c": b"good"}


def test_a_file_that_is_refused_holds_back_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, recorder = tmp_path / "run", Recorder()
    store = MemoryStore(before=refusing("log_artifact"))
    with short(root, store, recorder) as run:
        log(run, tmp_path, "text")
        for step in range(3):
            run.on_step(step, new_state(), {"loss": 1.0})

    assert set(store.copies) == {1, 2}
    assert store.aliases == {"last": 2}
    assert [p.step for p in store.points] == [0, 1, 2]
    assert len(recorder.of(cc.MirrorFailed)) == 1, "it is told once"
    assert (
        "Memory: could not log file 'plot.svg': ConnectionError: no log_artifact today"
        in caplog.text
    )
    (ended,) = recorder.of(cc.RunEnded)
    assert ended.unsent == {"memory": "1 file (ConnectionError: no log_artifact today)"}  # type: ignore[attr-defined]


def test_nothing_else_that_is_refused_holds_back_a_file(tmp_path: Path) -> None:
    store = MemoryStore(before=refusing("put", "log_metrics"))
    with short(tmp_path / "run", store) as run:
        run.on_step(0, new_state(), {"loss": 1.0})
        run.wait()
        log(run, tmp_path, "text")

    assert store.files == {"plot.svg": b"text"}
    assert not store.copies
    assert not store.points


def test_a_tracker_that_joins_later_gets_what_comes_from_then_on(tmp_path: Path) -> None:
    root, one, two = tmp_path / "run", MemoryStore("one"), MemoryStore("two")
    one.down = True
    with short(root, one) as run:
        log(run, tmp_path, "old", "old.txt")
    one.down = False

    with callbacks_in(root, one, two).run(new_state()) as run:
        log(run, tmp_path, "new", "new.txt")

    assert one.files == {"old.txt": b"old", "new.txt": b"new"}
    assert two.files == {"new.txt": b"new"}
    assert spooled(root) == []


def test_a_tracker_that_a_run_does_without_gets_it_when_it_is_back(tmp_path: Path) -> None:
    root, one, two = tmp_path / "run", MemoryStore("one"), MemoryStore("two")
    train(callbacks_in(root, one, two), 1)
    with callbacks_in(root, one).run(new_state()) as run:
        log(run, tmp_path, "text")
    assert one.files == {"plot.svg": b"text"}
    assert len(spooled(root)) == 1

    train(callbacks_in(root, one, two), 1)

    assert two.files == one.files
    assert spooled(root) == []


def test_it_may_come_from_any_thread(tmp_path: Path) -> None:
    store = MemoryStore()
    with callbacks_in(tmp_path / "run", store).run(new_state()) as run:

        def plot(number: int) -> None:
            path = tmp_path / f"{number}.txt"
            path.write_text(str(number))
            run.log_artifact(path)

        threads = [threading.Thread(target=plot, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert store.files == {f"{n}.txt": str(n).encode() for n in range(20)}


FORK = """
import os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")  # of JAX, which does not like forks
from ckpt_callbacks.testing import MemoryStore
from loops import callbacks_in, new_state

root, store = Path(sys.argv[1]), MemoryStore()
path = root / "a.txt"
path.write_text("text")
with callbacks_in(root / "run", store).run(new_state()) as run:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run.log_artifact(path)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert not (root / "run/.ckpt_callbacks/artifacts").exists()
    run.log_artifact(path, "b.txt")
assert list(store.files) == ["b.txt"], store.files
"""


def test_in_a_forked_child_it_does_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, tmp_path]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, timeout=120, cwd=HERE, check=False
    )

    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(source: Path, target: Path) -> None:
        target.write_text("ha")
        raise OSError(28, "No space left on device")

    root, store = tmp_path / "run", MemoryStore()
    with callbacks_in(root, store).run(new_state()) as run:
        with monkeypatch.context() as full:
            full.setattr("shutil.copyfile", cut)
            log(run, tmp_path, "half")
        assert spooled(root) == []
        log(run, tmp_path, "whole")

    assert "plot.svg is not sent: [Errno 28] No space left on device" in caplog.text
    assert store.files == {"plot.svg": b"whole"}


def test_at_the_failpoints_a_copy_is_whole_or_does_not_count(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "artifacts", ["one"])
    path = tmp_path / "a.txt"
    path.write_text("text")
    counted: dict[str, int] = {}

    def look(point: str) -> None:
        counted[point] = len(Spool(tmp_path / "other", ["one"]).lacking("one"))
        there = [p for p in (tmp_path / "artifacts").iterdir() if p.name.isdecimal()]
        counted[point] = len(there)
        assert all((p / "file" / "a.txt").read_text() == "text" for p in there)

    failpoints.arm(look)
    try:
        spool.add(path, "a.txt")
        (artifact,) = spool.lacking("one")
        spool.sent("one", artifact)
    finally:
        failpoints.arm(None)

    assert {p: n for p, n in counted.items() if p.startswith("artifact")} == {
        "artifact-copied": 0,
        "artifact-kept": 1,
        "artifact-noted": 1,
        "artifact-removed": 0,
    }


KILLED = """
import os, signal, sys
from pathlib import Path
from ckpt_callbacks.artifacts import Spool

root = Path(sys.argv[1])
spool = Spool(root / "artifacts", ["one", "two"])
for name in ("a", "b", "c"):
    (root / name).write_text(name)
    spool.add(root / name, f"{name}/{name}")
spool.sent("one", spool.lacking("one")[0])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_each_tracker_goes_on_where_it_was(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    (tmp_path / "artifacts" / ".00000009.new").mkdir()

    spool = Spool(tmp_path / "artifacts", ["one", "two"])

    assert not (tmp_path / "artifacts" / ".00000009.new").exists()
    found: dict[str, list[tuple[str, str]]] = {"one": [], "two": []}
    for tracker, sent in found.items():
        for artifact in spool.lacking(tracker):
            sent.append((artifact.name, artifact.path.read_text()))
            spool.sent(tracker, artifact)
    assert found == {
        "one": [("b/b", "b"), ("c/c", "c")],
        "two": [("a/a", "a"), ("b/b", "b"), ("c/c", "c")],
    }
    assert not list((tmp_path / "artifacts").iterdir())


def test_what_was_sent_everywhere_just_before_a_kill_goes(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "artifacts", ["one"])
    (tmp_path / "a").write_text("text")
    spool.add(tmp_path / "a", "a")
    (tmp_path / "artifacts" / "00000001" / "sent-one").touch()

    assert not Spool(tmp_path / "artifacts", ["one"]).lacking("one")
    assert not list((tmp_path / "artifacts").iterdir())


def test_a_damaged_one_is_left_alone_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "artifacts", ["one"])
    (tmp_path / "a").write_text("text")
    for _ in range(3):
        spool.add(tmp_path / "a", "a")
    (tmp_path / "artifacts" / "00000001" / "artifact.json").write_text("{")
    (tmp_path / "artifacts" / "00000002" / "artifact.json").write_text('{"format": 2}')

    again = Spool(tmp_path / "artifacts", ["one"])
    again.add(tmp_path / "a", "a")

    assert len(again.lacking("one")) == 2
    assert "00000001 can not be read and is left alone" in caplog.text
    assert "00000002 can not be read and is left alone: its format is 2" in caplog.text
    assert len(list((tmp_path / "artifacts").iterdir())) == 4


def test_a_worker_that_outlived_its_run_notes_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "artifacts", ["one"])
    (tmp_path / "a").write_text("text")
    spool.add(tmp_path / "a", "a")
    (artifact,) = spool.lacking("one")
    spool.close()

    with pytest.raises(cc.UsageError, match="the run has ended"):
        spool.sent("one", artifact)

    assert len(Spool(tmp_path / "artifacts", ["one"]).lacking("one")) == 1
