"""Orbax, and the only module that imports it.

A checkpoint is a set of *items*, each a nested dict of leaves with string keys, written with the
free functions of Orbax v1. Unlike its `Checkpointer`, their response belongs to one save exactly
and raises a failure once.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ckpt_callbacks.errors import CorruptCheckpoint
from ckpt_callbacks.processes import own_index

__all__ = [
    "LEFT_OUT",
    "WHOLE",
    "PendingSave",
    "decision_context",
    "describe",
    "is_checkpoint",
    "is_item",
    "is_on_device",
    "is_tree",
    "item_names",
    "key_impls",
    "load",
    "metadata",
    "preservation_context",
    "save",
    "save_plain",
    "steps",
]

Items = Mapping[str, Any]
"""Item name to a tree of leaves, or to an object that saves itself."""
WHOLE = ""
"""The name of the item in a checkpoint of others that is a single pytree without items."""
LEFT_OUT = ...
"""Orbax's `PLACEHOLDER`: a leaf that is not to be read."""
_DATA_FILE = 128 * 2**20
"""Bytes of a data file at most. By `benchmarks/data_files.py`, 1 GiB is durable in 0.4 to 0.75 of
the time that one file takes, with any size from 16 to 256 MiB; fewer files are fewer requests to a
tracker."""


_operations = threading.RLock()
"""Held while Orbax counts an operation, which all processes have to do alike."""


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
    the CPU, so the commit waits for it. A data file is written once it is full: with Orbax's own
    limit of 2 GiB that is at the end, by one thread.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = _DATA_FILE
    # Else a folder that can not be made leaves threads waiting that keep the process from ending.
    context.asynchronous.create_directories_asynchronously = False
    with _operations, context:
        pending: PendingSave = ocp.save_checkpointables_async(
            path, dict(items), custom_metadata=dict(metadata)
        )
    return pending


def save_plain(path: Path, item: str, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Write a pytree as an item of a checkpoint, or, with the item `WHOLE`, as all of it.

    The latter by the old functions (v0): the new ones read it too, but they write items only.
    """
    if item != WHOLE:
        save(path, {item: tree}, metadata).result()
        return
    from orbax import checkpoint as v0

    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree, custom_metadata=dict(metadata))


def load(path: Path, like: Items, *, alone: bool = False) -> dict[str, Any]:
    """Read the items that `like` names, with its structure, dtypes and shardings.

    What is `LEFT_OUT` in it is not read, and is the same in the result. Where there are several
    processes all have to call it, unless they read `alone`, into the memory of the host.
    """
    from orbax.checkpoint import v1 as ocp

    index = own_index() if alone else None
    with _operations if index is None else _uncounted(index):
        if WHOLE in like:
            return {WHOLE: ocp.load(path, like[WHOLE])}
        return dict(ocp.load_checkpointables(path, dict(like)))


@contextmanager
def _uncounted(index: int) -> Iterator[None]:
    """Let one process of several do without the others what all of them do together elsewhere.

    Orbax (0.12) puts the number of the operation into what processes wait for, and each counts for
    itself: after one that the others have not seen they would wait for ever.
    """
    from orbax.checkpoint import v1 as ocp
    from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator as Numbers

    context = ocp.Context()
    context.multiprocessing.primary_host = index
    context.multiprocessing.active_processes = {index}
    with _operations:
        number = Numbers._operation_id
        try:
            with context:
                yield
        finally:
            Numbers._operation_id = number
            Numbers._operation_id_counter = itertools.count(number + 1)


def metadata(path: Path) -> dict[str, Any]:
    """Return the `metadata` that `save` was given; empty for a checkpoint of others.

    From its file, since Orbax's own function reads the metadata of all arrays too, and warns of
    every item that is no pytree.

    Raises:
        CorruptCheckpoint: the file is no JSON.
    """
    file = path / "_CHECKPOINT_METADATA"
    try:
        found = json.loads(file.read_text("utf-8"))["custom_metadata"]
    except (FileNotFoundError, KeyError):
        return {}
    except (ValueError, TypeError) as error:
        raise CorruptCheckpoint(f"{file} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def item_names(path: Path) -> list[str]:
    """Return the names of the items in a checkpoint: each is a folder."""
    if is_tree(path):
        return [WHOLE]
    return sorted(p.name for p in path.iterdir() if p.is_dir())


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint that was committed, by whatever version."""
    if is_tree(path) or (path / "_CHECKPOINT_METADATA").is_file():
        return True
    # An old version has written no such file, only the items; and steps are no items.
    return any(is_tree(p) and not p.name.isdecimal() for p in path.glob("*"))


def steps(root: Path) -> dict[int, Path]:
    """Return the checkpoints in a directory of Orbax's own managers, by ascending step.

    The managers may have been told to put a prefix and zeros before the number.
    """
    there = [p for p in root.iterdir() if is_checkpoint(p)] if root.is_dir() else []
    plain = {int(p.name): p for p in there if p.name.isdecimal()}
    prefixed = {int(m[1]): p for p in there if (m := re.fullmatch(r".*_(\d+)", p.name))}
    return dict(sorted((plain or prefixed).items()))


def is_item(path: Path) -> bool:
    """Return whether a folder is an item in a checkpoint, which Orbax reads by that only."""
    alone = (path / "_CHECKPOINT_METADATA").is_file()
    return is_tree(path) and not alone and (path.parent / "_CHECKPOINT_METADATA").is_file()


def is_tree(folder: Path) -> bool:
    """Return whether a folder holds a pytree of arrays, as Orbax writes it."""
    return (folder / "_METADATA").is_file()


def describe(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return items of a checkpoint as trees of metadata (`shape`, `dtype`), reading no array.

    Of an item that is no pytree it is `None`.

    Raises:
        CorruptCheckpoint: a pytree cannot be made out, which Orbax takes for no pytree.
    """
    from orbax.checkpoint import v1 as ocp

    def tree(name: str) -> Any:
        found = ocp.metadata(path, checkpointable_name=name or None).metadata
        if found is None:
            raise CorruptCheckpoint(f"{path / name} is damaged: what it holds cannot be read")
        return found

    return {name: tree(name) if is_tree(path / name) else None for name in names}


def key_impls(folder: Path) -> dict[str, str]:
    """Return the implementations of the typed PRNG keys in a tree, by dotted path.

    Orbax (0.12) shows them in none of its metadata, and has them in these files only.
    """
    impls: dict[str, str] = {}
    for path in sorted(folder.glob("array_metadatas/process_*")):
        for entry in json.loads(path.read_text(encoding="utf-8"))["array_metadatas"]:
            about = entry["array_metadata"]
            if impl := (about.get("ext_metadata") or {}).get("random_key_impl"):
                impls[about["param_name"]] = impl
    return impls


def is_on_device(meta: Any) -> bool:
    """Return whether an array that `describe` tells of was on a device when it was saved."""
    return hasattr(meta, "sharding_metadata")  # the class is private to Orbax


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
