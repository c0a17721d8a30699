"""When to save: pure policies over step numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ckpt_callbacks.errors import ConfigError

__all__ = ["EveryNSteps", "SavePolicy"]


class SavePolicy(Protocol):
    """Says at which step the next save is due."""

    def next_due(self, last: int | None) -> int:
        """Return the first step at which a save is due.

        `last` is the newest step saved so far, also by an earlier process, or `None`.
        """
        ...


@dataclass(frozen=True, slots=True)
class EveryNSteps:
    """Save at the first step in each bucket of `n` steps: 0, n, 2n, … when none is left out.

    Step 0 is the first step of the first bucket, so it is saved.
    A loop that skips a multiple of `n` saves at the next step it takes,
    and a resumed run goes on in the bucket where it stopped.

    Raises:
        ConfigError: `n` is not a positive integer.
    """

    n: int

    def __post_init__(self) -> None:
        positive("EveryNSteps", "n", self.n)

    def next_due(self, last: int | None) -> int:
        """Return the start of the bucket after `last`; 0 when nothing was saved yet."""
        return 0 if last is None else (last // self.n + 1) * self.n


def positive(owner: str, name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{owner}: {name} must be an integer of at least 1, not {value!r}")
