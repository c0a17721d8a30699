"""Files of a checkpoint: sealed, verified, linked."""

import os
from pathlib import Path

import pytest

from ckpt_callbacks import CorruptCheckpoint
from ckpt_callbacks.manifest import link_tree, seal, tree_digest, verify


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "5"
    (root / "model").mkdir(parents=True)
    (root / "model" / "data").write_bytes(bytes(range(256)) * 8192)  # more than one read
    (root / "optimizer").mkdir()
    (root / "optimizer" / "data").write_bytes(b"moments")
    (root / "META").write_bytes(b"")
    return root


def damage(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def test_a_sealed_tree_is_read_only_and_verifies(tree: Path) -> None:
    files = seal(tree)

    assert list(files) == ["META", "model/data", "optimizer/data"]
    assert files["model/data"].size == 256 * 8192
    assert (tree / "model" / "data").stat().st_mode & 0o777 == 0o444
    verify(tree, files)


def test_a_sealed_tree_is_on_the_disk(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and every list of names, also the one that the checkpoint itself is in."""
    synced: set[int] = set()
    monkeypatch.setattr("os.fsync", lambda fd: synced.add(os.fstat(fd).st_ino))

    seal(tree)

    there = [*tree.rglob("*"), tree, tree.parent]
    assert [p for p in there if p.stat().st_ino not in synced] == []


def test_a_flipped_bit_names_the_file(tree: Path) -> None:
    files = seal(tree)
    content = bytearray((tree / "model" / "data").read_bytes())
    content[1_500_000] ^= 1
    damage(tree / "model" / "data", bytes(content))

    with pytest.raises(CorruptCheckpoint, match=r"model/data is damaged: its digest is xxh3:"):
        verify(tree, files)
    verify(tree, files, only={"optimizer"})


def test_a_truncated_or_missing_file_is_named(tree: Path) -> None:
    files = seal(tree)
    damage(tree / "optimizer" / "data", b"mom")
    with pytest.raises(CorruptCheckpoint, match=r"optimizer/data is damaged: its size is 3, but 7"):
        verify(tree, files)

    (tree / "optimizer" / "data").unlink()
    with pytest.raises(CorruptCheckpoint, match="optimizer/data cannot be read: No such file"):
        verify(tree, files)


def test_equal_trees_have_equal_digests(tree: Path, tmp_path: Path) -> None:
    files = seal(tree)
    link_tree(tree, tmp_path / "copy")

    assert tree_digest(seal(tmp_path / "copy")) == tree_digest(files)
    assert tree_digest({**files, "new": files["META"]}) != tree_digest(files)


def test_links_share_the_bytes_and_can_be_repeated(tree: Path, tmp_path: Path) -> None:
    assert link_tree(tree, tmp_path / "copy")
    (tmp_path / "copy" / "META").unlink()  # as if the first call was cut

    assert link_tree(tree, tmp_path / "copy")

    assert (tmp_path / "copy" / "model" / "data").samefile(tree / "model" / "data")
    assert (tmp_path / "copy" / "META").exists()


def test_symbolic_links_are_neither_listed_nor_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not ours")
    (tree / "link").symlink_to(tmp_path / "secret")
    (tree / "folder").symlink_to(tmp_path)

    assert list(seal(tree)) == ["META", "model/data", "optimizer/data"]
    assert (tmp_path / "secret").stat().st_mode & 0o200
