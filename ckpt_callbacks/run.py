"""One pass through a training loop: what the loop calls, and when something is due."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ckpt_callbacks.artifacts import artifact_name
from ckpt_callbacks.checkpoint import OrbaxCheckpoint
from ckpt_callbacks.clock import Clock
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.errors import (
    CkptCallbacksWarning,
    ConfigError,
    SaveError,
    StateMismatch,
    UsageError,
)
from ckpt_callbacks.evaluations import Evaluations
from ckpt_callbacks.events import Eval, RunEnded, RunStarted, Step
from ckpt_callbacks.following import Follower
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.metrics import host_floats
from ckpt_callbacks.paths import show
from ckpt_callbacks.policy import NEVER, Resume, SaveContext, SavePolicy, as_step
from ckpt_callbacks.preemption import Preemption
from ckpt_callbacks.processes import Processes, describe, here
from ckpt_callbacks.reading import compare, read
from ckpt_callbacks.remote import open_directory, refuse_bucket
from ckpt_callbacks.report import Summary, summarize
from ckpt_callbacks.restoring import Weights
from ckpt_callbacks.state import check, is_abstract, kinds_of, leaves_of
from ckpt_callbacks.stores import Store
from ckpt_callbacks.timing import Timed, untimed

if TYPE_CHECKING:
    from ckpt_callbacks.profile import Profile

__all__ = ["Run"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")
_ALWAYS = -math.inf
"""A gate that every step passes."""
_Taken = tuple[int, Any, Mapping[str, Any] | None, Mapping[str, Any] | None]
"""What `on_step` was given: step, state, metrics, metadata."""


class Run(Generic[S]):
    """One pass through a training loop; made by `Callbacks.run`."""

    profile: Profile | None = None
    """Where the time goes, with `Callbacks(profile=True)`."""

    def __init__(
        self,
        state: S,
        config: Mapping[str, Any],
        checkpoint: OrbaxCheckpoint | None,
        stores: list[Store],
        plugins: list[object],
        *,
        resume: Resume,
        run_id: str | None,
        start_from: Weights | None,
        init: Callable[[], S] | None,
        discard_newer: bool,
        drain_limit: float,
        grace: float,
        system_metrics: float | None,
        process_timeout: float,
        clock: Clock,
        timed: Timed = untimed,
    ) -> None:
        self._state: S | None = state
        self._start_from, self._init = start_from, init
        self._config = config
        self._checkpoint = checkpoint
        self._stores = stores
        self._timed = timed
        self._hooks = Hooks(plugins, critical=self._stop, timed=timed)
        self._resume: Resume = resume
        self._run_id = run_id
        self._discard_newer = discard_newer
        self._drain_limit = drain_limit
        self._system_metrics = system_metrics
        self._process_timeout = process_timeout
        self._processes: Processes | None = None
        self._asks = False  # whether process 0 is asked at every step
        self._clock = clock
        self._preemption = Preemption(grace, self._wake)
        self._engine: Engine | Follower | None = None
        self._must_read = False
        self._log: Callable[[tuple[int, Mapping[str, Any]]], object] = _drop
        self._evaluations = Evaluations(checkpoint)
        self._latest: _Taken | None = None
        self._last: int | None = None
        self._last_chance_used = False
        self._saved_at = 0.0
        self._entered = self._started = False
        self._error: BaseException | None = None
        self._failed_step: int | None = None
        self._pid, self._thread = os.getpid(), 0
        self._next_save = self._next_hook = NEVER
        self._gate: float = _ALWAYS  # the first `on_step` always takes the slow way
        self.next_step = 0
        """First step that the loop should take: 0, or the one after the restored checkpoint."""

    def __enter__(self) -> Run[S]:
        if self._entered:
            raise UsageError("a run is entered once: make a new one with callbacks.run")
        self._entered, self._thread = True, threading.get_ident()
        checkpoint, self._processes = self._checkpoint, here(self._process_timeout)
        if self._processes is None or checkpoint is None:
            self._processes = None
            self._enter()
        else:
            self._enter_together(checkpoint, self._processes)
        return self

    def _enter_together(self, checkpoint: OrbaxCheckpoint, processes: Processes) -> None:
        """Enter the run in all processes: process 0 opens the directory, and the others see it."""
        refuse_bucket(checkpoint.directory)
        self._asks = not checkpoint.save.by_steps or checkpoint.busy == "skip"
        if not processes.decides:
            self._stores = []
        processes.compare(
            {
                "directory": str(open_directory(checkpoint.directory)),
                "save": str(checkpoint.save),
                "keep": str(checkpoint.keep),
                "busy": checkpoint.busy,
                "keep_here": str(checkpoint.keep_here),
                "resume": f"{self._resume!r}, discard_newer={self._discard_newer}",
                "run_id": str(self._run_id),
                **describe(self._state),
            }
        )
        try:
            with processes.opening(lambda: self._engine.word() if self._engine else None):
                self._enter()
            processes.share(self._engine.unseen() if self._engine else None)
        except BaseException as error:
            if self._engine:  # else `_enter` has left it
                self.__exit__(type(error), error, None)
            raise

    def _enter(self) -> None:
        if self._checkpoint:
            items = check(self._state)  # what cannot be saved is known before the first step
            leaves = kinds_of(self._state) if self._stores else {}
            if self._checkpoint.keep_here is not None:
                _refuse_references(self._stores)
            for store in self._stores:
                store.entered(items)
                store.fits(leaves)
            self._engine = engine = self._open(self._checkpoint)
            self._saved_at = self._clock.monotonic()
            if engine.resumed:
                self._last = engine.resumed.step
                self.next_step = engine.resumed.step + 1
            self._log = engine.log
        try:
            self._must_read = self._begins_elsewhere()
            if self._engine:
                self._preemption.start()
            resumed = self.next_step - 1 if self.next_step else None
            root = self._engine.directory.root if self._engine else None
            self._hooks.emit(RunStarted(root, resumed, self.next_step))
            if self._engine:
                self._engine.begin()
            self._raise_stopped()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _open(self, checkpoint: OrbaxCheckpoint) -> Engine | Follower:
        directory = open_directory(checkpoint.directory, self._clock)
        if self._processes and not self._processes.decides:
            return Follower(directory, self._processes, self._hooks, self._save_failed)
        return Engine(
            directory,
            checkpoint.keep,
            self._stores,
            self._config,
            self._hooks,
            resume=self._resume,
            run_id=self._run_id,
            discard_newer=self._discard_newer,
            compare=partial(compare, like=self._state),
            here=checkpoint.keep_here,
            failed=self._save_failed,
            sample=self._system_metrics,
            latest=self._latest_step,
            clock=self._clock,
            drain_limit=self._drain_limit,
            timed=self._timed,
            processes=self._processes,
        )

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
        unsent: dict[str, str] = {}
        try:
            try:
                if self._engine and self._checkpoint:
                    self._save_at_end(status, self._checkpoint.save, self._engine)
                    if not (self._processes and self._processes.decides and kind is None):
                        self._engine.finish_saving()
                    if self._processes and kind is None:  # so that all may read it from here on
                        self._processes.agree("the last checkpoint", self._engine.finish_saving)
                if self._preemption.notice:
                    status = "preempted"
            finally:
                engine, self._engine = self._engine, None
                self._gate = _ALWAYS
                deadline = time.monotonic() + self._drain_limit

                def left() -> float:
                    return min(deadline - time.monotonic(), self._preemption.left())

                if engine:
                    unsent = engine.close(status, left)
                    engine.tell(unsent)
        finally:
            self._preemption.stop()
        self._hooks.emit(RunEnded(status, unsent))
        if kind is None:
            self._raise_stopped()

    def _begins_elsewhere(self) -> bool:
        """Return whether the state to train is not the one that was given.

        Raises:
            ConfigError: that one is abstract, and there are no values for it.
        """
        if self._engine and self._engine.resumed:
            return True
        if not self._init and is_abstract(self._state):
            raise ConfigError(
                "run: the state is abstract, and there is no checkpoint to go on from: give "
                "init=, a function that makes the state a new run begins with"
            )
        return bool(self._init or self._start_from)

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
        if self._state is None:
            raise UsageError(
                "run.state is read once, before the first step: keep what it returned then"
            )
        if self._must_read and self._entered and not self._engine:
            raise UsageError("run.state was first read after the with statement of its run")
        state = self._state
        if self._engine and (record := self._engine.resumed):
            # Its files were checked when the run was entered.
            path = self._engine.directory.path(record.step)
            try:
                state = read(path, state)
            except StateMismatch as error:
                error.args = (f"{error}\n{_another_start(str(self._engine.directory))}",)
                raise
        elif self._entered:
            state = self._made(state) if self._init else state
            state = self._start_from.into(state) if self._start_from else state
        self._state, self._must_read = None, False
        return state

    def _made(self, like: S) -> S:
        """Return the state that `init` makes.

        Raises:
            ConfigError: it has other leaves than the abstract one.
        """
        assert self._init  # noqa: S101  # for the type checker
        made = self._init()
        try:
            ours, theirs = leaves_of(like).keys(), leaves_of(made).keys()
        except StateMismatch as error:
            raise ConfigError(f"run: init= made no state: {error}") from error
        if other := sorted(map(show, ours ^ theirs)):
            raise ConfigError(
                "run: init= has to make what the abstract state describes, but only one of the two "
                f"has {', '.join(other[:5])}{', …' * (len(other) > 5)}"
            )
        return made

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
        return self._engine.unmeasured() if self._engine else []

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
        if self._checkpoint and not self._engine:
            raise UsageError("on_eval was called outside of the with statement of its run")
        step = as_step("on_eval", step)
        values, problems = host_floats(metrics)
        for problem in problems.values():
            warnings.warn(problem, CkptCallbacksWarning, stacklevel=2)
        if self._engine and os.getpid() == self._pid:
            with self._evaluations.mutex:
                try:
                    ranked = self._engine.evaluate(step, values)
                except OSError as error:  # such as a full disk
                    logger.error("the evaluation of step %d ranks nothing: %s", step, error)
                    return
                self._evaluated(step, values, self._engine, ranked=ranked)
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
        if self._checkpoint and not self._engine:
            raise UsageError("log_artifact was called outside of the with statement of its run")
        file = Path(path)
        name = artifact_name(file, name)
        if self._engine and os.getpid() == self._pid:
            try:
                self._engine.log_artifact(file, name)
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
        if not self._engine:
            raise UsageError("save was called outside of the with statement of a run")
        if os.getpid() != self._pid:
            return  # a forked child
        step = as_step("save", step)
        self._raise_stopped()
        if not self._started:
            self._first_step(step)
        if self._agreed(f"run.save of step {step}", lambda: self._is_past(step)):
            raise UsageError(f"step {step} is not newer than {self._last}, which was saved before")
        about = None if metadata is None else _as_json(metadata)
        self._save((step, state, metrics, about), self._engine)
        self._set_gate()

    def wait(self) -> None:
        """Wait until no save is in flight. Stores may still lack what was saved.

        Raises:
            SaveError: a save failed, and `on_failure` is `raise`.
        """
        if self._engine and os.getpid() == self._pid:
            self._engine.wait()
        self._raise_stopped()

    def summary(self) -> Summary:
        """Return what is kept, why and where; print it for a table."""
        if self._checkpoint is None:
            return Summary([], [], [])
        hints = [f"{s.title}: {s.hint()}" for s in self._stores]
        return summarize(self._checkpoint.directory, hints)

    def _latest_step(self) -> Any:
        latest = self._latest
        return None if latest is None else latest[0]

    def _due(self, taken: _Taken) -> None:
        """Do what is due at a step, and find out when the next thing is."""
        step, state, metrics, metadata = taken
        if os.getpid() != self._pid:
            return  # a forked child
        if type(step) is not int or step < 0:
            step = as_step("on_step", step)
            taken = (step, state, metrics, metadata)
        if self._checkpoint and not self._engine:
            raise UsageError("on_step was called outside of the with statement of its run")
        self._raise_stopped()
        if not self._started:
            self._first_step(step)
        if self._preemption.distributed:
            self._preemption.reached(step)
        if self._checkpoint and self._engine:
            if self._last_chance(step):
                self._save(taken, self._engine)
            elif step >= self._next_save:
                self._save_if_due(taken, self._checkpoint, self._engine)
        if step >= self._next_hook:
            self._next_hook = self._hooks.step(Step(step, state, metrics or {}))
        self._set_gate()
        self._raise_stopped()

    def _save_if_due(
        self, taken: _Taken, checkpoint: OrbaxCheckpoint, engine: Engine | Follower
    ) -> None:
        step = taken[0]

        def due() -> bool:
            evaluated = self._evaluations.of(step)
            context = SaveContext(
                step=step,
                last=self._last,
                now=self._clock.monotonic(),
                last_time=self._saved_at,
                evaluated=evaluated,
                would_keep=lambda: engine.would_keep(step, evaluated),
                busy=engine.busy,
                preempted=self._preemption.notice,
            )
            skipped = checkpoint.busy == "skip" and engine.busy
            return step != self._last and not skipped and checkpoint.save.due(context)

        if self._agreed(f"step {step}", due) if self._asks else due():
            self._save(taken, engine)
        self._next_save = step + 1 if self._asks else checkpoint.save.next_due(step)

    def _agreed(self, topic: str, decide: Callable[[], bool]) -> bool:
        """Return what `decide` says, in process 0 if there are several."""
        return bool(self._processes.agree(topic, decide)) if self._processes else decide()

    def _last_chance(self, step: int) -> bool:
        """Return whether the process is about to end and `step` is to be saved before."""
        if not self._preemption.notice or self._last_chance_used:
            return False
        self._last_chance_used = True
        logger.warning("told to end: step %d is the last one that is saved", step)
        return not self._agreed(f"the last save, step {step}", lambda: self._is_past(step))

    def _is_past(self, step: int) -> bool:
        """Return whether `step`, or a newer one, was saved."""
        return self._last is not None and step <= self._last and step != self._failed_step

    def _save_at_end(self, status: str, policy: SavePolicy, engine: Engine | Follower) -> None:
        latest, self._latest = self._latest, None
        if self._processes:
            if status != "finished":
                return  # the others are elsewhere
            self._processes.meet(f"the end of the run, last step {latest and latest[0]}")
        if latest is None:
            return
        try:
            step = as_step("on_step", latest[0])
        except ConfigError as error:  # it came on the fast way
            logger.error("the last step is not saved: %s", error)
            return
        past = self._agreed(f"the end, step {step}", lambda: self._is_past(step))
        if not past and (self._last_chance(step) or policy.at_end(status)):
            self._save((step, *latest[1:]), engine)

    def _save(self, taken: _Taken, engine: Engine | Follower) -> None:
        step, state, metrics, metadata = taken
        engine.wait()  # before the lock: a listener of the last save may evaluate
        with self._evaluations.mutex:
            evaluated = self._evaluations.take(step, metrics or {})
            self._last, self._saved_at = step, self._clock.monotonic()
            # Until it has begun, since Ctrl-C may come just now.
            self._failed_step = step
            error = engine.save(step, state, evaluated, metrics or {}, metadata or {})
            self._failed_step = step if error else None
        if error:
            engine.report(step, error)
        if self._checkpoint and self._checkpoint.synchronous:
            engine.settle()

    def _evaluated(
        self,
        step: int,
        values: Mapping[str, float],
        engine: Engine | Follower,
        *,
        ranked: bool,
    ) -> None:
        """Note an evaluation: of a checkpoint, of a step that may become one, or of neither."""
        if ranked:
            self._evaluations.met()
        elif self._last is None or step > self._last:
            self._evaluations.add(step, values)
        elif not engine.was_evicted(step):
            self._evaluations.missed(step)
        if self._checkpoint and self._checkpoint.save.watches_evaluations:
            self._next_save = min(self._next_save, step)
            self._gate = min(self._gate, step)

    def _first_step(self, step: int) -> None:
        if self._must_read:
            why = (
                f"resumed from step {self.next_step - 1}" if self.next_step else "is to begin anew"
            )
            raise UsageError(
                f"this run {why}, but run.state was never read, so the loop would train other "
                "weights: start with `state = run.state`"
            )
        if step < self.next_step:
            raise UsageError(
                f"this run resumed from step {self.next_step - 1}, but the loop took step {step}: "
                f"start it at run.next_step, which is {self.next_step}"
            )
        self._state = None
        self._next_hook = self._hooks.first_step(step)
        if self._checkpoint:
            due = self._checkpoint.save.next_due(self._last)
            self._next_save = step if self._asks or self._evaluations.of(step) else due
        self._started = True

    def _set_gate(self) -> None:
        """Let the next `on_step` that has something to do take the slow way."""
        due = min(self._next_save, self._next_hook)
        self._gate = due if due < NEVER else math.inf  # which a JAX integer can be compared with
        # After the line above, since these are set on other threads or in a signal handler.
        told = self._preemption.notice and not self._last_chance_used
        if self._error or told or self._preemption.distributed:
            self._gate = _ALWAYS

    def _wake(self) -> None:
        self._gate = _ALWAYS

    def _stop(self, error: BaseException) -> None:
        """Let the next call of the loop raise an error."""
        self._error = self._error or error
        self._wake()

    def _save_failed(self, step: int, error: BaseException) -> None:
        if step == self._last:
            self._failed_step = step
        if self._checkpoint and self._checkpoint.on_failure == "raise":
            failure = SaveError(f"step {step} could not be saved: {error}")
            failure.__cause__ = error
            self._stop(failure)

    def _raise_stopped(self) -> None:
        """Raise what is to end the training, on the thread that entered the run."""
        here = threading.get_ident() == self._thread and os.getpid() == self._pid
        if self._error and here and not self._hooks.calling:
            error, self._error = self._error, None
            raise error


def _another_start(root: str) -> str:
    """Return what to do where the checkpoint to go on from is of another state."""
    return (
        "To train this state from the start, give the run another directory (start_from=cc.Weights("
        f"{root!r}, only=…) takes over what fits), or resume=None and discard_newer=True, "
        "which removes the checkpoints in this one"
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


def _drop(point: tuple[int, Mapping[str, Any]]) -> None:
    """Take metrics where there is no directory to keep them."""


def _as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as it will come back."""
    try:
        return dict(json.loads(json.dumps(dict(metadata), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must hold JSON values by name: {error}") from error
