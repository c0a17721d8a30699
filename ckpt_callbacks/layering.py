"""Layers of weights put in the form, stacked or one by one, in which a model has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import pairwise

from ckpt_callbacks import forms
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.groups import as_groups, inside
from ckpt_callbacks.paths import Path
from ckpt_callbacks.tensors import Tensors

__all__ = ["check_form", "formed"]


def check_form(who: str, group: str | None, axis: int) -> None:
    """Check arguments that say what layers are called, and which axis they have.

    Raises:
        ConfigError: one is none.
    """
    if type(axis) is not int or axis < 0:
        raise ConfigError(f"{who}: axis must be 0 or more, not {axis!r}")
    if group is not None:
        as_groups(who, group if isinstance(group, str) else [group])


def formed(
    who: str, tensors: Tensors, wanted: Collection[Path], group: str | None, axis: int
) -> Tensors:
    """Return leaves with their layers in one array each, or in one of their own, as wanted.

    Raises:
        ConfigError: neither side has layers that are called as `group` says.
        StateMismatch: they cannot be put so.
    """
    here, there = _numbered(wanted), _numbered(tensors)
    patterns = _patterns(group) if group else here | there
    if group and not any(_has(paths, patterns) for paths in (wanted, tensors)):
        names = ", ".join(sorted(here | there)) or "no layers"
        raise ConfigError(f"{who}: no layers are called {group!r} on either side: there is {names}")
    for only_one, others, function in (
        (here - there, tensors, forms.unstack),
        (there - here, wanted, forms.stack),
    ):
        joined = {name for path in others for name in path[:-1]}
        for pattern in sorted(patterns):
            tail = _tail(pattern)
            if tail in only_one and _base(tail) in joined:
                tensors = function(tensors, group=pattern, axis=axis)
    return tensors


def _patterns(group: str) -> set[str]:
    return {group} if "{" in group else {f"{group}_{{}}", f"{group}/{{}}"}


def _has(paths: Collection[Path], patterns: Iterable[str]) -> bool:
    """Return whether some layers have one of these names, stacked or not."""
    return any(inside(paths, as_groups("", pattern)) for pattern in patterns)


def _numbered(paths: Iterable[Path]) -> set[str]:
    """Return what is numbered, as `stack` takes it: `layers/{}` or `layers_{}`."""
    found: set[str] = set()
    for path in paths:
        found |= {f"{name}/{{}}" for name, below in pairwise(path) if below.isdecimal()}
        found |= {f"{m[1]}_{{}}" for name in path[:-1] if (m := re.fullmatch(r"(.+)_\d+", name))}
    return found


def _tail(pattern: str) -> str:
    """Return a pattern without the names in front: `layers_{}` of `decoder/layers_{}`."""
    names = pattern.split("/")
    return "/".join(names[-2:]) if names[-1] == "{}" else names[-1]


def _base(pattern: str) -> str:
    """Return what layers in one array each are below, by what they are called one by one."""
    return pattern[: -len("/{}")]
