"""What a trainer tells of its training, as steps and evaluations of a run.

Tunix is never imported, which would take ten seconds: its trainer takes any object that has the
methods of `tunix.sft.hooks.TrainingHooks`.

After update `k` the trainer calls, in this order: `on_train_step_end` of update `k - 1`, the hooks
of an evaluation if one is due, and `on_train_step_start` of update `k + 1`, or `on_train_end`. So
at the last two a step is over, evaluation included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import ckpt_callbacks as cc
from ckpt_callbacks.policy import Resume
from ckpt_callbacks_tunix._variables import Variables

__all__ = ["attach"]


class Trainer(Protocol):
    """What is used of a `tunix.PeftTrainer`, and of those derived from it."""

    model: Any
    optimizer: Any
    config: Any
    training_hooks: Any
    _train_steps: int
    """Updates so far."""
    _iter_steps: int
    """Batches so far: several an update under gradient accumulation."""
    _prev_buffered_train_metrics: Any
    """Those of the last update. The hooks get them one update later."""

    def with_training_hooks(self, training_hooks: Any) -> Any: ...


@contextmanager
def attach(
    callbacks: cc.Callbacks,
    trainer: Trainer,
    *,
    config: Mapping[str, Any] | None = None,
    resume: Resume = "last",
    discard_newer: bool = False,
) -> Iterator[cc.Run[Any]]:
    """Enter a run that is told of what `trainer` trains, and saves it.

    If the run goes on from a checkpoint, the values are in the model and in the optimizer at once,
    and the trainer counts on from there. Give `trainer.train` the same data as the first time, from
    their beginning: by itself it skips the batches that it was trained on. (One with data hooks,
    or that is managed externally, does not.)

    The metrics are `loss`, of each update, and `eval_loss`, the mean over the batches of an
    evaluation, which comes before the save of its step. When the process is told to end, the
    trainer ends after an update, as if `max_steps` were reached, and `run.should_stop` says so; one
    that is managed externally is for its manager to end.

    Under gradient accumulation nothing is saved amid an update, so where training ends amid one,
    by Ctrl-C or since the data end there, `AtEnd` has nothing to save.

    Args:
        callbacks: what to save, keep and tell.
        trainer: a `PeftTrainer`, as it is to be trained: all options set, and no hooks.
        config: as in `Callbacks.run`.
        resume: as in `Callbacks.run`.
        discard_newer: as in `Callbacks.run`.

    Raises:
        ConfigError: Tunix is to write checkpoints too, or the trainer has hooks.
    """
    if trainer.config.checkpoint_root_directory is not None:
        raise cc.ConfigError(
            "attach: Tunix is to write checkpoints too, and would resume from its own: leave "
            "TrainingConfig(checkpoint_root_directory=...) out"
        )
    if trainer.training_hooks is not None:
        raise cc.ConfigError(
            "attach: the trainer has training hooks, "
            f"{type(trainer.training_hooks).__qualname__}, and there is room for one object only"
        )
    max_steps = trainer.config.max_steps
    variables = Variables(trainer.model, trainer.optimizer)
    with callbacks.run(
        variables.values(), config=config, resume=resume, discard_newer=discard_newer
    ) as run:
        hooks = _Hooks(run, variables)
        hooks.begin(trainer)
        trainer.with_training_hooks(hooks)
        try:
            yield run
        finally:
            trainer.with_training_hooks(None)
            trainer.config.max_steps = max_steps
            # An exception or Ctrl-C may have come before the last update was told of.
            hooks.finished(trainer, None)


class _Hooks:
    """The methods of `tunix.sft.hooks.TrainingHooks`."""

    def __init__(self, run: cc.Run[Any], variables: Variables) -> None:
        self._run = run
        self._variables = variables
        self._resumed = self._last = run.next_step - 1
        self._rngs: dict[str, Any] | None = None
        self._batches = 0

    def begin(self, trainer: Trainer) -> None:
        """Let the trainer go on from the step that the run resumed from, if it did."""
        state = self._run.state
        if not self._run.next_step:
            return
        self._variables.set(state)
        self._rngs = state["rngs"]
        trainer._train_steps = self._resumed
        trainer._iter_steps = self._resumed * _batches_per_update(trainer)

    def finished(self, trainer: Trainer, metrics: Mapping[str, Any] | None) -> None:
        """Tell of the last update, once."""
        step = trainer._train_steps
        if step > self._last:
            self._last = step
            self._run.on_step(step, self._variables.values(), metrics)

    def on_train_start(self, trainer: Trainer) -> None:
        # The evaluation that `train` begins with may have drawn random numbers, which one that was
        # not interrupted has not at this step.
        if self._rngs is not None:
            self._variables.set(self._variables.values() | {"rngs": self._rngs})
            self._rngs = None

    def on_train_step_start(self, trainer: Trainer) -> None:
        if trainer._train_steps > self._last:  # else it is amid an update, of several batches
            self.finished(trainer, _metrics(trainer))
            self._stop_if_told(trainer)

    def on_train_step_end(self, trainer: Trainer, train_step: int, train_loss: float) -> None:
        self._stop_if_told(trainer)

    def on_eval_step_start(self, trainer: Trainer) -> None:
        self._batches += 1

    def on_eval_step_end(self, trainer: Trainer, eval_loss: Any) -> None:
        """Take the sum of the losses of all batches, once an evaluation."""
        batches, self._batches = self._batches, 0
        step = trainer._train_steps
        # A run that resumes begins with an evaluation that it had before, unless a kill took it.
        if step != self._resumed or step in self._run.unmeasured:
            self._run.on_eval(step, {"eval_loss": eval_loss / batches})
        self._stop_if_told(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self.finished(trainer, _metrics(trainer))

    def _stop_if_told(self, trainer: Trainer) -> None:
        """Let the trainer end before the next batch. Called between two updates only."""
        if self._run.should_stop:
            trainer.config.max_steps = trainer._train_steps


def _batches_per_update(trainer: Trainer) -> int:
    return trainer.config.gradient_accumulation_steps or 1


def _metrics(trainer: Trainer) -> dict[str, Any] | None:
    """Return the loss of the last update, on the device."""
    buffered = trainer._prev_buffered_train_metrics
    if buffered is None:  # nothing was trained yet
        return None
    return {"loss": sum(buffered.losses) / len(buffered.losses)}
