"""A run directory in S3: moto's server, and the real clients of fsspec and Orbax."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.bucket import Bucket
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks_mlflow import MLflowTracker
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import WandbServer
from folder_store import FolderStore
from object_storage import RemoteContract, after, new_state, train
from servers import processes

BUCKET = "runs"
SCRIPT = Path(__file__).parents[1] / "killed_run.py"
POINTS = {
    "metrics-recorded": 2,
    "objects-sent": 2,
    "files-sealed": 2,
    "record-complete": 2,
    "record-evicting": 2,
    "moved-to-trash": 2,
    "objects-removed": 2,
    "published": 2,
    "request-applied": 1,
}
"""One in each part of a save, an eviction and the rest, and at which hit; `tests/test_kills.py` has
them all."""
LEAVING = {"record-left": 2, "left-for-trash": 1, "objects-removed": 3}
"""One in each part of a checkpoint's way to where a tracker alone has it."""


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with processes.s3(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def settings(endpoint: str) -> dict[str, str]:
    import s3fs

    client = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=endpoint)
    client.mkdir(BUCKET)
    return processes.AWS | {"AWS_ENDPOINT_URL": endpoint}


@pytest.fixture(autouse=True)
def _settings(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def where() -> str:
    return f"s3://{BUCKET}/{uuid4()}/digits"


class TestS3(RemoteContract):
    pass


def test_where_there_is_no_bucket_it_says_so(where: str) -> None:
    with pytest.raises(cc.ConfigError, match="cannot use the run directory s3://none/x"):
        train("s3://none/x", 3)


def test_mlflow_gets_its_address_and_no_bytes(where: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = MLflowTracker(
        "digits",
        register_as="digits",
        send="reference",
        tracking_uri=uri,
        artifact_location=str(tmp_path / "artifacts"),
    )

    train(where, 5, tracker)

    files = [p for p in (tmp_path / "artifacts").rglob("*") if p.is_file()]
    assert not [p for p in files if p.parent.name == "d"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        found = cc.restore("mlflow:/digits@best", like=new_state())
    np.testing.assert_array_equal(found["params"]["w"], after(2)["params"]["w"])


def test_wandb_gets_its_address_and_no_bytes(where: str, wandb_server: WandbServer) -> None:
    train(where, 5, WandbTracker("p", artifact="digits", send="reference"))

    there = {v.metadata["step"]: v for v in wandb_server.versions("p", "digits")}
    kept = [v for v in there.values() if v.state == "COMMITTED"]
    assert [set(v.files) for v in kept] == [{"checkpoint.json"}] * 2
    assert there[4].metadata["path"] == f"{where}/4"
    assert there[4].references
    found = cc.restore("wandb:me/p/digits:best", like=new_state())
    np.testing.assert_array_equal(found["params"]["w"], after(2)["params"]["w"])


def run(root: Path, where: str, machine: str, failpoint: str | None = None, *options: str) -> int:
    environment = os.environ | {"CKPT_CALLBACKS_SCRATCH": str(root / machine)}
    if failpoint:
        environment["CKPT_CALLBACKS_FAILPOINT"] = failpoint
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, root, where],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def outcome(root: Path, where: str) -> dict[str, Any]:
    """Return all that a run leaves behind, but for names and times of the run itself."""
    bucket, store = Bucket(where), FolderStore(root / "store")
    names = bucket.tree("")
    records = {n: json.loads(bucket.read(n) or b"") for n in names if "/records/" in n}
    here = [r for r in records.values() if not r["lost"]]
    files = {n for r in here for n in (f"{r['step']}/{f}" for f in r["files"])}
    listing = store.listing()
    assert listing is not None
    return {
        "records": {
            n: (r["state"], r["metrics"], r["logged"], r["lost"]) for n, r in records.items()
        },
        "other objects of checkpoints": [n for n in names if n[0] != "." and n not in files],
        "missing objects": sorted(files - names.keys()),
        "on the way": [n for n in names if n.split("/")[1] in ("trash", "inbox", "artifacts")],
        "evicted": sorted({gone.step for gone in open_directory(where).read_evicted()}),
        "complete": sorted(listing.copies),
        "aliases": dict(listing.aliases),
        "metrics": sorted(set(store.metrics())),
        "files": store.files(),
        "problems": cc.verify(where),
        "weights": {
            c.step: weights(where, c.step, *([] if "s3" in c.where else [store]))
            for c in cc.checkpoints(where)
        },
    }


def weights(where: str, step: int, *stores: FolderStore) -> list[float]:
    found = cc.restore(where, like={"w": np.zeros(1000)}, which=step, stores=stores)
    values: list[float] = found["w"].tolist()
    return values


def undisturbed(root: Path, settings: dict[str, str], *options: str) -> dict[str, Any]:
    where = f"s3://{BUCKET}/{uuid4()}/plain"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        assert run(root, where, "a", None, *options) == 0
        return outcome(root, where)


@pytest.fixture(scope="module")
def uninterrupted(
    settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    found = undisturbed(tmp_path_factory.mktemp("plain"), settings)
    assert (found["complete"], found["evicted"]) == ([1, 5], [0, 2, 3, 4])
    assert found["aliases"] == {"best": 1, "last": 5}
    assert (found["on the way"], found["missing objects"], found["problems"]) == ([], [], [])
    return found


@pytest.mark.parametrize("point", POINTS)
def test_killed_it_goes_on_elsewhere_as_if_it_never_was(
    point: str, uninterrupted: dict[str, Any], where: str, tmp_path: Path
) -> None:
    """After a second kill on the machine of the first, in the recovery or after it."""
    assert run(tmp_path, where, "a", f"{point}:{POINTS[point]}") == -signal.SIGKILL
    run(tmp_path, where, "a", f"{point}:1")
    assert run(tmp_path, where, "b") == 0

    assert outcome(tmp_path, where) == uninterrupted


@pytest.fixture(scope="module")
def small(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = undisturbed(tmp_path_factory.mktemp("small"), settings, "--small-disk")
    assert (found["complete"], found["evicted"]) == ([1, 4, 5], [0, 2, 3])
    assert found["aliases"] == {"best": 1, "last": 5}
    lost = {name.rpartition("/")[2]: lost for name, (*_, lost) in found["records"].items()}
    assert lost == {"1.json": True, "4.json": True, "5.json": False}
    assert (found["on the way"], found["missing objects"], found["problems"]) == ([], [], [])
    assert found["other objects of checkpoints"] == []
    return found


@pytest.mark.parametrize("point", LEAVING)
def test_killed_while_a_checkpoint_leaves_the_bucket_it_goes_on_elsewhere(
    point: str, small: dict[str, Any], where: str, tmp_path: Path
) -> None:
    killed = run(tmp_path, where, "a", f"{point}:{LEAVING[point]}", "--small-disk")
    assert killed == -signal.SIGKILL
    run(tmp_path, where, "a", f"{point}:1", "--small-disk")
    assert run(tmp_path, where, "b", None, "--small-disk") == 0

    assert outcome(tmp_path, where) == small
