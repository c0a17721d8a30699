"""All that runs behind the loop for one run directory, wired together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from ckpt_callbacks.clock import Clock
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CkptCallbacksError, ConfigError
from ckpt_callbacks.events import Eval
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.inbox import Inbox, Measured, Pinned, Request
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.metrics import MetricBuffer, MetricLog
from ckpt_callbacks.policy import KeepPolicy
from ckpt_callbacks.recovery import Resume, choose, copy_from, recover
from ckpt_callbacks.saver import Saver
from ckpt_callbacks.stores import MetricPoint, RunInfo, Store, Tracker
from ckpt_callbacks.worker import Worker

__all__ = ["Engine"]

logger = logging.getLogger("ckpt_callbacks")


@contextmanager
def _naming(directory: RunDirectory) -> Iterator[None]:
    """Turn a full or read-only disk into an error that names the directory."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CkptCallbacksError):
            raise
        raise ConfigError(f"cannot write to the run directory {directory.root}: {error}") from error


class Engine:
    """Owns the directory, its ledger, the saver, and one worker a store.

    Args:
        directory: where the checkpoints are.
        keep: what to keep.
        stores: where they are mirrored to.
        config: hyper-parameters for the trackers.
        hooks: get the events.
        resume: the checkpoint to go on from.
        discard_newer: whether those after it go.
        training: whether a loop follows; if not, what is there is only brought in order.
        failed: gets the error of every save that fails.
        clock: the clocks.

    Raises:
        ConfigError: the directory cannot be written, or holds foreign checkpoints.
        DirectoryLocked: somebody else owns it.
        RecordError: what is in it cannot be read.
        CheckpointNotFound, UsageError, CorruptCheckpoint: it cannot go on as `resume` says.
    """

    def __init__(
        self,
        directory: RunDirectory,
        keep: KeepPolicy,
        stores: Sequence[Store],
        config: Mapping[str, Any],
        hooks: Hooks,
        *,
        resume: Resume = "last",
        discard_newer: bool = False,
        training: bool = True,
        failed: Callable[[Exception], None] = lambda error: None,
        clock: Clock | None = None,
    ) -> None:
        self.directory = directory
        self._hooks = hooks
        self._saver: Saver | None = None
        self._workers: list[Worker] = []
        clock = clock or Clock()
        # Undone in reverse, whatever has happened: threads stop before what they use goes.
        self._exit = ExitStack()
        with _naming(directory):
            directory.acquire(brief=not training)
        self._exit.callback(directory.release)
        with _naming(directory), self._exit:
            policies = {store.name: store.keep for store in stores}
            self.ledger = Ledger(directory, keep, self._wake, policies, clock.time)
            self._exit.callback(self.ledger.close)
            back = recover(self.ledger)
            infos = [self._info(store, config) for store in stores]
            repair = partial(copy_from, list(zip(stores, infos, strict=True)))
            self.resumed = self.ledger.newest()
            if training:
                self.resumed, rewound = choose(self.ledger, resume, discard_newer, repair)
                back = back or rewound
            last = self.resumed.step if self.resumed else -1
            self._log = log = MetricLog(directory.meta, last, rewound=back)
            self._exit.callback(log.close)
            self._buffer = buffer = MetricBuffer(log, self._wake, clock.time)
            self._exit.callback(buffer.close)
            self._inbox = Inbox(directory, self.ledger.mutex, self._announce, self._apply)
            self._inbox.look()
            self._saver = saver = Saver(self.ledger, hooks, buffer.flush, failed)
            if back:
                saver.evict()  # before a step that was discarded is taken again
            saver.start()
            self._exit.callback(saver.close)
            for store, info in zip(stores, infos, strict=True):
                worker = Worker(store, info, self.ledger, log, hooks)
                worker.start()
                self._workers.append(worker)
                self._exit.callback(worker.abandon)
            self._inbox.start()
            self._exit.callback(self._inbox.close)
            self._exit = self._exit.pop_all()
        self.save = saver.save
        self.wait = saver.wait
        self.settle = saver.settle
        self.log = buffer.append
        if leaving := self.ledger.leaving():
            logger.warning(
                "the keep policy of %s was changed to %s. Once a newer checkpoint is complete "
                "everywhere, these go: %s",
                directory.root,
                keep,
                "; ".join(f"step {step} ({reason})" for step, reason in leaving.items()),
            )
        self._wake()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._saver is not None and self._saver.busy

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Tell the plugins and the trackers of an evaluation, and rank by it.

        Returns whether there is a checkpoint of that step.
        """
        self._hooks.emit(Eval(step, metrics))
        self._buffer.append((step, metrics))
        return self.ledger.measured(step, metrics)

    def close(self, status: str, limit: float) -> dict[str, str]:
        """Finish all work, waiting at most `limit` seconds for the stores.

        Returns what each store still lacks, by name.
        """
        with self._exit:
            self.wait()
            self._inbox.close()
            self._buffer.close()
            unsent = self._drain(status, limit)
            trackers = [w.store.name for w in self._workers if isinstance(w.store, Tracker)]
            if self._buffer.unwritten:
                lost = "metrics could not be written to the run directory"
                unsent |= {name: unsent.get(name, lost) for name in trackers}
            try:
                self.ledger.entered(status)
                self._log.compact(trackers)
            except OSError as error:  # such as a full disk
                logger.error("%s can not be written: %s", self.directory.meta, error)
        return unsent

    def _info(self, store: Store, config: Mapping[str, Any]) -> RunInfo:
        return RunInfo(
            run_id=self.ledger.run_id,
            name=self.directory.root.name,
            config=config,
            scratch=self.directory.scratch(store.name),
            remembered=self.ledger.remembered(store.name),
        )

    def _announce(self, request: Request) -> None:
        if isinstance(request, Measured):
            self._hooks.emit(Eval(request.step, request.metrics))
            self._buffer.write(MetricPoint(request.step, request.time, request.metrics))

    def _apply(self, request: Request) -> None:
        match request:
            case Measured(step, metrics, _):
                self.ledger.measured(step, metrics)
            case Pinned(step, pinned):
                self.ledger.pin(step, pinned=pinned)

    def _wake(self) -> None:
        for worker in self._workers:
            worker.wake()
        if self._saver:
            self._saver.wake()

    def _drain(self, status: str, limit: float) -> dict[str, str]:
        for worker in self._workers:
            worker.finish(status)
        deadline = time.monotonic() + limit
        unsent: dict[str, str] = {}
        for worker in self._workers:
            if not worker.join(max(0.0, deadline - time.monotonic())):
                unsent[worker.store.name] = worker.failure or "still busy"
                logger.warning(
                    "%s does not have everything after %.0f s (%s). It is kept in %s: "
                    "the next run there sends it.",
                    worker.store.title,
                    limit,
                    unsent[worker.store.name],
                    self.directory.root,
                )
        return unsent
