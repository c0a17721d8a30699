"""The containers of a live state built anew around layers that were stacked, or taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckpt_callbacks.adapters import adapter_of
from ckpt_callbacks.errors import StateMismatch
from ckpt_callbacks.groups import Group
from ckpt_callbacks.leaves import is_function
from ckpt_callbacks.paths import Path, show
from ckpt_callbacks.state import leaves_of, names_of

__all__ = ["Stacked", "Unstacked", "rebuild"]

_Sizes = Mapping[tuple[Path, Group], int]


def rebuild(builder: Stacked | Unstacked, state: Any) -> Any:
    """Return a state with other containers, in which the values lie where they were to.

    Raises:
        StateMismatch: it cannot be built.
    """
    made = builder.build(state, (), ())
    there = leaves_of(made)
    if wrong := builder.values.keys() ^ there.keys():
        raise StateMismatch(
            f"{show(min(wrong))}: layers lie in an object that cannot have other ones: give its "
            "state, such as nnx.state(model), or a dict of its leaves"
        )
    return made


class Stacked:
    """Builds the containers of a state with stacked layers: as those of the first one."""

    def __init__(self, groups: Sequence[Group], values: Mapping[Path, Any]) -> None:
        self.groups = groups
        self.values = values

    def build(self, node: Any, old: Path, new: Path) -> Any:
        """Return what is at `old` as it is at `new`, with its new values."""
        if (isinstance(node, Mapping) or type(node) in (list, tuple)) and node:
            named = list(_named(node))
            groups = [g for g in self.groups if not g.head]
            if any(all(g.number((*old, name)) is not None for name, _ in named) for g in groups):
                layers = dict(named)
                _check_built_alike(old, layers)
                return self.build(layers["0"], (*old, "0"), new)
        return _built(self, node, old, new)

    def entries(self, old: Path, name: str, node: Any) -> Iterator[str]:
        """Yield the names that a child gets in the new state."""
        groups = [g for g in self.groups if g.head and g.number((*old, name)) is not None]
        if not groups:
            yield name
        elif groups[0].number((*old, name)) == 0:
            group = groups[0]
            siblings = {n: x for n, x in _named(node) if group.number((*old, n)) is not None}
            _check_built_alike(old, siblings)
            yield from group.joined_name()


class Unstacked:
    """Builds the containers of a state with one entry a layer: each as those of the stack."""

    def __init__(self, groups: Sequence[Group], values: Mapping[Path, Any], sizes: _Sizes) -> None:
        self.groups = groups
        self.values = values
        self._sizes = sizes

    def build(self, node: Any, old: Path, new: Path) -> Any:
        """Return what is at `old` as it is at `new`, with its new values."""
        for group in self.groups:
            if not group.head and old and group.is_stacked(old):
                return [
                    _built(self, node, old, (*new, str(i))) for i in range(self._size(old, group))
                ]
        return _built(self, node, old, new)

    def entries(self, old: Path, name: str, node: Any) -> Iterator[str]:
        """Yield the names that a child gets in the new state."""
        del node
        at = (*old, name)
        for group in self.groups:
            if group.head and group.is_stacked(at):
                for i in range(self._size(at, group)):
                    yield from group.split_name(name, i)
                return
        yield name

    def _size(self, at: Path, group: Group) -> int:
        """Return how many layers there are, in places without leaves as in all others."""
        others = {size for (_, g), size in self._sizes.items() if g == group}
        if (at, group) not in self._sizes and len(others) > 1:
            raise StateMismatch(f"unstack: nothing at {show(at)} tells how many layers it has")
        return self._sizes.get((at, group)) or others.pop()


def _built(builder: Stacked | Unstacked, node: Any, old: Path, new: Path) -> Any:
    import jax

    if old != new:
        _check_no_axis_names(old, node)
    if new in builder.values:  # also where one leaf is in a box, as in a variable of NNX
        return jax.tree_util.tree_map(lambda _: builder.values[new], node)
    if isinstance(node, Mapping):
        made: dict[Any, Any] = {}
        for key, child in _items(node):
            for name in builder.entries(old, str(key), node):
                at = key if name == str(key) else name
                made[at] = builder.build(child, (*old, str(key)), (*new, name))
        return _like(node, made)
    if adapter_of(node):
        return node
    flat, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if not flat or not flat[0][0]:
        return node
    parts = [
        builder.build(child, (*old, *names_of(keys)), (*new, *names_of(keys)))
        for keys, child in flat
    ]
    return jax.tree_util.tree_unflatten(treedef, parts)


def _check_no_axis_names(path: Path, node: Any) -> None:
    """Check that what gets another axis has no names of axes, of which there would be one less."""
    if not hasattr(type(node), "add_axis"):  # as the boxes of Linen and the variables of NNX have
        return
    about = node.get_metadata() if hasattr(node, "get_metadata") else {}
    names = getattr(node, "names", None) or about.get("out_sharding")
    if names:
        raise StateMismatch(
            f"{show(path)} is a {type(node).__name__} that names its axes, {names}: give the "
            "arrays alone, as flax.linen.meta.unbox returns them"
        )


def _like(node: Any, made: dict[Any, Any]) -> Any:
    """Return a mapping of the same type."""
    from collections import defaultdict

    if isinstance(node, defaultdict):
        return type(node)(node.default_factory, made)
    if adapter_of(node):  # an `nnx.State` has no lists
        made = _with_numbers(made)
    return made if type(node) is dict else type(node)(made)


def _with_numbers(node: Any) -> Any:
    if isinstance(node, list):
        node = dict(enumerate(node))
    return {k: _with_numbers(x) for k, x in node.items()} if type(node) is dict else node


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the keys and children of a mapping, a list or a tuple."""
    import jax

    if isinstance(node, list | tuple):
        yield from enumerate(node)
    elif isinstance(node, dict):
        yield from node.items()
    else:  # what others have for a dict may show its children as something else than they are
        flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
        yield from ((keys[0].key, child) for keys, child in flat)


def _named(node: Any) -> Iterator[tuple[str, Any]]:
    return ((str(key), child) for key, child in _items(node))


def _check_built_alike(parent: Path, layers: Mapping[str, Any]) -> None:
    """Check what paths do not tell: the classes of containers, and functions among the leaves."""
    import jax

    def frame(node: Any) -> tuple[Any, list[Callable[..., Any]]]:
        leaves, treedef = jax.tree_util.tree_flatten(node)
        return treedef, [leaf for leaf in leaves if is_function(leaf)]

    (first, one), *others = layers.items()
    for name, other in others:
        if frame(one) != frame(other):
            raise StateMismatch(
                f"stack: layers are not alike: {show((*parent, first))} and "
                f"{show((*parent, name))} are built differently: {frame(one)[0]} and "
                f"{frame(other)[0]}"
            )
