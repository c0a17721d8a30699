"""One pass through a training loop: what the loop calls, and when something is due."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from ckpt_callbacks.adapters import capture
from ckpt_callbacks.checkpoint import OrbaxCheckpoint
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.errors import CkptCallbacksWarning, UsageError
from ckpt_callbacks.events import Eval, RunEnded, RunStarted, Step
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.metrics import host_floats
from ckpt_callbacks.policy import NEVER, SaveContext, SavePolicy
from ckpt_callbacks.report import Summary, summarize
from ckpt_callbacks.restore import read
from ckpt_callbacks.retention import ranked_metrics
from ckpt_callbacks.stores import Store

__all__ = ["Run"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")


class Run(Generic[S]):
    """One pass through a training loop; made by `Callbacks.run`."""

    def __init__(
        self,
        state: S,
        config: Mapping[str, Any],
        checkpoint: OrbaxCheckpoint | None,
        stores: list[Store],
        hooks: Hooks,
        drain_limit: float,
    ) -> None:
        self._state: S = state
        self._config = config
        self._checkpoint = checkpoint
        self._stores = stores
        self._hooks = hooks
        self._drain_limit = drain_limit
        self._engine: Engine | None = None
        self._restored = True
        self._log: Callable[[tuple[int, Mapping[str, Any]]], object] = _drop
        self._evaluated: dict[int, dict[str, float]] = {}
        # An evaluation may come from another thread, just while its step is being saved.
        self._evaluating = threading.RLock()
        self._last: int | None = None
        self._saved_at = 0.0
        self._warned = False
        self._entered = False
        self._pid = os.getpid()
        self._next_save = self._next_hook = NEVER
        self._gate = -1  # the first `on_step` always takes the slow way
        self.next_step = 0
        """First step that the loop should take: 0, or the one after the restored checkpoint."""

    def __enter__(self) -> Run[S]:
        if self._entered:
            raise UsageError("a run is entered once: make a new one with callbacks.run")
        self._entered = True
        if self._checkpoint:
            capture(self._state)  # what cannot be saved is known before the first step
            directory = RunDirectory(self._checkpoint.directory)
            self._engine = engine = Engine(
                directory, self._checkpoint.keep, self._stores, self._config, self._hooks
            )
            self._saved_at = time.monotonic()
            if engine.resumed:
                self._last = engine.resumed.step
                self._restored = False
                self.next_step = engine.resumed.step + 1
            self._log = engine.log
        resumed = self.next_step - 1 if self.next_step else None
        self._hooks.emit(RunStarted(self._directory, resumed, self.next_step))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: the run is its parent's
        status = "finished"
        if kind is not None:
            status = "killed" if issubclass(kind, KeyboardInterrupt) else "failed"
        engine = self._engine
        unsent = engine.close(status, self._drain_limit) if engine else {}
        self._gate = -1
        self._engine = None
        self._hooks.emit(RunEnded(status, unsent))

    @property
    def _directory(self) -> Path | None:
        return RunDirectory(self._checkpoint.directory).root if self._checkpoint else None

    @property
    def state(self) -> S:
        """The state to train: as given, or with the values of the newest checkpoint.

        Restored on the first read. Flax NNX objects are changed in place; all else is new.

        Raises:
            StateMismatch: the checkpoint has other leaves or shapes than the state given.
            CorruptCheckpoint: a file is damaged.
        """
        if not self._restored and self._engine and (record := self._engine.resumed):
            path = self._engine.directory.path(record.step)
            self._state = read(path, self._state, files=record.files)
            self._restored = True
        return self._state

    def on_step(self, step: int, state: S, metrics: Mapping[str, Any] | None = None) -> None:
        """Tell that the loop finished `step` and that `state` is the result.

        With nothing due this is one comparison and one append.

        Args:
            step: from `next_step` on, ascending.
            state: may be donated or changed as soon as this returns.
            metrics: numbers or scalars on the device, which are read later, off this thread.

        Raises:
            UsageError: the run was resumed, but its state never read, or `step` is one
                that it already has.
        """
        if metrics is not None:
            self._log((step, dict(metrics)))
        if step >= self._gate:
            self._due(step, state, metrics or {})

    def on_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Tell how good the state of `step` is. Call it before `on_step(step, …)`.

        It may also come later, from any thread: then the checkpoints are ranked again.

        Args:
            step: the step that was measured.
            metrics: numbers; scalars on the device are waited for.

        Raises:
            UsageError: it comes outside of the `with` statement.
        """
        if self._checkpoint and not self._engine:
            raise UsageError("on_eval was called outside of the with statement of its run")
        values, problems = host_floats(metrics)
        for problem in problems.values():
            warnings.warn(problem, CkptCallbacksWarning, stacklevel=2)
        self._hooks.emit(Eval(step, values))
        if self._engine and os.getpid() == self._pid:
            self._log((step, values))
            with self._evaluating:
                try:
                    ranked = self._engine.ledger.measured(step, values)
                except OSError as error:  # such as a full disk
                    logger.error("the evaluation of step %d ranks nothing: %s", step, error)
                    return
                if not ranked:
                    self._evaluated.setdefault(step, {}).update(values)
                if self._checkpoint and self._checkpoint.save.watches_evaluations:
                    self._next_save = min(self._next_save, step)
                    self._gate = min(self._gate, step)

    def save(self, step: int, state: S, metrics: Mapping[str, Any] | None = None) -> None:
        """Save a step now, whatever the policy says; before `on_step` of it, or without.

        Raises:
            UsageError: it comes outside of the `with` statement, or `step` is not newer than
                the newest that was saved.
        """
        if not self._engine:
            raise UsageError("save was called outside of the with statement of a run")
        if self._gate < 0:
            self._first_step(step)
            self._gate = min(self._next_save, self._next_hook)
        if self._last is not None and step <= self._last:
            raise UsageError(f"step {step} is not newer than {self._last}, which was saved before")
        self._save(step, state, metrics or {}, self._engine)

    def wait(self) -> None:
        """Wait until no save is in flight. Stores may still lack what was saved."""
        if self._engine:
            self._engine.wait()

    def summary(self) -> Summary:
        """Return what is kept, why and where; print it for a table."""
        if self._directory is None:
            return Summary([], [], [])
        return summarize(self._directory, [f"{s.title}: {s.hint()}" for s in self._stores])

    def _due(self, step: int, state: S, metrics: Mapping[str, Any]) -> None:
        """Do what is due at `step`, and find out when the next thing is."""
        if os.getpid() != self._pid:
            return  # a forked child
        if self._gate < 0:
            self._first_step(step)
        if step >= self._next_save and self._checkpoint and self._engine:
            self._save_if_due(step, state, metrics, self._checkpoint.save, self._engine)
        if step >= self._next_hook:
            self._next_hook = self._hooks.step(Step(step, state, metrics))
        self._gate = min(self._next_save, self._next_hook)

    def _save_if_due(
        self, step: int, state: S, metrics: Mapping[str, Any], policy: SavePolicy, engine: Engine
    ) -> None:
        with self._evaluating:
            evaluated = dict(self._evaluated.get(step, {}))

        def would_keep() -> bool:
            engine.wait()  # else the answer would depend on how fast the last save is
            return engine.ledger.would_keep(step, evaluated)

        context = SaveContext(
            step=step,
            last=self._last,
            now=time.monotonic(),
            last_time=self._saved_at,
            evaluated=evaluated,
            would_keep=would_keep,
        )
        if step != self._last and policy.due(context):
            self._save(step, state, metrics, engine)
        self._next_save = policy.next_due(step)

    def _save(self, step: int, state: S, metrics: Mapping[str, Any], engine: Engine) -> None:
        engine.wait()  # before the lock: a listener of the last save may evaluate
        with self._evaluating:
            evaluated = self._evaluated.pop(step, {})
            self._check_metrics(step, evaluated, metrics)
            self._last, self._saved_at = step, time.monotonic()
            engine.save(step, state, evaluated, metrics)
            # Evaluations of steps that passed without a save rank nothing.
            self._evaluated = {s: m for s, m in self._evaluated.items() if s > step}

    def _first_step(self, step: int) -> None:
        if self._checkpoint and not self._engine:
            raise UsageError("on_step was called outside of the with statement of its run")
        if not self._restored:
            raise UsageError(
                f"this run resumed from step {self.next_step - 1}, but run.state was never read, "
                "so the loop would train fresh weights: start with `state = run.state`"
            )
        if step < self.next_step:
            raise UsageError(
                f"this run resumed from step {self.next_step - 1}, but the loop took step {step}: "
                f"start it at run.next_step, which is {self.next_step}"
            )
        self._next_hook = self._hooks.first_step(step)
        if self._checkpoint:
            due = self._checkpoint.save.next_due(self._last)
            self._next_save = step if step in self._evaluated else due

    def _check_metrics(
        self, step: int, evaluated: Mapping[str, float], metrics: Mapping[str, Any]
    ) -> None:
        """Warn once when an evaluation lacks what the policy ranks by."""
        if not evaluated or self._warned or self._checkpoint is None:
            return
        seen = {*evaluated, *metrics}
        if missing := set(ranked_metrics(self._checkpoint.keep)) - seen:
            self._warned = True
            warnings.warn(
                f"the evaluation of step {step} has no {', '.join(sorted(missing))}, which "
                f"{self._checkpoint.keep} ranks by, so it can not be best; "
                f"the metrics were {', '.join(sorted(seen))}",
                CkptCallbacksWarning,
                stacklevel=6,
            )


def _drop(point: tuple[int, Mapping[str, Any]]) -> None:
    """Take metrics where there is no directory to keep them."""
