"""What is remembered of a run, and of the folders that W&B's client made at each of its starts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckpt_callbacks.directory import replace_text
from ckpt_callbacks_wandb._log import Log

__all__ = ["Starts"]

logger = logging.getLogger("ckpt_callbacks")


class Starts:
    """The starts of one run, in `run.json`.

    Args:
        folder: where that is.
        config: hyper-parameters, as this start gives them; one that only sends gives none.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._file = folder / "run.json"
        self._known: dict[str, Any] = {"began": time.time(), "config": {}, "starts": {}}
        if self._file.exists():
            self._known = json.loads(self._file.read_text("utf-8"))
        self._known["config"] |= config
        self._write()

    @property
    def began(self) -> float:
        """When the run began, seconds since the epoch."""
        return float(self._known["began"])

    @property
    def config(self) -> dict[str, Any]:
        """What all starts gave, the last one first."""
        return dict(self._known["config"])

    def add(self, folder: Path, run_id: str) -> list[Log]:
        """Note the folder of a new start; return the logs of the earlier ones, the oldest first.

        Args:
            folder: that W&B's client made.
            run_id: of the run of W&B. Only starts of the same are returned.
        """
        logs: list[Log] = []
        for name in list(self._known["starts"]):
            start = self._folder / name
            log = start / f"run-{run_id}.wandb"
            if log.exists() and start != folder:
                logs.append(Log(log))
            elif not start.is_dir() and not self._known["starts"].pop(name):
                logger.warning("%s is gone, and with it what W&B had not been sent of it", start)
        self._known["starts"].setdefault(self._name(folder), False)
        self._write()
        return logs

    def is_settled(self, log: Log) -> bool:
        """Return whether the server has all of a start."""
        return bool(self._known["starts"].get(self._name(log.path.parent)))

    def settle(self, logs: Iterable[Log]) -> None:
        """The server has all of these starts."""
        self._known["starts"] |= {self._name(log.path.parent): True for log in logs}
        self._write()

    def _name(self, folder: Path) -> str:
        """Return a folder as it is noted: one in the run directory moves with it."""
        inside = folder.is_relative_to(self._folder)
        return str(folder.relative_to(self._folder) if inside else folder)

    def _write(self) -> None:
        replace_text(self._file, json.dumps(self._known, indent=1))
