"""What may have been meant by a path or an address that is no run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Protocol, Self, TypeVar

from ckpt_callbacks.text import closest

__all__ = ["Folder", "nearby"]

_SHOWN = 5
_LOOKED_AT = 100
"""Folders that are looked into, of which each may cost a request."""


class Folder(Protocol):
    """As much of `pathlib.Path` as is used here; there need be no such folder."""

    @property
    def name(self) -> str:
        """The last part of the path."""

    @property
    def parent(self) -> Self:
        """The folder that it is in; itself where there is none."""

    def __truediv__(self, name: str, /) -> Self:
        """Return what is in it."""

    def is_dir(self) -> bool:
        """Return whether there is such a folder."""

    def iterdir(self) -> Iterable[Self]:
        """Return what is in it, or more."""


F = TypeVar("F", bound=Folder)


def nearby(root: Folder) -> str:
    """Return what to do instead, as the end of a message; nothing if nothing is known."""
    try:
        return _nearby(root)
    except Exception:  # whatever a client raises where nothing may be looked into
        return ""


def _nearby(root: Folder) -> str:
    if not root.is_dir():
        meant = _meant(root, _is_run)
        return f". Did you mean {meant}?" if meant else ""
    if _is_run(root.parent) and root.name.isdecimal():
        return f". It is a checkpoint of the run directory {root.parent}"
    children = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda p: p.name)
    if runs := [path.name for path in islice(children, _LOOKED_AT) if _is_run(path)]:
        more = ", …" * (len(runs) > _SHOWN)
        return f". There are run directories in it: {', '.join(runs[:_SHOWN])}{more}"
    if isinstance(root, Path) and any(path.name.isdecimal() for path in children):
        return (
            f". Are these checkpoints of Orbax? `ckpt-callbacks adopt {root} NEW` takes them over"
        )
    return ""


def _meant(path: F, fits: Callable[[F], bool]) -> F | None:
    """Return the folder whose path is the nearest, part by part; the last part is one that fits."""
    if path.is_dir():
        return path
    if path.parent == path:
        return None
    folder = _meant(path.parent, lambda there: there.is_dir())
    if folder is None:
        return None
    names = {there.name for there in folder.iterdir()}
    name = closest(path.name, names, lambda name: fits(folder / name))
    return folder / name if name else None


def _is_run(path: Folder) -> bool:
    return (path / ".ckpt_callbacks").is_dir()
