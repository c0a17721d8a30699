"""The user's files, which are logged with a run of W&B."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_callbacks_wandb._log import LOG_SECONDS, Log, Saved

if TYPE_CHECKING:
    import wandb

__all__ = ["Files"]

ARTIFACTS = "artifacts"
"""The folder for them among the files of W&B's run, which has files of its own there, such as
`config.yaml`."""


class Files:
    """The files of one run of W&B.

    Args:
        run: the run, which is open.
        log: its log file.
        api: of W&B; none if the run is offline.
    """

    def __init__(self, run: wandb.Run, log: Log, api: wandb.Api | None) -> None:
        self._run = run
        self._log = log
        self._api = api

    def log(self, path: Path, name: str) -> None:
        """Send a file, or log it to be sent, and return when that is done."""
        # Into the folder that W&B syncs, since the file goes.
        root = Path(self._run.dir)
        target = root / ARTIFACTS / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        if self._api:
            self._send(self._api, root, target)
            return
        self._run.save(glob.escape(str(target)), base_path=str(root), policy="now")
        for found in self._log.follow(LOG_SECONDS):
            if isinstance(found, Saved) and f"{ARTIFACTS}/{name}" in found.names:
                return

    def resume(self, logs: Iterable[Log]) -> None:
        """Send what earlier starts logged offline; their logs are given, the oldest first."""
        for log in logs:
            if self._api and not log.is_synced:
                root = log.path.parent / "files"
                for file in sorted(p for p in (root / ARTIFACTS).rglob("*") if p.is_file()):
                    self._send(self._api, root, file)

    def _send(self, api: wandb.Api, root: Path, file: Path) -> None:
        """Upload a file, which returns when it is there."""
        api.run(self._run.path).upload_file(str(file), root=str(root))
        file.unlink()
