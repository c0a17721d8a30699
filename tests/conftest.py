"""Every test runs in a folder of its own and reaches no network."""

from pathlib import Path

import pytest

from ckpt_callbacks_wandb.testing import wandb_server

__all__ = ["wandb_server"]  # a fixture

pytest.register_assert_rewrite("ckpt_callbacks.testing")


_MLFLOW = [
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-hits", action="store_true", help="kill at every hit of every failpoint: 40 minutes"
    )
    parser.addoption(
        "--machine-runs", type=int, default=100, help="runs of the state machine, 50 steps each"
    )
    parser.addoption("--flips", type=int, default=60, help="checkpoints to damage at random")
    parser.addoption(
        "--write-commands", action="store_true", help="take what commands print as what they should"
    )


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in _MLFLOW:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
