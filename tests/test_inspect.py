"""What a checkpoint holds, seen without reading its arrays."""

import json
import math
import re
import shutil
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from orbax.checkpoint import v1 as ocp
from rich.console import Console

import ckpt_callbacks as cc
from ckpt_callbacks import inspection, sources
from ckpt_callbacks.cli import main
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.record import Record
from ckpt_callbacks.testing import FakeClock
from folder_store import FolderStore
from loops import callbacks_in, train


@pytest.fixture
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def save(root: Path, state: Any, config: dict[str, Any] | None = None) -> None:
    keep = cc.LatestN(2) | cc.BestN(1, "score", mode="max")
    clock = FakeClock(1_700_000_000)
    checkpoint = cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=keep)
    with cc.Callbacks(checkpoint, clock=clock).run(state, config=config) as run:
        state = run.state
        for step, score in ((1, 0.9), (2, 0.25)):
            run.on_eval(step, {"score": score})
            run.on_step(step, state, {"loss": 1 / 8}, metadata={"tokens": 100 * step, "at": [1, 2]})


def layers(count: int) -> dict[str, Any]:
    layer = {"kernel": jnp.zeros((2, 3), jnp.bfloat16), "bias": jnp.zeros(3)}
    return {"layers": [layer] * count, "head": {"kernel": jnp.zeros((3, 5))}}


def test_all_that_is_known_of_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    config = {"rate": 1e-3, "clip": math.inf, "sizes": (8, 8), "name": "small"}
    save(tmp_path / "run", {"model": layers(2), "epoch": 3}, config)

    found = cc.inspect(tmp_path / "run", "best")

    assert (found.step, found.time, found.aliases) == (1, 1_700_000_000, ["best"])
    assert found.reason == "latest #2, best #1"
    assert found.metrics == {"score": 0.9, "loss": 0.125}
    assert found.metadata == {"tokens": 100, "at": [1, 2]}
    assert found.config == {"rate": 1e-3, "clip": "Infinity", "sizes": [8, 8], "name": "small"}
    assert found.leaves == {
        "epoch": Leaf("int"),
        "model/head/kernel": Leaf("array", (3, 5), "float32"),
        "model/layers/0/bias": Leaf("array", (3,), "float32"),
        "model/layers/0/kernel": Leaf("array", (2, 3), "bfloat16"),
        "model/layers/1/bias": Leaf("array", (3,), "float32"),
        "model/layers/1/kernel": Leaf("array", (2, 3), "bfloat16"),
    }
    assert found.leaves["model/layers/0/kernel"].nbytes == 12
    folder = tmp_path / "run" / "1"
    assert found.bytes == cc.find(tmp_path / "run", 1).bytes
    assert found.items.keys() == {"model", "state"}
    inside = [p.stat().st_size for p in (folder / "model").rglob("*") if p.is_file()]
    assert found.items["model"] == sum(inside)
    assert cc.inspect(tmp_path / "run").step == cc.inspect(tmp_path / "run", 2).step == 2


def test_every_kind_of_leaf_is_as_it_was(tmp_path: Path) -> None:
    state = {
        "keys": jax.random.key(0),
        "many": jax.random.split(jax.random.key(0, impl="rbg"), 3),
        "half": jnp.zeros(4, jnp.bfloat16),
        "int4": jnp.zeros((2, 4), jnp.int4),
        "uint4": jnp.zeros(3, jnp.uint4),
        "none": np.zeros((0, 4), np.float16),
        "on": True,
        "large": 2**70,
        "rate": 0.5,
        "text": "a [b] c",
        "bytes": b"abc",
        "scalar": np.float64(1),
    }
    save(tmp_path, state)

    found = cc.inspect(tmp_path)

    assert {name: str(leaf) for name, leaf in found.leaves.items()} == {
        "keys": "key<threefry2x32>[]",
        "many": "key<rbg>[3]",
        "half": "bfloat16[4]",
        "int4": "int4[2, 4]",
        "uint4": "uint4[3]",
        "none": "float16[0, 4]",
        "on": "bool",
        "large": "int",
        "rate": "float",
        "text": "str",
        "bytes": "bytes",
        "scalar": "float64[]",
    }
    assert found.leaves["int4"].nbytes == 4
    assert "├─ none    float16[0, 4]              0        0 B" in str(found)


def test_no_array_is_read(tmp_path: Path) -> None:
    """Not a byte: all is still told where the files of the arrays are gone."""
    state = {"model": {f"layer{i}": np.random.default_rng(i).random((512, 512)) for i in range(8)}}
    save(tmp_path, state)
    cc.inspect(tmp_path)  # so that all code is loaded

    before = _read_by_this_process()
    found = cc.inspect(tmp_path)
    read = _read_by_this_process() - before

    assert found.bytes > 16 << 20
    assert 0 < read < 200_000
    folders = [path / "d" for path in tmp_path.glob("*/*/ocdbt.process_*")]
    assert sum(f.stat().st_size for folder in folders for f in folder.iterdir()) > 32 << 20
    for folder in folders:
        shutil.rmtree(folder)
    assert cc.inspect(tmp_path).leaves == found.leaves


def _read_by_this_process() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.usefixtures("_utc")
def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"model": layers(12), "rng": jax.random.key(0), "pair": [1.0, 2.0], "epoch": 3}
    save(tmp_path / "run", state, {"rate": 1e-3, "note": "long text " * 20})
    monkeypatch.chdir(tmp_path)

    found = cc.inspect("run")

    picture = """\
        step 2 of run (last)
        kept as   latest #1
        saved     2023-11-14 22:13:20
        metrics   loss 0.125, score 0.25
        metadata  tokens=200, at=[1, 2]
        config    rate=0.001, note=long text long text long text long text long text long text long text
                  long text long text long text long text long text long text long text long text long text
                  long text long text long text long text
        on disk   DISK
        state     29 leaves, 123 numbers, 348 B in memory

                            type                 numbers  in memory
        ├─ epoch            int
        ├─ model                                     123      348 B
        │  ├─ head/kernel   float32[3, 5]             15       60 B
        │  └─ layers                                 108      288 B
        │     └─ 0 … 11     each of 12                 9       24 B
        │        ├─ bias    float32[3]                 3       12 B
        │        └─ kernel  bfloat16[2, 3]             6       12 B
        ├─ pair
        │  └─ 0, 1          float, each of 2
        └─ rng              key<threefry2x32>[]"""  # noqa: E501  # as wide as it is printed
    # What is on disk depends on the version of Orbax.
    assert re.sub("on disk .*", "on disk   DISK", str(found)) == textwrap.dedent(picture)

    assert found.text(depth=2).partition("\n\n")[2] == textwrap.dedent("""\
                           type                          numbers  in memory
        ├─ epoch           int
        ├─ model                                             123      348 B
        │  ├─ head/kernel  float32[3, 5]                      15       60 B
        │  └─ layers       24 leaves: bfloat16, float32      108      288 B
        ├─ pair
        │  └─ 0, 1         float, each of 2
        └─ rng             key<threefry2x32>[]""")


def test_rich_shows_the_same_and_takes_no_name_for_markup(tmp_path: Path) -> None:
    save(tmp_path, {"model": {"[red]": jnp.zeros(2), "b": 1}})
    console = Console(width=200)

    with console.capture() as capture:
        console.print(cc.inspect(tmp_path))

    assert capture.get() == f"{cc.inspect(tmp_path)}\n"


def test_names_that_hold_a_slash_or_are_numbers(tmp_path: Path) -> None:
    """As Haiku has them. What looks like a leaf and a subtree of one name is shown as both."""
    state = {"model": {"a": jnp.zeros(2), "a/b": jnp.zeros(3), "2": 1, "10": 2, "1": "x"}}
    save(tmp_path, state)

    found = cc.inspect(tmp_path)

    names = ["a", "a/b", "1", "2", "10"]
    assert list(found.leaves) == [f"model/{name}" for name in names]
    table = [line.split() for line in str(found).partition("\n\n")[2].splitlines()]
    assert [row[1:3] for row in table[2:]] == [
        ["a", "float32[2]"], ["a/b", "float32[3]"], ["1", "str"], ["2,", "10"],
    ]  # fmt: skip


def test_a_checkpoint_of_others(tmp_path: Path) -> None:
    tree = {"params": {"w": jnp.zeros((4, 2))}, "step": jnp.int32(0)}
    ocp.save(tmp_path / "alone", tree, custom_metadata={"by": "them"})
    with ocp.training.Checkpointer(tmp_path / "many") as checkpointer:
        for step in (3, 7):
            checkpointer.save(step, tree)

    alone, many = cc.inspect(tmp_path / "alone"), cc.inspect(tmp_path / "many", 3)

    expected = {"params/w": "float32[4, 2]", "step": "int32[]"}
    for found in (alone, many):
        assert {name: str(leaf) for name, leaf in found.leaves.items()} == expected
    assert (alone.step, alone.metadata) == (None, {"by": "them"})
    assert (many.step, many.time, many.config) == (3, None, {})
    assert cc.inspect(tmp_path / "many").step == 7
    assert str(many).startswith(f"step 3 of {tmp_path}/many\non disk ")


def test_one_checkpoint_of_a_run_alone(tmp_path: Path) -> None:
    save(tmp_path / "run", {"model": layers(1), "n": 2**70}, {"rate": 1})
    shutil.copytree(tmp_path / "run" / "2", tmp_path / "copy")

    found = cc.inspect(tmp_path / "copy")

    assert found.leaves == cc.inspect(tmp_path / "run").leaves
    assert (found.step, found.metadata, found.config) == (None, {}, {})


def test_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", {"model": layers(1)}, {"rate": 1})
    directory = RunDirectory(tmp_path / "run")

    def fetch(address: str, into: Path, **_: object) -> Record:
        assert address == "there:/x@best"
        shutil.copytree(directory.path(1), into, dirs_exist_ok=True)
        return directory.read_records()[1]

    monkeypatch.setattr(sources, "fetch", fetch)
    found = cc.inspect("there:/x@best")

    assert (found.source, found.step) == ("there:/x@best", 1)
    assert found.metadata == {"tokens": 100, "at": [1, 2]}
    assert found.bytes == cc.find(directory.root, 1).bytes
    assert found.config == {}
    with pytest.raises(cc.ConfigError, match="inspect: there:/x@best names a checkpoint itself"):
        cc.inspect("there:/x@best", 1)


@pytest.mark.parametrize("name", ["_METADATA", "d"])
def test_damaged_metadata_is_told_or_made_good_from_a_copy(name: str, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    train(callbacks_in(tmp_path / "run", store), 1)
    expected = cc.inspect(tmp_path / "run").leaves
    path = tmp_path / "run" / "0" / "model" / name
    file = path if path.is_file() else next(path.iterdir())
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-3] + b"abc")

    with pytest.raises(cc.CorruptCheckpoint, match=str(file)):
        cc.inspect(tmp_path / "run", stores=[])
    assert cc.inspect(tmp_path / "run", stores=[store]).leaves == expected
    if name == "d":  # of which Orbax itself says that it is no pytree
        with pytest.raises(cc.CorruptCheckpoint, match="0/model is damaged"):
            cc.inspect(tmp_path / "run" / "0")


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    save(tmp_path / "run", {"model": layers(1)})

    with pytest.raises(cc.CheckpointNotFound, match="no checkpoint 'worst'; it has best, last"):
        cc.inspect(tmp_path / "run", "worst")
    with pytest.raises(cc.ConfigError, match="inspect: a step must be an integer from 0"):
        cc.inspect(tmp_path / "run", 1.5)  # type: ignore[arg-type]
    with pytest.raises(cc.ConfigError, match="neither a run directory nor a checkpoint"):
        cc.inspect(tmp_path)


def test_the_command_line(tmp_path: Path) -> None:
    save(tmp_path, {"model": layers(3)}, {"rate": 1e-3})

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["inspect", str(tmp_path), *arguments])

    assert run().output == f"{inspection.inspect(tmp_path)}\n"
    assert run("--which", "best", "--depth", "1").output == cc.inspect(tmp_path, 1).text(1) + "\n"
    assert run("--which", "1").output == f"{cc.inspect(tmp_path, 1)}\n"
    wrong = run("--which", "worst")
    assert wrong.exit_code == 2
    assert wrong.output.startswith(f"Error: {tmp_path} has no checkpoint 'worst'")


def test_a_run_remembers_the_configuration_that_it_was_last_given(tmp_path: Path) -> None:
    def given(config: dict[str, Any] | None) -> Any:
        save_one = callbacks_in(tmp_path)
        train(save_one, 3, config=config)
        return cc.inspect(tmp_path).config

    assert given({"rate": 1, "old": True}) == {"rate": 1, "old": True}
    assert given(None) == {"rate": 1, "old": True}
    assert given({"rate": 2}) == {"rate": 2}
    cc.pin(tmp_path, 2)  # another process, that has none
    assert cc.inspect(tmp_path).config == {"rate": 2}
    assert json.loads((tmp_path / ".ckpt_callbacks" / "run.json").read_text())["format"] == 1
