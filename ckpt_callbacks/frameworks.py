"""The adapters that come with the package; see `ckpt_callbacks.adapters`."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["ADAPTERS"]


class NNXAdapter:
    """Flax NNX modules, optimizers, `Rngs` and other graph nodes, in place; `nnx.State`, anew.

    What a forward pass sowed (`nnx.Intermediate`) is no state and is left out.
    """

    def matches(self, node: Any) -> bool:
        nnx = sys.modules.get("flax.nnx")
        return nnx is not None and isinstance(node, nnx.Pytree | nnx.State)

    def capture(self, node: Any) -> Any:
        variable = sys.modules["flax.nnx"].Variable
        nested: dict[str, Any] = {}
        for path, leaf in self._flat(node):
            *parents, name = map(str, path)
            below = nested
            for parent in parents:
                below = below.setdefault(parent, {})
            below[name] = leaf.get_value() if isinstance(leaf, variable) else leaf
        return nested

    def apply(self, node: Any, values: Any) -> Any:
        nnx = sys.modules["flax.nnx"]
        new: dict[tuple[Any, ...], Any] = {}
        for path, leaf in self._flat(node):
            value = values
            for name in path:
                value = value[str(name)]
            new[path] = leaf.replace(value) if isinstance(leaf, nnx.Variable) else value
        if isinstance(node, nnx.State):
            return nnx.from_flat_state({**dict(nnx.to_flat_state(node)), **new})
        nnx.update(node, nnx.from_flat_state(new))
        return node

    def _flat(self, node: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
        nnx = sys.modules["flax.nnx"]
        state = node if isinstance(node, nnx.State) else nnx.state(node)
        for path, leaf in nnx.to_flat_state(state):
            if not isinstance(leaf, nnx.Intermediate):
                yield path, leaf


class EquinoxMarkAdapter:
    """What stands in `eqx.nn.Shared` where a layer is used again: no leaf."""

    def matches(self, node: Any) -> bool:
        # The class is private to Equinox; that it is met in each `Shared` is under test.
        kind = type(node)
        return kind.__name__ == "SharedNode" and kind.__module__.startswith("equinox.")

    def capture(self, node: Any) -> Any:
        del node
        return ()

    def apply(self, node: Any, values: Any) -> Any:
        del values
        return node


class KerasAdapter:
    """Keras 3 models on JAX: weights, other variables and the optimizer's, by position, in place.

    Their names will not do: Keras numbers the layers of a process.
    """

    def matches(self, node: Any) -> bool:
        keras = sys.modules.get("keras")
        return keras is not None and isinstance(node, keras.Model)

    def capture(self, node: Any) -> Any:
        return {
            kind: [v.value for v in found] for kind, found in self._variables(node).items() if found
        }

    def apply(self, node: Any, values: Any) -> Any:
        for kind, found in self._variables(node).items():
            for variable, value in zip(found, values.get(kind, ()), strict=True):
                variable.assign(value)
        return node

    def _variables(self, node: Any) -> dict[str, Any]:
        optimizer = getattr(node, "optimizer", None)
        if optimizer is not None and not optimizer.built:  # as the first step would do
            optimizer.build(node.trainable_variables)
        return {
            "trainable": node.trainable_variables,
            "non_trainable": node.non_trainable_variables,
            "optimizer": optimizer.variables if optimizer is not None else [],
        }


class VaultAdapter:
    """A Flashbax `Vault`, which is a file: where writing goes on in it, and in the buffer.

    A vault that is opened again takes all that is in the buffer for new. Rows that were written
    after the checkpoint are overwritten by those that come again.
    """

    def matches(self, node: Any) -> bool:
        module = sys.modules.get("flashbax.vault.vault")
        return module is not None and isinstance(node, module.Vault)

    def capture(self, node: Any) -> Any:
        # Private to Flashbax (0.1.3), which has no other way to say it; under test.
        return {"vault_index": node.vault_index, "buffer_index": node._last_received_fbx_index}

    def apply(self, node: Any, values: Any) -> Any:
        node.vault_index = values["vault_index"]
        node._last_received_fbx_index = values["buffer_index"]
        return node


class DataclassAdapter:
    """Dataclasses that JAX does not know as pytrees: their fields, in a copy."""

    def matches(self, node: Any) -> bool:
        if not dataclasses.is_dataclass(node) or isinstance(node, type):
            return False
        import jax

        return bool(jax.tree_util.all_leaves([node])) and not isinstance(node, jax.ShapeDtypeStruct)

    def capture(self, node: Any) -> Any:
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}

    def apply(self, node: Any, values: Any) -> Any:
        new = copy.copy(node)
        for name, value in values.items():
            object.__setattr__(new, name, value)  # also in a frozen one
        return new


ADAPTERS = (
    NNXAdapter(),
    EquinoxMarkAdapter(),
    KerasAdapter(),
    VaultAdapter(),
    DataclassAdapter(),
)
"""Asked in order; the first that matches handles the node."""
