"""Text for people."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Collection, Sequence
from typing import Any

__all__ = ["as_text", "closest", "columns", "counted", "listed", "suggestion"]

_SHOWN = 12
"""How many steps a message names."""


def columns(otherwise: int) -> int:
    """Return the width of the terminal, or another one where there is none, such as in a pipe."""
    return shutil.get_terminal_size((otherwise, 25)).columns


def as_text(printable: Any, otherwise: int = 100) -> str:
    """Return as plain text what rich can print, as wide as `columns` says."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=columns(otherwise))
    console.print(printable, soft_wrap=True)  # what is no table in whole lines, to be copied
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def counted(number: int, what: str) -> str:
    """Return a number of things, such as `1 checkpoint` or `2 checkpoints`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def listed(steps: Sequence[int]) -> str:
    """Return steps in words; of many the first and the last ones."""
    if len(steps) <= _SHOWN:
        return ", ".join(map(str, steps)) or "none"
    ends = [*map(str, steps[: _SHOWN // 2]), "…", *map(str, steps[-_SHOWN // 2 :])]
    return f"{', '.join(ends)} ({len(steps):,} in all)"


def suggestion(
    wanted: object, names: Collection[str] = (), steps: Collection[int] = (), *, of: str = ""
) -> str:
    """Return what may have been meant, as the end of a message; nothing if nothing is close.

    Args:
        wanted: what was asked for: a name, or a step.
        names: what there is.
        steps: the steps that there are.
        of: stands before the suggestion, such as the folder that it is in.
    """
    if isinstance(wanted, int):
        if len(steps) <= _SHOWN:  # all of them were listed
            return ""
        nearest = min(steps, key=lambda step: (abs(step - wanted), step))
        return f". The nearest is {nearest}"
    close = closest(str(wanted), names)
    return f". Did you mean {of}{close}?" if close else ""


def closest(
    wanted: str, names: Collection[str], fits: Callable[[str], bool] = lambda name: True
) -> str | None:
    """Return the name that may have been meant, of those that fit; `None` if none is close."""
    import difflib

    return next(filter(fits, difflib.get_close_matches(wanted, names, _SHOWN, 0.65)), None)
