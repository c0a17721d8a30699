"""Pickles are told for what they are, and not read."""

import pickle
import zipfile
from pathlib import Path

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.pickles import refuse_pickle


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_any_name_is_refused(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(pickle.dumps({"w": 1}, protocol))

    with pytest.raises(cc.ConfigError, match=r"weights is a pickle\. .*run any code.*safetensors"):
        refuse_pickle(tmp_path / "weights")


def test_an_archive_of_pytorch_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights", "w") as archive:
        archive.writestr("archive/data.pkl", b"")

    with pytest.raises(cc.ConfigError, match=r"holds a pickle \(data\.pkl\)"):
        refuse_pickle(tmp_path / "weights")


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"])
def test_a_name_that_pickles_have_is_refused(suffix: str, tmp_path: Path) -> None:
    for content in (b"", b"(dp0\n.", b"PK no archive"):
        (tmp_path / f"a{suffix}").write_bytes(content)
        with pytest.raises(cc.ConfigError, match=f"has the suffix {suffix}, which pickles have"):
            refuse_pickle(tmp_path / f"a{suffix}")


def test_other_files_and_folders_are_not(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("w.npy", b"")
    (tmp_path / "text").write_text("text")
    (tmp_path / "folder.ckpt").mkdir()

    for path in tmp_path.iterdir():
        refuse_pickle(path)
    refuse_pickle(tmp_path / "nothing")
