"""From the names and the layout of one library to those of another, and back.

A rule names leaves on both sides by templates, and the axes of their arrays by the notation of
einops, so that it reads both ways and no second set of rules has to agree with the first::

    key_map = cc.KeyMap([
        cc.Rule("model.embed_tokens.weight", "embed.embedding"),
        cc.Rule("model.layers.{l}.self_attn.q_proj.weight", "layers.attention.query.kernel",
                "(h d) i -> l i h d", h=8),
        cc.Rule("model.layers.{l}.mlp.experts.{e}.up_proj.weight", "layers.experts.up",
                "o i -> l e i o"),
        cc.Rule("model.layers.{l}.self_attn.rotary_emb.inv_freq", None),
    ])
    print(key_map.plan(tensors, like=wanted))
    renamed = key_map.apply(tensors, like=wanted)
    back = key_map.reverse().apply(renamed)

One idea stands for transposing, reshaping, stacking and splitting: a field that only one side has
in its names is an axis of the arrays on the other side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ckpt_callbacks.errors import ConfigError, StateMismatch
from ckpt_callbacks.paths import Path, dotted
from ckpt_callbacks.rearranging import Axes, Index, rearranged, within
from ckpt_callbacks.rules import Rule
from ckpt_callbacks.tensors import Tensor, Tensors

__all__ = ["KeyMap", "KeyPlan", "Move", "Rule"]

_SHOWN = 20
"""Lines below each heading of an error; a plan shows all."""
_Part = tuple[Path, dict[str, str]]
"""A source, and its fields."""


@dataclass(frozen=True, slots=True)
class Move:
    """Sources that belong together, and what becomes of them by one rule."""

    rule: Rule
    source: str
    """The name, with those fields open that differ among the sources; the target likewise."""
    target: str
    sources: Mapping[str, Tensor]
    """By dotted name."""
    targets: Tensors


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """What a map makes of what it is given. Print it for the whole; nothing has been read."""

    tensors: dict[Path, Tensor]
    """What is made, in the order in which it is best to read it."""
    moves: Sequence[Move]
    dropped: Sequence[str]
    unused: Sequence[Rule]
    """Rules that match nothing, which alone is no problem."""
    problems: Mapping[str, Sequence[str]]
    """By what is wrong, the names of which it is, or lines that say more."""

    def __str__(self) -> str:
        rows = [_row(move) for move in self.moves]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        more = {"dropped": self.dropped, "rules that match nothing": [*map(repr, self.unused)]}
        return "\n".join([*lines, *_listed({**more, **self.problems})])


class KeyMap:
    """Rules from the names and the layout of one library to those of another.

    Every leaf must be matched by exactly one rule.

    Raises:
        ConfigError: there are no rules.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        if not self.rules or not all(isinstance(rule, Rule) for rule in self.rules):
            raise ConfigError(f"KeyMap takes a list of Rule, not {list(self.rules)!r}")

    def reverse(self) -> KeyMap:
        """Return the map from the target to the source, without what is dropped.

        Raises:
            ConfigError: all is dropped.
        """
        return KeyMap(rule.reverse() for rule in self.rules if rule.target is not None)

    def apply(self, tensors: Tensors, like: Tensors | None = None) -> dict[Path, Tensor]:
        """Return the leaves as they are called and lie on the other side; none is read yet.

        Args:
            tensors: the leaves, such as of a checkpoint.
            like: what has to be made, each in its shape; the dtypes are not compared.

        Raises:
            ConfigError: two rules match the same leaf, or make the same.
            StateMismatch: leaves are matched by no rule, lack others that they are to be stacked
                with, do not have the axes that their rule says, or are not those of `like`; all
                of them.
        """
        plan = self.plan(tensors, like)
        if plan.problems:
            raise StateMismatch(
                "\n".join(["the names do not fit", *_listed(plan.problems, _SHOWN)])
            )
        return plan.tensors

    def plan(self, tensors: Tensors, like: Tensors | None = None) -> KeyPlan:
        """Return what `apply` would make of the leaves, and all that stands against it.

        Raises:
            ConfigError: two rules match the same leaf, or make the same.
        """
        groups, left_over = self._groups(tensors)
        # Of names that hold dots themselves only `like` knows where they end.
        paths = _by_name(like or {})
        split = _Split()
        moves: list[Move] = []
        wrong: list[str] = []
        makers: dict[Path, Rule] = {}
        for (rule, _), parts in groups.items():
            if rule.target is None:
                continue
            move, against = _moved(rule, parts, tensors, paths, split)
            moves.append(move)
            wrong += against
            for path in move.targets:
                if path in makers:
                    raise ConfigError(
                        f"two sources would become {dotted(path)}: one by {makers[path]}, and "
                        f"{move.source} by {rule}"
                    )
                makers[path] = rule
        made = {path: tensor for move in moves for path, tensor in move.targets.items()}
        problems = {"matched by no rule": left_over, "cannot be made": wrong}
        if like is not None:
            problems |= _compared(made, like)
        used = {rule for rule, _ in groups}
        return KeyPlan(
            tensors=made,
            moves=moves,
            dropped=[dotted(p) for (r, _), g in groups.items() if not r.target for p, _ in g],
            unused=[rule for rule in self.rules if rule not in used],
            problems={what: names for what, names in problems.items() if names},
        )

    def _groups(self, tensors: Tensors) -> tuple[dict[tuple[Rule, Path], list[_Part]], list[str]]:
        """Return the sources, with their fields, that go together; and those of no rule."""
        groups: dict[tuple[Rule, Path], list[_Part]] = {}
        left_over: list[str] = []
        ambiguous: dict[tuple[Rule, Rule], str] = {}
        for name, path in _by_name(tensors).items():
            hits = [(r, found) for r in self.rules if (found := r.match(name)) is not None]
            if len(hits) > 1:
                ambiguous.setdefault((hits[0][0], hits[1][0]), name)
            elif hits:
                rule, fields = hits[0]
                key = tuple(fields[f] for f in rule.common)
                groups.setdefault((rule, key), []).append((path, fields))
            else:
                left_over.append(name)
        if ambiguous:
            raise ConfigError(
                "\n".join(
                    f"{name} is matched by {a} and by {b}" for (a, b), name in ambiguous.items()
                )
            )
        return groups, left_over


class _Split:
    """Reads arrays that are split, and keeps the last one for all that is made of it."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor | None, Any] = (None, None)

    def read(self, tensor: Tensor) -> Any:
        kept, value = self._kept
        if kept is not tensor:
            del value
            self._kept = (None, None)  # so that two are never in memory
            value = tensor.read()
            self._kept = (tensor, value)
        return value


def _moved(
    rule: Rule, parts: Sequence[_Part], tensors: Tensors, paths: Mapping[str, Path], split: _Split
) -> tuple[Move, list[str]]:
    """Return what becomes of the sources that go together, and what stands against it."""
    target = rule.target or ""
    common = {f: parts[0][1][f] for f in rule.common}
    found = {dotted(path): tensors[path] for path, _ in parts}
    shown = rule.named(rule.source, common), rule.named(target, common)
    move = Move(rule, *shown, found, {})
    if rule.sides is None:
        return replace(move, targets={_path(shown[1], paths): tensors[parts[0][0]]}), []

    lengths: dict[str, int] = {}
    for field in (f for f in rule.stacked if f not in rule.options):
        numbers = {int(fields[field]) for _, fields in parts}
        lengths[field] = len(numbers)
        if gaps := set(range(len(numbers))) - numbers:
            return move, [f"{shown[0]}: {field} goes up to {max(numbers)} without {min(gaps)}"]
    indices = {
        rule.named(rule.source, {**common, **values}): index
        for values, index in rule.indices(rule.stacked, lengths)
    }
    source, out = rule.sides
    sizes, wrong = _sizes(source, rule.known, indices, found)
    if wrong:
        return move, wrong
    pieces = [
        (index, partial(split.read, found[name]) if rule.split else found[name].read)
        for name, index in indices.items()
    ]
    sizes = {**sizes, **lengths, **rule.known}
    leaf = next(iter(found.values())).leaf
    targets = {
        _path(rule.named(target, {**common, **values}), paths): Tensor(
            replace(leaf, shape=out.shape(within(sizes, taken))),
            partial(rearranged, pieces, source, out, sizes, taken),
        )
        for values, taken in rule.indices(rule.split, sizes)
    }
    return replace(move, targets=targets), []


def _sizes(
    source: Axes,
    known: Mapping[str, int],
    indices: Mapping[str, Index],
    found: Mapping[str, Tensor],
) -> tuple[dict[str, int], list[str]]:
    """Return the sizes of the axes of the sources, in which all have to agree."""
    wrong = [f"{name} is missing" for name in indices if name not in found]
    first, leaf = next((name, tensor.leaf) for name, tensor in found.items())
    agreed: dict[str, int] = {}
    for name, tensor in found.items():
        own = tensor.leaf
        if own.kind != "array":
            wrong.append(f"{name} is {own}: only an array has axes to name")
            continue
        try:
            sizes = source.sizes(own.shape, within(known, indices[name]))
        except StateMismatch as error:
            wrong.append(f"{name}, {own}, {error}")
            continue
        sizes = {axis: n for axis, n in sizes.items() if axis not in indices[name]}
        agreed = agreed or sizes
        if own.dtype != leaf.dtype or sizes != agreed:
            wrong.append(f"{name} is {own} where {first} is {leaf}")
    return agreed, wrong


def _compared(made: Tensors, like: Tensors) -> dict[str, list[str]]:
    shapes = {path: (made[path].leaf, like[path].leaf) for path in made if path in like}
    return {
        "not filled": [f"{dotted(p)} {like[p].leaf}" for p in like if p not in made],
        "not asked for": [dotted(p) for p in made if p not in like],
        "of another shape": [
            f"{dotted(path)} is {ours} where {theirs} is asked for"
            for path, (ours, theirs) in shapes.items()
            if (ours.kind, ours.shape) != (theirs.kind, theirs.shape)
        ],
    }


def _row(move: Move) -> tuple[str, ...]:
    made = _counted(move.targets.values()) or "cannot be made"
    return move.source, _counted(move.sources.values()), "->", move.target, made


def _counted(tensors: Iterable[Tensor]) -> str:
    counts = Counter(str(tensor.leaf) for tensor in tensors)
    return ", ".join(leaf if n == 1 else f"{n} x {leaf}" for leaf, n in counts.items())


def _listed(found: Mapping[str, Sequence[str]], limit: int | None = None) -> list[str]:
    lines: list[str] = []
    for what, names in found.items():
        if names:
            lines += [f"{what}:", *(f"  {name}" for name in names[:limit])]
            left = len(names[limit:]) if limit else 0
            lines += [f"  … and {left} more, which the plan shows"] * (left > 0)
    return lines


def _by_name(tensors: Tensors) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in tensors:
        if (name := dotted(path)) in found:
            raise StateMismatch(f"two leaves have the name {name}: {found[name]} and {path}")
        found[name] = path
    return found


def _path(name: str, paths: Mapping[str, Path]) -> Path:
    return paths.get(name) or tuple(name.split("."))
