"""What may have been meant by a path that is no run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ckpt_callbacks.text import closest

__all__ = ["nearby"]

_SHOWN = 5


def nearby(root: Path) -> str:
    """Return what to do instead, as the end of a message; nothing if nothing is known."""
    try:
        if not root.is_dir():
            meant = _meant(root, _is_run)
            return f". Did you mean {meant}?" if meant else ""
        if _is_run(root.parent) and root.name.isdecimal():
            return f". It is a checkpoint of the run directory {root.parent}"
        children = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:  # nothing that may be looked into
        return ""
    if runs := [path.name for path in children if _is_run(path)]:
        more = ", …" * (len(runs) > _SHOWN)
        return f". There are run directories in it: {', '.join(runs[:_SHOWN])}{more}"
    if any(path.name.isdecimal() for path in children):
        return (
            f". Are these checkpoints of Orbax? `ckpt-callbacks adopt {root} NEW` takes them over"
        )
    return ""


def _meant(path: Path, fits: Callable[[Path], bool]) -> Path | None:
    """Return the folder whose path is the nearest, part by part; the last part is one that fits."""
    if path.is_dir():
        return path
    if path.parent == path:
        return None
    folder = _meant(path.parent, Path.is_dir)
    name = folder and closest(path.name, {there.name for there in folder.iterdir() if fits(there)})
    return folder / name if folder and name else None


def _is_run(path: Path) -> bool:
    return (path / ".ckpt_callbacks").is_dir()
