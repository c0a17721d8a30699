"""Checkpoints that travel: one written as a file of another library."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

from ckpt_callbacks import formats, streams
from ckpt_callbacks.errors import CkptCallbacksError, ConfigError, StateMismatch
from ckpt_callbacks.manifest import fsync
from ckpt_callbacks.opening import Transform, as_transforms, opened
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.progress import growing
from ckpt_callbacks.stores import Store
from ckpt_callbacks.tensors import Tensors

__all__ = ["export"]

_BY_LIKE = ("equinox", "msgpack")
"""Formats that are written as a state has its leaves."""


@overload
def export(
    source: Any,
    dest: str | os.PathLike[str],
    *,
    format: str | None = ...,
    which: int | str = ...,
    only: str | Collection[str] | None = ...,
    stores: Sequence[Store] | None = ...,
    transform: Transform | Sequence[Transform] | None = ...,
    overwrite: bool = ...,
    like: Any = ...,
    **options: Any,
) -> Path: ...


@overload
def export(source: Any, dest: BinaryIO, *, format: str, **options: Any) -> None: ...


def export(
    source: Any,
    dest: str | os.PathLike[str] | BinaryIO,
    *,
    format: str | None = None,
    which: int | str = "last",
    only: str | Collection[str] | None = None,
    stores: Sequence[Store] | None = None,
    transform: Transform | Sequence[Transform] | None = None,
    overwrite: bool = False,
    like: Any = None,
    **options: Any,
) -> Path | None:
    """Write a checkpoint, or a part of it, in a format of another library.

    Little more than one leaf is in memory at a time, but all of them where Orbax writes: it takes
    nothing but a whole pytree. `dest` is there only once all of it is durable; what goes wrong
    leaves nothing new, and a kill a folder `.export-…` beside it, with what was to be replaced or
    its successor. What is known of the checkpoint is written with the leaves: step, time, run,
    metrics, your `metadata=`, the digest of its record, and what `only` was; of a file, what it
    said itself. The files of Flax and Equinox have no place for it.

    Leaves that save themselves, such as iterators of Grain, are left out, and a message says so.

    Args:
        source: a run directory, a checkpoint or an address, as `restore` takes it; a file or a
            folder in one of the formats that `export` writes; or a live state.
        dest: the file or folder to write, in a folder that exists; or a stream of bytes, such as
            `io.BytesIO()`, which gets all of a file once it was made, in a temporary folder.
        format: `safetensors`, `npz`, …; by the suffix of `dest` if not given. A folder needs it,
            and so does a stream, which takes `npy` too.
        which: in a run directory, an alias such as `best` or `last`, or a step.
        only: paths in the source, such as `params`, as `restore` takes them.
        stores: where to look for another copy of a damaged checkpoint, as in `restore`.
        transform: a function of `Tensors`, or several, one after the other, for other names or
            another form: `partial(cc.unstack, group="layers")`.
        overwrite: replace what is there: a file, or a folder in the same format that holds
            nothing else.
        like: the module, live or abstract, of a file of Equinox that is read, and the live one
            for one that is written, as such a file has no names; for a msgpack file the state that
            Flax is to read it into.
        options: of the format, such as `max_shard_size` and `naming` of safetensors, `item` of
            Orbax, and `hyper_parameters` of Equinox.

    Returns:
        `dest`, as an absolute path; nothing if it is a stream.

    Raises:
        ConfigError: the format is not known, `dest` is there already or has no folder to be in,
            an option is none of the format, or `source` is nothing that can be read.
        StateMismatch: a leaf cannot be told in this format, or the live state has no values.
        RecordError, CheckpointNotFound, CorruptCheckpoint: as `restore` has it.
    """
    if not isinstance(dest, str | os.PathLike):
        with streams.written_to("export", dest, format) as path:
            export(
                source, path, which=which, only=only, stores=stores, transform=transform,
                like=like, **options,
            )  # fmt: skip
        return None
    target = Path(dest).expanduser().absolute()
    name = _format_of(target, format)
    _check_place(target, name, overwrite=overwrite)
    transforms = as_transforms("export", transform)
    selection = None if only is None else Selection(only)
    chosen = {} if only is None else {"only": [only] if isinstance(only, str) else list(only)}
    is_file = isinstance(source, str | os.PathLike) and os.fspath(source).endswith(".eqx")
    if like is not None and (name in _BY_LIKE or not is_file):
        options["like"] = like

    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
        made = Path(folder, "new", target.name)

        def use(tensors: Tensors, about: Mapping[str, Any]) -> None:
            # It may be written again: from another copy, or if this one went away meanwhile.
            shutil.rmtree(made.parent, ignore_errors=True)
            made.parent.mkdir()
            for function in transforms:
                tensors = function(tensors)
            if not tensors:
                raise StateMismatch(f"export: {transforms} left no leaf of {source}")
            try:
                formats.named(name).write(made, tensors, {**about, **chosen}, **options)
            except CkptCallbacksError as error:
                raise type(error)(str(error).replace(str(made), str(target))) from error

        with growing(f"writing {target.name}", made.parent):
            opened("export", source, which, use, selection, stores, like)
        _check_place(target, name, overwrite=overwrite)  # it took a while
        _move(made.parent, target)
    return target


def _format_of(target: Path, given: str | None) -> str:
    """Return the format to write `target` in.

    Raises:
        ConfigError: it is not known, or the suffix says another.
    """
    by_suffix = formats.SUFFIXES.get(target.suffix)
    name = given or by_suffix
    if name not in formats.FORMATS:
        raise ConfigError(
            f"export: {f'format {name!r}' if name else target.name} is not known; formats are "
            f"{', '.join(formats.FORMATS)}, and suffixes {', '.join(formats.SUFFIXES)}"
            + " (a folder needs format=)"
            * (name is None)
        )
    if by_suffix not in (None, name):
        raise ConfigError(f"export: {target.name} is a name for {by_suffix}, not for {name}")
    return name


def _check_place(target: Path, name: str, *, overwrite: bool) -> None:
    """Raise ConfigError if nothing can be written at `target`."""
    if not target.parent.is_dir():
        raise ConfigError(f"export: there is no folder {target.parent}: make it first")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ConfigError(f"export: {target} is there already; overwrite=True replaces it")
    if target.is_dir() and (what := _kept(target, name)):
        raise ConfigError(f"export: {target} is {what}, which is not overwritten")


def _kept(folder: Path, name: str) -> str | None:
    """Return what a folder is if it is not to be replaced by one in the format `name`."""
    if (folder / ".ckpt_callbacks").exists():
        return "a run directory"
    if (folder.parent / ".ckpt_callbacks").exists() and folder.name.isdecimal():
        return "a checkpoint of a run"
    if formats.format_of(folder) != name:
        return f"a folder that is not in the format {name}"
    here = {path.name for path in folder.iterdir()}
    if name == "orbax":  # one file says that all of the folder is a checkpoint
        more = set() if here & {"_CHECKPOINT_METADATA", "_METADATA"} else here
    else:
        parts = (".safetensors", ".safetensors.index.json")
        more = {file for file in here if not file.endswith(parts)}
    return f"a folder that holds more than a checkpoint, {min(more)}" if more else None


def _move(folder: Path, target: Path) -> None:
    """Let what was written in `folder` take the place of what there is, `target` last."""
    for made in sorted(folder.iterdir(), key=lambda path: path.name == target.name):
        there, old = target.with_name(made.name), folder / f".{made.name}.old"
        is_folder = there.is_dir() and not there.is_symlink()
        try:
            # What a rename does not replace.
            if is_folder or (made.is_dir() and os.path.lexists(there)):
                there.rename(old)
            made.replace(there)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(there):
                old.rename(there)
            raise
    fsync(target.parent)
