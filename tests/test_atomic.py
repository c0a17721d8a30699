"""A new file or folder is there as a whole or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks import atomic, manifest


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_there_once_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced = tmp_path / "a" / "b", []
    monkeypatch.setattr(atomic.os, "fsync", lambda fd: synced.append(names(folder)))

    with atomic.new_file(folder / "file") as file:
        file.write(b"new")
        assert names(folder) != ["file"]
    assert (folder / "file").read_bytes() == b"new"
    made = [[] for _ in ("a", "b")]  # that the folder is there lasts too
    *first, (part,), after = synced  # its content before it moves, then the folder
    assert first == made
    assert part.endswith(".part")
    assert after == ["file"]

    with atomic.new_file(folder / "file") as file:
        file.write(b"newer")
        assert (folder / "file").read_bytes() == b"new"
    assert (folder / "file").read_bytes() == b"newer"
    assert names(folder) == ["file"]


def half_a_file(path: Path) -> None:
    with atomic.new_file(path) as file:
        file.write(b"new")
        raise OSError("full")


def half_a_folder(path: Path) -> None:
    with atomic.new_folder(path) as part:
        part.mkdir()
        (part / "file").write_text("new")
        raise OSError("full")


@pytest.mark.parametrize("write", [half_a_file, half_a_folder])
def test_after_an_error_there_is_none(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "a" / "new")
    assert names(tmp_path / "a") == []


def test_a_folder_is_there_once_all_of_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, synced = tmp_path / "a" / "folder", {}
    real = manifest.fsync
    for module in (atomic, manifest):
        monkeypatch.setattr(
            module, "fsync", lambda path: (real(path), synced.update({path.name: there.exists()}))
        )

    with atomic.new_folder(there) as part:
        (part / "below").mkdir(parents=True)
        (part / "below" / "file").write_text("new")
    assert {name: synced[name] for name in ("file", "below", part.name, "a")} == {
        "file": False, "below": False, part.name: False, "a": True,
    }  # fmt: skip
    assert (there / "below" / "file").read_text() == "new"
    with pytest.raises(cc.ConfigError, match="folder is there already"), atomic.new_folder(there):
        pass


def test_folders_that_are_made_for_it_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(atomic, "fsync", synced.append)

    with atomic.new_file(tmp_path / "a" / "b" / "file"):
        assert set(synced) == {tmp_path, tmp_path / "a"}
    with atomic.new_file(tmp_path / "a" / "b" / "file"):
        assert synced[2:] == [tmp_path / "a" / "b"]
