"""Who owns a run directory, and how its files change."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckpt_callbacks import ConfigError, DirectoryLocked, RecordError
from ckpt_callbacks.directory import RunDirectory, replace_text
from ckpt_callbacks.record import Record

OWNER = """
import sys
from ckpt_callbacks.directory import RunDirectory
RunDirectory(sys.argv[1]).acquire()
print("mine", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_told_who_owns_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        with pytest.raises(DirectoryLocked, match=f"in use by process {owner.pid} on "):
            RunDirectory(tmp_path / "run").acquire()
        owner.kill()

    directory = RunDirectory(tmp_path / "run")  # a dead owner holds nothing
    directory.acquire()
    directory.release()


def test_only_a_lock_counts_and_not_what_is_written_of_the_owner(tmp_path: Path) -> None:
    """A file may be old, or name a process id that is somebody else's by now."""
    directory = RunDirectory(tmp_path / "run")
    written = directory.meta / "owner.json"
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, directory.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        old = {"host": socket.gethostname(), "pid": owner.pid, "since": 0.0, "brief": False}
        written.write_text(json.dumps(old))
        with pytest.raises(DirectoryLocked, match=f"process {owner.pid} "):
            directory.acquire()
        written.unlink()
        with pytest.raises(DirectoryLocked, match="another process"):
            directory.acquire(patience=0)
        owner.kill()

    written.write_text(json.dumps({**old, "pid": os.getppid(), "since": time.time()}))
    directory.acquire()
    directory.release()


@pytest.mark.parametrize("written", ["nothing", "of one that is gone"])
def test_an_owner_that_has_just_begun_is_waited_for_until_it_says_how_long_it_stays(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be there for a moment only, and what an earlier one said of itself is not its word."""
    directory = RunDirectory(tmp_path / "run")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, directory.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        said = directory.meta / "owner.json"
        own = said.read_text()
        said.unlink()
        if written != "nothing":
            said.write_text(json.dumps({**json.loads(own), "pid": gone.pid}))
        waits: list[float] = []

        def wait(seconds: float) -> None:
            """First it says that it is there for a moment; then it is gone."""
            waits.append(seconds)
            if len(waits) == 1:
                said.write_text(json.dumps({**json.loads(own), "brief": True}))
            else:
                owner.kill()
                owner.wait()

        monkeypatch.setattr("ckpt_callbacks.directory.time.sleep", wait)
        directory.acquire()

    assert len(waits) == 2
    directory.release()


def test_an_owner_that_says_it_stays_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, directory.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        said = directory.meta / "owner.json"
        own = said.read_text()
        said.unlink()
        monkeypatch.setattr(
            "ckpt_callbacks.directory.time.sleep", lambda seconds: said.write_text(own)
        )
        with pytest.raises(DirectoryLocked, match=f"process {owner.pid} "):
            directory.acquire()
        owner.kill()


def test_a_second_run_in_this_process_is_refused(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run")
    first.acquire()

    with pytest.raises(DirectoryLocked, match="another run of this process"):
        RunDirectory(tmp_path / "run").acquire()

    first.release()
    second = RunDirectory(tmp_path / "run")
    second.acquire()
    second.release()


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"cannot write to the run directory .*/run: .*choose"):
        RunDirectory(tmp_path / place).acquire()


def test_eviction_takes_a_step_out_at_once_and_frees_it_later(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.acquire()
    (directory.path(5) / "model").mkdir(parents=True)
    (directory.path(5) / "model" / "data").write_text("x")
    (directory.path(5) / "model" / "data").chmod(0o444)

    directory.to_trash(5)

    assert not directory.path(5).exists()
    assert len(list(directory.trash.iterdir())) == 1
    directory.empty_trash()
    assert not list(directory.trash.iterdir())
    directory.release()


def test_a_step_that_is_a_symbolic_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    directory = RunDirectory(tmp_path / "run")
    directory.acquire()
    directory.path(5).symlink_to(tmp_path / "elsewhere")

    directory.to_trash(5)

    assert directory.path(5).is_symlink()
    assert (tmp_path / "elsewhere").is_dir()
    directory.release()


def test_records_are_read_in_order_of_steps(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.acquire()
    for step in (100, 20, 3):
        directory.write_record(Record(step, "complete", "me", 0.0))

    assert list(directory.read_records()) == [3, 20, 100]

    (directory.records / "100.json").rename(directory.records / "7.json")
    with pytest.raises(RecordError, match=r"7\.json is the record of step 100"):
        directory.read_records()
    directory.release()


@pytest.mark.parametrize("kept", [(), (1,)])
def test_a_reader_misses_nothing_that_changes_while_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: tuple[int, ...]
) -> None:
    """Else `last` is an older step, or none, although there was a newer one all the time."""
    directory = RunDirectory(tmp_path)
    directory.acquire()

    def save(step: int) -> None:
        directory.path(step).mkdir()
        (directory.path(step) / "_CHECKPOINT_METADATA").touch()
        directory.write_record(Record(step, "complete", "me", 0.0))

    for step in (*kept, 2):
        save(step)
    read = RunDirectory.read_record

    def owner_goes_on(self: RunDirectory, step: int) -> Record | None:
        if not directory.path(3).exists():
            save(3)
            directory.remove_record(2)
            directory.to_trash(2)
        return read(self, step)

    monkeypatch.setattr(RunDirectory, "read_record", owner_goes_on)

    assert list(directory.complete_records()) == [*kept, 3]
    directory.release()


def test_replacing_leaves_no_temporary_file(tmp_path: Path) -> None:
    replace_text(tmp_path / "a.json", "one")
    replace_text(tmp_path / "a.json", "two")

    assert (tmp_path / "a.json").read_text() == "two"
    assert [p.name for p in tmp_path.glob("*a.json*")] == ["a.json"]


def test_a_file_is_replaced_once_its_new_content_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a power cut at any moment leaves the old content or the new, and all of it."""
    path = tmp_path / "a.json"
    path.write_text("old")
    synced: list[tuple[int, str, str]] = []

    def sync(fd: int) -> None:
        """Note which file is synced, its content if it is one, and what a reader finds."""
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        content = Path(f"/proc/self/fd/{fd}").read_text() if is_file else ""
        synced.append((os.fstat(fd).st_ino, content, path.read_text()))

    monkeypatch.setattr("os.fsync", sync)

    replace_text(path, "new one")

    new, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert synced == [(new, "new one", "old"), (folder, "", "new one")]
