"""What stands behind the loop of a run that saves: checked, compared, and opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ckpt_callbacks.checkpoint import OrbaxCheckpoint
from ckpt_callbacks.clock import Clock
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.following import Follower
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.policy import Resume
from ckpt_callbacks.processes import Processes
from ckpt_callbacks.reading import compare
from ckpt_callbacks.remote import open_directory, refuse_bucket
from ckpt_callbacks.sharing import describe
from ckpt_callbacks.state import check, kinds_of
from ckpt_callbacks.stores import Store
from ckpt_callbacks.timing import Timed

__all__ = ["Terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What `Callbacks` and `Callbacks.run` were given, as far as the run directory needs it."""

    checkpoint: OrbaxCheckpoint
    stores: Sequence[Store]
    config: Mapping[str, Any]
    resume: Resume
    run_id: str | None
    discard_newer: bool
    drain_limit: float
    system_metrics: float | None
    process_timeout: float
    clock: Clock

    def together(self, processes: Processes, state: Any) -> Terms:
        """Return the terms for this one of several processes: the others leave stores to process 0.

        Raises:
            ConfigError: the processes do not have the same, or the directory is in object storage.
            ProcessLost: some process did not come in time.
        """
        checkpoint = self.checkpoint
        refuse_bucket(checkpoint.directory)
        processes.compare(
            {
                "directory": str(open_directory(checkpoint.directory)),
                "save": str(checkpoint.save),
                "keep": str(checkpoint.keep),
                "busy": checkpoint.busy,
                "keep_here": str(checkpoint.keep_here),
                "resume": f"{self.resume!r}, discard_newer={self.discard_newer}",
                "run_id": str(self.run_id),
                **describe(state),
            }
        )
        return self if processes.decides else replace(self, stores=())

    def check(self, state: Any) -> None:
        """Check what is to be saved and sent, so that it is known before the first step.

        Raises:
            StateMismatch, ConfigError: some of it cannot be.
        """
        items = check(state)
        leaves = kinds_of(state) if self.stores else {}
        if self.checkpoint.keep_here is not None:
            _refuse_references(self.stores)
        for store in self.stores:
            store.entered(items)
            store.fits(leaves)

    def open(
        self,
        state: Any,
        hooks: Hooks,
        *,
        processes: Processes | None,
        failed: Callable[[int, BaseException], None],
        latest: Callable[[], Any],
        timed: Timed,
    ) -> Engine | Follower:
        """Open the run directory, or learn of it from process 0.

        Args:
            state: has to fit what the run goes on from.
            hooks: get the events.
            processes: those that the loop runs in, if there are several.
            failed: gets step and error of every save that fails.
            latest: returns the step that the loop is at, `None` before the first.
            timed: stands around each piece of work.

        Raises:
            CkptCallbacksError: as `Engine` and `Follower` have it.
        """
        directory = open_directory(self.checkpoint.directory, self.clock)
        if processes and not processes.decides:
            return Follower(directory, processes, hooks, failed)
        return Engine(
            directory,
            self.checkpoint.keep,
            self.stores,
            self.config,
            hooks,
            resume=self.resume,
            run_id=self.run_id,
            discard_newer=self.discard_newer,
            compare=partial(compare, like=state),
            here=self.checkpoint.keep_here,
            failed=failed,
            sample=self.system_metrics,
            latest=latest,
            clock=self.clock,
            drain_limit=self.drain_limit,
            timed=timed,
            processes=processes,
        )


def _refuse_references(stores: Sequence[Store]) -> None:
    """Refuse stores that say where the files are in a directory which these are to leave."""
    for store in stores:
        if store.refers_here:
            raise ConfigError(
                f"run: {store.title} is to hold references to the files in the run directory, "
                "which with keep_here= leave it: leave keep_here out, or give the tracker another "
                "send than 'reference'"
            )
