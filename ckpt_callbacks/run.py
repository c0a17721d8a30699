"""One pass through a training loop: what the loop calls, and when something is due."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ckpt_callbacks.artifacts import artifact_name
from ckpt_callbacks.beginning import Beginning
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.entering import Terms
from ckpt_callbacks.errors import (
    CkptCallbacksWarning,
    ConfigError,
    DirectoryLocked,
    SaveError,
    UsageError,
)
from ckpt_callbacks.events import Eval, RunEnded, RunStarted, Step
from ckpt_callbacks.following import Follower
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.metrics import host_floats
from ckpt_callbacks.policy import NEVER, as_step
from ckpt_callbacks.preemption import Preemption
from ckpt_callbacks.processes import Processes, here
from ckpt_callbacks.report import Summary, summarize
from ckpt_callbacks.saves import Saves, Taken
from ckpt_callbacks.timing import Timed, untimed

if TYPE_CHECKING:
    from ckpt_callbacks.profile import Profile

__all__ = ["Run"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")
_ALWAYS = -math.inf
"""A gate that every step passes."""


class Run(Generic[S]):
    """One pass through a training loop; made by `Callbacks.run`."""

    profile: Profile | None = None
    """Where the time goes, with `Callbacks(profile=True)`."""

    def __init__(
        self,
        beginning: Beginning[S],
        terms: Terms | None,
        plugins: list[object],
        grace: float,
        *,
        timed: Timed = untimed,
    ) -> None:
        self._beginning = beginning
        self._terms = terms
        self._timed = timed
        self._hooks = Hooks(plugins, critical=self._stop, timed=timed)
        self._preemption = Preemption(grace, self._wake)
        self._saves: Saves | None = None
        self._log: Callable[[tuple[int, Mapping[str, Any]]], object] = _drop
        self._latest: Taken | None = None
        self._entered = self._started = False
        self._error: BaseException | None = None
        self._pid, self._thread = os.getpid(), 0
        self._next_hook = NEVER
        self._gate: float = _ALWAYS  # the first `on_step` always takes the slow way
        self.next_step = 0
        """First step that the loop should take: 0, or the one after the restored checkpoint."""

    def __enter__(self) -> Run[S]:
        if self._entered:
            raise UsageError("a run is entered once: make a new one with callbacks.run")
        self._entered, self._thread = True, threading.get_ident()
        if self._terms and (processes := here(self._terms.process_timeout)):
            self._enter_together(self._terms, processes)
        else:
            self._enter(self._terms)
        return self

    def _enter_together(self, terms: Terms, processes: Processes) -> None:
        """Enter the run in all processes: process 0 opens the directory, and the others see it."""
        self._terms = terms = terms.together(processes, self._beginning.given)
        try:
            with processes.opening(lambda: self._saves.engine.word() if self._saves else None):
                self._enter(terms, processes)
            processes.share(self._saves.engine.unseen() if self._saves else None)
        except BaseException as error:
            if self._saves:  # else `_enter` has left it
                self.__exit__(type(error), error, None)
            raise

    def _enter(self, terms: Terms | None, processes: Processes | None = None) -> None:
        engine = self._open(terms, processes) if terms else None
        directory = engine.directory if engine else None
        resumed = engine.resumed.step if engine and engine.resumed else None
        try:
            self._beginning.enter(directory, resumed)
            self.next_step = self._beginning.next_step
            if engine:
                self._preemption.start()
            root = directory.root if directory else None
            self._hooks.emit(RunStarted(root, resumed, self.next_step))
            if engine:
                engine.begin()
            self._raise_stopped()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _open(self, terms: Terms, processes: Processes | None) -> Engine | Follower:
        state = self._beginning.given
        terms.check(state)
        engine = terms.open(
            state,
            self._hooks,
            processes=processes,
            failed=self._save_failed,
            latest=self._latest_step,
            timed=self._timed,
        )
        self._saves = Saves(terms.checkpoint, engine, processes, self._preemption, terms.clock)
        self._log = engine.log
        return engine

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: the run is its parent's
        status = _status(kind)
        unsent: dict[str, str] = {}
        try:
            try:
                if self._saves:
                    latest, self._latest = self._latest, None
                    self._saves.end(status, latest)
                if self._preemption.notice:
                    status = "preempted"
            except BaseException as failure:
                status = _status(type(failure))
                raise
            finally:
                saves, self._saves = self._saves, None
                self._beginning.leave()
                self._gate = _ALWAYS
                if saves and self._terms:
                    unsent = self._close(saves.engine, status, self._terms.drain_limit)
        finally:
            self._preemption.stop()
            self._hooks.emit(RunEnded(status, unsent))
        if kind is None:
            self._raise_stopped()

    def _close(self, engine: Engine | Follower, status: str, limit: float) -> dict[str, str]:
        """Finish what is in the background, and return what stores still lack."""
        deadline = time.monotonic() + limit

        def left() -> float:
            return min(deadline - time.monotonic(), self._preemption.left())

        unsent = engine.close(status, left)
        engine.tell(unsent)
        return unsent

    @property
    def state(self) -> S:
        """The state to train: as given, or with the values of the checkpoint to go on from.

        Read it once: a run holds no reference to what it gave away, so that no state is in memory
        twice. Objects of frameworks, such as Flax NNX modules, are changed in place; all else is
        new.

        Raises:
            StateMismatch: the checkpoint has other leaves or shapes than the state given.
            CheckpointNotFound, CorruptCheckpoint: of what is to be started from; see `restore`.
            UsageError: it was read before, or is first read when the run is over.
        """
        return self._beginning.take()

    @property
    def should_stop(self) -> bool:
        """Whether the process was told to end (SIGTERM, or the runtime's own notice).

        The next `on_step` saves that step, whatever the policy says; then leave the loop. When
        the grace time is over the signal takes the course it would have taken without the run.
        """
        return self._preemption.notice

    @property
    def unmeasured(self) -> list[int]:
        """Steps that have a checkpoint and lack a metric which the policy ranks by.

        A kill between a step and its evaluation leaves them; `cc.restore(…, which=step)` and
        `on_eval(step, …)` make up for it.
        """
        return self._saves.engine.unmeasured() if self._saves else []

    def on_step(
        self,
        step: int,
        state: S,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell that the loop finished `step` and that `state` is the result.

        With nothing due this is one comparison and one append.

        Args:
            step: from `next_step` on, ascending.
            state: may be donated or changed as soon as this returns.
            metrics: numbers or scalars on the device, which are read later, off this thread.
            metadata: JSON values of your own by name, kept with the checkpoint if one is saved.

        Raises:
            UsageError: the run was resumed, but its state never read, or `step` is one
                that it already has.
            ConfigError: `metadata` is not JSON, `metrics` no mapping, or the first step no integer
                from 0.
            SaveError: an earlier save failed, and `on_failure` is `raise`.
        """
        if metrics is not None:
            try:
                self._log((step, dict(metrics)))
            except (TypeError, ValueError):
                raise ConfigError(
                    f"on_step: metrics must be numbers by name, not a {type(metrics).__name__}"
                ) from None
        if metadata is not None:
            metadata = _as_json(metadata)
        self._latest = taken = (step, state, metrics, metadata)
        if step >= self._gate:
            self._due(taken)

    def on_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Tell how good the state of `step` is. Call it before `on_step(step, …)`.

        It may also come later, from any thread: then the checkpoints are ranked again. From
        another process it is `report_metrics`.

        Args:
            step: the step that was measured.
            metrics: numbers; scalars on the device are waited for.

        Raises:
            UsageError: it comes outside of the `with` statement.
            ConfigError: `step` is no integer from 0.
        """
        if self._terms and not self._saves:
            raise UsageError("on_eval was called outside of the with statement of its run")
        step = as_step("on_eval", step)
        values, problems = host_floats(metrics)
        for problem in problems.values():
            warnings.warn(problem, CkptCallbacksWarning, stacklevel=2)
        saves = self._saves
        if saves and os.getpid() == self._pid:
            try:
                is_due = saves.evaluate(step, values)
            except OSError as error:  # such as a full disk
                logger.error("the evaluation of step %d ranks nothing: %s", step, error)
                return
            if is_due:
                self._gate = min(self._gate, step)
        else:
            self._hooks.emit(Eval(step, values))
        self._raise_stopped()

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Send a file to every tracker: a plot, a configuration, a vocabulary.

        It is copied now, so it may be changed or removed afterwards, and sent in the background.
        Like metrics it waits for a tracker that is down, and for the next run if need be.

        Args:
            path: the file.
            name: where it goes below the run, such as `plots/loss.png`; the file's own name if
                not given. A later file of the same name replaces it.

        Raises:
            UsageError: it comes outside of the `with` statement.
            ConfigError: there is no such file, it cannot be read, or `name` is absolute, empty,
                has a part `..` or lies in `checkpoints/`, which is ours.
        """
        if self._terms and not self._saves:
            raise UsageError("log_artifact was called outside of the with statement of its run")
        file = Path(path)
        name = artifact_name(file, name)
        if self._saves and os.getpid() == self._pid:
            try:
                self._saves.engine.log_artifact(file, name)
            except OSError as error:  # such as a full disk
                logger.error("the file %s is not sent: %s", file, error)
        self._raise_stopped()

    def save(
        self,
        step: int,
        state: S,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a step now, whatever the policy says; before `on_step` of it, or without.

        Raises:
            UsageError: it comes outside of the `with` statement, or `step` is not newer than
                the newest that was saved.
            ConfigError: `metadata` is not JSON, or `step` no integer from 0.
        """
        if not self._saves:
            raise UsageError("save was called outside of the with statement of a run")
        if os.getpid() != self._pid:
            return  # a forked child
        step = as_step("save", step)
        self._raise_stopped()
        if not self._started:
            self._first_step(step)
        self._saves.check_new(step)
        about = None if metadata is None else _as_json(metadata)
        self._saves.save((step, state, metrics, about))
        self._set_gate()

    def wait(self) -> None:
        """Wait until no save is in flight. Stores may still lack what was saved.

        Raises:
            SaveError: a save failed, and `on_failure` is `raise`.
        """
        if self._saves and os.getpid() == self._pid:
            self._saves.engine.wait()
        self._raise_stopped()

    def summary(self) -> Summary:
        """Return what is kept, why and where; print it for a table."""
        if self._terms is None:
            return Summary([], [], [])
        hints = [f"{s.title}: {s.hint()}" for s in self._terms.stores]
        return summarize(self._terms.checkpoint.directory, hints)

    def _latest_step(self) -> Any:
        latest = self._latest
        return None if latest is None else latest[0]

    def _due(self, taken: Taken) -> None:
        """Do what is due at a step, and find out when the next thing is."""
        step, state, metrics, metadata = taken
        if os.getpid() != self._pid:
            return  # a forked child
        if type(step) is not int or step < 0:
            step = as_step("on_step", step)
            taken = (step, state, metrics, metadata)
        if self._terms and not self._saves:
            raise UsageError("on_step was called outside of the with statement of its run")
        self._raise_stopped()
        if not self._started:
            self._first_step(step)
        if self._saves:
            self._saves.at(taken)
        if step >= self._next_hook:
            self._next_hook = self._hooks.step(Step(step, state, metrics or {}))
        self._set_gate()
        self._raise_stopped()

    def _first_step(self, step: int) -> None:
        self._beginning.first_step(step)
        self._next_hook = self._hooks.first_step(step)
        if self._saves:
            self._saves.first_step(step)
        self._started = True

    def _set_gate(self) -> None:
        """Let the next `on_step` that has something to do take the slow way."""
        saves = self._saves
        due = min(saves.next, self._next_hook) if saves else self._next_hook
        self._gate = due if due < NEVER else math.inf  # which a JAX integer can be compared with
        # After the line above, since these are set on other threads or in a signal handler.
        if self._error or (saves and saves.at_once):
            self._gate = _ALWAYS

    def _wake(self) -> None:
        self._gate = _ALWAYS

    def _stop(self, error: BaseException) -> None:
        """Let the next call of the loop raise an error."""
        self._error = self._error or error
        self._wake()

    def _save_failed(self, step: int, error: BaseException) -> None:
        if self._saves:
            self._saves.failed(step)
        if isinstance(error, DirectoryLocked):  # it is another run's now: no save can succeed
            self._stop(error)
        elif self._terms and self._terms.checkpoint.on_failure == "raise":
            failure = SaveError(f"step {step} could not be saved: {error}")
            failure.__cause__ = error
            self._stop(failure)

    def _raise_stopped(self) -> None:
        """Raise what is to end the training, on the thread that entered the run."""
        if not self._error or self._hooks.calling:
            return
        if threading.get_ident() == self._thread and os.getpid() == self._pid:
            error, self._error = self._error, None
            raise error


def _status(kind: type[BaseException] | None) -> str:
    """Return how a run ends that is left by an exception, or by none."""
    if kind is None:
        return "finished"
    return "killed" if issubclass(kind, KeyboardInterrupt) else "failed"


def _drop(point: tuple[int, Mapping[str, Any]]) -> None:
    """Take metrics where there is no directory to keep them."""


def _as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as it will come back."""
    try:
        return dict(json.loads(json.dumps(dict(metadata), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must hold JSON values by name: {error}") from error
