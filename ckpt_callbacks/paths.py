"""Names of leaves, and patterns that choose among them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ckpt_callbacks.errors import CheckpointNotFound, ConfigError
from ckpt_callbacks.payload import WEIGHTS

__all__ = ["STATES", "Path", "Selection", "dotted", "show"]

STATES = ("state", "default", "items")
"""Items that may hold more than the part of the state that has their name: ours for leaves that are
no container of their own, and Orbax's (v1, and v0) for a whole state."""
Path = tuple[str, ...]
"""Names from the root of the state to a leaf."""


def show(path: Path) -> str:
    """Return a path as people read it: `model/layers/0/kernel`."""
    return "/".join(path) or "the root"


def dotted(path: Path) -> str:
    """Return a path as Orbax names it on disk: `model.layers.0.kernel`."""
    return ".".join(path)


class Selection:
    """The leaves that `only` chooses.

    A pattern is a path such as `model/layers/0`, which stands for all below it too; `*` stands
    for anything within a name, `**` for any number of names, and a leading `!` takes away what
    the pattern matches. `params` at the top means the weights also where they have another name:
    `model` or `weights`.

    Raises:
        ConfigError: `only` is empty, or holds something else than patterns.
    """

    def __init__(self, only: str | Collection[str]) -> None:
        given: Any = [only] if isinstance(only, str) else only
        patterns = list(given) if isinstance(given, Collection) else []
        if not patterns or not all(isinstance(p, str) and p.strip("!/") for p in patterns):
            raise ConfigError(
                "only must be a path of the state such as 'params' or 'model/layers/*', or several "
                f"of them, not {only!r}"
            )
        self._without = [p[1:].strip("/") for p in patterns if p.startswith("!")]
        self._wanted = [p.strip("/") for p in patterns if not p.startswith("!")] or ["**"]

    def __str__(self) -> str:
        return ", ".join([*self._wanted, *(f"!{p}" for p in self._without)])

    def of(self, paths: Collection[Path], where: str, items: Collection[str] = ()) -> set[Path]:
        """Return those of `paths` that are chosen.

        Raises:
            CheckpointNotFound: a pattern matches none, or none is left; the message names `where`,
                and all `items` that are there.
        """
        shown = {path: f"{show(path)}/" for path in paths}
        wanted = {p: _regex(p) for p in _meant(self._wanted, shown.values())}
        for pattern, regex in wanted.items():
            if not any(map(regex.match, shown.values())):
                there = [*shown.values(), *(f"{item}/" for item in items if item != "state")]
                raise CheckpointNotFound(
                    f"only: {pattern!r} matches nothing in {where}; {_beside(pattern, there)}"
                )
        without = [_regex(p) for p in _meant(self._without, shown.values())]
        chosen = {
            path
            for path, text in shown.items()
            if any(p.match(text) for p in wanted.values())
            and not any(p.match(text) for p in without)
        }
        if not chosen:
            raise CheckpointNotFound(f"only: '{self}' leaves nothing of {where}")
        return chosen

    def in_file(self, metadata: Mapping[str, Any]) -> Selection:
        """Return what chooses in a file that says this of itself."""
        del metadata
        return self

    def items(self, items: Collection[str], where: str) -> list[str]:
        """Return the items that may hold what is chosen, by the first name of each pattern.

        Raises:
            CheckpointNotFound: there is none for one of the patterns; the message names `where`.
        """
        # Leaves that are no container of their own are in the item `state`.
        rest = {item for item in items if item in STATES}
        chosen: set[str] = set()
        absent: list[str] = []
        for pattern in _meant(self._wanted, items):
            top = pattern.split("/")[0]
            found = {item for item in items if _regex(top).match(f"{item}/")}
            found |= rest if "*" in top or not found else set()
            chosen |= found
            absent += [] if found else [pattern]
        if absent:
            raise CheckpointNotFound(
                f"{where} has no item {', '.join(absent)}; it has {', '.join(sorted(items))}: name "
                "what to read of it with only="
            )
        without = [_regex(p) for p in _meant(self._without, items)]
        return sorted(i for i in chosen if i in rest or not any(p.match(f"{i}/") for p in without))


def _meant(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the patterns, with `params` at the top replaced by the name the weights have."""
    tops = {name.split("/")[0] for name in names}
    weights = ["params"] if "params" in tops else [w for w in WEIGHTS if w in tops] or ["params"]
    meant: list[str] = []
    for pattern in patterns:
        top, slash, below = pattern.partition("/")
        meant += [w + slash + below for w in weights] if top == "params" else [pattern]
    return meant


def _regex(pattern: str) -> re.Pattern[str]:
    """Return what matches a path that ends with a slash, and all paths below it."""
    text = ""
    for name in pattern.split("/"):
        any_names = name == "**"
        text += "(?:[^/]*/)*" if any_names else re.sub(r"(\\\*)+", "[^/]*", re.escape(name)) + "/"
    return re.compile(text)


def _beside(pattern: str, shown: Iterable[str]) -> str:
    """Return what there is where a pattern goes astray."""
    parents = pattern.split("/")
    below: set[str] = set()
    while parents and not below:
        parents.pop()
        found = [re.match("".join(_regex(p).pattern for p in parents), text) for text in shown]
        below = {m.string[m.end() :].split("/")[0] for m in found if m} - {""}
    place = f"below {'/'.join(parents)} there is" if parents else "at the top there is"
    names = sorted(below)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{place} {', '.join(names[:10])}{more}"
