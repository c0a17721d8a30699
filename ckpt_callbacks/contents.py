"""What a checkpoint holds, and how its arrays are read into the places of a state."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from ckpt_callbacks import beside, orbax_io
from ckpt_callbacks.leaves import DType, Leaf, Note, decode, found, key_impl, leaf_of, loses_bits
from ckpt_callbacks.manifest import verify
from ckpt_callbacks.paths import STATES, Path, dotted
from ckpt_callbacks.record import File
from ckpt_callbacks.state import ROOT, children, leaves_of, names_of

__all__ = ["Contents", "Stored", "finished", "key_of"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A leaf of a checkpoint.

    Args:
        item: the folder that it is in.
        meta: Orbax's metadata of it, or the leaf itself if another library has read it.
        note: what it was before it was stored.
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
        like: the state that it is for, if there is one: in a checkpoint of others its names say
            whether an item is a part of the state or all of it.
        choose: returns the items to look at, of those that there are; all of them if not given.
        files: the record of its files: none is read before it was checked.

    Raises:
        CorruptCheckpoint: a file is damaged; the message names it.
        CheckpointNotFound: as `choose` has it.
        StateMismatch: as `beside.values_of` has it.
    """

    def __init__(
        self,
        path: FilePath,
        like: Any = None,
        choose: Callable[[list[str]], Collection[str]] | None = None,
        files: Mapping[str, File] | None = None,
    ) -> None:
        self.path = path
        verify(path, files or {}, only=())
        about = orbax_io.metadata(path)
        notes = about.get("leaves") if "run" in about else None
        self.ours = ours = isinstance(notes, dict)
        parts: Mapping[str, Any] = {} if ours or like is None else children(like)
        self._wanted = frozenset(leaves_of(like)) if parts else frozenset()
        folders = orbax_io.item_names(path)
        self._root = ROOT if ours else _root(path, folders, parts.keys(), files or {})
        names = {ROOT if folder == self._root else folder: folder for folder in folders}
        self.items = sorted(names)
        self.folders = [names[n] for n in (choose(self.items) if choose else self.items)]
        verify(path, files or {}, None if orbax_io.WHOLE in self.folders else self.folders)
        self._trees = {
            folder: tree
            for folder, tree in orbax_io.describe(path, self.folders).items()
            if tree is not None
        }
        if not isinstance(notes, dict):
            notes = {
                f"{folder}.{name}": {"key": impl}
                for folder in self._trees
                for name, impl in orbax_io.key_impls(path / folder).items()
            }
        self.leaves: dict[Path, Stored] = {}
        self._values: dict[Path, Any] = {}
        for folder in [f for f in self.folders if f not in self._trees]:
            part = like if folder == self._root else parts.get(folder)
            if ours:
                leaf = Leaf("files", _processes(path / folder))
                self.leaves[(folder,)] = Stored(folder, None, None, leaf)
            elif like is None or part is not None:  # else it was kept beside the state
                self._look_into(folder, part)
        for folder, below, meta in self._walk():
            note = notes.get(dotted((folder, *below)))
            leaf = found(meta, note, on_device=orbax_io.is_on_device(meta))
            self.leaves[self._state_path(folder, below)] = Stored(folder, meta, note, leaf)

    def _look_into(self, folder: str, part: Any) -> None:
        """Take in an item that is no tree; `part` is what the state has for it."""
        values = beside.values_of(self.path / folder, part)
        if values is None:
            leaf = Leaf("files", _processes(self.path / folder))
            self.leaves[(folder,)] = Stored(folder, None, None, leaf)
        for below, value in (values or {}).items():
            at = self._state_path(folder, below)
            self._values[at] = value
            self.leaves[at] = Stored(folder, value, None, leaf_of(value) or Leaf("files"))

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
        loaded = orbax_io.load(self.path, like, alone=numpy) if like else {}
        flat = {folder: jax.tree_util.tree_leaves(loaded[folder]) for folder, _ in asked.values()}
        return {
            at: finished(flat[folder][i], self.leaves[at], wanted[at], dtype, numpy=numpy)
            for at, (folder, i) in asked.items()
        } | {
            at: finished(value, self.leaves[at], wanted[at], dtype, numpy=numpy)
            for at, value in self._values.items()
            if at in wanted
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
        at = path if folder == self._root else (folder, *path)
        if at[-1:] == ("value",) and at not in self._wanted and at[:-1] in self._wanted:
            return at[:-1]  # an `nnx.State` that others saved has this level
        return at


def key_of(path: Path, leaf: Leaf) -> Path:
    """Return the path by which a checkpoint has a leaf of a state."""
    if leaf.kind == "files":  # is an item of its own
        return (dotted(path) or ROOT,)
    return path or ("leaf",)


def _processes(folder: FilePath) -> tuple[int, ...]:
    """Return how many processes saved what is theirs alone, as the iterators of Grain do."""
    names = (re.fullmatch(r"process_\d+-of-(\d+)\.json", p.name) for p in folder.iterdir())
    return tuple({int(name[1]) for name in names if name})


def _root(
    path: FilePath, folders: list[str], tops: Collection[str], files: Mapping[str, File]
) -> str | None:
    """Return the item in a checkpoint of others that holds the whole state, if there is one.

    An item that has the name of a part of the state is that part, unless all parts are in it.
    """
    trees = [folder for folder in folders if orbax_io.is_tree(path / folder)]
    states = [*trees, *(f for f in folders if beside.equinox_file(path / f))]
    alone = states if tops and len(states) == 1 else []

    def holds_all(folder: str) -> bool:
        if folder not in trees:
            return False
        verify(path, files, [folder])
        tree = orbax_io.describe(path, [folder])[folder]
        return set(tops) <= children(tree).keys()

    candidates = [f for f in (orbax_io.WHOLE, *STATES) if f in states] + alone
    return next((f for f in candidates if f not in tops or holds_all(f)), None)


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


def finished(loaded: Any, stored: Stored, wanted: Any, dtype: DType, *, numpy: bool) -> Any:
    """Return a leaf as it was saved, where the state has it."""
    import jax
    import numpy as np

    value = decode(loaded, stored.note)
    if impl := key_impl(value.dtype) if isinstance(value, jax.Array) else None:
        to_device = _goes_to_device(stored, wanted, dtype)
        if not numpy and not (to_device and _is_uncommitted(wanted)):
            return value
        data = np.asarray(jax.random.key_data(value))
        return data if numpy else jax.random.wrap_key_data(jax.numpy.asarray(data), impl=impl)
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
