"""What stands for the engine in the processes that follow: it saves with the others.

It has no ledger, no workers and no trackers, and writes nothing but what Orbax has each process
write.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_callbacks import orbax_io
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CkptCallbacksError
from ckpt_callbacks.events import Eval, SaveFailed
from ckpt_callbacks.extras import ahead
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.processes import Processes
from ckpt_callbacks.sharing import as_global
from ckpt_callbacks.state import capture

__all__ = ["Follower"]

logger = logging.getLogger("ckpt_callbacks")

_LONGEST_LOOK = 60.0
"""Seconds within which a network file system shows what another host has written."""


class _Resumed(NamedTuple):
    step: int


class Follower:
    """Takes part in the saves of a run that process 0 has opened.

    Args:
        directory: which all processes share.
        processes: of the run.
        hooks: get the events of this process.
        failed: gets step and error of every save that fails here, before its event.

    Raises:
        CkptCallbacksError: what kept process 0 from opening it.
    """

    busy = False
    """Process 0 knows."""

    def __init__(
        self,
        directory: RunDirectory,
        processes: Processes,
        hooks: Hooks,
        failed: Callable[[int, BaseException], None],
    ) -> None:
        self.directory = directory
        self._processes, self._hooks, self._failed = processes, hooks, failed
        self._saving: threading.Thread | None = None
        word = processes.opened()
        self._run_id: str = word["run"]
        self._unmeasured: list[int] = word["unmeasured"]
        self.resumed = None if word["step"] is None else _Resumed(word["step"])

    def word(self) -> None:
        """Process 0 tells."""

    def begin(self) -> None:
        """Process 0 sees to what others ask."""

    def unseen(self) -> str | None:
        """Return what is wrong if this process has another directory than process 0."""
        deadline = time.monotonic() + min(_LONGEST_LOOK, self._processes.timeout / 2)
        while True:
            try:
                run = self.directory.read_run()
            except (OSError, CkptCallbacksError) as error:
                return str(error)
            if run and run.run_id == self._run_id:
                return None
            if time.monotonic() > deadline:
                return (
                    f"does not see the run that process 0 has opened in {self.directory.root}: it "
                    "has to be one directory that all processes share"
                )
            time.sleep(0.1)

    def unmeasured(self) -> list[int]:
        """Return the steps that lacked a metric when the run began."""
        return self._unmeasured

    def would_keep(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Process 0 is asked."""
        return False

    def was_evicted(self, step: int) -> bool:
        """Process 0 knows."""
        return False

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Tell the plugins of an evaluation; process 0 ranks by its own."""
        self._hooks.emit(Eval(step, metrics))
        return True

    def log(self, point: tuple[int, Mapping[str, Any]]) -> None:
        """Process 0 logs its own."""

    def log_artifact(self, path: Path, name: str) -> None:
        """Process 0 sends its own."""

    def save(
        self,
        step: int,
        state: Any,
        evaluated: Mapping[str, float],
        metrics: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> Exception | None:
        """Take part in a save, as `Saver.save` has it."""
        self.wait()
        with ahead():
            problem: Exception | None = None
            items: dict[str, Any] = {}
            try:
                items = capture(state).items
            except Exception as error:
                problem = error
            if refused := self._processes.before_save(step, problem):
                return refused
            try:
                pending = orbax_io.save(self.directory.path(step), as_global(items), {})
            except Exception as error:
                return error
        self._saving = threading.Thread(
            target=self._finish, args=(step, pending), name="ckpt-saver", daemon=True
        )
        self._saving.start()
        return None

    def _finish(self, step: int, pending: orbax_io.PendingSave) -> None:
        try:
            pending.result()
        except Exception as error:
            self.report(step, error)

    def report(self, step: int, error: Exception) -> None:
        """Tell of a save that failed here."""
        self._failed(step, error)
        text = f"{type(error).__name__}: {error}"
        logger.error("the checkpoint of step %d could not be saved: %s", step, text)
        self._hooks.emit(SaveFailed(step, text))

    def wait(self) -> None:
        """Wait until no save is in flight."""
        if self._saving and self._saving is not threading.current_thread():
            self._saving.join()

    settle = finish_saving = wait

    def close(self, status: str, left: Callable[[], float]) -> dict[str, str]:
        """Finish what is in flight. Process 0 sees to the trackers."""
        self.wait()
        return {}

    def tell(self, unsent: Mapping[str, str]) -> None:
        """Nothing is unsent."""
