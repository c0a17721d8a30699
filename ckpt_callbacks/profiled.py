"""A run that is timed."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from ckpt_callbacks.clock import Clock
from ckpt_callbacks.profile import Profile
from ckpt_callbacks.report import Summary
from ckpt_callbacks.run import Run

__all__ = ["ProfiledRun"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")

_CALLS = ("on_step", "on_eval", "save", "wait", "log_artifact")
"""What the loop calls."""


class ProfiledRun(Run[S]):
    """A run that is timed; made by `Callbacks.run` with `profile=True`."""

    profile: Profile

    def __init__(self, *arguments: Any, clock: Clock) -> None:
        self.profile = Profile(clock)
        super().__init__(*arguments, timed=self.profile.timed)
        for name in _CALLS:
            setattr(self, name, self._timed(f"run.{name}")(getattr(self, name)))

    def __enter__(self) -> Run[S]:
        self.profile.begin()
        with self._timed("entering the run"):
            return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._timed("leaving the run"):
                super().__exit__(kind, error, trace)
        finally:
            self.profile.end()
            if self._started and os.getpid() == self._pid:
                # Not `info`, since who asked for it is to see it where no logging is set up.
                logger.warning("%s", self.profile)

    @property
    def state(self) -> S:
        with self._timed("run.state"):
            return super().state

    def summary(self) -> Summary:
        return replace(super().summary(), profile=self.profile)
