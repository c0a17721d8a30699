"""What W&B's client wrote to its logs, for tests. The folder is the one above `wandb/`."""

from pathlib import Path
from typing import Any

from ckpt_callbacks_wandb._log import Artifact, Row, logs_of


def artifacts(folder: Path) -> list[Artifact]:
    """Return all artifacts logged, in order."""
    logs = logs_of(folder / "wandb")
    return [found for log in logs for found in log.new() if isinstance(found, Artifact)]


def aliases(folder: Path) -> dict[str, int]:
    """Return the step that the latest record of each alias names."""
    return {alias: a.metadata["step"] for a in artifacts(folder) for alias in a.aliases}


def history(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics, in order."""
    logs = logs_of(folder / "wandb")
    return [found.values for log in logs for found in log.new() if isinstance(found, Row)]
