"""One rule of a map between names: templates for both sides, and the axes of the arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from typing import Any

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.rearranging import Axes, Index

__all__ = ["Rule"]

_FIELD = re.compile(r"\{((?:\*\*)?[^\W\d]\w*)\}")
_NUMBER = "0|[1-9][0-9]{0,8}"


class Rule:
    """What leaves are called on both sides, and how the axes of their arrays lie.

    Args:
        source: names joined by dots, with fields: `{i}` stands for one name or a part of one, and
            `{**rest}` for any number of names.
        target: the same for the other side; `None` drops the leaves, which a map that is reversed
            can not bring back.
        axes: the axes on both sides, such as `o i -> i o`. A field that only one side has in its
            names is one of the axes of the other: `layers.{l}.up` to `layers.up` with
            `o i -> l i o` stacks, and `qkv` to `{x}` with `(x h d) i -> i h d` splits. Without,
            arrays stay as they are.
        sizes: of axes that the shape does not tell, a number, such as `h=8`; of fields, what they
            stand for in order, such as `x=("q", "k", "v")` or `l=range(3, 61)`, and nothing else
            matches then. A field that is an axis stands for the numbers from 0 where it is not
            given. Where parts are of several sizes, such as `x={"q": 8, "k": 2, "v": 2}`, the field
            is an axis of the part too: `qkv` to `{x}` with `(x d) i -> i x d`.

    Raises:
        ConfigError: the two sides do not fit each other.
    """

    def __init__(
        self, source: str, target: str | None, axes: str | None = None, /, **sizes: Any
    ) -> None:
        self.source, self.target, self.axes, self.sizes = source, target, axes, sizes
        fields = _fields(source), _fields(target or "")
        only = [[f for f in a if f not in b] for a, b in (fields, fields[::-1])]
        self.common = [f for f in fields[0] if f in fields[1]]
        self.stacked, self.split = ([], []) if target is None else only
        """The fields that are axes of the target, and those that are axes of the source."""
        self.known: dict[str, int] = {}
        """Of axes, the sizes that are given."""
        self.options: dict[str, dict[str, int | slice]] = {}
        """Of fields, what is given that they stand for, and where each is along the axis."""
        for name, given in sizes.items():
            self._give(name, given, name in fields[0] + fields[1])
        self.sides = self._sides()
        named = {*fields[0], *fields[1], *(n for side in self.sides or () for n in side.names)}
        if unknown := sorted(sizes.keys() - named):
            raise ConfigError(f"{self}: there is no field and no axis {', '.join(unknown)}")
        self._regex = self._compiled()

    def __repr__(self) -> str:
        options = [repr(self.axes)] if self.axes else []
        options += [f"{name}={value!r}" for name, value in self.sizes.items()]
        return f"Rule({', '.join([repr(self.source), repr(self.target), *options])})"

    def reverse(self) -> Rule:
        """Return the rule that undoes this one.

        Raises:
            ConfigError: it drops leaves.
        """
        if self.target is None:
            raise ConfigError(f"{self} drops what it matches, and cannot be reversed")
        axes = " -> ".join(map(str, self.sides[::-1])) if self.sides else None
        return Rule(self.target, self.source, axes, **self.sizes)

    def match(self, name: str) -> dict[str, str] | None:
        """Return the fields of a source with this dotted name, if it is one."""
        found = self._regex.fullmatch(name)
        return found and found.groupdict()

    def indices(
        self, fields: Sequence[str], lengths: Mapping[str, int]
    ) -> list[tuple[dict[str, str], Index]]:
        """Return all values of these fields, and where along their axes each is."""
        options = [self.options.get(f) or _counted(range(lengths[f])) for f in fields]
        return [
            (
                {f: value for f, (value, _) in zip(fields, chosen, strict=True)},
                {f: at for f, (_, at) in zip(fields, chosen, strict=True)},
            )
            for chosen in product(*(option.items() for option in options))
        ]

    def named(self, template: str, values: Mapping[str, str]) -> str:
        """Return a name by its template; fields that have no value stay."""
        return _FIELD.sub(lambda m: values.get(m[1].lstrip("*"), m[0]), template)

    def _give(self, name: str, given: Any, is_field: bool) -> None:
        values = range(given) if isinstance(given, int) else given
        found: dict[str, int | slice] = {}
        if not is_field:
            self.known[name] = len(values) if isinstance(values, range) else 0
        elif isinstance(values, Mapping):
            ends = accumulate(values.values())
            found = {
                str(v): slice(end - n, end)
                for (v, n), end in zip(values.items(), ends, strict=True)
            }
            self.known[name] = sum(values.values()) if min(values.values(), default=0) > 0 else 0
        elif isinstance(values, Sequence) and not isinstance(values, str):
            found = _counted(values)
            self.known[name] = len(values)
        if not self.known.get(name):
            raise ConfigError(
                f"{self}: {name} must be a number of at least 1, or of a field what it stands for: "
                f"a range, a list, or a dict from that to sizes; not {given!r}"
            )
        if is_field and len(found) < len(values):
            raise ConfigError(f"{self}: {name} has something twice: {given!r}")
        self.options |= {name: found} if is_field else {}

    def _sides(self) -> tuple[Axes, Axes] | None:
        if self.axes is None:
            if alone := self.stacked + self.split:
                raise ConfigError(
                    f"{self}: the field {alone[0]} is on one side only, so it is an axis on the "
                    "other: say where, such as 'o i -> l i o'"
                )
            return None
        texts = self.axes.split("->")
        if len(texts) != 2 or self.target is None:
            raise ConfigError(f"{self}: axes must be such as 'o i -> i o', of what is not dropped")
        source, target = map(Axes.parse, texts)
        if both := [f for f in self.common if f in source.names + target.names]:
            raise ConfigError(f"{self}: {both[0]} is a field and an axis: rename one of them")
        for side, fields, there in (
            (source, self.stacked, "target"),
            (target, self.split, "source"),
        ):
            uneven = [f for f in fields if isinstance(self.sizes.get(f), Mapping)]
            if twice := [f for f in fields if f in side.names and f not in uneven]:
                raise ConfigError(
                    f"{self}: {twice[0]} is in the names of one side, so as an axis it belongs to "
                    f"the {there} alone"
                )
            if once := [f for f in uneven if f not in side.names]:
                raise ConfigError(
                    f"{self}: {once[0]} has parts of several sizes, so it is an axis on both sides"
                )
        if lone := {*source.names, *self.stacked} ^ {*target.names, *self.split}:
            raise ConfigError(
                f"{self}: {', '.join(sorted(lone))} must be an axis, or a field of the names, on "
                "both sides"
            )
        return source, target

    def _compiled(self) -> re.Pattern[str]:
        pattern = ""
        at = 0
        seen: set[str] = set()
        for match in _FIELD.finditer(self.source):
            pattern += re.escape(self.source[at : match.start()])
            at, name = match.end(), match[1].lstrip("*")
            if name in seen:
                pattern += f"(?P={name})"
                continue
            seen.add(name)
            if name in self.options:
                inner = "|".join(map(re.escape, self.options[name]))
            elif name in self.stacked:
                inner = _NUMBER
            else:
                inner = ".+" if "*" in match[1] else "[^.]+"
            pattern += f"(?P<{name}>{inner})"
        return re.compile(pattern + re.escape(self.source[at:]))


def _counted(values: Sequence[Any]) -> dict[str, int | slice]:
    return {str(value): i for i, value in enumerate(values)}


def _fields(template: str) -> list[str]:
    """Return the fields of a template, each once.

    Raises:
        ConfigError: a brace is not that of a field.
    """
    if set("{}") & set(_FIELD.sub("", template)):
        raise ConfigError(
            f"{template!r}: a field is written {{name}}, or {{**name}} for many names"
        )
    return list(dict.fromkeys(name.lstrip("*") for name in _FIELD.findall(template)))
