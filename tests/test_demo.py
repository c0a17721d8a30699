"""The main job, as a newcomer runs it: real digits, Orbax, MLflow and W&B."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from orbax.checkpoint import v1 as ocp

import ckpt_callbacks as cc
import digits
import wandb_log

EXAMPLES = Path(__file__).parent.parent / "examples"
KILLED_DEMO = Path(__file__).parent / "killed_demo.py"
FRAMEWORKS = ["nnx", "equinox"]
# With a W&B service of their own, which dies with them as it does outside of tests.
ENVIRONMENT = {k: v for k, v in os.environ.items() if "SERVICE" not in k} | {"COLUMNS": "140"}


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )


def records(directory: Path) -> dict[int, dict[str, Any]]:
    folder = directory / ".ckpt_callbacks" / "records"
    return {int(p.stem): json.loads(p.read_text()) for p in folder.iterdir()}


def weights(checkpoint: Path) -> dict[str, bytes]:
    """Return the bytes of every leaf, read by Orbax alone."""
    names = [p.name for p in checkpoint.iterdir() if p.is_dir()]
    like = {n: ocp.metadata(checkpoint, checkpointable_name=n).metadata for n in names}
    found: dict[str, bytes] = {}

    def walk(path: str, node: Any) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                walk(f"{path}/{name}", child)
        else:
            found[path] = np.asarray(node).tobytes()

    def as_numpy(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: as_numpy(v) for k, v in node.items()}
        return np.zeros(node.shape, node.dtype) if hasattr(node, "shape") else node

    walk("", ocp.load_checkpointables(checkpoint, as_numpy(like)))
    return found


@pytest.fixture(scope="module", params=FRAMEWORKS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An example that ran to its end, and what it printed."""
    root = tmp_path_factory.mktemp(request.param)
    name = f"digits-{request.param}"
    done = run(EXAMPLES / f"digits_{request.param}.py", "--directory", root, "--steps", 400)
    assert done.returncode == 0, done.stderr
    return root, name, done.stdout


def test_it_ends_with_the_table_and_how_to_open_the_trackers(finished: Any) -> None:
    _, _, printed = finished

    for word in ("step", "val_accuracy", "kept because", "best #1", "latest #1", "local, MLflow"):
        assert word in printed
    assert "mlflow ui --backend-store-uri sqlite:///" in printed
    assert "ckpt-callbacks sync" in printed


def test_every_place_holds_exactly_the_kept_steps(finished: Any) -> None:
    root, name, _ = finished
    kept = records(root / name)
    assert {400, 350} <= kept.keys()
    assert 2 <= len(kept) <= 4
    assert {r["state"] for r in kept.values()} == {"complete"}
    accuracy = {s: r["metrics"]["val_accuracy"] for s, r in kept.items()}
    best = max(accuracy, key=lambda s: (accuracy[s], s))

    local = {int(p.name) for p in (root / name).iterdir() if p.name.isdecimal()}
    assert local == kept.keys()

    uri = f"sqlite:///{root}/mlflow.db"
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("digits")
    models = client.search_logged_models([experiment.experiment_id])
    assert {int(m.params["step"]) for m in models} == kept.keys()
    assert {str(m.status) for m in models} == {"READY"}
    on_disk = {p.name for p in (root / "mlartifacts" / "models").iterdir()}
    assert on_disk == {m.model_id for m in models}
    for alias, step in {"best": best, "last": 400}.items():
        version = client.get_model_version_by_alias(name, alias)
        assert version.tags["ckpt_callbacks_step"] == str(step)

    aliases = wandb_log.aliases(root)
    assert (aliases["best"], aliases["last"]) == (best, 400)
    for artifact in wandb_log.artifacts(root):
        held = [Path(p).exists() for p in artifact.files.values()]
        assert all(held) if artifact.metadata["step"] in kept else not any(held)


def test_best_from_mlflow_has_the_same_bytes_as_the_local_one(finished: Any) -> None:
    root, name, _ = finished
    uri = f"sqlite:///{root}/mlflow.db"
    client = MlflowClient(uri, uri)
    version = client.get_model_version_by_alias(name, "best")

    copy = Path(client.get_model_version_download_uri(name, version.version)) / "checkpoint"

    local = weights(root / name / version.tags["ckpt_callbacks_step"])
    assert weights(copy) == local
    assert len(local) >= 10


def rows(text: str) -> list[list[str]]:
    """Return the cells of a table."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_command_line_lists_the_same(finished: Any) -> None:
    root, name, printed = finished
    command = Path(sys.executable).with_name("ckpt-callbacks")

    listed = subprocess.run(
        [command, "ls", root / name],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT | {"COLUMNS": "160"},
    )

    shown = [(step, why, where) for step, _, _, _, why, where, *_ in rows(listed.stdout)]
    assert shown == [(step, why, where) for step, _, why, _, where, _ in rows(printed)]


def test_every_metric_is_in_mlflow_and_wandb_once(finished: Any) -> None:
    root, _, _ = finished
    uri = f"sqlite:///{root}/mlflow.db"
    client = MlflowClient(uri, uri)
    (mlflow_run,) = client.search_runs(["1"])
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["batch_size"] == "128"

    history = client.get_metric_history(mlflow_run.info.run_id, "loss")
    assert [m.step for m in history] == list(range(401))
    rows = [r["trainer/step"] for r in wandb_log.history(root) if "loss" in r]
    assert rows == list(range(401))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "kills"),
    [
        ("nnx", [("Saved", 2), ("Step", 77), ("Promoted", 2)]),
        ("equinox", [("Evicted", 1), ("Mirrored", 1)]),
    ],
    ids=FRAMEWORKS,
)
def test_killed_again_and_again_it_ends_as_if_it_never_was(
    framework: str, kills: list[tuple[str, int]], tmp_path: Path
) -> None:
    name = f"digits-{framework}"
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for root in (plain, killed):
        root.mkdir()
    done = run(KILLED_DEMO, framework, plain, 300, "none", 1)
    assert done.returncode == 0, done.stderr

    for kind, nth in kills:
        cut = run(KILLED_DEMO, framework, killed, 300, kind, nth)
        assert cut.returncode == -signal.SIGKILL, (kind, nth, cut.stderr)
    done = run(KILLED_DEMO, framework, killed, 300, "none", 1)
    assert done.returncode == 0, done.stderr

    kept = records(plain / name)
    best = max(kept, key=lambda s: (kept[s]["metrics"]["val_accuracy"], s))
    aliases = wandb_log.aliases(killed)
    assert (aliases["best"], aliases["last"]) == (best, 300)
    rows = [r["trainer/step"] for r in wandb_log.history(killed) if "loss" in r]
    assert rows == list(range(301))

    def outcome(root: Path) -> dict[int, Any]:
        """Everything but what names a run or a moment."""
        return {
            step: (r["state"], r["metrics"], sorted(r["copies"]))
            for step, r in records(root / name).items()
        }

    assert outcome(killed) == outcome(plain)
    for step in outcome(plain):
        assert weights(killed / name / str(step)) == weights(plain / name / str(step))
    uri = f"sqlite:///{killed}/mlflow.db"
    client = MlflowClient(uri, uri)
    (mlflow_run,) = client.search_runs(["1"])  # the same run all along
    history = client.get_metric_history(mlflow_run.info.run_id, "loss")
    assert [m.step for m in history] == list(range(301))
    models = client.search_logged_models(["1"])
    assert sorted(int(m.params["step"]) for m in models) == sorted(outcome(plain))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_weights_are_bit_identical_with_and_without_callbacks(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"digits_{framework}")
    monkeypatch.setattr(module, "Progress", _Silent)

    with_all, _ = module.train(digits.callbacks_for("run", tmp_path), 120)
    without, _ = module.train(cc.Callbacks(), 120)

    assert _bytes(with_all) == _bytes(without)


class _Silent:
    """Stands in for the progress bar, which writes to the terminal."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *error: object) -> None: ...

    def add_task(self, *arguments: Any, **options: Any) -> int:
        return 0

    def update(self, *arguments: Any, **options: Any) -> None: ...


def _bytes(state: Any) -> list[bytes]:
    import jax

    from ckpt_callbacks.state import leaves_of

    def content(leaf: Any) -> bytes:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return [content(leaf) for leaf in leaves_of(state).values()]
