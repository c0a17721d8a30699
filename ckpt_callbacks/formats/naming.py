"""Names that other libraries give to leaves, and the paths in a state that they stand for.

==================== ======================== ===========================================
naming               ``("model", "0", "w")``  for files of
==================== ======================== ===========================================
`dots`               ``model.0.w``            Hugging Face, PyTorch, Orbax
`safejax`            ``model.0.w``            safejax: the same
`pytree2safetensors` ``@model#0@w``           pytree2safetensors
==================== ======================== ===========================================

pytree2safetensors writes ``.name`` for an attribute, ``@name`` for a key of a dict and ``#0`` for
an element of a list or tuple, and drops a ``.`` that a name begins with. A checkpoint does not know
which container a leaf was in, so here whole numbers become ``#0`` and all others ``@name``; all
three are understood.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ckpt_callbacks.errors import ConfigError, StateMismatch
from ckpt_callbacks.paths import Path

__all__ = ["NAMINGS", "guess", "join", "names_of", "split"]

NAMINGS = ("dots", "safejax", "pytree2safetensors")

_INDEX = re.compile(r"0|[1-9][0-9]*")
_NOT_AN_INDEX = re.compile(r"#(?!(0|[1-9][0-9]*)([.@#]|$))")


def join(path: Path, naming: str) -> str:
    """Return the name of a leaf."""
    if naming != "pytree2safetensors":
        return ".".join(path)
    return "".join(("#" if _INDEX.fullmatch(name) else "@") + name for name in path)


def split(name: str, naming: str) -> Path:
    """Return the path that a name stands for; that of the lone leaf of a state is empty."""
    if not name:
        return ()
    if naming != "pytree2safetensors":
        return tuple(name.split("."))
    return tuple(re.split("[.@#]", name[1:] if name[0] in ".@#" else name))


def names_of(paths: Iterable[Path], naming: str) -> dict[Path, str]:
    """Return the name of each leaf.

    Raises:
        ConfigError: there is no such naming.
        StateMismatch: two leaves would have the same name; the message has the paths of both.
    """
    if naming not in NAMINGS:
        raise ConfigError(f"naming must be one of {', '.join(NAMINGS)}, not {naming!r}")
    found: dict[str, Path] = {}
    for path in paths:
        name = join(path, naming)
        if name in found:
            raise StateMismatch(
                f"{found[name]} and {path} would both be called {name!r} with naming={naming!r}: "
                "rename one of them"
            )
        found[name] = path
    return {path: name for name, path in found.items()}


def guess(names: Collection[str]) -> str:
    """Return the naming of a file that does not tell it.

    Names with ``@`` or ``#`` are those of pytree2safetensors if all can be read so, and as
    different paths.
    """
    marked = any("@" in name or "#" in name for name in names)
    if not marked or any(map(_NOT_AN_INDEX.search, names)):
        return "dots"
    paths = {split(name, "pytree2safetensors") for name in names}
    return "pytree2safetensors" if len(paths) == len(names) else "dots"
