"""The leaves of a state as people see them: a tree, with what each leaf is and how large."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby

from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.paths import Path
from ckpt_callbacks.report import size

__all__ = ["draw", "measure"]

_Row = tuple[str, str, str, str]
_Leaves = list[tuple[Path, Leaf]]


def draw(leaves: Mapping[Path, Leaf], depth: int | None = None) -> Iterator[str]:
    """Yield the lines of a tree; `depth` is how many levels to show."""
    table = [("", "type", "numbers", "in memory"), *_rows(list(leaves.items()), depth)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, what, numbers, memory in table:
        left = f"{name:{widths[0]}}  {what:{widths[1]}}"
        yield f"{left}  {numbers:>{widths[2]}}  {memory:>{widths[3]}}".rstrip()


def measure(leaves: Collection[Leaf]) -> tuple[str, str]:
    """Return how many numbers are in arrays, and their size; nothing if there is no array."""
    arrays = [leaf for leaf in leaves if leaf.kind == "array"]
    if not arrays:
        return "", ""
    numbers = sum(math.prod(leaf.shape) for leaf in arrays)
    return f"{numbers:,}", size(sum(leaf.nbytes for leaf in arrays))


def _rows(leaves: _Leaves, depth: int | None, guide: str = "") -> Iterator[_Row]:
    """Yield the rows of a tree; numbered subtrees that are alike, such as layers, as one."""
    nodes: dict[tuple[str, bool], _Leaves] = {}
    for (name, *rest), leaf in leaves:
        nodes.setdefault((name, bool(rest)), []).append((tuple(rest), leaf))
    alike = groupby(nodes.items(), lambda node: node[1] if node[0][0].isdecimal() else node[0])
    rows = [[(name, below) for (name, _), below in group] for _, group in alike]
    for row in rows:
        name, below = row[0]
        if each := f"each of {len(row)}" if len(row) > 1 else "":
            name = f"{name}{' … ' if len(row) > 2 else ', '}{row[-1][0]}"
        else:
            while below[0][0] and len({path[:1] for path, _ in below}) == 1:  # an only child
                name = f"{name}/{below[0][0][0]}"
                below = [(path[1:], leaf) for path, leaf in below]
        last, inside = row is rows[-1], [leaf for _, leaf in below]
        what = ""
        if not below[0][0]:
            what = str(inside[0])
        elif depth == 1:
            kinds = {str(leaf).partition("[")[0] for leaf in inside}
            what = f"{len(inside)} leaves: {', '.join(sorted(kinds))}"
        what = ", ".join(filter(None, (what, each)))
        yield f"{guide}{'└─ ' if last else '├─ '}{name}", what, *measure(inside)
        if below[0][0] and depth != 1:
            deeper = None if depth is None else depth - 1
            yield from _rows(below, deeper, guide + ("   " if last else "│  "))
