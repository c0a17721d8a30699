"""What a run could not send: how it is told, and how it is sent without training on."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ckpt_callbacks as cc
from ckpt_callbacks import catalog
from ckpt_callbacks.cli import main
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.testing import MemoryStore, Recorder
from folder_store import FolderStore
from loops import KEEP, callbacks_in, new_state, train

HERE = Path(__file__).parent


class Remade(FolderStore):
    """One that another process can make again, whose service may be down."""

    def settings(self) -> dict[str, Any]:
        return {"root": str(self.root)}

    def open(self, run: Any) -> Any:
        if (self.root / "down").exists():
            raise ConnectionError("the folder is down")
        return super().open(run)


@pytest.fixture
def remade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remade:
    """Return a store whose factory is known as an installed package's would be."""

    def make(name: str, settings: Any) -> Remade:
        assert name == "folder", f"no store is called {name}"
        return Remade(settings["root"])

    monkeypatch.setattr(catalog, "_make", make)
    store = Remade(tmp_path / "store")
    store.root.mkdir()
    return store


def leave_unsent(root: Path, *stores: object) -> cc.RunEnded:
    """Train with stores that are down, and return how the run ended."""
    recorder = Recorder()
    checkpoint = cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(50), keep=KEEP)
    plot = root.parent / "plot.svg"
    plot.write_text("<svg/>")
    with cc.Callbacks(checkpoint, *stores, recorder, drain_limit=0.2).run(new_state()) as run:
        run.log_artifact(plot)
        for step in range(101):
            run.on_step(step, new_state(step), {"loss": 1.0, "rate": 0.1, "norm": 2.0})
    (ended,) = recorder.of(cc.RunEnded)
    assert isinstance(ended, cc.RunEnded)
    return ended


def messages(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [m for m in caplog.messages if text in m]


def test_at_the_end_each_store_is_told_of_once_with_how_much_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, one, two = tmp_path / "it's mine", MemoryStore("one"), MemoryStore("two")
    one.down = two.down = True

    ended = leave_unsent(root, one, two, MemoryStore("three"))

    lacking = "2 checkpoints (steps 50, 100), 303 metric values, 1 file"
    assert ended.unsent == {
        "one": f"{lacking} (ConnectionError: one is down)",
        "two": f"{lacking} (ConnectionError: two is down)",
    }
    (message,) = messages(caplog, "One does not have everything")
    assert len(messages(caplog, "does not have everything")) == 2
    assert message == (
        f"One does not have everything yet: {ended.unsent['one']}. It is kept in {root}; "
        f"the next run there sends it, or: ckpt-callbacks sync {shlex.quote(str(root))}"
    )


def test_of_many_only_some_steps_are_named(tmp_path: Path) -> None:
    store, recorder = MemoryStore(), Recorder()
    store.down = True
    checkpoint = cc.OrbaxCheckpoint(tmp_path, save=cc.EveryNSteps(1), keep=cc.LatestN(1500))
    with cc.Callbacks(checkpoint, store, recorder, drain_limit=0).run(new_state()) as run:
        for step in range(10):
            run.on_step(step, new_state(), {f"m{n}": 1.0 for n in range(200)})

    (ended,) = recorder.of(cc.RunEnded)
    assert isinstance(ended, cc.RunEnded)
    assert ended.unsent["memory"].startswith(
        "10 checkpoints (steps 0, 1, 2, 3, 4, 5, 6, 7, …), 2,000 metric values ("
    )


def test_where_only_an_alias_is_missing_it_is_named(tmp_path: Path) -> None:
    store, recorder = MemoryStore(), Recorder()

    def refuse(call: str) -> None:
        if call == "alias":
            raise PermissionError("aliases are protected")

    store.before = refuse
    checkpoint = cc.OrbaxCheckpoint(tmp_path, save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    callbacks = cc.Callbacks(checkpoint, store, recorder, drain_limit=0.5)
    train(callbacks, 1)

    (ended,) = recorder.of(cc.RunEnded)
    assert isinstance(ended, cc.RunEnded)
    assert ended.unsent == {
        "memory": "move alias 'last' to step 0 (PermissionError: aliases are protected)"
    }


def test_sync_sends_all_that_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, store = tmp_path / "run", MemoryStore()
    store.down = True
    leave_unsent(root, store)

    assert cc.sync(root, stores=[store], timeout=0.2) == {
        "memory": "2 checkpoints (steps 50, 100), 303 metric values, 1 file "
        "(ConnectionError: memory is down)"
    }
    store.down = False
    assert cc.sync(root, stores=[store]) == {}

    assert set(store.copies) == {50, 100}
    assert store.aliases == {"last": 100}
    assert [p.step for p in store.points] == list(range(101))
    assert store.files == {"plot.svg": b"<svg/>"}
    changes = store.changes
    assert cc.sync(root, stores=[store]) == {}
    assert store.changes == changes, "there was nothing to do"
    assert len(messages(caplog, "does not have everything")) == 1, "told by the run alone"


def test_the_command_makes_the_stores_again_even_if_they_were_never_reached(
    tmp_path: Path, remade: Remade
) -> None:
    root = tmp_path / "run"
    (remade.root / "down").touch()
    leave_unsent(root, remade)
    known = RunDirectory(root).open_run()
    assert known.settings == {"folder": {"root": str(remade.root)}}
    (remade.root / "down").unlink()

    result = CliRunner().invoke(main, ["sync", str(root)])

    assert (result.exit_code, result.output.splitlines()[1:]) == (0, ["Folder has everything"])
    listing = remade.listing()
    assert listing
    assert set(listing.copies) == {50, 100}
    assert len(remade.metrics()) == 303
    assert remade.files() == {"plot.svg": b"<svg/>"}


def test_a_store_whose_first_opening_failed_remembers_nothing(tmp_path: Path) -> None:
    """As it is promised, although the run directory knows of it already."""
    remembered = []

    class Tells(MemoryStore):
        def open(self, run: Any) -> Any:
            remembered.append(dict(run.remembered))
            return super().open(run)

    store = Tells()
    store.down = True
    leave_unsent(tmp_path / "run", store)
    store.down = False
    for _ in range(2):
        assert cc.sync(tmp_path / "run", stores=[store]) == {}

    assert remembered[-2] == {}
    assert set(remembered[-1]) == {"run_id"}


def test_the_command_says_what_is_lacking(
    tmp_path: Path, remade: Remade, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = tmp_path / "run", MemoryStore("other")
    (remade.root / "down").touch()
    leave_unsent(root, remade, other)

    result = CliRunner().invoke(main, ["sync", "--timeout", "0.2", str(root)])

    assert result.exit_code == 1
    lacking = "2 checkpoints (steps 50, 100), 303 metric values, 1 file"
    assert result.output.splitlines() == [
        "sending to Folder, Other, for 0 s at most",
        f"Folder lacks {lacking} (ConnectionError: the folder is down)",
        "Other lacks what there is: it can not be made again here",
    ]


def test_a_directory_that_a_run_owns_is_left_to_it(tmp_path: Path) -> None:
    with callbacks_in(tmp_path / "run").run(new_state()) as run:
        run.on_step(0, new_state())
        run.wait()
        with pytest.raises(cc.DirectoryLocked, match=r"the run in .*/run sends everything itself"):
            cc.sync(tmp_path / "run")
        result = CliRunner().invoke(main, ["sync", str(tmp_path / "run")])

    assert result.exit_code == 1
    assert "sends everything itself" in result.output


def test_one_that_is_there_for_a_moment_only_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, store = tmp_path / "run", MemoryStore()
    train(callbacks_in(root, store), 2)
    holder = RunDirectory(root)
    holder.acquire(brief=True)
    monkeypatch.setattr("ckpt_callbacks.requests.time.sleep", lambda seconds: holder.release())

    assert cc.sync(root, stores=[store]) == {}


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(cc.ConfigError, match="is no run directory"):
        cc.sync(folder)
    assert CliRunner().invoke(main, ["sync", str(folder)]).exit_code == 2
    assert list(folder.iterdir()) == []


def test_a_request_without_an_owner_still_tells_what_is_unsent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, store = tmp_path / "run", MemoryStore()
    train(callbacks_in(root, store), 3)
    store.down = True

    assert cc.pin(root, 2, stores=[store], timeout=0.2)

    assert len(messages(caplog, "Memory does not have everything yet: the end of the run")) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
import ckpt_callbacks as cc
from folder_store import FolderStore
from loops import callbacks_in, new_state

root = Path(sys.argv[1])

class Down(FolderStore):
    def open(self, run):
        raise ConnectionError("down")

plot = root / "plot.svg"
plot.write_text("<svg/>")
with callbacks_in(root / "run", Down(root / "store")).run(new_state()) as run:
    for step in range(3):
        run.on_step(step, new_state(), {"loss": 1.0})
    run.log_artifact(plot)
    run.wait()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_is_sent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path],
        cwd=HERE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL

    store = FolderStore(tmp_path / "store")
    assert cc.sync(tmp_path / "run", stores=[store]) == {}

    listing = store.listing()
    assert listing
    assert set(listing.copies) == {1, 2}
    assert store.metrics() == [(0, "loss"), (1, "loss"), (2, "loss")]
    assert store.files() == {"plot.svg": b"<svg/>"}
    run = RunDirectory(tmp_path / "run").open_run()
    assert run.status == "killed"
