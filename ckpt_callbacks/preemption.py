"""The notice that this process is about to be taken away, and what is done about it.

In one process the notice is SIGTERM. The first is noted, and whatever handler was there is called
as well; a second one, or the end of the grace time, goes straight to what was there before, which
for Python's default ends the process. Where `jax.distributed` runs, its runtime has a handler of
its own and agrees with all processes on one step; a handler of ours would swallow the signal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

__all__ = ["Preemption"]


class Preemption:
    """Listens for the notice from `start` to `stop`.

    Args:
        grace: seconds between the notice and the end of the process.
        noticed: called once, within the signal handler.
    """

    _live: ClassVar[set[Preemption]] = set()
    """Those of this process that listen."""
    _told: ClassVar[float | None] = None
    """When this process was told: a run that is entered later stops at once, too."""
    _passing = False
    """Whether the notice is being passed on to the handlers that were there before."""

    def __init__(self, grace: float, noticed: Callable[[], None]) -> None:
        self.distributed = False
        """Whether `reached` has to be asked at every step, in all processes."""
        self._grace = grace
        self._noticed = noticed
        self._previous: Any = None
        self._stopped = False
        self._timer: threading.Timer | None = None
        self._pid = os.getpid()

    @property
    def notice(self) -> bool:
        """Whether the notice has come."""
        return Preemption._told is not None

    def start(self) -> None:
        """Begin to listen, where that is possible.

        It is on the main thread of a process whose handler for SIGTERM Python knows.
        """
        jax = sys.modules.get("jax")
        runs = bool(jax and jax.distributed.is_initialized())
        # A user may have turned its service off; the signal is not ours then either.
        self.distributed = bool(runs and jax and jax.config.jax_enable_preemption_service)
        if runs or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not None:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            Preemption._live.add(self)

    def stop(self) -> None:
        """Put back the handler that was there."""
        if self._timer:
            self._timer.cancel()
        self._stopped = True
        Preemption._live.discard(self)
        if self._previous is not None and self._is_on_top():
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Ask the runtime whether `step` is the one at which all processes save and stop."""
        from jax.experimental import multihost_utils

        if not self.notice and multihost_utils.reached_preemption_sync_point(step):
            self._note()
        return self.notice

    def left(self) -> float:
        """Return how many seconds there are left to work; infinite without a notice.

        A part of the grace time is kept for what the program does after the run.
        """
        if Preemption._told is None:
            return float("inf")
        return Preemption._told + self._grace - min(2.0, self._grace / 5) - time.monotonic()

    def _note(self) -> None:
        if Preemption._told is None:
            Preemption._told = time.monotonic()
        self._noticed()

    def _is_on_top(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._on_signal

    def _on_signal(self, number: int, frame: Any) -> None:
        previous = self._previous
        if self._stopped:  # it is still here, since a run that was left later had it below
            if callable(previous) and not self._is_on_top():
                previous(number, frame)
            elif self._is_on_top() or not Preemption._live:  # else that one sees to it
                signal.signal(number, previous)
                os.kill(os.getpid(), number)
            return
        # Two runs may be entered at a time: the handler of the inner one calls that of the other.
        again = self.notice and (self._timer is not None or not Preemption._passing)
        if again or os.getpid() != self._pid:  # a forked child is not told, but ended
            self.stop()
            os.kill(os.getpid(), number)
            return
        self._note()
        # A signal may only be handled on the main thread, so the timer sends the second one.
        self._timer = threading.Timer(self._grace, os.kill, (os.getpid(), number))
        self._timer.daemon = True
        self._timer.start()
        if callable(previous):
            Preemption._passing = True
            try:
                previous(number, frame)
            finally:
                Preemption._passing = False
