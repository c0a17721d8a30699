"""From the state a user has to leaves that can be saved, and back.

A state is any pytree. Its leaves are named by their path, and every leaf that holds data is
saved; the others (functions, `None`) stay what they are in the live object. A node that is no
plain pytree, such as a Flax NNX module, is taken apart by a `StateAdapter`.

The children of the top level become the items of the checkpoint, so that weights can be read
and verified without the optimizer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from ckpt_callbacks.errors import StateMismatch

__all__ = [
    "ADAPTERS",
    "Captured",
    "NNXAdapter",
    "StateAdapter",
    "abstract",
    "apply",
    "capture",
    "deleted",
]

Path = tuple[str, ...]
"""Names from the root of the state to a leaf."""
Captured = dict[str, Any]
"""Item name to a nested dict of leaves with string keys."""

ROOT = "state"
"""Item for leaves that are no container of their own: a counter, a key, a lone module."""

_MAX_ITEMS = 8
_RESERVED = {ROOT, "metrics"}  # Orbax keeps `metrics` for itself
_ITEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class StateAdapter(Protocol):
    """Takes apart one kind of node. It must not import the library whose nodes it knows."""

    def matches(self, node: Any) -> bool:
        """Return whether this adapter handles `node`. Asked for every node of a state."""
        ...

    def capture(self, node: Any) -> dict[Path, Any]:
        """Return the node's leaves by their path below it."""
        ...

    def apply(self, node: Any, leaves: Mapping[Path, Any]) -> Any:
        """Return the node with `leaves`, which has exactly the paths that `capture` gave."""
        ...


class NNXAdapter:
    """Flax NNX modules, optimizers, `Rngs` and other graph nodes, restored in place.

    What a forward pass sowed (`nnx.Intermediate`) is no state and is left out.
    """

    def matches(self, node: Any) -> bool:
        # A node of a library that was never imported can not exist.
        nnx = sys.modules.get("flax.nnx")
        return nnx is not None and isinstance(node, nnx.Pytree)

    def capture(self, node: Any) -> dict[Path, Any]:
        return {_names(path): _value(leaf) for path, leaf in self._flat(node)}

    def apply(self, node: Any, leaves: Mapping[Path, Any]) -> Any:
        nnx = sys.modules["flax.nnx"]
        new = [(path, _with(leaf, leaves[_names(path)])) for path, leaf in self._flat(node)]
        nnx.update(node, nnx.from_flat_state(new))
        return node

    def _flat(self, node: Any) -> Iterable[tuple[tuple[Any, ...], Any]]:
        nnx = sys.modules["flax.nnx"]
        flat: Iterable[tuple[tuple[Any, ...], Any]] = nnx.to_flat_state(
            nnx.state(node, nnx.Not(nnx.Intermediate))
        )
        return flat


ADAPTERS: list[StateAdapter] = [NNXAdapter()]
"""Asked in order; the first that matches handles the node."""


def capture(state: Any) -> Captured:
    """Return the leaves of `state`, by item. Nothing is copied.

    Raises:
        StateMismatch: a leaf cannot be saved, or two leaves have the same name.
    """
    leaves = _leaves(state)
    for path, leaf in leaves.items():
        if not _is_data(leaf):
            raise StateMismatch(
                f"the leaf at {_show(path)} is a {type(leaf).__qualname__}, which cannot be "
                "saved: leave it out of the state, or register a StateAdapter for it"
            )
    if not leaves:
        raise StateMismatch(f"the state, a {type(state).__qualname__}, holds nothing to save")
    items = _own_items(leaves) if not _adapter(state) else frozenset[str]()
    return _nest(leaves, items)


def deleted(captured: Captured) -> list[str]:
    """Return the paths of leaves whose device buffers are gone, as donation leaves them."""
    jax = sys.modules.get("jax")
    if jax is None:
        return []
    return [
        _show(path)
        for path, leaf in _flatten(captured).items()
        if isinstance(leaf, jax.Array) and leaf.is_deleted()
    ]


def abstract(state: Any, items: Collection[str]) -> Captured:
    """Return the leaves of `state` as they lie in a checkpoint with `items`.

    Device arrays are replaced by their shape, dtype and sharding.
    """
    return _nest({p: _abstract_leaf(leaf) for p, leaf in _leaves(state).items()}, items)


def apply(state: Any, captured: Mapping[str, Any]) -> Any:
    """Return `state` with the leaves of `captured`.

    Nodes of adapters are changed in place, all else is built anew. Leaves that `captured` lacks
    keep what `state` has.
    """
    import jax

    new = _flatten(captured)
    leaves = {p: new.get(_item_path(p, captured), old) for p, old in _leaves(state).items()}
    nodes, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_node)
    rebuilt: list[Any] = []
    for keys, node in nodes:
        path = tuple(map(_key_name, keys))
        if adapter := _adapter(node):
            below = {p[len(path) :]: v for p, v in leaves.items() if p[: len(path)] == path}
            rebuilt.append(adapter.apply(node, below))
        else:
            rebuilt.append(leaves.get(path, node))
    return jax.tree_util.tree_unflatten(treedef, rebuilt)


def check_same(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Compare a captured state with a checkpoint's metadata, before anything is read.

    Raises:
        StateMismatch: leaves are missing, extra, or of another shape; all of them at once.
    """
    ours, theirs = _flatten(wanted), _flatten(found)
    problems = [f"{_show(p)}: not in the checkpoint" for p in ours if p not in theirs]
    problems += [f"{_show(p)}: not in the state" for p in theirs if p not in ours]
    for path, leaf in ours.items():
        here, there = getattr(leaf, "shape", ()), getattr(theirs.get(path), "shape", ())
        if path in theirs and here != there and not _is_key(leaf):
            problems.append(f"{_show(path)}: shape {here} in the state, {there} in the checkpoint")
    if problems:
        shown = "\n  ".join(problems[:20] + ["…"] * (len(problems) > 20))
        raise StateMismatch(f"the state does not fit the checkpoint {where}:\n  {shown}")


def _leaves(state: Any) -> dict[Path, Any]:
    """Return all data leaves by path."""
    import jax

    leaves: dict[Path, Any] = {}
    joined: dict[str, Path] = {}
    for keys, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_node)[0]:
        path = tuple(map(_key_name, keys))
        adapter = _adapter(node)
        below = adapter.capture(node) if adapter else {(): node} if not callable(node) else {}
        for rest, leaf in below.items():
            full = path + rest
            # Orbax joins the names with dots and would store two such leaves as one.
            dotted = ".".join(full)
            if dotted in joined:
                raise StateMismatch(
                    f"two leaves have the name {dotted!r}: {_show(joined[dotted])} and "
                    f"{_show(full)}; rename one of them"
                )
            joined[dotted] = full
            leaves[full] = leaf
    return leaves


def _is_node(node: Any) -> bool:
    return _adapter(node) is not None


def _adapter(node: Any) -> StateAdapter | None:
    return next((a for a in ADAPTERS if a.matches(node)), None)


def _own_items(leaves: Iterable[Path]) -> frozenset[str]:
    """Return the top-level names that become items of their own."""
    tops = {path[0] for path in leaves if len(path) > 1}
    # An item is a folder with about seven files, so a model of many layers stays one item.
    if len(tops) > _MAX_ITEMS or tops & _RESERVED or not all(map(_ITEM_NAME.fullmatch, tops)):
        return frozenset()
    return frozenset(tops)


def _item_path(path: Path, items: Collection[str]) -> Path:
    """Return the path with the item's name in front."""
    if len(path) > 1 and path[0] in items:
        return path
    return (ROOT, *(path or ("leaf",)))


def _nest(leaves: Mapping[Path, Any], items: Collection[str]) -> Captured:
    nested: Captured = {}
    for path, leaf in leaves.items():
        *parents, name = _item_path(path, items)
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def _flatten(nested: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    flat: dict[Path, Any] = {}
    for name, node in nested.items():
        if isinstance(node, Mapping):
            flat |= _flatten(node, (*path, name))
        else:
            flat[*path, name] = node
    return flat


def _abstract_leaf(leaf: Any) -> Any:
    import jax

    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]  # jax leaves it untyped
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        )
    return leaf


def _is_data(leaf: Any) -> bool:
    import jax
    import numpy as np

    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OUSMm"
    return isinstance(leaf, jax.Array | bool | int | float | str)


def _is_key(leaf: Any) -> bool:
    """Return whether the leaf is a typed PRNG key, which is stored with an extra axis."""
    import jax

    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)


def _key_name(key: Any) -> str:
    import jax

    match key:
        case jax.tree_util.GetAttrKey(name=name):
            return str(name)
        case jax.tree_util.SequenceKey(idx=name):
            return str(name)
        case jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name):
            return str(name)
        case _:
            return str(key)


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(map(str, path))


def _value(leaf: Any) -> Any:
    """Return the array in an NNX variable; a state may also hold bare arrays."""
    variable = sys.modules["flax.nnx"].Variable
    return leaf.get_value() if isinstance(leaf, variable) else leaf


def _with(leaf: Any, value: Any) -> Any:
    variable = sys.modules["flax.nnx"].Variable
    return leaf.replace(value) if isinstance(leaf, variable) else value


def _show(path: Path) -> str:
    return "/".join(path) or "the root"
