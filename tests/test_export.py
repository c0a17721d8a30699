"""Checkpoints that are written as files of other libraries."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import ckpt_callbacks as cc
from ckpt_callbacks import sources
from ckpt_callbacks.cli import main
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.formats import equinox, npz
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.record import Record
from ckpt_callbacks.tensors import Tensor, Tensors
from folder_store import FolderStore
from foreign import standard
from loops import callbacks_in, train
from saved import save


def state() -> dict[str, Any]:
    layer = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}
    return {
        "params": {"layers": [layer, layer], "head": {"kernel": jnp.full((3, 2), 5.0)}},
        "opt_state": {"mu": jnp.zeros(4)},
        "key": jax.random.key(1),
        "step": 7,
    }


def read(path: Path) -> dict[str, Any]:
    return {"/".join(at): tensor.read() for at, tensor in npz.read(path)[0].items()}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        np.asarray(found[name]).tobytes() == np.asarray(expected[name]).tobytes() for name in found
    )


def flat(tree: Any) -> dict[str, Any]:
    path_of = jax.tree_util.keystr
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        path_of(path, simple=True, separator="/"): x
        if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else jax.random.key_data(x)
        for path, x in leaves
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return save(tmp_path / "run", state())


def test_all_of_a_run_is_written_and_read_back(root: Path) -> None:
    written = cc.export(root, "all.npz")

    assert written == Path.cwd() / "all.npz"
    assert same(read(written), flat(state()))
    assert [p.name for p in Path.cwd().iterdir() if "export" in p.name] == []


def test_what_is_known_of_a_checkpoint_is_written_beside_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    checkpoint = cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(3))
    with cc.Callbacks(checkpoint).run(state()) as run:
        assert run.state
        for step, loss in ((1, 0.5), (2, math.inf)):
            run.on_step(step, state(), {"loss": loss}, metadata={"n": [1]})
    record = RunDirectory(root).read_records()[2]

    metadata = npz.read(cc.export(root, "a.npz", only="params", which=2))[1]

    assert metadata == {
        "step": 2,
        "time": record.time,
        "run": record.owner,
        "metrics": {"loss": "inf"},
        "metadata": {"n": [1]},
        "digest": tree_digest(record.files),
        "only": ["params"],
    }
    assert npz.read(cc.export(root, "b.npz", which=1))[1]["metrics"] == {"loss": 0.5}
    # What a file said of itself stays with it.
    assert npz.read(cc.export("a.npz", "c.npz"))[1] == metadata


def test_every_kind_of_source(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(root)

    def fetch(address: str, into: Path, **_: object) -> Record:
        shutil.copytree(directory.path(0), into, dirs_exist_ok=True)
        return directory.read_records()[0]

    monkeypatch.setattr(sources, "fetch", fetch)
    standard(Path("theirs").absolute(), state()["params"])
    cc.export(root, "first.npz")
    expected = flat(state())
    for number, source in enumerate((root, root / "0", "there:/x@best", "first.npz", state())):
        assert same(read(cc.export(source, f"{number}.npz")), expected), source
    assert npz.read(Path("2.npz"))[1]["digest"] == npz.read(Path("0.npz"))[1]["digest"]
    assert same(read(cc.export(Path("theirs"), "theirs.npz")), flat(state()["params"]))


def test_a_part_and_another_form(root: Path) -> None:
    def upper(tensors: Tensors) -> Tensors:
        return {tuple(map(str.upper, path)): tensor for path, tensor in tensors.items()}

    def kernels(tensors: Tensors) -> Tensors:
        return {path: tensor for path, tensor in tensors.items() if path[-1] == "KERNEL"}

    only = ["params", "!**/head"]
    found = read(cc.export(root, "a.npz", only=only, transform=[upper, kernels]))

    assert set(found) == {"PARAMS/LAYERS/0/KERNEL", "PARAMS/LAYERS/1/KERNEL"}
    one = cc.export(root, "one.npy", only="params/head/kernel", transform=upper)
    assert np.array_equal(np.load(one), np.full((3, 2), 5.0))
    with pytest.raises(cc.StateMismatch, match="left no leaf"):
        cc.export(root, "b.npz", transform=[kernels])


def test_only_what_is_chosen_is_read(root: Path) -> None:
    (file,) = {p for p in (root / "0" / "opt_state").rglob("*") if p.name == "_METADATA"}
    file.chmod(0o644)
    file.write_text("damaged")

    assert "params/head/kernel" in read(cc.export(root, "a.npz", only="params"))
    with pytest.raises(cc.CorruptCheckpoint, match="opt_state/_METADATA"):
        cc.export(root, "b.npz", stores=[])
    assert not Path("b.npz").exists()


def test_a_damaged_checkpoint_is_read_from_another_copy(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    train(callbacks_in(tmp_path / "run", store), 1)
    for file in (tmp_path / "run" / "0" / "model").rglob("*"):
        if file.is_file() and "ocdbt.process" in str(file):
            file.chmod(0o644)
            file.write_bytes(b"damaged")

    found = read(cc.export(tmp_path / "run", "a.npz", stores=[store]))

    assert same(
        found, flat({"model": {"w": np.ones((4, 4), "f4")}, "moments": {"m": np.ones(3, "f4")}})
    )


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "exists": ({"dest": "there.npz"}, cc.ConfigError, "is there already; overwrite=True"),
    "suffix": ({"dest": "a.bin"}, cc.ConfigError, "a.bin is not known; formats are .*npz"),
    "folder": ({"dest": "new"}, cc.ConfigError, "a folder needs format="),
    "format": ({"format": "hdf5"}, cc.ConfigError, "'hdf5' is not known; formats are .*npz"),
    "parent": ({"dest": "no/a.npz"}, cc.ConfigError, "there is no folder .*/no"),
    "a run": (
        {"dest": "run", "format": "npz", "overwrite": True},
        cc.ConfigError,
        "is a run directory, which is not overwritten",
    ),
    "a folder": (
        {"dest": "folder", "format": "npz", "overwrite": True},
        cc.ConfigError,
        "not in the format npz, which is not overwritten",
    ),
    "a checkpoint of a run": (
        {"dest": "run/0", "format": "orbax", "overwrite": True},
        cc.ConfigError,
        "is a checkpoint of a run, which is not overwritten",
    ),
    "option": ({"compress": True}, cc.ConfigError, "takes no options: compress"),
    "option of safetensors": (
        {"dest": "a.safetensors", "compress": True},
        cc.ConfigError,
        "no option compress: it has max_shard_size and naming",
    ),
    "like": ({"like": {}}, cc.ConfigError, "takes no options: like"),
    "transform": ({"transform": "x"}, cc.ConfigError, "takes functions of leaves, which 'x'"),
    "map": (
        {"transform": cc.KeyMap([cc.Rule("a", "b")])},
        cc.ConfigError,
        "takes functions of leaves, which .*KeyMap",
    ),
    "only": ({"only": "prams"}, cc.CheckpointNotFound, "there is key, opt_state, params, step"),
    "no path": ({"only": 3}, cc.ConfigError, "only must be a path of the state .*, not 3"),
    "below": ({"only": "params/x"}, cc.CheckpointNotFound, "'params/x' matches nothing"),
    "step": ({"which": 3}, cc.CheckpointNotFound, "has no step 3; it has 0"),
    "source": ({"source": "folder"}, cc.ConfigError, "neither a run directory nor"),
    "nothing": ({"source": "gone.npz"}, cc.ConfigError, "export: there is no gone.npz"),
    "text": ({"source": "plain.txt"}, cc.ConfigError, "in no format that is read here: .*npz"),
    "damaged": ({"source": "there.npz"}, cc.CorruptCheckpoint, "there.npz is damaged"),
    "address": ({"source": "nowhere:/x"}, cc.ConfigError, "no address that is understood"),
    "which": ({"source": {"n": 1}, "which": 3}, cc.ConfigError, "a live state has no steps"),
    "abstract": (
        {"source": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}},
        cc.StateMismatch,
        "the leaf at w is abstract",
    ),
    "unsavable": ({"source": {"a": object()}}, cc.StateMismatch, "cannot be saved"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_and_nothing_written(case: str, root: Path) -> None:
    arguments, error, message = WRONG[case]
    Path("there.npz").write_bytes(b"")
    Path("folder").mkdir()
    Path("plain.txt").write_text("text")
    before = sorted(map(str, Path.cwd().rglob("*")))
    given = {"source": root, "dest": "a.npz"} | arguments

    with pytest.raises(error, match=message):
        cc.export(given.pop("source"), given.pop("dest"), **given)

    assert sorted(map(str, Path.cwd().rglob("*"))) == before


def test_what_is_there_stays_until_all_is_written(root: Path) -> None:
    path = cc.export({"old": 1}, "a.npz")

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def broken(tensors: Tensors) -> Tensors:
        return {path: Tensor(tensor.leaf, fail) for path, tensor in tensors.items()}

    with pytest.raises(OSError, match="No space left"):
        cc.export(root, path, overwrite=True, transform=broken)
    assert read(path) == {"old": 1}
    assert sorted(p.name for p in Path.cwd().iterdir() if p.name.startswith((".", "a"))) == [
        "a.npz"
    ]

    cc.export(root, path, overwrite=True, only="step")
    assert read(path) == {"step": 7}
    cc.export(path, path, overwrite=True, transform=lambda t: {("new",): t["step",]})
    assert read(path) == {"new": 7}


def test_a_message_has_the_path_that_was_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, *_: object, **__: object) -> None:
        raise cc.StateMismatch(f"{path} cannot hold it")

    monkeypatch.setattr(npz, "write", write)
    with pytest.raises(cc.StateMismatch, match=f"^{Path.cwd()}/a.npz cannot hold it$"):
        cc.export(root, "a.npz")


def test_a_file_that_another_makes_meanwhile_is_not_replaced(root: Path) -> None:
    def meanwhile(tensors: Tensors) -> Tensors:
        Path("a.npz").write_text("theirs")
        return tensors

    with pytest.raises(cc.ConfigError, match="is there already"):
        cc.export(root, "a.npz", transform=meanwhile)
    assert Path("a.npz").read_text() == "theirs"


def test_a_checkpoint_that_goes_away_meanwhile_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = iter([True, False])  # when it is looked for after it was read
    monkeypatch.setattr(sources, "_moved_on", lambda *_: next(gone))
    assert read(cc.export(root, "a.npz", only="step")) == {"step": 7}

    def evicted(*_: object) -> bool:
        raise cc.CheckpointNotFound("evicted while it was read")

    monkeypatch.setattr(sources, "_moved_on", evicted)
    with pytest.raises(cc.CheckpointNotFound, match="evicted"):
        cc.export(root, "b.npz", which=0)
    assert sorted(p.name for p in Path.cwd().iterdir() if "wandb" not in p.name) == ["a.npz", "run"]


@pytest.mark.parametrize("format_", ["safetensors", "orbax"])
def test_a_folder_takes_the_place_of_its_like_alone(
    format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("folder")
    cc.export({"w": np.zeros(2)}, folder, format=format_)
    cc.export({"w": np.ones(2)}, folder, format=format_, overwrite=True)
    assert cc.load_params(folder)["w"].tolist() == [1, 1]

    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if target == folder.absolute():
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            cc.export({"w": np.zeros(2)}, folder, format=format_, overwrite=True)
    assert cc.load_params(folder)["w"].tolist() == [1, 1]

    Path("file").write_text("old")
    cc.export({"w": np.ones(2)}, "file", format=format_, overwrite=True)
    assert cc.load_params("file")["w"].tolist() == [1, 1]

    mine = Path("mine")
    mine.mkdir()
    cc.export({"w": np.ones(2)}, mine / "model", format=format_)
    if format_ == "safetensors":
        (mine / "model" / "model.safetensors").rename(mine / "model.safetensors")
    (mine / "config.json").write_text("{}")
    with pytest.raises(cc.ConfigError, match=r"holds more than a checkpoint, config\.json"):
        cc.export({"w": np.ones(2)}, mine, format=format_, overwrite=True)
    assert (mine / "config.json").exists()


def test_a_file_of_equinox_is_read_by_its_module() -> None:
    mlp = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(1))
    cc.export(mlp, "mlp.npz")
    cc.export("mlp.npz", "mlp.eqx", like=mlp)
    equinox.write_module(Path("mlp.eqx"), mlp, {"width": 4})

    like = eqx.filter_eval_shape(eqx.nn.MLP, 2, 1, 4, 1, key=jax.random.key(2))
    path = cc.export("mlp.eqx", "again.npz", like=like)

    assert same(read(path), read(Path("mlp.npz")))
    assert npz.read(path)[1] == {"width": 4}
    with pytest.raises(cc.ConfigError, match="give like="):
        cc.export("mlp.eqx", "more.npz")


class Iterator:
    """Saves itself, as the iterators of Grain do."""

    async def save(self, *_: object) -> None: ...
    async def load(self, *_: object) -> None: ...


def test_what_saves_itself_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ckpt_callbacks"):
        path = cc.export({"w": np.ones(2), "data": Iterator()}, "a.npz")

    assert set(read(path)) == {"w"}
    assert "export: left out of the state, since they save themselves: data" in caplog.text
    with pytest.raises(cc.CheckpointNotFound, match="nothing that can be read alone: data saved"):
        cc.export({"data": Iterator()}, "b.npz")


# The command line


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_line(root: Path) -> None:
    done = invoke("export", root, "a.npz", "--only", "params/head", "--only", "step", "--which", 0)
    assert (done.exit_code, done.output) == (0, f"wrote {Path.cwd()}/a.npz\n")
    assert set(read(Path("a.npz"))) == {"params/head/kernel", "step"}

    again = invoke("convert", "a.npz", "a.npz")
    assert (again.exit_code, again.output[:7]) == (2, "Error: ")
    assert "is there already" in again.output
    assert invoke("convert", "a.npz", "a.npz", "--only", "step", "--overwrite").exit_code == 0
    assert set(read(Path("a.npz"))) == {"step"}

    for arguments, message in (
        (["gone", "b.npz"], "there is no gone"),
        ([root, "b.npz", "--which", "9"], "has no step 9"),
        ([root, "b.npz", "--which", "worst"], "has no checkpoint 'worst'"),
        ([root, "b"], "formats are"),
        ([root, "no/b.npz"], "there is no folder"),
        ([root, "b.npz", "--format", "x"], "'x' is not known"),
    ):
        failed = invoke("export", *arguments)
        assert failed.exit_code == 2, failed.output
        assert message in failed.output
    assert invoke("export", root, "b.npz", "--axis", "1").exit_code == 2
    assert sorted(p.name for p in Path.cwd().iterdir() if "wandb" not in p.name) == ["a.npz", "run"]


def test_a_disk_that_refuses_is_told_without_a_traceback(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(npz, "write", full)
    failed = invoke("export", root, "a.npz")

    assert (failed.exit_code, failed.output) == (1, "Error: [Errno 28] No space left on device\n")


def test_the_installed_command(root: Path) -> None:
    command = [sys.executable, "-c", "from ckpt_callbacks.cli import main; main()", "export"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    done = subprocess.run(
        [*command, str(root), "a.npz", "--only", "params"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(np.load("a.npz")[npz.NOTES].tobytes())["metadata"]["step"] == 0
    failed = subprocess.run(
        [*command, str(root), "b.npz", "--which", "5"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert failed.returncode == 2
    assert failed.stderr.startswith("Error: ")
    assert "has no step 5; it has 0" in failed.stderr
    assert not Path("b.npz").exists()
