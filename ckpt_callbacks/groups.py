"""Groups of layers: found by their names, and checked before anything is done to them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_callbacks.errors import ConfigError, StateMismatch
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.paths import Path, show

__all__ = ["Group", "as_groups", "check_layers", "counts", "inside", "layers_in", "stacks_in"]

_NUMBER = re.compile("0|[1-9][0-9]*")
_EXAMPLE = "'layers_{}' or 'decoder/layers/{}'"


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that are numbered, `layers_0, layers_1`, or children, `layers/0, layers/1`.

    Args:
        text: the pattern, with `{}` in place of the number at its end.
        before: the names in front of the one with the number; a path of any depth ends in them.
        head: what the name with the number begins with; nothing if it is the number alone.
        lists: whether what is stacked may be a list, which else is taken for one entry a layer.
    """

    text: str
    before: Path
    head: str
    lists: bool

    @property
    def stacked(self) -> Path:
        """The names that the stacked layers have: those with the number have none."""
        name = self.head.rstrip("_-.")
        return (*self.before, name) if name else self.before

    def number(self, path: Path) -> int | None:
        """Return which layer it is that lies at `path`, if it is one."""
        *before, name = path
        text = name[len(self.head) :]
        fits = name.startswith(self.head) and _ends(tuple(before), self.before)
        return int(text) if fits and _NUMBER.fullmatch(text) else None

    def is_stacked(self, path: Path) -> bool:
        """Return whether what lies at `path` has the name of stacked layers."""
        return _ends(path, self.stacked)

    def joined_name(self) -> Path:
        """Return what stands in a path for the name with the number."""
        return self.stacked[len(self.before) :]

    def split_name(self, stacked: str, number: int) -> Path:
        """Return what stands in a path for the last name of what is stacked."""
        return (f"{self.head}{number}",) if self.head else (stacked, str(number))


def as_groups(who: str, group: str | Collection[str]) -> list[Group]:
    """Return the groups that patterns stand for; `layers` is short for `layers_{}`.

    Raises:
        ConfigError: one is no pattern.
    """
    groups = []
    given: Any = [group] if isinstance(group, str) else group
    for text in given if isinstance(given, Collection) else [group]:
        shown = str(text)
        pattern = shown if "{" in shown else f"{shown}_{{}}"
        *before, last = pattern.split("/")
        head = last.removesuffix("{}")
        made = Group(pattern, tuple(before), head, lists=pattern == text and head != "")
        names = made.joined_name() if made.head else made.before
        whole = isinstance(text, str) and pattern.count("{}") == 1 and last.endswith("{}")
        if not whole or not names or not all(before):
            raise ConfigError(f"{who}: group must be a pattern such as {_EXAMPLE}, not {text!r}")
        groups.append(made)
    if not groups:
        raise ConfigError(f"{who}: group must name layers, such as {_EXAMPLE}")
    return groups


def layers_in(path: Path, groups: Sequence[Group]) -> Iterator[tuple[int, Group, int]]:
    """Yield where in a path there is a layer, of which group, and which one."""
    for end in range(1, len(path) + 1):
        for group in groups:
            if (number := group.number(path[:end])) is not None:
                yield end, group, number
                break


def stacks_in(path: Path, groups: Sequence[Group]) -> Iterator[tuple[int, Group]]:
    """Yield where in a path there are stacked layers, and of which group."""
    for end in range(1, len(path) + 1):
        for group in groups:
            if group.is_stacked(path[:end]):
                yield end, group
                break


def inside(leaves: Collection[Path], groups: Sequence[Group]) -> set[Path]:
    """Return the leaves that are in layers, stacked or not."""
    return {p for p in leaves if any(layers_in(p, groups)) or any(stacks_in(p, groups))}


def check_layers(leaves: Mapping[Path, Leaf], groups: Sequence[Group]) -> None:
    """Check that layers can be stacked: numbered from 0 without a gap, and all alike.

    Raises:
        StateMismatch: they can not; the message names the first difference.
    """
    found: dict[tuple[Path, Group], dict[int, dict[Path, Leaf]]] = {}
    for path, leaf in leaves.items():
        for end, group, number in layers_in(path, groups):
            place = found.setdefault((path[: end - 1], group), {})
            place.setdefault(number, {})[path[end:]] = leaf
            _check_array("stack", path, leaf, group)
    _check_found("stack", leaves, groups, {group for _, group in found})
    names = _names(leaves)
    for (parent, group), layers in found.items():
        shown = show((*parent, f"{group.head}{{}}"))
        if sorted(layers) != list(range(len(layers))):
            numbers = ", ".join(map(str, sorted(layers)))
            raise StateMismatch(
                f"stack: {shown} has the numbers {numbers}: they must be 0, 1, … without a gap"
            )
        first = (*parent, f"{group.head}0")
        for number, layer in sorted(layers.items()):
            _check_alike(first, layers[0], (*parent, f"{group.head}{number}"), layer)
        taken = (*parent, *group.joined_name())
        in_the_way = (
            {taken} & {(*parent, name) for name in names[parent]}
            if group.head
            else {(*taken, n) for n in names[taken] if group.number((*taken, n)) is None}
        )
        if in_the_way:
            raise StateMismatch(
                f"stack: {show(min(in_the_way))} is in the way: {shown} would be stacked at "
                f"{show(taken)}"
            )


def counts(
    leaves: Mapping[Path, Leaf], groups: Sequence[Group], axis: int
) -> dict[tuple[Path, Group], int]:
    """Return how many layers are stacked at each path.

    Raises:
        StateMismatch: nothing is stacked there, or leaves do not agree on the number of layers.
    """
    found: dict[tuple[Path, Group], tuple[int, Path]] = {}
    for path, leaf in leaves.items():
        shape = leaf.shape
        for end, group in stacks_in(path, groups):
            at = path[:end]
            _check_array("unstack", path, leaf, group)
            if not group.lists and path[end:] and _NUMBER.fullmatch(path[end]):
                hint = f"; if it is a layer that is a list, name it {group.text!r}" * bool(
                    group.head
                )
                raise StateMismatch(
                    f"unstack: {show(at)} has one entry a layer: {show(path)}{hint}"
                )
            if not shape:
                raise StateMismatch(f"unstack: {show(path)} is {leaf}: it has no axis of layers")
            cut = min(axis, len(shape) - 1)
            size, other = found.setdefault((at, group), (shape[cut], path))
            if size != shape[cut] or not size:
                raise StateMismatch(
                    f"unstack: axis {axis} of layers is {size} long in {show(other)}, "
                    f"{leaves[other]}, and {shape[cut]} in {show(path)}, {leaf}"
                )
            shape = shape[:cut] + shape[cut + 1 :]
    _check_found("unstack", leaves, groups, {group for _, group in found})
    names = _names(leaves)
    for at, group in found:
        beside = [(*at[:-1], name) for name in names[at[:-1]]] if group.head else []
        if in_the_way := [path for path in beside if group.number(path) is not None]:
            raise StateMismatch(
                f"unstack: {show(in_the_way[0])} is in the way of the layers of {show(at)}"
            )
    return {place: size for place, (size, _) in found.items()}


def _names(leaves: Collection[Path]) -> dict[Path, set[str]]:
    """Return the names below each path."""
    names: dict[Path, set[str]] = {}
    for path in leaves:
        for end, name in enumerate(path):
            names.setdefault(path[:end], set()).add(name)
    return names


def _check_array(who: str, path: Path, leaf: Leaf, group: Group) -> None:
    if leaf.kind not in ("array", "key"):
        raise StateMismatch(
            f"{who}: {show(path)} is no array but {leaf}: {group.text} has to have arrays alone"
        )


def _check_alike(
    first: Path, layer: Mapping[Path, Leaf], at: Path, other: Mapping[Path, Leaf]
) -> None:
    for below in (*layer, *other):
        here, there = layer.get(below), other.get(below)
        if here != there:
            raise StateMismatch(
                f"stack: layers are not alike: {show(first + below)} is {here or 'not there'}, and "
                f"{show(at + below)} is {there or 'not there'}; give layers that differ as groups "
                "of their own"
            )


def _check_found(
    who: str, leaves: Collection[Path], groups: Sequence[Group], found: Collection[Group]
) -> None:
    for group in groups:
        if group not in found:
            wanted = show(group.stacked) if who == "unstack" else group.text
            hint = ""
            if who == "stack" and any(any(stacks_in(path, [group])) for path in leaves):
                hint = f": {show(group.stacked)} is stacked already"
            elif who == "unstack" and any(any(layers_in(path, [group])) for path in leaves):
                hint = ": there is one entry a layer already"
            names = {re.sub("[0-9]+", "{}", name) for path in leaves for name in path}
            numbered = sorted(name for name in names if "{}" in name)
            if not hint and numbered:
                hint = f"; the names with a number are {', '.join(numbered)}"
            raise StateMismatch(f"{who}: nothing is named {wanted}{hint}")


def _ends(path: Path, names: Path) -> bool:
    return len(path) >= len(names) and path[len(path) - len(names) :] == names
