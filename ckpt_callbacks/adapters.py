"""What takes apart the nodes of a state that are no plain pytree.

A state is any pytree. Where a node of it is something else, such as a Flax NNX module or a data
iterator, a `StateAdapter` says which leaves it has, and puts new ones in. A library of which
nodes are known is recognised and never imported: an object of a library that was not imported
can not exist.

A package may bring an adapter as an entry point in the group `ckpt_callbacks.adapters`, named
after the module whose nodes it knows: it is loaded once that module has been imported.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

from ckpt_callbacks import frameworks
from ckpt_callbacks.errors import ConfigError

__all__ = ["GROUP", "StateAdapter", "adapter_of", "register_adapter"]

GROUP = "ckpt_callbacks.adapters"


class StateAdapter(Protocol):
    """Takes apart one kind of node. It must not import the library whose nodes it knows."""

    def matches(self, node: Any) -> bool:
        """Return whether this adapter handles `node`.

        Asked for every node of a state but Python's own containers and numbers, and arrays.
        """
        ...

    def capture(self, node: Any) -> Any:
        """Return the values of `node` as a pytree, often a dict. Nothing need be copied.

        It may hold nodes of other adapters. Of an abstract node, which some frameworks have as
        templates, the values are `jax.ShapeDtypeStruct`.
        """
        ...

    def apply(self, node: Any, values: Any) -> Any:
        """Return the node with `values`, a pytree as `capture` gave it: changed in place, or new.

        Nothing has been changed yet when it is found that a checkpoint does not fit.
        """
        ...


_registered: list[StateAdapter] = []
_plain: set[type] = {dict, list, tuple, int, float, bool, complex, str, bytes, type(None)}
_by_module: dict[str, Any] | None = None
"""Entry points that were not loaded yet."""


def register_adapter(adapter: StateAdapter) -> None:
    """Let an adapter handle the nodes that it knows; the last one registered is asked first.

    Raises:
        ConfigError: it lacks one of the methods of `StateAdapter`.
    """
    for name in ("matches", "capture", "apply"):
        if not callable(getattr(adapter, name, None)) or isinstance(adapter, type):
            raise ConfigError(
                f"register_adapter: {adapter!r} is no adapter: give an object with the methods "
                "matches, capture and apply"
            )
    _registered.insert(0, adapter)


def adapter_of(node: Any) -> StateAdapter | None:
    """Return what takes `node` apart, if it is no plain pytree."""
    if type(node) in _plain:
        return None
    _load()
    if _is_plain(node):
        return None
    for adapter in (*_registered, *frameworks.ADAPTERS):
        if adapter.matches(node):
            return adapter
    return None


def _is_plain(node: Any) -> bool:
    """Return whether `node` is an array, and remember its type."""
    arrays = [m.Array for m in [sys.modules.get("jax")] if m]
    arrays += [m.ndarray for m in [sys.modules.get("numpy")] if m]
    if isinstance(node, tuple(arrays)):
        _plain.add(type(node))
        return True
    return False


def _load() -> None:
    """Load the adapters of packages for the libraries that have been imported by now."""
    global _by_module  # noqa: PLW0603  # entry points are looked up once
    if _by_module is None:
        from importlib.metadata import entry_points

        _by_module = {point.name: point for point in entry_points(group=GROUP)}
    for name in [name for name in _by_module if name in sys.modules]:
        register_adapter(_by_module.pop(name).load()())
