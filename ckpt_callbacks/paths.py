"""Names of leaves, and patterns that choose among them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

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
    the pattern matches. `params` means the weights also where they have another name: `model` or
    `weights`.

    Raises:
        ConfigError: `only` is empty, or holds something else than patterns.
    """

    def __init__(self, only: str | Collection[str]) -> None:
        patterns = [only] if isinstance(only, str) else list(only)
        if not patterns or not all(isinstance(p, str) and p.strip("!/") for p in patterns):
            raise ConfigError(
                "only must be a path of the state such as 'params' or 'model/layers/*', or several "
                f"of them, not {only!r}"
            )
        self._without = [_regex(p[1:]) for p in patterns if p.startswith("!")]
        self._wanted = [p for p in patterns if not p.startswith("!")] or ["**"]

    def __str__(self) -> str:
        return ", ".join(self._wanted)

    def of(self, paths: Collection[Path]) -> set[Path]:
        """Return those of `paths` that are chosen."""
        shown = {path: show(path) for path in paths}
        wanted = [_regex(p) for p in self._meant(shown.values())]
        return {
            path
            for path, text in shown.items()
            if any(p.match(text) for p in wanted) and not any(p.match(text) for p in self._without)
        }

    def items(self, items: Collection[str], where: str) -> list[str]:
        """Return the items that may hold what is chosen, by the first name of each pattern.

        Raises:
            CheckpointNotFound: there is none for one of the patterns; the message names `where`.
        """
        chosen: set[str] = set()
        absent: list[str] = []
        for pattern in self._meant(items):
            top = _regex(pattern.split("/")[0])
            found = {i for i in items if top.match(i)} or {i for i in items if i in STATES}
            chosen |= found
            absent += [] if found else [pattern]
        if absent:
            raise CheckpointNotFound(
                f"{where} has no item {', '.join(absent)}; it has {', '.join(sorted(items))}"
            )
        return sorted(chosen)

    def _meant(self, names: Iterable[str]) -> list[str]:
        """Return the wanted patterns, with `params` replaced by the name the weights have."""
        tops = {name.split("/")[0] for name in names}
        if "params" not in self._wanted or "params" in tops:
            return self._wanted
        weights = [name for name in WEIGHTS if name in tops] or ["params"]
        return [p for p in self._wanted if p != "params"] + weights


def _regex(pattern: str) -> re.Pattern[str]:
    """Return what matches a path, and all paths below it."""
    parts = re.split(r"(\*\*|\*)", pattern.strip("/"))
    text = "".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)
    return re.compile(rf"{text}(/.*)?\Z", re.DOTALL)
