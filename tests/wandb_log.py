"""What W&B's client wrote to its logs, for tests. The folder is the one above `wandb/`."""

from pathlib import Path
from typing import Any

from ckpt_callbacks_wandb._log import Artifact, Log, Row, Saved


def logs_of(folder: Path) -> list[Log]:
    """Return the logs of all starts, the oldest first."""
    found = folder.glob("*run-*/run-*.wandb")
    return [Log(p) for p in sorted(found, key=lambda p: p.parent.name.removeprefix("offline-"))]


def artifacts(folder: Path) -> list[Artifact]:
    """Return all artifacts logged, in order."""
    logs = logs_of(folder / "wandb")
    return [found for log in logs for found in log.new() if isinstance(found, Artifact)]


def aliases(folder: Path) -> dict[str, int]:
    """Return the step that the latest record of each alias names."""
    return {alias: a.metadata["step"] for a in artifacts(folder) for alias in a.aliases}


def files(folder: Path) -> dict[str, bytes]:
    """Return what a sync of all starts, in order, leaves of the user's files, by name."""
    found: dict[str, bytes] = {}
    for log in logs_of(folder / "wandb"):
        saved = {n for entry in log.new() if isinstance(entry, Saved) for n in entry.names}
        for name in saved - {"requirements.txt"}:  # which is W&B's own
            content = (log.path.parent / "files" / name).read_bytes()
            found[name.removeprefix("artifacts/")] = content
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics, in order."""
    logs = logs_of(folder / "wandb")
    return [found.values for log in logs for found in log.new() if isinstance(found, Row)]
