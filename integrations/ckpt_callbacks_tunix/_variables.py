"""The variables that a trainer changes, as a state that can be saved."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Variables"]


class Variables:
    """The variables that change while a model is trained.

    They are looked up once: a walk through a model of a few hundred layers takes longer than many
    a training step, while the trainer keeps the variables and only gives them new values.

    Args:
        model: a Flax NNX module, whose LoRA parameters are all that is trained if it has any.
        optimizer: its Flax NNX optimizer.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        import jax

        nnx: Any = sys.modules["flax.nnx"]  # else there were no model
        lora = nnx.state(model, nnx.LoRAParam)
        every = nnx.All(nnx.Variable, nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate)))
        variables = {
            "model": lora or nnx.state(model, every),
            "optimizer": nnx.state(optimizer),
            "rngs": nnx.state(model, nnx.RngState),
        }
        leaves, structure = jax.tree.flatten(
            {name: nnx.to_pure_dict(part, lambda v: v) for name, part in variables.items()},
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        self._variables: list[Any] = leaves
        self._structure: Any = structure

    def values(self) -> dict[str, Any]:
        """Return what they hold now. Nothing is copied."""
        values: dict[str, Any] = self._structure.unflatten(
            [variable.get_raw_value() for variable in self._variables]
        )
        return values

    def set(self, values: dict[str, Any]) -> None:
        """Let them hold `values`, which `values()` returned once, or a checkpoint of it."""
        new = self._structure.flatten_up_to(values)
        for variable, value in zip(self._variables, new, strict=True):
            variable.set_value(value)
