"""Weights that are published in MLflow beside a checkpoint, for other libraries."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import mlflow
import numpy as np
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.manifest import link_tree, verify
from ckpt_callbacks.testing import Recorder
from ckpt_callbacks_mlflow import MLflowTracker
from ckpt_callbacks_mlflow._files import send
from embedded import client, models, opened, tracker, uri
from loops import callbacks_in, new_state, train
from payloads import FILE, check_plainly, check_read, saved, state_of

SCORES = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2}


@pytest.fixture(autouse=True)
def _server(tmp_path: Path) -> Iterator[None]:
    mlflow.set_tracking_uri(uri(tmp_path))
    yield
    mlflow.set_tracking_uri(None)


def folders(folder: Path) -> list[Path]:
    """Return the folders of the artifacts of all LoggedModels."""
    return list((folder / "artifacts" / "models").iterdir())


def with_weights(folder: Path, **options: Any) -> MLflowTracker:
    return tracker(folder, **{"payload": cc.Safetensors(), **options})


def scratch(folder: Path) -> list[Path]:
    """Return what is left of what was made to be sent."""
    return list((folder / "scratch").iterdir())


def test_a_version_holds_a_file_that_others_read_beside_the_checkpoint(tmp_path: Path) -> None:
    store = opened(tmp_path, with_weights(tmp_path))
    checkpoint, state = saved(tmp_path, 7)

    copy = store.put(checkpoint, [])
    store.alias("best", 7)

    assert copy.shared  # of the checkpoint there is no second copy here
    found = mlflow.artifacts.download_artifacts(f"models:/digits@best/{FILE}")
    check_plainly(Path(found).read_bytes(), state)
    about = check_read(Path(found), state)
    assert about["digest"] == models(tmp_path)[7].params["digest"]
    assert json.loads(models(tmp_path)[7].params["payload"])["only"] == "params"
    assert scratch(tmp_path) == []
    (tmp_path / "saved-7").rename(tmp_path / "gone")
    (tmp_path / "into").mkdir()
    store.get(7, tmp_path / "into")
    verify(tmp_path / "into", checkpoint.files)
    assert {p.name for p in (tmp_path / "into").iterdir() if p.is_dir()} == {"params", "moments"}
    like = {"params": state_of(0)["params"]}
    loaded = cc.load_params("mlflow:/digits@best", like)["params"]
    assert loaded["head"]["w"].tobytes() == state["params"]["head"]["w"].tobytes()


def test_a_run_publishes_what_it_keeps_and_leaves_no_other_file(tmp_path: Path) -> None:
    events = Recorder()
    mirror = with_weights(tmp_path)

    train(callbacks_in(tmp_path / "run", mirror, events, drain_limit=60), 4, SCORES)

    assert not events.of(cc.MirrorFailed)
    assert models(tmp_path).keys() == {1, 2, 3}
    files = {p for folder in folders(tmp_path) for p in folder.rglob("*.safetensors")}
    assert len(files) == len(folders(tmp_path)) == 3
    for step, model in models(tmp_path).items():
        weights = cc.load_params(Path(model.artifact_location) / FILE)
        assert weights["w"][0, 0] == step + 1
    assert not (tmp_path / "run" / ".ckpt_callbacks" / "stores" / "mlflow" / "payload").exists()
    assert cc.restore("mlflow:/digits@best", like=new_state())["model"]["w"][0, 0] == 2.0


def test_what_is_deleted_there_leaves_no_weights(tmp_path: Path) -> None:
    store = opened(tmp_path, with_weights(tmp_path))
    store.put(saved(tmp_path, 7)[0], [])
    assert list(tmp_path.glob(f"artifacts/models/*/artifacts/{FILE}"))

    assert store.delete(7)

    assert folders(tmp_path) == []


@pytest.mark.parametrize("folder", ["checkpoint", "weights"])
def test_a_copy_that_was_cut_is_completed_and_is_one(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, with_weights(tmp_path))
    checkpoint, state = saved(tmp_path, 7)

    def cut(source: Path, target: Path, names: Any) -> bool:
        linked = link_tree(source, target, names)
        if target.name == folder:
            raise ConnectionError("cut")
        return linked

    with monkeypatch.context() as patched:
        patched.setattr("ckpt_callbacks_mlflow._files.link_tree", cut)
        with pytest.raises(ConnectionError):
            store.put(checkpoint, [])
    listing = store.listing()
    assert listing is not None
    assert not listing.copies
    assert str(models(tmp_path)[7].status) == "PENDING"
    assert scratch(tmp_path) == []

    store.put(checkpoint, [])

    (there,) = folders(tmp_path)
    assert str(models(tmp_path)[7].status) == "READY"
    check_read(there / "artifacts" / FILE, state)


def test_weights_that_did_not_arrive_whole_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, with_weights(tmp_path))

    def half(source: Path, target: Path, names: Any) -> bool:
        return target.name == "weights" or link_tree(source, target, names)

    monkeypatch.setattr("ckpt_callbacks_mlflow._files.link_tree", half)
    with pytest.raises(OSError, match=f"{FILE} has None bytes in MLflow instead of"):
        store.put(saved(tmp_path, 7)[0], [])

    assert str(models(tmp_path)[7].status) == "PENDING"


def test_on_a_server_what_arrived_before_a_cut_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of files stands in for one that files are uploaded to."""
    store = opened(tmp_path, with_weights(tmp_path))
    checkpoint, state = saved(tmp_path, 7)
    names: list[str] = []
    cuts: list[str] = []

    def cut(repository: Any, path: Path, name: str) -> None:
        names.append(name)
        if name == FILE and not cuts:
            cuts.append(name)
            raise ConnectionError("cut")
        send(repository, path, name)

    monkeypatch.setattr("ckpt_callbacks_mlflow._files._local_folder", lambda store: None)
    monkeypatch.setattr("ckpt_callbacks_mlflow._files.send", cut)
    with pytest.raises(ConnectionError):
        store.put(checkpoint, [])
    assert str(models(tmp_path)[7].status) == "PENDING"
    names.clear()

    store.put(checkpoint, [])

    assert set(names) == {FILE, "weights.json", "checkpoint.json", "MLmodel", "README.md"}
    (there,) = folders(tmp_path)
    check_read(there / "artifacts" / FILE, state)
    assert store.delete(7)
    assert not list((tmp_path / "artifacts").rglob("*.safetensors"))


def test_a_copy_begun_with_other_options_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = saved(tmp_path, 7)
    first = opened(tmp_path, with_weights(tmp_path, payload=cc.Safetensors(max_shard_size=50)))

    def cut(*arguments: object) -> None:
        raise ConnectionError("cut")

    with monkeypatch.context() as patched:
        patched.setattr(first._client, "finalize_logged_model", cut)
        with pytest.raises(ConnectionError):
            first.put(checkpoint, [])

    opened(tmp_path, with_weights(tmp_path)).put(checkpoint, [])

    (there,) = folders(tmp_path)
    names = [p.name for p in (there / "artifacts" / "weights").iterdir()]
    assert names == ["model.safetensors"]
    assert str(models(tmp_path)[7].status) == "READY"


def test_what_a_killed_process_left_is_no_part_of_a_copy(tmp_path: Path) -> None:
    store = opened(tmp_path, with_weights(tmp_path))
    left = tmp_path / "scratch" / "payload" / "weights"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "other.safetensors").write_bytes(b"half")

    store.put(saved(tmp_path, 7)[0], [])

    (there,) = folders(tmp_path)
    assert [p.name for p in (there / "artifacts" / "weights").iterdir()] == ["model.safetensors"]
    assert scratch(tmp_path) == []


class Down(MLflowTracker):
    """Takes no checkpoint."""

    def put(self, *arguments: object) -> Any:
        raise ConnectionError("the server is down")


def test_a_sync_publishes_what_the_run_could_not(tmp_path: Path) -> None:
    payload = cc.Safetensors(only=["params"], max_shard_size=10**6)
    location = str(tmp_path / "artifacts")
    down = Down("digits", tracking_uri=uri(tmp_path), artifact_location=location, payload=payload)
    train(callbacks_in(tmp_path / "run", down, drain_limit=1), 3)
    assert models(tmp_path) == {}

    assert cc.sync(tmp_path / "run", timeout=60) == {}

    for step, model in models(tmp_path).items():
        assert cc.load_params(Path(model.artifact_location) / FILE)["w"][0, 0] == step + 1
        assert json.loads(model.params["payload"]) == payload.to_json()
    assert models(tmp_path).keys() == {1, 2}


def test_weights_that_the_state_has_not_are_told_before_training(tmp_path: Path) -> None:
    callbacks = callbacks_in(tmp_path / "run", with_weights(tmp_path))

    with pytest.raises(cc.ConfigError, match=r"MLflowTracker: payload=.* has no item params"):
        callbacks.run({"net": {"w": jnp.zeros(3)}}).__enter__()


def test_what_cannot_be_published_is_told_before_training(tmp_path: Path) -> None:
    mirror = with_weights(tmp_path, payload=cc.Safetensors(unstack="blocks"))

    with pytest.raises(cc.ConfigError, match=r"MLflowTracker: payload=.*nothing is named blocks"):
        train(callbacks_in(tmp_path / "run", mirror), 2)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_published_after_all_is_told_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Recorder()
    mirror = with_weights(tmp_path, payload=cc.Safetensors(unstack="blocks"))
    # As a state may become another one.
    monkeypatch.setattr(cc.Safetensors, "fits", lambda *_: None)

    train(callbacks_in(tmp_path / "run", mirror, events, drain_limit=3), 2)

    told = [e for e in events.of(cc.MirrorFailed) if isinstance(e, cc.MirrorFailed)]
    assert {e.error for e in told} == {"StateMismatch: unstack: nothing is named blocks"}
    assert len(told) == len({e.action for e in told})
    assert client(tmp_path).search_logged_models(["1"]) == []


# As MLflow loads it, where the checkpoint is not there -------------------------------------------


def apply(weights: dict[str, Any], inputs: Any) -> Any:
    return np.asarray(inputs @ np.asarray(weights["model"]["w"]))


def apply_plain(weights: dict[str, Any], inputs: Any) -> Any:
    return np.asarray(inputs @ weights["w"])


@pytest.mark.parametrize("functions", [("apply", "new_weights"), ("apply_plain", None)])
def test_mlflow_loads_the_weights_where_the_checkpoint_was_not_sent(
    functions: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    predict, like = (name and f"{Path(__file__).stem}:{name}" for name in functions)
    mirror = with_weights(tmp_path, send="reference", predict=predict, like=like)
    train(callbacks_in(tmp_path / "run", mirror, drain_limit=60), 4, SCORES)
    (tmp_path / "run").rename(tmp_path / "gone")
    inputs = np.eye(4, dtype=np.float32)

    predicted = mlflow.pyfunc.load_model("models:/digits@best").predict(inputs)

    assert np.array_equal(predicted, np.full((4, 4), 2.0))
    assert not (Path(models(tmp_path)[1].artifact_location) / "checkpoint").exists()


def test_weights_are_loaded_by_their_address_where_the_checkpoint_was_not_sent(
    tmp_path: Path,
) -> None:
    mirror = with_weights(tmp_path, send="reference")
    train(callbacks_in(tmp_path / "run", mirror, drain_limit=60), 4, SCORES)
    (tmp_path / "run").rename(tmp_path / "gone")

    loaded = cc.load_params("mlflow:/digits@best", new_weights())

    assert loaded["model"]["w"].tobytes() == np.full((4, 4), 2.0, np.float32).tobytes()
    cc.export("mlflow:/digits@best", tmp_path / "best.npz")
    assert np.load(tmp_path / "best.npz")["model.w"][0, 0] == 2.0
    with pytest.raises(cc.CheckpointNotFound, match=r"there are only the weights, as a file"):
        cc.restore("mlflow:/digits@best", like=new_state())
    with pytest.raises(cc.UsageError, match=r"there are only the weights, as a file, so no run"):
        train(callbacks_in(tmp_path / "new"), 5, resume="mlflow:/digits@last")


def new_weights() -> dict[str, Any]:
    return {"model": new_state()["model"]}


def test_damaged_weights_are_not_loaded(tmp_path: Path) -> None:
    store = opened(tmp_path, with_weights(tmp_path, send="reference"))
    store.put(saved(tmp_path, 7)[0], [])
    store.alias("best", 7)
    file = Path(models(tmp_path)[7].artifact_location) / FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)

    with pytest.raises(cc.CorruptCheckpoint, match=r"model.safetensors is damaged: its digest"):
        mlflow.pyfunc.load_model("models:/digits@best")


def test_what_is_no_payload_is_told_at_once() -> None:
    with pytest.raises(cc.ConfigError, match=r"MLflowTracker: payload must be cc.Safetensors\("):
        MLflowTracker(payload="safetensors")  # type: ignore[arg-type]
