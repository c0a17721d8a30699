"""Which steps of a loop are saved, and what was measured of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ckpt_callbacks.checkpoint import OrbaxCheckpoint
from ckpt_callbacks.clock import Clock
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.errors import ConfigError, UsageError
from ckpt_callbacks.evaluations import Evaluations
from ckpt_callbacks.following import Follower
from ckpt_callbacks.policy import NEVER, SaveContext, as_step
from ckpt_callbacks.preemption import Preemption
from ckpt_callbacks.processes import Processes

__all__ = ["Saves", "Taken"]

logger = logging.getLogger("ckpt_callbacks")

Taken = tuple[int, Any, Mapping[str, Any] | None, Mapping[str, Any] | None]
"""What `on_step` was given: step, state, metrics, metadata."""


class Saves:
    """The saves of a run, from when it is entered until it is left.

    Args:
        checkpoint: says which steps.
        engine: saves them.
        processes: those that the loop runs in, of which process 0 decides; `None` for one.
        preemption: tells of the last step that can be saved.
        clock: the clocks.
    """

    def __init__(
        self,
        checkpoint: OrbaxCheckpoint,
        engine: Engine | Follower,
        processes: Processes | None,
        preemption: Preemption,
        clock: Clock,
    ) -> None:
        self.engine = engine
        self.next = NEVER
        """The next step that may be due, once there was a first one."""
        self._policy, self._skips = checkpoint.save, checkpoint.busy == "skip"
        self._synchronous = checkpoint.synchronous
        self._processes = processes
        # Whether process 0 is asked at every step.
        self._asks = processes is not None and (not self._policy.by_steps or self._skips)
        self._preemption = preemption
        self._clock = clock
        self._evaluations = Evaluations(checkpoint)
        self._last = engine.resumed.step if engine.resumed else None
        self._saved_at = clock.monotonic()
        self._failed_step: int | None = None
        self._last_chance_used = False

    @property
    def at_once(self) -> bool:
        """Whether `at` has something to do at the very next step, whichever that is."""
        told = self._preemption.notice and not self._last_chance_used
        return told or self._preemption.distributed

    def first_step(self, step: int) -> None:
        """The loop begins, with `step`."""
        now = self._asks or self._evaluations.of(step)
        self.next = step if now else self._policy.next_due(self._last)

    def at(self, taken: Taken) -> None:
        """Save a step that the loop took, if it is to be."""
        step = taken[0]
        if self._preemption.distributed:
            self._preemption.reached(step)
        if self._last_chance(step):
            self.save(taken)
        elif step >= self.next:
            self._save_if_due(taken)

    def end(self, status: str, latest: Taken | None) -> None:
        """Save the last step of the loop if it is to be, and wait for what is being saved."""
        self._save_at_end(status, latest)
        processes = self._processes if status == "finished" else None
        if not (processes and processes.decides):
            self.engine.finish_saving()
        if processes:  # so that all may read it from here on
            processes.agree("the last checkpoint", self.engine.finish_saving)

    def check_new(self, step: int) -> None:
        """Check that a step can still be saved.

        Raises:
            UsageError: it is not newer than the newest that was.
        """
        if self._agreed(f"run.save of step {step}", lambda: self._is_past(step)):
            raise UsageError(f"step {step} is not newer than {self._last}, which was saved before")

    def save(self, taken: Taken) -> None:
        """Save a step now."""
        step, state, metrics, metadata = taken
        self.engine.wait()  # before the lock: a listener of the last save may evaluate
        with self._evaluations.mutex:
            evaluated = self._evaluations.take(step, metrics or {})
            self._last, self._saved_at = step, self._clock.monotonic()
            # Until it has begun, since Ctrl-C may come just now.
            self._failed_step = step
            error = self.engine.save(step, state, evaluated, metrics or {}, metadata or {})
            self._failed_step = step if error else None
        if error:
            self.engine.report(step, error)
        if self._synchronous:
            self.engine.settle()

    def failed(self, step: int) -> None:
        """A save failed: its step may be saved again."""
        if step == self._last:
            self._failed_step = step

    def evaluate(self, step: int, values: Mapping[str, float]) -> bool:
        """Note an evaluation: of a checkpoint, of a step that may become one, or of neither.

        Returns whether that step may be due now.

        Raises:
            OSError: it could not be written down.
        """
        with self._evaluations.mutex:
            if self.engine.evaluate(step, values):
                self._evaluations.met()
            elif self._last is None or step > self._last:
                self._evaluations.add(step, values)
            elif not self.engine.was_evicted(step):
                self._evaluations.missed(step)
            if not self._policy.watches_evaluations:
                return False
            self.next = min(self.next, step)
            return True

    def _save_if_due(self, taken: Taken) -> None:
        step = taken[0]

        def due() -> bool:
            evaluated = self._evaluations.of(step)
            context = SaveContext(
                step=step,
                last=self._last,
                now=self._clock.monotonic(),
                last_time=self._saved_at,
                evaluated=evaluated,
                would_keep=lambda: self.engine.would_keep(step, evaluated),
                busy=self.engine.busy,
                preempted=self._preemption.notice,
            )
            skipped = self._skips and self.engine.busy
            return step != self._last and not skipped and self._policy.due(context)

        if self._agreed(f"step {step}", due) if self._asks else due():
            self.save(taken)
        self.next = step + 1 if self._asks else self._policy.next_due(step)

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

    def _save_at_end(self, status: str, latest: Taken | None) -> None:
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
        if not past and (self._last_chance(step) or self._policy.at_end(status)):
            self.save((step, *latest[1:]))
