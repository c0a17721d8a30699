"""Checkpoints as others write them: with the APIs of Orbax itself, old (v0) and new (v1)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import orbax.checkpoint as v0
from orbax.checkpoint import v1

from states.case import describe, pytree_leaves


def leaves(state: Any) -> dict[str, str]:
    """Return type, dtype, shape and digest of every leaf, by its path."""
    return {path: describe(leaf) for path, leaf in pytree_leaves(state)}


def standard(path: Path, state: Any) -> None:
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def pytree(path: Path, state: Any) -> None:
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def manager(path: Path, state: Any) -> None:
    managed(path, {3: v0.args.StandardSave(state)})


def v1_pytree(path: Path, state: Any) -> None:
    v1.save(path, state)


def v1_manager(path: Path, state: Any) -> None:
    with v1.training.Checkpointer(path) as checkpointer:
        checkpointer.save(3, state)


def managed(
    path: Path,
    steps: Mapping[int, Any],
    metrics: Callable[[int], dict[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Save steps with the `CheckpointManager` of v0."""
    ranked = {"best_fn": lambda m: m["score"], "best_mode": "max"} if metrics else {}
    settings = v0.CheckpointManagerOptions(**ranked, **options)
    with v0.CheckpointManager(path, options=settings) as there:
        for step, args in steps.items():
            there.save(step, args=args, metrics=metrics(step) if metrics else None)


def composite(path: Path, items: Mapping[str, Any], config: Any) -> None:
    """Save items of arrays, and one of JSON, with v0."""
    trees = {name: v0.args.StandardSave(item) for name, item in items.items()}
    managed(path, {3: v0.args.Composite(**trees, config=v0.args.JsonSave(config))})


class EquinoxHandler(v0.CheckpointHandler):
    """How users of Orbax v0 save an Equinox module beside other items."""

    def save(self, directory: Any, args: "EquinoxSave") -> None:
        eqx.tree_serialise_leaves(str(directory / "model.eqx"), args.item)

    def restore(self, directory: Any, args: Any = None) -> Any:
        raise NotImplementedError


@v0.args.register_with_handler(EquinoxHandler, for_save=True, for_restore=True)
@dataclass
class EquinoxSave(v0.args.CheckpointArgs):
    item: Any


WHOLE = [standard, pytree, manager, v1_pytree, v1_manager]
"""What writes a state as one item."""
