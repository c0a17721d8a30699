"""What a loop begins with: its state, and its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import ConfigError, StateMismatch, UsageError
from ckpt_callbacks.paths import show
from ckpt_callbacks.reading import read
from ckpt_callbacks.restoring import Weights
from ckpt_callbacks.state import is_abstract, leaves_of

__all__ = ["Beginning"]

S = TypeVar("S")


class Beginning(Generic[S]):
    """The state to train: as it was given, as it is made, or with values from elsewhere.

    Args:
        given: the state, or what describes it.
        start_from: where a new run gets its weights from.
        init: makes the state of a new run.
    """

    def __init__(self, given: S, start_from: Weights | None, init: Callable[[], S] | None) -> None:
        self.given: S | None = given
        """What was given, until the state was read, or the loop began."""
        self.next_step = 0
        """First step that the loop should take."""
        self._start_from, self._init = start_from, init
        self._directory: RunDirectory | None = None
        self._must_read = self._is_over = False

    def enter(self, directory: RunDirectory | None, resumed: int | None) -> None:
        """The run goes on from step `resumed` of its directory, or begins anew.

        Raises:
            ConfigError: the state is abstract, and there are no values for it.
        """
        if directory and resumed is not None:
            self._directory, self.next_step, self._must_read = directory, resumed + 1, True
            return
        if not self._init and is_abstract(self.given):
            raise ConfigError(
                "run: the state is abstract, and there is no checkpoint to go on from: give "
                "init=, a function that makes the state a new run begins with"
            )
        self._must_read = bool(self._init or self._start_from)

    def leave(self) -> None:
        """The run is over."""
        self._is_over = True

    def take(self) -> S:
        """Return the state to train, and keep no reference to it; see `Run.state`.

        Raises:
            StateMismatch: the checkpoint has other leaves or shapes than the state given.
            ConfigError: `init` makes another state than the abstract one.
            CheckpointNotFound, CorruptCheckpoint: of what is to be started from; see `restore`.
            UsageError: it was taken before, or the run is over.
        """
        if self.given is None:
            raise UsageError(
                "run.state is read once, before the first step: keep what it returned then"
            )
        if self._must_read and self._is_over:
            raise UsageError("run.state was first read after the with statement of its run")
        state = self._elsewhere(self.given) if self._must_read else self.given
        self.given, self._must_read = None, False
        return state

    def first_step(self, step: int) -> None:
        """The loop begins, with `step`.

        Raises:
            UsageError: it would train other weights, or it has that step already.
        """
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
        self.given = None

    def _elsewhere(self, like: S) -> S:
        """Return the state with its values: of the checkpoint, or those that a new run gets."""
        if self._directory:
            # Its files were checked when the run was entered.
            path = self._directory.path(self.next_step - 1)
            try:
                return read(path, like)
            except StateMismatch as error:
                error.args = (f"{error}\n{_another_start(str(self._directory))}",)
                raise
        state = self._made(like, self._init) if self._init else like
        return self._start_from.into(state) if self._start_from else state

    def _made(self, like: S, init: Callable[[], S]) -> S:
        """Return the state that `init` makes.

        Raises:
            ConfigError: it has other leaves than the abstract one.
        """
        made = init()
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


def _another_start(root: str) -> str:
    """Return what to do where the checkpoint to go on from is of another state."""
    return (
        "To train this state from the start, give the run another directory (start_from=cc.Weights("
        f"{root!r}, only=…) takes over what fits), or resume=None and discard_newer=True, "
        "which removes the checkpoints in this one"
    )
