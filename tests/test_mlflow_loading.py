"""What is in MLflow, brought back: by address, by MLflow itself, and for a run on an empty disk."""

import functools
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mlflow
import numpy as np
import pytest
from flax import nnx

import ckpt_callbacks as cc
import loops
from ckpt_callbacks.manifest import seal, tree_digest
from ckpt_callbacks.record import record_from_json, record_to_json
from ckpt_callbacks.testing import make_checkpoint
from ckpt_callbacks_mlflow import MLflowTracker
from ckpt_callbacks_mlflow.flavor import Loaded
from embedded import aliases, client, models, opened, tracker, uri
from loops import local_steps, new_state, train

SCORES = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2}

callbacks_in = functools.partial(loops.callbacks_in, drain_limit=60)  # on a busy machine too


@pytest.fixture(autouse=True)
def _server(tmp_path: Path) -> Iterator[None]:
    mlflow.set_tracking_uri(uri(tmp_path))
    yield
    mlflow.set_tracking_uri(None)


def trained(folder: Path, **options: Any) -> MLflowTracker:
    """Train four steps: the weights of step n are n + 1, and the best step is 1."""
    mirror = tracker(folder, **options)
    train(callbacks_in(folder / "run", mirror), 4, SCORES)
    return mirror


def weight(address: str, **options: Any) -> float:
    return float(cc.restore(address, like=new_state(), **options)["model"]["w"][0, 0])


def run_id(folder: Path) -> str:
    found = models(folder)[1].source_run_id
    assert isinstance(found, str)
    return found


# By address


def test_an_address_names_a_checkpoint_that_is_on_no_disk_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path)
    (tmp_path / "run").rename(tmp_path / "gone")

    assert weight("mlflow:/digits@best") == 2.0
    assert weight("mlflow:/digits@last") == 4.0
    assert weight("models:/digits@last") == 4.0
    assert weight(f"mlflow:/digits/{aliases(tmp_path)['best']}") == 2.0
    assert weight(f"mlflow:/runs/{run_id(tmp_path)}/2") == 3.0
    assert weight("mlflow:/digits@best", only="model") == 2.0


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mlflow:/digits@champion", "MLflow does not give mlflow:/digits@champion"),
        ("mlflow:/other@best", "MLflow does not give mlflow:/other@best"),
        ("mlflow:/digits/99", "MLflow does not give mlflow:/digits/99"),
        ("mlflow:/runs/0123/7", "MLflow does not give mlflow:/runs/0123/7"),
    ],
)
def test_an_address_of_nothing_is_told(tmp_path: Path, address: str, message: str) -> None:
    trained(tmp_path)

    with pytest.raises(cc.CheckpointNotFound, match=message):
        cc.restore(address, like=new_state())


def test_an_address_of_another_form_is_told() -> None:
    with pytest.raises(cc.ConfigError, match="is none of mlflow:/NAME@ALIAS"):
        cc.restore("mlflow:/digits", like=new_state())
    with pytest.raises(cc.ConfigError, match=r"begins with none of .*mlflow:"):
        cc.restore("mlfow:/digits@best", like=new_state())


def test_a_step_that_the_run_does_not_have_is_told(tmp_path: Path) -> None:
    trained(tmp_path)

    with pytest.raises(cc.CheckpointNotFound, match="the run has no checkpoint of this step"):
        cc.restore(f"mlflow:/runs/{run_id(tmp_path)}/0", like=new_state())


def test_a_version_of_somebody_else_is_told(tmp_path: Path) -> None:
    trained(tmp_path)
    theirs = client(tmp_path).create_model_version("digits", source=str(tmp_path))

    with pytest.raises(cc.CheckpointNotFound, match="was not made by ckpt_callbacks"):
        cc.restore(f"mlflow:/digits/{theirs.version}", like=new_state())


def own_copy(path: Path) -> Path:
    """Give a hard link a file of its own, so that damage there is only there."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def test_a_flipped_bit_there_is_an_error_here(tmp_path: Path) -> None:
    trained(tmp_path)
    folder = Path(models(tmp_path)[1].artifact_location)
    files = [p for p in (folder / "checkpoint" / "model").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(own_copy(victim).read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)

    with pytest.raises(cc.CorruptCheckpoint, match=victim.name):
        weight("mlflow:/digits@best")


def test_a_manifest_that_is_not_the_one_sent_is_an_error(tmp_path: Path) -> None:
    trained(tmp_path)
    folders = {s: Path(m.artifact_location) for s, m in models(tmp_path).items()}
    (folders[1] / "checkpoint.json").write_bytes((folders[3] / "checkpoint.json").read_bytes())

    with pytest.raises(cc.RecordError, match="is not the one that was sent"):
        weight("mlflow:/digits@best")


# What is sent


def test_weights_alone_can_be_sent(tmp_path: Path) -> None:
    trained(tmp_path, send="weights")

    folder = Path(models(tmp_path)[1].artifact_location) / "checkpoint"
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"model"}
    assert weight("mlflow:/digits@best", only="model") == 2.0
    with pytest.raises(cc.CheckpointNotFound, match=r"has no item moments; it has model"):
        cc.restore("mlflow:/digits@best", like=new_state(), only="moments")


def test_weights_that_have_no_such_name_are_told(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 7)
    (checkpoint.path / "model").rename(checkpoint.path / "net")
    files = {name.replace("model/", "net/"): file for name, file in checkpoint.files.items()}
    store = opened(tmp_path, tracker(tmp_path, send="weights"))

    with pytest.raises(cc.ConfigError, match="the items of the checkpoint are net"):
        store.put(replace(checkpoint, files=files), [])


def test_weights_that_have_no_such_name_are_told_before_training(tmp_path: Path) -> None:
    callbacks = callbacks_in(tmp_path / "run", tracker(tmp_path, send="weights"))

    with pytest.raises(cc.ConfigError, match="send='weights' needs an item named"):
        callbacks.run({"net": {"w": jnp.zeros(3)}}).__enter__()


def test_a_run_can_not_go_on_from_weights_alone(tmp_path: Path) -> None:
    trained(tmp_path, send="weights")

    address, part = "mlflow:/digits@last", r"holds a part of the checkpoint only \(model\)"
    with pytest.raises(cc.UsageError, match=part):
        train(callbacks_in(tmp_path / "new"), 5, resume=address)
    with pytest.raises(cc.UsageError, match=part):
        cc.pull(address, tmp_path / "pulled")


def test_an_address_is_no_directory_with_several_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(cc.ConfigError, match="names a checkpoint itself; leave out which=3"):
        cc.restore("mlflow:/digits@best", like=new_state(), which=3)


def test_a_reference_holds_no_bytes(tmp_path: Path) -> None:
    trained(tmp_path, send="reference")

    folder = Path(models(tmp_path)[1].artifact_location)
    assert not (folder / "checkpoint").exists()
    assert weight("mlflow:/digits@best") == 2.0
    (tmp_path / "run").rename(tmp_path / "gone")
    with pytest.raises(cc.CheckpointNotFound, match=r"MLflow has a reference to .*run/1 only"):
        weight("mlflow:/digits@best")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"send": "all"}, "send must be one of"),
        ({"predict": "no colon"}, "predict must be 'package.module:function'"),
        ({"like": "a.b"}, "like must be 'package.module:function'"),
        ({"register_as": "a/b"}, "register_as must not contain"),
        ({"run_id": " "}, "run_id must be a name"),
        ({"send": "reference", "predict": "a:b"}, "predict needs the weights"),
    ],
)
def test_an_option_that_is_wrong_is_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cc.ConfigError, match=message):
        MLflowTracker(**options)


# As MLflow loads it


class Net(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0)) for _ in range(1)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.layers[0](x))


def make() -> dict[str, Any]:
    return {"model": Net()}


def apply(state: dict[str, Any], inputs: Any) -> Any:
    return np.asarray(state["model"](jnp.asarray(inputs)))


def apply_module(model: Net, inputs: Any) -> Any:
    return apply({"model": model}, inputs)


def apply_plain(weights: dict[str, Any], inputs: Any) -> Any:
    layer = weights["layers"]["0"]
    return np.asarray(jnp.tanh(jnp.asarray(inputs) @ layer["kernel"] + layer["bias"]))


@pytest.mark.parametrize("send", ["checkpoint", "weights"])
@pytest.mark.parametrize(
    "functions", [("apply", "make"), ("apply_module", "Net"), ("apply_plain", None)]
)
def test_mlflow_loads_a_model_that_predicts_as_the_live_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    send: str,
    functions: tuple[str, str | None],
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    predict, like = (name and f"{Path(__file__).stem}:{name}" for name in functions)
    mirror = tracker(tmp_path, send=send, predict=predict, like=like)
    state = {"model": Net(), "count": {"n": jnp.zeros(2)}}
    with callbacks_in(tmp_path / "run", mirror).run(state) as run:
        kernel = state["model"].layers[0].kernel
        kernel.set_value(kernel.get_value() * 2 + 1)
        run.on_step(0, state)
    (tmp_path / "run").rename(tmp_path / "gone")
    inputs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    loaded = mlflow.pyfunc.load_model("models:/digits@last")

    predicted = loaded.predict(inputs)
    assert np.array_equal(predicted, apply(state, inputs)), predicted


def test_without_a_function_predict_says_which_option_is_missing(tmp_path: Path) -> None:
    trained(tmp_path)
    loaded = mlflow.pyfunc.load_model("models:/digits@best")

    with pytest.raises(cc.ConfigError, match=r"MLflowTracker\(..., predict='package.module:f"):
        loaded.predict(np.zeros((1, 3)))
    assert float(Loaded(Path(models(tmp_path)[1].artifact_location)).state["w"][0, 0]) == 2.0


def test_a_function_that_is_not_here_is_named(tmp_path: Path) -> None:
    trained(tmp_path, predict="nowhere.to:be_found")

    with pytest.raises(cc.ConfigError, match=r"predict='nowhere.to:be_found' .* No module named"):
        mlflow.pyfunc.load_model("models:/digits@best")


# A run that goes on where nothing is left of it


def test_a_run_goes_on_from_mlflow_on_an_empty_disk(tmp_path: Path) -> None:
    trained(tmp_path)
    before = run_id(tmp_path)
    (tmp_path / "run").rename(tmp_path / "gone")

    callbacks = callbacks_in(tmp_path / "run", tracker(tmp_path))
    state = train(callbacks, 6, {5: 0.3}, resume="mlflow:/digits@last")

    assert float(state["model"]["w"][0, 0]) == 6.0
    assert local_steps(tmp_path / "run") == {4, 5}
    # The best of the other disk is still the best, and the run is the same one.
    assert models(tmp_path).keys() == {1, 4, 5}
    assert {m.source_run_id for m in models(tmp_path).values()} == {before}
    steps = {v.tags["ckpt_callbacks_step"]: v for v in registered(tmp_path)}
    named = aliases(tmp_path)
    assert named == {"best": str(steps["1"].version), "last": str(steps["5"].version)}
    history = client(tmp_path).get_metric_history(before, "loss")
    assert [m.step for m in history] == [0, 1, 2, 3, 4, 5]


def test_steps_that_are_taken_again_on_another_disk_are_logged_once(tmp_path: Path) -> None:
    trained(tmp_path)
    before = run_id(tmp_path)
    (tmp_path / "run").rename(tmp_path / "gone")

    callbacks = callbacks_in(tmp_path / "run", tracker(tmp_path), every=10)
    train(callbacks, 6, resume="mlflow:/digits@last")

    history = client(tmp_path).get_metric_history(before, "loss")
    assert [m.step for m in history] == [0, 1, 2, 3, 4, 5]


def test_only_the_newest_checkpoint_can_be_gone_on_from_on_another_disk(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "run").rename(tmp_path / "gone")

    newest = f"A run can only go on from its newest one, mlflow:/runs/{run_id(tmp_path)}/3"
    with pytest.raises(cc.UsageError, match=newest):
        train(callbacks_in(tmp_path / "run"), 6, resume="mlflow:/digits@best")


def test_what_was_pinned_or_measured_again_on_another_disk_is_known_here(tmp_path: Path) -> None:
    keep = cc.LatestN(2) | cc.BestN(1, "score", mode="max")
    root = tmp_path / "run"
    train(callbacks_in(root, tracker(tmp_path), keep=keep), 2, {0: 0.5, 1: 0.9})
    many = {f"metric {n}": float(n) for n in range(400)}
    assert cc.report_metrics(root, 1, {"score": 0.1, **many})
    assert cc.pin(root, 0)
    saved = cc.find(root, 0).time
    train(callbacks_in(root, tracker(tmp_path), keep=keep), 5)
    root.rename(tmp_path / "gone")

    callbacks = callbacks_in(root, tracker(tmp_path), keep=keep)
    train(callbacks, 6, resume="mlflow:/digits@last")

    known = {row.step: row for row in cc.checkpoints(root)}
    assert known.keys() == {0, 4, 5}
    assert "pinned" in known[0].reason
    assert known[0].metrics == {"loss": 0.0, "score": 0.5}
    assert known[0].time == saved
    assert models(tmp_path).keys() == {0, 4, 5}


def test_a_copy_of_other_bytes_on_the_server_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing comes when the step was already saved again."""
    trained(tmp_path)
    records = tmp_path / "run" / ".ckpt_callbacks" / "records"
    record = record_from_json((records / "3.json").read_text(), "3.json")
    path = tmp_path / "run" / "3"
    own_copy(path / "_CHECKPOINT_METADATA").write_text("{}")
    files = seal(path)
    text = record_to_json(replace(record, files=files, copies={}))
    (records / "3.json").write_text(text)

    train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 4)

    assert models(tmp_path)[3].params["digest"] == tree_digest(files)


def test_the_server_of_the_tracker_is_asked(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "run").rename(tmp_path / "gone")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")

    state = train(
        callbacks_in(tmp_path / "run", tracker(tmp_path)), 5, resume="mlflow:/digits@last"
    )

    assert float(state["model"]["w"][0, 0]) == 5.0
    with pytest.raises(cc.CheckpointNotFound, match=r"there is no database sqlite:.*other.db"):
        weight("mlflow:/digits@last")
    assert not (tmp_path / "other.db").exists()


def test_no_password_is_in_the_error_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://bob:hunter2@127.0.0.1:9")

    with pytest.raises(cc.CheckpointNotFound, match="does not give mlflow:/digits@best") as caught:
        weight("mlflow:/digits@best")
    shown = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in shown


def test_a_step_of_two_directories_in_one_run_is_not_guessed(tmp_path: Path) -> None:
    client(tmp_path).create_experiment("mine")
    with mlflow.start_run(experiment_id="1") as run:
        for name in ("pretrain", "finetune"):
            train(callbacks_in(tmp_path / name, MLflowTracker()), 1)

    with pytest.raises(cc.ConfigError, match="several run directories have logged step 0"):
        weight(f"mlflow:/runs/{run.info.run_id}/0")


def registered(folder: Path) -> list[Any]:
    return list(client(folder).search_model_versions("name = 'digits'"))


def test_where_the_directory_holds_a_run_that_one_goes_on(tmp_path: Path) -> None:
    trained(tmp_path)
    client(tmp_path).set_registered_model_alias("digits", "old", aliases(tmp_path)["best"])

    state = train(callbacks_in(tmp_path / "run", tracker(tmp_path)), 5, resume="mlflow:/digits@old")

    assert float(state["model"]["w"][0, 0]) == 5.0


def test_an_address_of_nothing_ends_the_start_of_the_run(tmp_path: Path) -> None:
    callbacks = callbacks_in(tmp_path / "run", tracker(tmp_path))

    with pytest.raises(cc.CheckpointNotFound, match="MLflow does not give mlflow:/digits@last"):
        train(callbacks, 3, resume="mlflow:/digits@last")
    assert not (tmp_path / "run" / ".ckpt_callbacks" / "run.json").exists()
