"""Orbax, and the only module that imports it.

A checkpoint is a set of *items*, each a nested dict of leaves with string keys, written with the
free functions of Orbax v1. Unlike its `Checkpointer`, their response belongs to one save exactly
and raises a failure once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "PendingSave",
    "decision_context",
    "describe",
    "item_names",
    "load",
    "load_alone",
    "metadata",
    "preservation_context",
    "save",
]

Items = Mapping[str, Any]
"""Item name to a tree of leaves."""


class PendingSave(Protocol):
    """A save in flight."""

    def result(self, timeout: float | None = None) -> Any:
        """Wait until it is committed, or raise what went wrong."""
        ...


def save(path: Path, items: Items, metadata: Mapping[str, Any]) -> PendingSave:
    """Start to write a checkpoint at `path`.

    Returns once the leaves are safe from donation and mutation by the caller.
    `metadata` is JSON that Orbax stores with the checkpoint and shows to its own readers.

    Compression is off: for float weights it saves about 7 % of the bytes and takes five times
    the CPU, so the commit waits for it.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    # Else a folder that can not be made leaves threads waiting that keep the process from ending.
    context.asynchronous.create_directories_asynchronously = False
    with context:
        pending: PendingSave = ocp.save_checkpointables_async(
            path, dict(items), custom_metadata=dict(metadata)
        )
    return pending


def load(path: Path, like: Items) -> dict[str, Any]:
    """Read the items that `like` names, with its structure, dtypes and shardings."""
    from orbax.checkpoint import v1 as ocp

    return dict(ocp.load_checkpointables(path, dict(like)))


def load_alone(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Read items as nested dicts with no template, all arrays on this process's first device."""
    import jax

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> Any:
        if not hasattr(leaf, "sharding"):  # a NumPy array, or a number
            return leaf
        return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]  # jax leaves it untyped
            leaf.shape, leaf.dtype, sharding=device
        )

    # An item that holds a Python bool has no metadata (Orbax 0.12), and is read as it was saved.
    found = describe(path, names)
    return load(path, {n: t and jax.tree.map(place, t) for n, t in found.items()})


def metadata(path: Path) -> dict[str, Any]:
    """Return the `metadata` that `save` was given; empty for a checkpoint of others."""
    from orbax.checkpoint import v1 as ocp

    found = ocp.checkpointables_metadata(path).custom_metadata
    return found if isinstance(found, dict) else {}


def item_names(path: Path) -> list[str]:
    """Return the names of the items in a checkpoint: each is a folder."""
    return sorted(p.name for p in path.iterdir() if p.is_dir())


def describe(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return items of a checkpoint as trees of metadata (`shape`, `dtype`), reading no array."""
    from orbax.checkpoint import v1 as ocp

    return {name: ocp.metadata(path, checkpointable_name=name).metadata for name in names}


def decision_context(*, saving: bool, preempted: bool) -> Any:
    """Return what Orbax's save-decision policies are told of the run."""
    from orbax.checkpoint import v1 as ocp
    from orbax.checkpoint.options import MultiprocessingOptions

    return ocp.training.save_decision_policies.DecisionContext(
        is_saving_in_progress=saving,
        reached_preemption=preempted,
        multiprocessing_options=MultiprocessingOptions(),
    )


def preservation_context() -> Any:
    """Return what Orbax's preservation policies are told of the run: nothing so far."""
    from orbax.checkpoint import v1 as ocp

    return ocp.training.preservation_policies.PreservationContext()
