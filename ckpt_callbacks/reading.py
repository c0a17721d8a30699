"""Reading a checkpoint that lies on this disk, verified."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ckpt_callbacks import orbax_io
from ckpt_callbacks.contents import Contents, key_of
from ckpt_callbacks.errors import CheckpointNotFound, StateMismatch
from ckpt_callbacks.leaves import DType, Leaf, leaf_of
from ckpt_callbacks.matching import check_same
from ckpt_callbacks.paths import Path as Names
from ckpt_callbacks.paths import Selection, show
from ckpt_callbacks.record import File
from ckpt_callbacks.state import ROOT, apply, leaves_of, put

__all__ = ["compare", "read", "read_alone", "read_freely", "tell_dtypes"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")


def read(
    path: Path,
    like: S,
    files: Mapping[str, File] | None = None,
    only: Selection | None = None,
    *,
    dtype: DType = "saved",
    as_numpy: bool = False,
) -> S:
    """Return `like` with the values of the checkpoint at `path`, checked against `files`.

    Leaves are compared before any array is read, and nothing is read of a file before its digest
    was checked. The arguments are those of `restore`.
    """
    contents, targets, wanted = _matched(path, like, files, only, dtype, as_numpy=as_numpy)
    if dtype == "saved":
        tell_dtypes(str(path), targets, {at: stored.leaf for at, stored in contents.leaves.items()})
    loaded = contents.load(targets, dtype, numpy=as_numpy)
    restored: S = apply(like, {wanted[key]: value for key, value in loaded.items()})
    return restored


def tell_dtypes(where: str, targets: Mapping[Names, Any], leaves: Mapping[Names, Leaf]) -> None:
    """Say which arrays have another dtype than the state would have them."""
    differ: list[str] = []
    for key, value in targets.items():
        here, there = leaf_of(value), leaves[key]
        if here and here.kind == there.kind == "array" and here.dtype != there.dtype:
            differ.append(f"{show(key)} ({there.dtype}, not {here.dtype})")
    if differ:
        logger.warning(
            "%s: these keep the dtype that they were saved with: %s%s",
            where,
            ", ".join(differ[:5]),
            f" and {len(differ) - 5} more" * (len(differ) > 5),
        )


def compare(path: Path, like: Any) -> None:
    """Raise StateMismatch if the state `like` does not fit the checkpoint at `path`."""
    _matched(path, like, None, None, "saved", as_numpy=False)


def _matched(
    path: Path,
    like: Any,
    files: Mapping[str, File] | None,
    only: Selection | None,
    dtype: DType,
    *,
    as_numpy: bool,
) -> tuple[Contents, dict[Names, Any], dict[Names, Names]]:
    """Return a checkpoint, the leaves of `like` that it has, and their paths there.

    Both are by the path in the checkpoint.
    """
    ours = leaves_of(like)
    contents = _contents(path, like, only, files)
    wanted = {_key(at, value): at for at, value in ours.items()}
    there = contents.leaves
    if only is not None:
        chosen = only.of({*wanted, *there}, str(path), contents.items)
        wanted = {key: at for key, at in wanted.items() if key in chosen}
        there = {key: stored for key, stored in there.items() if key in chosen}
    targets = {key: ours[at] for key, at in wanted.items()}
    if not targets:
        tops = ", ".join(sorted({show(at[:1]) for at in ours}))
        raise StateMismatch(
            f"the state has nothing at {only}; it has {tops}: give a lone model below its name, as "
            "in like={'model': model}"
        )
    check_same(
        targets,
        {key: stored.leaf for key, stored in there.items()},
        str(path),
        dtype=dtype,
        numpy=as_numpy,
    )
    return contents, targets, wanted


def _contents(
    path: Path,
    like: Any,
    only: Selection | None,
    files: Mapping[str, File] | None,
) -> Contents:
    def choose(names: list[str]) -> Collection[str]:
        return names if only is None else only.items(names, str(path))

    return Contents(path, like, choose, files)


def _key(path: Names, value: Any) -> Names:
    leaf = leaf_of(value)
    return key_of(path, leaf) if leaf else path


def read_freely(
    path: Path,
    files: Mapping[str, File] | None = None,
    only: Selection | None = None,
    *,
    as_numpy: bool = False,
) -> dict[str, Any]:
    """Return what the checkpoint at `path` holds as nested dicts; see `read`."""
    contents = _contents(path, None, only, files)
    targets = contents.template()
    if not targets:
        raise CheckpointNotFound(
            f"{path} holds nothing that can be read without like= ({', '.join(contents.folders)})"
        )
    if only is not None:
        chosen = only.of(targets.keys(), str(path), contents.items)
        targets = {key: value for key, value in targets.items() if key in chosen}
    nested: dict[str, Any] = {}
    for key, value in contents.load(targets, "saved", numpy=as_numpy).items():
        put(nested, key, value)
    return nested


def read_alone(path: Path, like: Any, files: Mapping[str, File], preferred: Collection[str]) -> Any:
    """Return what a checkpoint that lies alone holds for inference.

    Args:
        path: a checkpoint, or a part of its items.
        like: a state with some of the items, which gets their values, or the only preferred item
            itself; if `None`, the preferred items are returned as nested dicts of arrays, a single
            one as it is.
        files: the record of its files.
        preferred: names of items, of which those that are there are taken; all if none is.

    Raises:
        CheckpointNotFound, StateMismatch, CorruptCheckpoint: as `restore` has it.
    """
    items = orbax_io.item_names(path)
    names = [name for name in items if name in preferred] or items
    if like is None:
        found = read_freely(path, files, None if names == items else Selection(names))
        return found[names[0]] if len(names) == 1 and names[0] in found else found
    tops = {at[0] for at in leaves_of(like) if at}
    if names != [ROOT] and len(names) == 1 and not tops & set(items):
        return read(path, {names[0]: like}, files, Selection(names))[names[0]]  # that item alone
    return read(path, like, files, Selection(tops) if tops & set(items) else None)
