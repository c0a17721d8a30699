"""Reading checkpoints back, verified."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, overload

from ckpt_callbacks import orbax_io
from ckpt_callbacks.addresses import fetch, is_address
from ckpt_callbacks.catalog import info_of, stores_of
from ckpt_callbacks.contents import Contents, key_of
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
)
from ckpt_callbacks.leaves import DType, leaf_of
from ckpt_callbacks.manifest import verify as check_files
from ckpt_callbacks.matching import check_same
from ckpt_callbacks.paths import Path as Names
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.policy import Candidate, as_step
from ckpt_callbacks.record import File, Record
from ckpt_callbacks.recovery import copy_from
from ckpt_callbacks.retention import policy_from_json, promote
from ckpt_callbacks.state import ROOT, apply, leaves_of, put
from ckpt_callbacks.stores import Store

__all__ = ["Reader", "Weights", "compare", "read", "read_alone", "read_freely", "restore", "visit"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")
Reader = Callable[[Path, Record | None], S]
"""Gets a checkpoint and its record, if it has one, with the files that are yet to be checked."""


@overload
def restore(
    source: str | os.PathLike[str],
    *,
    like: S,
    which: int | str = ...,
    only: str | Collection[str] | None = ...,
    dtype: DType = ...,
    as_numpy: bool = ...,
    verify: bool = ...,
    stores: Sequence[Store] | None = ...,
) -> S: ...


@overload
def restore(
    source: str | os.PathLike[str],
    *,
    like: None = None,
    which: int | str = ...,
    only: str | Collection[str] | None = ...,
    dtype: DType = ...,
    as_numpy: bool = ...,
    verify: bool = ...,
    stores: Sequence[Store] | None = ...,
) -> dict[str, Any]: ...


def restore(
    source: str | os.PathLike[str],
    *,
    like: Any = None,
    which: int | str = "last",
    only: str | Collection[str] | None = None,
    dtype: DType = "saved",
    as_numpy: bool = False,
    verify: bool = True,
    stores: Sequence[Store] | None = None,
) -> Any:
    """Return the state `like` with the values of a checkpoint.

    Every leaf comes back as it was saved: its type, dtype, shape and bytes. Where it lies, in the
    host's memory or on devices and how it is sharded there, is as `like` has it. What does not fit
    is told before any array is read, all at once.

    Training may go on in the directory: an alias whose checkpoint is evicted while it is read is
    looked up again. A damaged checkpoint is read from a store instead that has a true copy of it.

    Args:
        source: a run directory, the folder of a single checkpoint, or an address in a tracker,
            such as `mlflow:/digits@best`; then nothing need be on this disk. Checkpoints that
            Orbax wrote for others, and directories of its `CheckpointManager` and `Checkpointer`,
            do too; an item that Equinox wrote (`*.eqx`) needs its module in `like`.
        like: a live state of the same structure, or an abstract one, whose arrays are
            `jax.ShapeDtypeStruct`, as `nnx.eval_shape`, `eqx.filter_eval_shape` and
            `jax.eval_shape` make it. Objects of frameworks in it, such as Flax NNX modules, are
            changed in place. Without it, nested dicts by the names in the checkpoint.
        which: in a run directory, an alias such as `best` or `last`, or a step.
        only: paths in the state, such as `params` or `["model/layers/*", "!**/bias"]`: no other
            leaves are read, and the rest of `like` stays as it is. See `Selection`.
        dtype: `saved` gives the dtype that a leaf had, `cast` that of `like`, and with `error`
            the two must agree.
        as_numpy: read arrays into the host's memory, as NumPy arrays; typed keys as their data.
        verify: check every file that is touched against its record before it is read.
        stores: where to look for another copy; the run's own, made again, if not given.

    Files of a run directory are checked against their record; a lone checkpoint has none.

    Raises:
        ConfigError: `source` is no checkpoint, no run directory and no address that a tracker
            which is installed understands, `which` is no step, or another argument is none of
            those.
        RecordError: a record that `which` needs is damaged.
        CheckpointNotFound: nothing there answers `which` or `only`, or the step that was named
            was evicted while it was read.
        StateMismatch: `like` has other leaves or shapes, or places that do not fit.
        CorruptCheckpoint: a file is damaged, and there is no other copy; the message names it.
    """
    if dtype not in get_args(DType):
        raise ConfigError(f"restore: dtype must be one of {get_args(DType)}, not {dtype!r}")
    selection = None if only is None else Selection(only)

    def reader(path: Path, record: Record | None) -> Any:
        files = record.files if record else None
        if like is None:
            return read_freely(path, files, selection, as_numpy=as_numpy)
        return read(path, like, files, selection, dtype=dtype, as_numpy=as_numpy)

    return visit("restore", source, which, reader, selection, stores, verify=verify)


def visit(
    owner: str,
    source: str | os.PathLike[str],
    which: int | str,
    reader: Reader[S],
    only: Selection | None = None,
    stores: Sequence[Store] | None = None,
    *,
    verify: bool = True,
) -> S:
    """Return what `reader` makes of a checkpoint; `owner` asks for it.

    The other arguments, and what is raised, are those of `restore`.
    """
    if isinstance(source, str) and is_address(source):
        return _from_tracker(owner, source, reader, which, only, verify=verify)
    root = Path(source).expanduser().absolute()
    if not (root / ".ckpt_callbacks").is_dir():
        return reader(_of_others(root, which), None)
    directory = RunDirectory(root)
    which = which if isinstance(which, str) else as_step(owner, which)
    return _from_run(directory, which, reader, stores, verify=verify)


def _from_run(
    directory: RunDirectory,
    which: int | str,
    reader: Reader[S],
    stores: Sequence[Store] | None,
    *,
    verify: bool,
) -> S:
    while True:
        record = _resolve(directory, which)
        try:
            state = reader(directory.path(record.step), record if verify else _checked(record))
        except Exception as error:
            if not _moved_on(directory, record, which):
                if not isinstance(error, CorruptCheckpoint):
                    raise
                return _from_elsewhere(directory, record, reader, stores, error)
        else:
            if not _moved_on(directory, record, which):
                return state


@dataclass(frozen=True, slots=True)
class Weights:
    """What a new run begins with: `callbacks.run(state, start_from=Weights(...))`.

    Args:
        source: a run directory, a checkpoint or an address, as `restore` takes it.
        which: in a run directory, an alias or a step.
        only: paths in the state; the weights by default, with a fresh optimizer.
        dtype: `saved`, `cast` or `error`; see `restore`.
    """

    source: str | os.PathLike[str]
    which: int | str = "last"
    _: KW_ONLY
    only: str | Collection[str] | None = "params"
    dtype: DType = "saved"

    def __post_init__(self) -> None:
        if not isinstance(self.source, str | os.PathLike) or not str(self.source):
            raise ConfigError(f"start_from must be a path or an address, not {self.source!r}")
        if self.only is not None:
            Selection(self.only)

    def into(self, state: S) -> S:
        """Return `state` with these weights."""
        options: dict[str, Any] = {"only": self.only, "dtype": self.dtype, "which": self.which}
        logger.warning("a new run begins with %s of %s", self.only or "all", self.source)
        return restore(self.source, like=state, **options)


def _of_others(root: Path, which: int | str) -> Path:
    """Return the checkpoint at `root`, which is one or holds some by their step.

    Raises:
        ConfigError: it is neither.
        CheckpointNotFound: it has no such step.
    """
    if orbax_io.is_checkpoint(root):
        return root
    steps = orbax_io.steps(root)
    if not steps:
        raise ConfigError(f"{root} is neither a run directory nor a checkpoint")
    step = max(steps) if which == "last" else which
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointNotFound(
            f"{root} has no checkpoint {which!r}: it is a directory of Orbax with the steps {there}"
        )
    return steps[int(step)]


def _moved_on(directory: RunDirectory, record: Record, which: int | str) -> bool:
    """Return whether the checkpoint was evicted, or replaced, since `record` was read.

    Raises:
        CheckpointNotFound: it was, and it was asked for by its step.
    """
    now = directory.read_record(record.step)
    if now and directory.is_readable(now) and now.files == record.files:
        return False
    if which == record.step:
        raise CheckpointNotFound(f"step {which} of {directory.root} was evicted while it was read")
    return True


def _from_elsewhere(
    directory: RunDirectory,
    record: Record,
    reader: Reader[S],
    stores: Sequence[Store] | None,
    error: CorruptCheckpoint,
) -> S:
    """Read a damaged checkpoint from a store that has a true copy.

    Raises:
        CorruptCheckpoint: no store has one.
    """
    import tempfile

    run = directory.open_run()
    there = stores_of(run) if stores is None else stores
    infos = [info_of(directory, run, store.name, None) for store in there]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / str(record.step)
        if not copy_from(list(zip(there, infos, strict=True)), record, copy):
            raise error
        logger.error("%s. It is read from another copy", error)
        return reader(copy, _checked(record))


def _from_tracker(
    owner: str,
    address: str,
    reader: Reader[S],
    which: int | str,
    only: Selection | None,
    *,
    verify: bool,
) -> S:
    import tempfile

    if which != "last":
        raise ConfigError(f"{owner}: {address} names a checkpoint itself; leave out {which=}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkpoint"
        copy.mkdir()
        record = fetch(address, copy, only=only)
        if verify:  # maybe fewer items than were saved
            check_files(copy, record.files, orbax_io.item_names(copy))
        return reader(copy, _checked(record))


def _checked(record: Record) -> Record:
    """Return a record of which no file is yet to be checked."""
    return replace(record, files={})


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
    loaded = contents.load(targets, dtype, numpy=as_numpy)
    restored: S = apply(like, {wanted[key]: value for key, value in loaded.items()})
    return restored


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


def _resolve(directory: RunDirectory, which: int | str) -> Record:
    """Return the record of the checkpoint that is asked for.

    By its step also where another record is damaged, which an alias might have meant.
    """
    if not isinstance(which, str):
        record = directory.read_record(which)
        if record is None or not directory.is_readable(record):
            there = ", ".join(map(str, directory.complete_records())) or "none"
            raise CheckpointNotFound(f"{directory.root} has no step {which}; it has {there}")
        return record
    complete = directory.complete_records()
    run = directory.read_run()
    policy = policy_from_json(run.policy) if run else None
    history = [Candidate(s, r.metrics) for s, r in complete.items()]
    aliases = promote(policy, history) if policy else {}
    if which not in aliases:
        there = ", ".join(map(str, complete)) or "none"
        raise CheckpointNotFound(
            f"{directory.root} has no checkpoint {which!r}; it has "
            f"{', '.join(aliases) or 'no aliases'} and steps {there}"
        )
    return complete[aliases[which]]
