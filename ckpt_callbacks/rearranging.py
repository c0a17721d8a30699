"""The axes of arrays, named: `(h d) i -> i h d` says what becomes of each.

The notation is that of einops: an axis that was several is written in parentheses, the slowest
first, and `1` is an axis of size 1. It says a transpose and a reshape at once, and reads both ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_callbacks.errors import ConfigError, StateMismatch

__all__ = ["Axes", "Index", "rearranged", "within"]

Index = Mapping[str, int | slice]
"""By axis, where along it a part is: at one place, which leaves it without the axis, or several."""

_TOKEN = re.compile(r"\s*(?:\(([\w\s]*)\)|(\w+))\s*")


@dataclass(frozen=True, slots=True)
class Axes:
    """One side of the notation: of each axis of an array the named axes that it is made of."""

    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Axes:
        """Return one side of the notation.

        Raises:
            ConfigError: it is none, or names an axis twice.
        """
        groups: list[tuple[str, ...]] = []
        at = 0
        while at < len(text) and (match := _TOKEN.match(text, at)):
            inner, name = match.groups()
            names = (name,) if inner is None else tuple(inner.split())
            groups.append(tuple(n for n in names if n != "1"))
            at = match.end()
        axes = cls(tuple(groups))
        if text[at:].strip() or not all(map(str.isidentifier, axes.names)):
            raise ConfigError(f"axes: {text!r} is no list of axes, such as '(h d) i'")
        if len(set(axes.names)) < len(axes.names):
            raise ConfigError(f"axes: {text!r} names an axis twice")
        return axes

    def __str__(self) -> str:
        shown = [g[0] if len(g) == 1 else f"({' '.join(g)})" if g else "1" for g in self.groups]
        return " ".join(shown)

    @property
    def names(self) -> tuple[str, ...]:
        """All axes, the slowest first."""
        return tuple(name for group in self.groups for name in group)

    def sizes(self, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
        """Return the size of each axis of an array, where `known` says those that it must.

        Raises:
            StateMismatch: the array is another one; the message says how.
        """
        if len(shape) != len(self.groups):
            raise StateMismatch(f"has {len(shape)} axes where '{self}' has {len(self.groups)}")
        found: dict[str, int] = {}
        for size, group in zip(shape, self.groups, strict=True):
            open_ = [name for name in group if name not in known]
            rest = math.prod(known[name] for name in group if name in known)
            if len(open_) > 1:
                raise StateMismatch(f"does not say the sizes of {' and '.join(open_)}: give one")
            if not (size % rest == 0 if open_ and rest else size == rest):
                raise StateMismatch(
                    f"has an axis of {size} where '{Axes((group,))}' asks for "
                    + (f"a multiple of {rest}" if open_ else f"{rest}")
                )
            found |= {name: known.get(name, size // (rest or 1)) for name in group}
        return found

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of an array with axes of these sizes."""
        return tuple(math.prod(sizes[name] for name in group) for group in self.groups)


def rearranged(
    parts: Sequence[tuple[Index, Callable[[], Any]]],
    source: Axes,
    target: Axes,
    sizes: Mapping[str, int],
    taken: Index,
) -> Any:
    """Return an array with the axes of `target` from arrays with those of `source`.

    One part at a time is in memory beside the result.

    Args:
        parts: where in the result each belongs, and what reads it.
        source: of each part.
        target: of the result.
        sizes: of all axes where they are whole.
        taken: what of the parts is in the result.
    """
    import numpy as np

    result: Any = None
    made = within(sizes, taken)
    for index, read in parts:
        own = within(sizes, index)
        part = np.asarray(read()).reshape([own[name] for name in source.names])
        part = part[tuple(taken.get(name, slice(None)) for name in source.names)]
        left = [name for name in source.names if not isinstance(taken.get(name), int)]
        if result is None:
            result = np.empty([made[name] for name in target.names], part.dtype)
        place = tuple(index.get(name, slice(None)) for name in target.names)
        order = [name for name in target.names if not isinstance(index.get(name), int)]
        result[place] = part.transpose([left.index(name) for name in order])
        del part
    return result.reshape(target.shape(made))


def within(sizes: Mapping[str, int], index: Index) -> dict[str, int]:
    """Return the sizes of the axes of a part, of those that are there whole."""
    parts = {name: at.stop - at.start for name, at in index.items() if isinstance(at, slice)}
    return {**sizes, **parts}
