"""All that runs behind the loop for one run directory, wired together."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ckpt_callbacks.addresses import take_over
from ckpt_callbacks.anywhere import name_run
from ckpt_callbacks.artifacts import Spool
from ckpt_callbacks.catalog import info_of
from ckpt_callbacks.clock import Clock
from ckpt_callbacks.directory import ORBAX_TEMPORARY, RunDirectory
from ckpt_callbacks.errors import CkptCallbacksError, ConfigError, DirectoryLocked
from ckpt_callbacks.events import Eval
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.inbox import Inbox, Measured, Named, Pinned, Pruned, Request
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.metrics import MetricBuffer, MetricLog
from ckpt_callbacks.plan import Action, Publish
from ckpt_callbacks.policy import KeepPolicy, Resume
from ckpt_callbacks.processes import Processes
from ckpt_callbacks.progress import growing, transfer, watched
from ckpt_callbacks.recovery import choose, copy_from, recover, refuse_others
from ckpt_callbacks.retention import policy_from_json
from ckpt_callbacks.saver import Saver
from ckpt_callbacks.stores import MetricPoint, Store, Tracker
from ckpt_callbacks.system import SystemMetrics
from ckpt_callbacks.timing import Timed, untimed
from ckpt_callbacks.worker import Worker

__all__ = ["Engine"]

logger = logging.getLogger("ckpt_callbacks")

_PIECE = 0.1
"""Seconds to wait at a time."""
_SHOWN = 8
"""How many steps a message names."""


@contextmanager
def _naming(directory: RunDirectory) -> Iterator[None]:
    """Turn a full or read-only disk into an error that names the directory."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CkptCallbacksError):
            raise
        raise ConfigError(f"cannot write to the run directory {directory}: {error}") from error


class Engine:
    """Owns the directory, its ledger, the saver, and one worker a store.

    Args:
        directory: where the checkpoints are.
        keep: what to keep.
        here: of that, what the directory holds once the stores have the rest; all if not given.
        stores: where they are mirrored to.
        config: hyper-parameters, for the trackers and `run.json`.
        hooks: get the events.
        resume: the checkpoint to go on from.
        run_id: what names the run in all stores; the directory has its own if not given.
        discard_newer: whether those after it go.
        compare: raises if the state does not fit a checkpoint, before those after it go.
        training: whether a loop follows; if not, what is there is only brought in order.
        failed: gets step and error of every save that fails.
        sample: seconds between two samples of the machine; `None` for none.
        latest: returns the step that the loop is at, `None` before the first.
        clock: the clocks.
        sending: whether the stores are to send what they only hold for later.
        drain_limit: seconds that each store may take at the end.
        timed: stands around each piece of work.
        processes: the others that the loop runs in, which follow this one.

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
        run_id: str | None = None,
        discard_newer: bool = False,
        compare: Callable[[Path], None] = lambda path: None,
        training: bool = True,
        here: KeepPolicy | None = None,
        failed: Callable[[int, BaseException], None] = lambda step, error: None,
        sample: float | None = None,
        latest: Callable[[], Any] = lambda: None,
        clock: Clock | None = None,
        sending: bool = False,
        drain_limit: float = 60.0,
        timed: Timed = untimed,
        processes: Processes | None = None,
    ) -> None:
        self.directory = directory
        self._training = training
        self._hooks = hooks
        self._saver: Saver | None = None
        self._workers: list[Worker] = []
        clock = clock or Clock()
        # Undone in reverse, whatever has happened: threads stop before what they use goes.
        self._exit = ExitStack()
        with _naming(directory):
            refuse_others(directory)
            directory.acquire(brief=not training)
        self._exit.callback(directory.release)
        with _naming(directory), self._exit:
            resume = take_over(
                directory, name_run(directory, run_id, resume, keep, stores), keep, stores
            )
            policies = {store.name: store.keep for store in stores}
            known = directory.read_run()
            all_here = training or known is None or known.stores.keys() <= policies.keys()
            self.ledger = ledger = Ledger(
                directory,
                keep,
                self._wake,
                policies,
                clock.time,
                all_here=all_here,
                config=config,
                here=here,
            )
            self._exit.callback(ledger.close)
            recover(ledger)
            about = partial(info_of, sending=sending, drain_limit=drain_limit)
            infos = [about(directory, ledger.run, s.name, config, ledger.rank) for s in stores]
            repair = partial(copy_from, list(zip(stores, infos, strict=True)))
            chosen = (
                choose(ledger, resume, discard_newer, repair, compare)
                if training
                else ledger.newest()
            )
            self.resumed = chosen
            went_back = ledger.run.rewound
            self._log = log = MetricLog(
                directory.meta, chosen.step if chosen else -1, rewound=went_back
            )
            self._exit.callback(log.close)
            self._buffer = buffer = MetricBuffer(log, self._wake, clock.time, timed)
            self._exit.callback(buffer.close)
            log.expect([store.name for store in stores if isinstance(store, Tracker)])
            self._files = files = Spool(directory.meta / "artifacts", log.expected)
            self._exit.callback(files.close)
            self._system = SystemMetrics(directory.root, sample, latest, buffer.append)
            self._exit.callback(self._system.close)
            self._inbox = Inbox(directory, ledger.mutex, self._announce, self._apply)
            self._saver = saver = Saver(ledger, hooks, buffer.flush, failed, timed, processes)
            if went_back is not None:
                ledger.went_back(None)
                saver.evict()  # before a step that was discarded is taken again
            self._show_change()
            saver.start()
            self._exit.callback(saver.close)
            for store, info in zip(stores, infos, strict=True):
                self._start(Worker(store, info, ledger, log, files, hooks, timed))
            self._exit = self._exit.pop_all()
        self.save = timed("save")(saver.save)
        self.wait = timed("waiting for a save")(saver.wait)
        self.settle = timed("waiting for a save")(saver.settle)
        self.report = saver.report
        self.log = timed("handing over metrics")(buffer.append)
        self._wake()

    def _start(self, worker: Worker) -> None:
        worker.start()
        self._workers.append(worker)
        self._exit.callback(worker.abandon)

    def begin(self) -> None:
        """Apply what other processes have asked meanwhile, and from now on what they ask."""
        with _naming(self.directory):
            if self._training:
                self.ledger.entered("running")
            self._inbox.look()
        self._inbox.start()
        self._exit.callback(self._inbox.close)
        self._system.start()

    def _show_change(self) -> None:
        if leaving := self.ledger.situation.leaving():
            logger.warning(
                "the keep policy of %s was changed to %s. Once a newer checkpoint is complete "
                "everywhere, these go: %s",
                self.directory,
                self.ledger.policy,
                "; ".join(f"step {step} ({reason})" for step, reason in leaving.items()),
            )

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._saver is not None and self._saver.busy

    def finish_saving(self) -> None:
        """Wait until what is being saved is complete, and told of."""
        root, newest = self.directory.root, self.ledger.newest()
        steps = [s for s, r in self.ledger.records().items() if r.state == "saving"]
        places = [root / f"{step}{end}" for step in steps for end in ("", ORBAX_TEMPORARY)]
        with growing("saving", *places, total=newest.bytes if newest else None):
            self.wait()
            self.settle()  # a listener may still evaluate it

    def word(self) -> dict[str, Any]:
        """Return what the processes that follow have to know."""
        step = self.resumed.step if self.resumed else None
        return {"run": self.ledger.run_id, "step": step, "unmeasured": self.unmeasured()}

    def unseen(self) -> str | None:
        """Return what is wrong if this process has another directory than process 0."""
        return None

    def unmeasured(self) -> list[int]:
        """Return the complete steps that lack a metric which the policy ranks by."""
        return self.ledger.situation.unmeasured()

    def would_keep(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Return whether the policy has a place for a step that is not saved yet."""
        self.wait()  # else the answer would depend on how fast the last save is
        return self.ledger.would_keep(step, metrics)

    def was_evicted(self, step: int) -> bool:
        """Return whether this run has evicted a step."""
        return self.ledger.was_evicted(step)

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Tell the plugins and the trackers of an evaluation, and rank by it.

        Returns whether there is a checkpoint of that step.
        """
        self._hooks.emit(Eval(step, metrics))
        self._buffer.append((step, metrics))
        return self.ledger.measured(step, metrics)

    def log_artifact(self, path: Path, name: str) -> None:
        """Copy a file of the user's for the trackers."""
        self._files.add(path, name)
        self._wake()

    def close(self, status: str, left: Callable[[], float]) -> dict[str, str]:
        """Finish all work, waiting for the stores while `left` returns more than 0 seconds.

        Returns what each store still lacks, by name.
        """
        with self._exit:
            self.wait()
            self._inbox.close()
            self._system.close()
            self._buffer.close()
            unsent = self._drain(status, left)
            if self._buffer.unwritten:
                lost = "metrics that could not be written to the run directory"
                trackers = [w.store.name for w in self._workers if isinstance(w.store, Tracker)]
                unsent |= {name: unsent.get(name, lost) for name in trackers}
            try:
                self.ledger.entered(status)
                self._log.compact()
            except (OSError, DirectoryLocked) as error:  # a full disk, or it is somebody else's
                logger.error("%s can not be written: %s", self.directory.meta, error)
        return unsent

    def tell(self, unsent: Mapping[str, str]) -> None:
        """Say which stores do not have everything yet, and how they get it."""
        for store in (w.store for w in self._workers if not w.done):
            logger.warning(
                "%s does not have everything yet: %s. It is kept in %s; the next run there sends "
                "it, or: ckpt-callbacks sync %s",
                store.title,
                unsent[store.name],
                self.directory,
                shlex.quote(str(self.directory)),
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
            case Named(step, alias, when):
                self.ledger.promote(step, alias, when)
            case Pruned(steps, keep):
                self.ledger.prune(steps, policy_from_json(keep))

    def _wake(self) -> None:
        for worker in self._workers:
            worker.wake()
        if self._saver:
            self._saver.wake()

    def _drain(self, status: str, left: Callable[[], float]) -> dict[str, str]:
        for worker in self._workers:
            worker.finish(status)
        unsent: dict[str, str] = {}
        for worker in self._workers:
            self._join(worker, left)
            worker.abandon()
            if not worker.done:
                why = worker.failure or "still busy"
                unsent[worker.store.name] = f"{self._lacking(worker.store)} ({why})"
        return unsent

    def _join(self, worker: Worker, left: Callable[[], float]) -> None:
        """Wait for a worker, and show a person who waits too what it has still to send."""
        name, there = worker.store.name, 0
        if watched():
            there = self._bytes_lacking(name)
        with transfer(f"sending to {worker.store.title}", there or None) as advance:
            # In short pieces, since a notice of preemption may make it less.
            while not worker.join(min(_PIECE, max(0.0, left()))) and left() > 0:
                if there:
                    now = min(there, self._bytes_lacking(name))
                    advance(there - now)
                    there = now

    def _bytes_lacking(self, store: str) -> int:
        """Return how many bytes of checkpoints a store does not have yet."""
        with suppress(Exception):  # a policy may be the user's own function, and raise
            steps = [a.step for a in self.ledger.copies(store).actions() if isinstance(a, Publish)]
            records = self.ledger.records()
            return sum(records[step].bytes for step in steps if step in records)
        return 0

    def _lacking(self, store: Store) -> str:
        """Return what a store does not have yet, in words."""
        try:
            lacking = _in_words(self.ledger.copies(store.name).actions())
        except Exception:  # a policy may be the user's own function, and raise
            lacking = ["what is to be kept"]
        if isinstance(store, Tracker):
            with suppress(OSError):  # somebody removed the file
                lacking += _counted(self._log.unsent_values(store.name), "metric value")
            lacking += _counted(len(self._files.lacking(store.name)), "file")
        return ", ".join(lacking) or "the end of the run"


def _in_words(actions: Sequence[Action]) -> list[str]:
    """Return what is to be done in a store: how many copies to make, or else all the rest."""
    steps = [str(a.step) for a in actions if isinstance(a, Publish)]
    if not steps:
        return [str(action) for action in actions]
    named = ", ".join(steps[:_SHOWN]) + ", …" * (len(steps) > _SHOWN)
    (how_many,) = _counted(len(steps), "checkpoint")
    return [f"{how_many} (step{'s' * (len(steps) > 1)} {named})"]


def _counted(number: int, what: str) -> list[str]:
    """Return how many there are, or nothing if there are none."""
    return [f"{number:,} {what}{'s' * (number > 1)}"] if number else []
