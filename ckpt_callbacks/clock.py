"""The two clocks of a run, in one place so that a test can set them."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """The machine's own clocks."""

    def time(self) -> float:
        """Return seconds since the epoch, for people; it may be moved back."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds of a clock that never goes back."""
        return time.monotonic()
