"""Objects that save themselves, by the protocol of Orbax: an item of their own each."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import ckpt_callbacks as cc


class Vocabulary:
    """Saves itself, as Orbax's `StatefulCheckpointable` says."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)

    async def save(self, directory: Any) -> Any:
        words = list(self.words)  # as of now; the rest comes later

        async def write() -> None:
            folder = await directory.await_creation()
            (folder / "words.json").write_text(json.dumps(words))

        return write()

    async def load(self, directory: Any) -> Any:
        async def read() -> None:
            self.words = json.loads((directory / "words.json").read_text())

        return read()


def callbacks_in(directory: Path) -> cc.Callbacks:
    return cc.Callbacks(cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(1), keep=cc.LatestN(1)))


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    words = Vocabulary("a", "b")
    state = {"words": words, "deep": {"er": Vocabulary("c")}, "params": {"w": jnp.ones(2)}}
    with callbacks_in(tmp_path / "run").run(state) as run:
        run.on_step(0, state)
        words.words.append("later")  # while the save is in flight
    return tmp_path / "run"


def test_it_is_restored_in_place(run_directory: Path) -> None:
    words, deep = Vocabulary(), Vocabulary()
    like = {"words": words, "deep": {"er": deep}, "params": {"w": jnp.zeros(2)}}

    restored = cc.restore(run_directory, like=like)

    assert restored["words"] is words
    assert words.words == ["a", "b"]
    assert deep.words == ["c"]
    assert restored["params"]["w"].tolist() == [1.0, 1.0]
    assert sorted(p.name for p in (run_directory / "0").iterdir() if p.is_dir()) == [
        "deep.er",
        "params",
        "words",
    ]


def test_it_is_read_alone_and_left_out(run_directory: Path) -> None:
    words = Vocabulary()
    cc.restore(run_directory, like={"words": words}, only="words")
    assert words.words == ["a", "b"]

    restored = cc.restore(run_directory, like={"params": {"w": jnp.zeros(2)}}, only="params")
    assert restored["params"]["w"].tolist() == [1.0, 1.0]
    assert cc.restore(run_directory).keys() == {"params"}


def test_what_is_missing_is_told(run_directory: Path) -> None:
    with pytest.raises(cc.StateMismatch) as error:
        cc.restore(run_directory, like={"params": {"w": jnp.zeros(2)}, "more": Vocabulary()})

    assert str(error.value).splitlines()[1:] == [
        "  more: not in the checkpoint",
        "  deep.er: not in the state",
        "  words: not in the state",
        "The rest fits: only='params' restores that alone",
    ]


def test_damage_to_its_files_is_noticed(run_directory: Path) -> None:
    file = run_directory / "0" / "words" / "words.json"
    file.chmod(0o644)
    file.write_text('["x", "b"]')

    with pytest.raises(cc.CorruptCheckpoint, match=r"words\.json is damaged"):
        cc.restore(run_directory, like={"words": Vocabulary()}, only="words")
