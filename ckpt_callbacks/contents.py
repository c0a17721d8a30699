"""What a checkpoint holds, and how its arrays are read into the places of a state."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from ckpt_callbacks import orbax_io
from ckpt_callbacks.leaves import DType, Leaf, Note, decode, found, leaf_of, loses_bits
from ckpt_callbacks.manifest import verify
from ckpt_callbacks.paths import Path, dotted
from ckpt_callbacks.record import File
from ckpt_callbacks.state import ROOT, names_of

__all__ = ["Contents", "Stored", "key_of"]

_ROOTS_OF_OTHERS = (orbax_io.WHOLE, "default", "items")
"""Items that hold a whole state in checkpoints of Orbax itself (v0)."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A leaf of a checkpoint.

    Args:
        item: the folder that it is in.
        meta: Orbax's metadata of it.
        note: ours.
        leaf: what it was in the state.
    """

    item: str
    meta: Any
    note: Note | None
    leaf: Leaf


class Contents:
    """The leaves of a checkpoint, by their path in the state; no array is read for it.

    Args:
        path: the checkpoint.
        tops: the names at the top of the state that it is for: in a checkpoint of others they say
            whether an item is a part of the state or all of it.
        choose: returns the items to look at, of those that there are; all of them if not given.
        files: the record of its files: none is read before it was checked.

    Raises:
        CorruptCheckpoint: a file is damaged; the message names it.
        CheckpointNotFound: as `choose` has it.
    """

    def __init__(
        self,
        path: FilePath,
        tops: Collection[str] = (),
        choose: Callable[[list[str]], Collection[str]] | None = None,
        files: Mapping[str, File] | None = None,
    ) -> None:
        self.path = path
        verify(path, files or {}, only=())
        about = orbax_io.metadata(path)
        self.ours = "run" in about
        notes: Mapping[str, Note] = about.get("leaves", {}) if self.ours else {}
        folders = orbax_io.item_names(path)
        self._root = ROOT if self.ours else _root(path, folders, tops)
        names = {ROOT if folder == self._root else folder: folder for folder in folders}
        self.folders = [names[n] for n in (choose(sorted(names)) if choose else names)]
        verify(path, files or {}, None if orbax_io.WHOLE in self.folders else self.folders)
        self._trees = {
            folder: tree
            for folder, tree in orbax_io.describe(path, self.folders).items()
            if tree is not None
        }
        self.leaves: dict[Path, Stored] = {}
        for folder in self.folders:
            if folder not in self._trees:
                leaf = Leaf("files", _processes(path / folder))
                self.leaves[(folder,)] = Stored(folder, None, None, leaf)
        for folder, below, meta in self._walk():
            note = notes.get(dotted((folder, *below)))
            leaf = found(meta, note, on_device=orbax_io.is_on_device(meta))
            self.leaves[self._state_path(folder, below)] = Stored(folder, meta, note, leaf)

    def load(self, wanted: Mapping[Path, Any], dtype: DType, *, numpy: bool) -> dict[Path, Any]:
        """Read the leaves that `wanted` names, each into the place that its value says.

        Args:
            wanted: by path in the state: an array or a number of the state, or a
                `jax.ShapeDtypeStruct`; they were found to fit.
            dtype: what decides the dtype.
            numpy: whether to read arrays into the host's memory only.
        """
        import jax

        targets: dict[str, list[Any]] = {folder: [] for folder in self._trees}
        asked: dict[Path, tuple[str, int]] = {}
        for folder, below, _ in self._walk():
            at, among = self._state_path(folder, below), targets[folder]
            if at in wanted:
                asked[at] = folder, len(among)
                among.append(_target(self.leaves[at], wanted[at], dtype, numpy=numpy))
            else:
                among.append(orbax_io.LEFT_OUT)
        like: dict[str, Any] = {
            folder: jax.tree_util.tree_unflatten(
                jax.tree_util.tree_structure(self._trees[folder]), targets[folder]
            )
            for folder in {folder for folder, _ in asked.values()}
        }
        # What saves itself also loads itself.
        like |= {at[0]: wanted[at] for at in wanted if self.leaves[at].leaf.kind == "files"}
        loaded = orbax_io.load(self.path, like) if like else {}
        flat = {folder: jax.tree_util.tree_leaves(loaded[folder]) for folder, _ in asked.values()}
        return {
            at: _finished(flat[folder][i], self.leaves[at], wanted[at], dtype, numpy=numpy)
            for at, (folder, i) in asked.items()
        }

    def template(self) -> dict[Path, Any]:
        """Return what `load` reads every leaf into as it was, on a device if it was on one."""
        import jax
        import numpy as np

        def place(stored: Stored) -> Any:
            meta = stored.meta
            if not stored.leaf.on_device:
                return np.empty(stored.leaf.shape, meta.dtype) if hasattr(meta, "shape") else meta
            return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]  # jax leaves it untyped
                stored.leaf.shape, meta.dtype
            )

        trees = {at: stored for at, stored in self.leaves.items() if stored.leaf.kind != "files"}
        return {at: place(stored) for at, stored in trees.items()}

    def _walk(self) -> Iterator[tuple[str, Path, Any]]:
        """Yield item, path below it, and Orbax's metadata of all leaves in trees."""
        import jax

        for folder, tree in self._trees.items():
            for keys, meta in jax.tree_util.tree_flatten_with_path(tree)[0]:
                yield folder, names_of(keys), meta

    def _state_path(self, folder: str, path: Path) -> Path:
        if not self.ours and path[-1:] == ("value",):
            path = path[:-1]  # as a saved `nnx.State` has it
        return path if folder == self._root else (folder, *path)


def key_of(path: Path, leaf: Leaf) -> Path:
    """Return the path by which a checkpoint has a leaf of a state."""
    if leaf.kind == "files":  # is an item of its own
        return (dotted(path) or ROOT,)
    return path or ("leaf",)


def _processes(folder: FilePath) -> tuple[int, ...]:
    """Return how many processes saved what is theirs alone, as the iterators of Grain do."""
    names = (re.fullmatch(r"process_\d+-of-(\d+)\.json", p.name) for p in folder.iterdir())
    return tuple({int(name[1]) for name in names if name})


def _root(path: FilePath, folders: list[str], tops: Collection[str]) -> str | None:
    """Return the item in a checkpoint of others that holds the whole state, if there is one."""
    trees = [folder for folder in folders if orbax_io.is_tree(path / folder)]
    alone = trees if len(trees) == 1 else []
    return next(
        (f for f in (*_ROOTS_OF_OTHERS, ROOT, *alone) if f in trees and f not in tops), None
    )


def _target(stored: Stored, wanted: Any, dtype: DType, *, numpy: bool) -> Any:
    """Return what Orbax is asked to read a leaf as."""
    import numpy as np

    meta = stored.meta
    if not hasattr(meta, "shape"):
        return meta  # a number, or text
    where = wanted.sharding if _goes_to_device(stored, wanted, dtype) else None
    keys = [leaf for leaf in (stored.leaf, leaf_of(wanted)) if leaf and leaf.kind == "key"]
    if keys and "shape" not in (stored.note or {}):
        # Orbax knows itself which keys it has, if any, whatever it is asked for.
        return _struct(wanted.shape, wanted.dtype, where) if where else _struct(*_form(meta), None)
    if where and not (stored.note or numpy or _is_uncommitted(wanted)):
        return _struct(meta.shape, wanted.dtype if dtype == "cast" else meta.dtype, where)
    return np.empty(*_form(meta))


def _finished(loaded: Any, stored: Stored, wanted: Any, dtype: DType, *, numpy: bool) -> Any:
    """Return a leaf as it was saved, where the state has it."""
    import jax
    import numpy as np

    value = decode(loaded, stored.note)
    if stored.leaf.kind == "key":
        return np.asarray(jax.random.key_data(value)) if numpy else value
    if dtype == "cast":
        value = _cast(value, wanted)
    if numpy or not isinstance(value, np.ndarray):
        return value
    if _goes_to_device(stored, wanted, dtype):
        return jax.device_put(value, None if _is_uncommitted(wanted) else wanted.sharding)
    # Where the state has a number by now, it is an array if it was one on a device.
    number = isinstance(wanted, bool | int | float | complex)
    return jax.numpy.asarray(value) if number and stored.leaf.on_device else value


def _cast(value: Any, wanted: Any) -> Any:
    """Return a number or a host array with the dtype, or as the Python type, of `wanted`."""
    import jax
    import numpy as np

    number = isinstance(value, bool | int | float | complex | np.ndarray | np.generic)
    if not number or isinstance(value, jax.Array):
        return value
    if isinstance(wanted, bool | int | float | complex) and not isinstance(wanted, np.generic):
        return type(wanted)(np.asarray(value).item())
    array = np.asarray(value).astype(wanted.dtype)
    return array[()] if isinstance(wanted, np.generic) else array


def _goes_to_device(stored: Stored, wanted: Any, dtype: DType) -> bool:
    """Return whether the state has a leaf on a device, and it is the same there."""
    import jax

    if not isinstance(wanted, jax.Array | jax.ShapeDtypeStruct):
        return False
    return dtype == "cast" or stored.leaf.on_device or not loses_bits(stored.leaf)


def _is_uncommitted(wanted: Any) -> bool:
    """Return whether an array may be moved between devices, which Orbax would pin it to one of."""
    import jax

    if isinstance(wanted, jax.Array):
        return not wanted.committed and jax.device_count() > 1
    return wanted.sharding is None


def _form(meta: Any) -> tuple[Any, Any]:
    return meta.shape, meta.dtype


def _struct(shape: Any, dtype: Any, sharding: Any) -> Any:
    import jax

    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]  # jax leaves it untyped
        shape, dtype, sharding=sharding
    )
