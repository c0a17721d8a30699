"""What stands around a piece of work so that it can be timed; here it does nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Timed", "TimedCalls", "Timing", "untimed"]

F = TypeVar("F", bound=Callable[..., Any])


class Timing:
    """A context manager and decorator that times nothing: it gives back the function itself."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, function: F) -> F:
        return function


Timed = Callable[[str], Timing]
"""Returns what stands around the work of that name: `untimed`, or `Profile.timed`."""

_NOTHING = Timing()


def untimed(name: str) -> Timing:
    """Return what does nothing."""
    return _NOTHING


class TimedCalls:
    """The methods of an object, each of them timed.

    Args:
        target: the object.
        name: what its calls go by, before the name of the method.
        timed: stands around each of them.
    """

    def __init__(self, target: object, name: str, timed: Timed) -> None:
        self._target, self._name, self._timed = target, name, timed

    def __getattr__(self, method: str) -> Any:
        return self._timed(f"{self._name}: {method}")(getattr(self._target, method))
