"""Weights that are published in W&B beside a checkpoint, for other libraries."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import ckpt_callbacks as cc
import wandb_log
from ckpt_callbacks.formats import safetensors
from ckpt_callbacks.manifest import verify
from ckpt_callbacks.publication import files_of
from ckpt_callbacks.stores import RunInfo
from ckpt_callbacks.testing import Recorder
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import Fault, StoredVersion, WandbServer
from loops import callbacks_in, new_state, train
from payloads import FILE, KEY, check_plainly, check_read, saved, state_of

SCORES = {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2}


def tracker(**options: Any) -> WandbTracker:
    return WandbTracker("p", **{"artifact": "digits", "payload": cc.Safetensors(), **options})


def opened(tmp_path: Path, **options: Any) -> WandbTracker:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    store = tracker(**options)
    store.entered(["params"])
    store.open(RunInfo(KEY, "digits", {}, scratch, {}))
    return store


def there(server: WandbServer) -> dict[int, StoredVersion]:
    """Return the complete versions by step, of which there is one each."""
    found = [v for v in server.versions("p", "digits") if v.state == "COMMITTED"]
    by_step = {v.metadata["step"]: v for v in found}
    assert len(by_step) == len(found)
    return by_step


def weight(content: bytes) -> float:
    return float(safetensors.loads(content)[0]["model", "w"].read()[0, 0])


# Online ------------------------------------------------------------------------------------------


def test_a_version_holds_a_file_that_others_read_beside_the_checkpoint(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    store = opened(tmp_path)
    checkpoint, state = saved(tmp_path, 7)

    copy = store.put(checkpoint, [])

    assert (copy.state, copy.shared) == ("confirmed", False)
    version = there(wandb_server)[7]
    check_plainly(version.files[FILE], state)
    named = files_of(version.files["weights.json"].decode(), "weights.json")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.safetensors").write_bytes(version.files[FILE])
    verify(tmp_path / "there", named)
    check_read(tmp_path / "there", state)
    assert version.metadata["payload"] == cc.Safetensors().to_json()
    assert not store._held.steps()  # it was removed once it was sent
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))
    (tmp_path / "into").mkdir()
    store.get(7, tmp_path / "into")
    verify(tmp_path / "into", checkpoint.files)
    assert {p.name for p in (tmp_path / "into").iterdir() if p.is_dir()} == {"params", "moments"}
    store.close("finished")


def test_a_run_publishes_what_it_keeps(tmp_path: Path, wandb_server: WandbServer) -> None:
    events = Recorder()

    train(callbacks_in(tmp_path / "run", tracker(), events, drain_limit=60), 4, SCORES)

    assert not events.of(cc.MirrorFailed)
    assert {s: weight(v.files[FILE]) for s, v in there(wandb_server).items()} == {
        1: 2.0, 2: 3.0, 3: 4.0,
    }  # fmt: skip
    assert {v.state for v in wandb_server.versions("p")} <= {"COMMITTED", "DELETED"}
    like = {"model": new_state()["model"]}
    assert cc.load_params("wandb:me/p/digits:best", like)["model"]["w"][0, 0] == 2.0


def test_an_upload_that_failed_is_repeated_and_is_one(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    store = opened(tmp_path)
    checkpoint, state = saved(tmp_path, 7)
    wandb_server.begin(Fault("403", request="CommitArtifact"))
    with pytest.raises(ValueError, match="403"):
        store.put(checkpoint, [])
    assert not there(wandb_server)

    store.put(checkpoint, [])

    check_plainly(there(wandb_server)[7].files[FILE], state)
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))
    store.close("finished")


KILLED = """
import sys
from pathlib import Path
from test_wandb_payload import tracker
from loops import callbacks_in, train

train(callbacks_in(Path(sys.argv[1]), tracker()), 4, {1: 0.9})
"""


def test_a_run_that_was_killed_during_an_upload_publishes_each_once(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    root, reached = tmp_path / "run", threading.Event()
    # With a W&B service of its own, which dies with it.
    environment = {k: v for k, v in os.environ.items() if "SERVICE" not in k}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    wandb_server.begin(Fault("hang", request="CommitArtifact"))
    wandb_server.on_request = lambda _: (
        reached.set() if "CommitArtifact" in wandb_server.requests else None
    )
    with subprocess.Popen([sys.executable, "-c", KILLED, root], env=environment) as process:
        assert reached.wait(60)
        process.kill()
    wandb_server.on_request = None
    wandb_server.release()
    wandb_server.begin()

    train(callbacks_in(root, tracker(), drain_limit=60), 4, SCORES)

    assert {s: weight(v.files[FILE]) for s, v in there(wandb_server).items()} == {
        1: 2.0, 2: 3.0, 3: 4.0,
    }  # fmt: skip
    assert {v.state for v in wandb_server.versions("p")} <= {"COMMITTED", "DELETED"}
    assert not list((root / ".ckpt_callbacks").rglob("*.safetensors"))


def test_where_the_checkpoint_is_a_reference_the_weights_are_there(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    store = opened(tmp_path, send="reference")
    checkpoint, state = saved(tmp_path, 7)

    store.put(checkpoint, [])

    version = there(wandb_server)[7]
    assert set(version.files) == {"checkpoint.json", "weights.json", FILE}
    assert version.references
    check_plainly(version.files[FILE], state)
    store.close("finished")
    (tmp_path / "saved-7").rename(tmp_path / "gone")
    like = {"params": state_of(0)["params"]}
    loaded = cc.load_params("wandb:me/p/digits:step-7", like)["params"]
    assert loaded["head"]["w"].tobytes() == state["params"]["head"]["w"].tobytes()
    with pytest.raises(cc.CheckpointNotFound, match=r"there are only the weights, as a file"):
        cc.restore("wandb:me/p/digits:step-7")


# Offline -----------------------------------------------------------------------------------------


def test_weights_are_held_until_the_checkpoint_is_no_longer_wanted(tmp_path: Path) -> None:
    store = opened(tmp_path, mode="offline", dir=tmp_path / "logs")
    checkpoint, state = saved(tmp_path, 7)

    copy = store.put(checkpoint, ["best"])
    store.alias("last", 7)

    assert copy.state == "staged"
    first, second = wandb_log.artifacts(tmp_path / "logs")
    held = Path(first.files[FILE])
    assert held == Path(second.files[FILE]) == tmp_path / "scratch" / "7" / FILE
    assert not held.stat().st_mode & 0o222  # as it was, for whoever reads it later
    check_plainly(held.read_bytes(), state)
    store.delete(7)
    assert not held.exists()
    store.close("finished")


def test_a_hold_that_was_cut_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, mode="offline", dir=tmp_path / "logs")
    checkpoint, state = saved(tmp_path, 7)

    def cut(*arguments: object) -> None:
        raise ConnectionError("cut")

    with monkeypatch.context() as patched:
        patched.setattr("ckpt_callbacks_wandb._held.link_tree", cut)
        with pytest.raises(ConnectionError):
            store.put(checkpoint, [])
    assert not store._held.steps()

    store.put(checkpoint, [])

    (found,) = (tmp_path / "scratch").rglob("*.safetensors")
    check_read(found, state)
    store.close("finished")


def test_a_sync_sends_the_weights_that_are_held(tmp_path: Path, wandb_server: WandbServer) -> None:
    payload = cc.Safetensors(only=["params"], max_shard_size=10**6)
    mirror = tracker(mode="offline", payload=payload)
    train(callbacks_in(tmp_path / "run", mirror, drain_limit=60), 4, SCORES)

    assert cc.sync(tmp_path / "run", timeout=60) == {}

    assert {s: weight(v.files[FILE]) for s, v in there(wandb_server).items()} == {
        1: 2.0, 2: 3.0, 3: 4.0,
    }  # fmt: skip
    assert all(v.metadata["payload"] == payload.to_json() for v in there(wandb_server).values())
    assert not list((tmp_path / "run" / ".ckpt_callbacks").rglob("*.safetensors"))


# What is wrong -----------------------------------------------------------------------------------


def test_weights_that_the_state_has_not_are_told_before_training(tmp_path: Path) -> None:
    callbacks = callbacks_in(tmp_path / "run", tracker(mode="offline"))

    with pytest.raises(cc.ConfigError, match=r"WandbTracker: payload=.* has no item params"):
        callbacks.run({"net": {"w": jnp.zeros(3)}}).__enter__()


def test_what_cannot_be_published_is_not_held(tmp_path: Path) -> None:
    store = opened(tmp_path, mode="offline", payload=cc.Safetensors(unstack="blocks"))
    checkpoint, _ = saved(tmp_path, 7)

    with pytest.raises(cc.StateMismatch, match="unstack: nothing is named blocks"):
        store.put(checkpoint, [])

    assert not store._held.steps()
    assert not (tmp_path / "scratch" / "7").exists()
    store.close("finished")


def test_what_is_no_payload_is_told_at_once() -> None:
    with pytest.raises(cc.ConfigError, match=r"WandbTracker: payload must be cc.Safetensors\("):
        WandbTracker("p", payload="safetensors")  # type: ignore[arg-type]


def test_what_cannot_be_published_is_told_before_training(tmp_path: Path) -> None:
    mirror = tracker(mode="offline", payload=cc.Safetensors("model", unstack="blocks"))

    with pytest.raises(cc.ConfigError, match=r"WandbTracker: payload=.*nothing is named blocks"):
        train(callbacks_in(tmp_path / "run", mirror), 2)
