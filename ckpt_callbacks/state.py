"""From the state a user has to leaves that can be saved, and back.

A leaf is named by its path, and every leaf that holds data is saved; the others (functions,
`None`) stay what they are in the live object.

The children of the top level become the items of the checkpoint, so that weights can be read
and verified without the optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_callbacks.adapters import adapter_of
from ckpt_callbacks.errors import StateMismatch
from ckpt_callbacks.leaves import (
    Leaf,
    Note,
    encode,
    is_files,
    is_function,
    leaf_of,
    missing,
    unsavable,
    wanted_type,
)
from ckpt_callbacks.paths import Path, dotted, show
from ckpt_callbacks.payload import WEIGHTS

__all__ = [
    "ROOT",
    "Captured",
    "apply",
    "capture",
    "check",
    "children",
    "is_abstract",
    "item_path",
    "kinds_of",
    "leaves_of",
    "names_of",
    "put",
]

ROOT = "state"
"""Item for leaves that are no container of their own: a counter, a key, a lone module."""

_MAX_ITEMS = 8
_RESERVED = {ROOT, "metrics"}  # Orbax keeps `metrics` for itself
_ITEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


_NAMED_BY = {
    "DictKey": "key",
    "FlattenedIndexKey": "key",
    "GetAttrKey": "name",
    "SequenceKey": "idx",
}
"""What holds the name in the keys of `jax.tree_util`."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A state as it is saved.

    Args:
        items: item name to a nested dict of leaves, or to an object that saves itself.
        notes: for leaves that Orbax can not store as they are, what they were, by dotted path.
    """

    items: dict[str, Any]
    notes: dict[str, Note]


def check(state: Any) -> list[str]:
    """Check that a state, which may be abstract, can be saved once it has values.

    Returns:
        The names of the items that it will have.

    Raises:
        StateMismatch: a leaf cannot be saved, or two leaves have the same name; all of them.
    """
    leaves = leaves_of(state)
    _check_kinds(leaves)
    items = _own_items(state, leaves)
    return sorted({item_path(path, leaf, items)[0] for path, leaf in leaves.items()})


def capture(state: Any) -> Captured:
    """Return the leaves of `state`, by item. Nothing is copied.

    Raises:
        StateMismatch: as `check`; or leaves are abstract, or were donated.
    """
    leaves = leaves_of(state)
    _check_kinds(leaves)
    _raise_unsavable({p: why for p, x in leaves.items() if (why := missing(x))}, "")
    names = _own_items(state, leaves)
    captured = Captured({}, {})
    for path, leaf in leaves.items():
        item, *rest = item_path(path, leaf, names)
        stored, note = encode(leaf)
        if note:
            captured.notes[dotted((item, *rest))] = note
        if rest:
            put(captured.items.setdefault(item, {}), rest, stored)
        else:
            captured.items[item] = stored
    return captured


def is_abstract(state: Any) -> bool:
    """Return whether a leaf of `state` has a shape and a dtype, but no values."""
    import jax

    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves_of(state).values())


def apply(state: Any, values: Mapping[Path, Any]) -> Any:
    """Return `state` with new values for the leaves at the paths given.

    Nodes of adapters are changed as the adapter does, often in place; all else is built anew.
    """
    return _ordered(state, _rebuilt(state, (), values))


def leaves_of(state: Any) -> dict[Path, Any]:
    """Return all data leaves by path.

    Raises:
        StateMismatch: there are none, or two have the same name.
    """
    leaves: dict[Path, Any] = {}
    joined: dict[str, Path] = {}
    for path, leaf in _walk(state, ()):
        # Orbax joins the names with dots and would store two such leaves as one.
        if (name := dotted(path)) in joined:
            raise StateMismatch(
                f"two leaves have the name {name!r}: {show(joined[name])} and {show(path)}; "
                "rename one of them"
            )
        joined[name] = path
        leaves[path] = leaf
    if not leaves:
        raise StateMismatch(f"the state, a {type(state).__qualname__}, holds nothing to save")
    return leaves


def kinds_of(state: Any) -> dict[Path, Leaf]:
    """Return what each leaf is, by path, also of a state that is abstract."""
    kinds = {path: leaf_of(leaf) for path, leaf in leaves_of(state).items()}
    return {path: kind for path, kind in kinds.items() if kind}


def children(state: Any) -> dict[str, Any]:
    """Return what is at the top level of `state`, by name."""
    import jax

    adapter = adapter_of(state)
    node = adapter.capture(state) if adapter else state
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return {names_of(keys)[0]: child for keys, child in flat if keys}


def item_path(path: Path, leaf: Any, items: Collection[str]) -> Path:
    """Return where a leaf lies in a checkpoint: its item, and the path below that."""
    if is_files(leaf):  # is an item of its own
        return (dotted(path) or ROOT,)
    if len(path) > 1 and path[0] in items:
        return path
    return (ROOT, *(path or ("leaf",)))


def names_of(keys: Iterable[Any]) -> Path:
    """Return the names in a path of JAX."""
    return tuple(map(_key_name, keys))


def _walk(node: Any, path: Path) -> Iterable[tuple[Path, Any]]:
    import jax

    try:
        flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=_is_adapted)
    except ValueError as error:  # such as keys that have no order
        raise StateMismatch(
            f"JAX cannot take {show(path)} apart: {error} Keys of one dict must be of one type"
        ) from error
    for keys, leaf in flat:
        at = path + names_of(keys)
        if adapter := adapter_of(leaf):
            yield from _walk(adapter.capture(leaf), at)
        elif not is_function(leaf):
            yield at, leaf


def _rebuilt(node: Any, path: Path, values: Mapping[Path, Any]) -> Any:
    import jax

    flat, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=_is_adapted)
    new: list[Any] = []
    for keys, leaf in flat:
        at = path + names_of(keys)
        if not (adapter := adapter_of(leaf)):
            new.append(wanted_type(leaf, values[at]) if at in values else leaf)
        elif any(p[: len(at)] == at for p in values):
            made = adapter.apply(leaf, _rebuilt(adapter.capture(leaf), at, values))
            if made is None:
                raise StateMismatch(
                    f"{type(adapter).__name__}.apply returned None for {show(at)}: it has to "
                    "return the node, also one that it changed in place"
                )
            new.append(made)
        else:
            new.append(leaf)
    return jax.tree_util.tree_unflatten(treedef, new)


def _ordered(old: Any, new: Any) -> Any:
    """Return `new` with the keys of its dicts in the order of `old`, where JAX sorts them."""
    if type(old) is dict and type(new) is dict:
        return {key: _ordered(old[key], new[key]) for key in old}
    if type(old) in (list, tuple) and type(new) is type(old):
        return type(new)(map(_ordered, old, new))
    return new


def _check_kinds(leaves: Mapping[Path, Any]) -> None:
    _raise_unsavable(
        {path: why for path, leaf in leaves.items() if (why := unsavable(leaf))},
        "\nLeave it out of the state, or register a StateAdapter for what holds it",
    )


def _raise_unsavable(problems: Mapping[Path, str], then: str) -> None:
    if problems:
        lines = "\n  ".join(f"the leaf at {show(path)} {why}" for path, why in problems.items())
        raise StateMismatch(lines + then)


def _own_items(state: Any, leaves: Mapping[Path, Any]) -> frozenset[str]:
    """Return the top-level names that become items of their own."""
    tops = {path[0] for path, leaf in leaves.items() if len(path) > 1 and not is_files(leaf)}
    if adapter_of(state) and not tops & set(WEIGHTS):
        return frozenset()  # the layers of a lone module
    # An item is a folder with about seven files, so a model of many layers stays one item. Weights
    # are one in any case, so that they can be read and verified alone.
    if len(tops) > _MAX_ITEMS or tops & _RESERVED or not all(map(_ITEM_NAME.fullmatch, tops)):
        return frozenset(tops & set(WEIGHTS))
    return frozenset(tops)


def put(nested: dict[str, Any], path: Iterable[str], leaf: Any) -> None:
    """Put a leaf into nested dicts, which are made as need be."""
    *parents, name = path
    for parent in parents:
        nested = nested.setdefault(parent, {})
    nested[name] = leaf


def _is_adapted(node: Any) -> bool:
    return adapter_of(node) is not None


def _key_name(key: Any) -> str:
    name = _NAMED_BY.get(type(key).__name__)
    return str(getattr(key, name) if name else key)
