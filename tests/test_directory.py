"""Who owns a run directory, and how its files change."""

import subprocess
import sys
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


def test_replacing_leaves_no_temporary_file(tmp_path: Path) -> None:
    replace_text(tmp_path / "a.json", "one")
    replace_text(tmp_path / "a.json", "two")

    assert (tmp_path / "a.json").read_text() == "two"
    assert [p.name for p in tmp_path.glob("*a.json*")] == ["a.json"]
