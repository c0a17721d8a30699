"""The leaves of whatever holds some: a run, a checkpoint, an address, a file, or a live state."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any, TypeVar

from ckpt_callbacks import formats, orbax_io
from ckpt_callbacks.addresses import is_address
from ckpt_callbacks.bucket import is_bucket
from ckpt_callbacks.contents import Contents
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.paths import Path, Selection, show
from ckpt_callbacks.pickles import refuse_pickle
from ckpt_callbacks.record import File, Record, numbers
from ckpt_callbacks.sources import visit
from ckpt_callbacks.state import capture, leaves_of
from ckpt_callbacks.stores import Store
from ckpt_callbacks.tensors import Tensor, Tensors, of_contents, of_state

__all__ = ["Transform", "Use", "about", "as_transforms", "leaves_in", "opened"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")
Transform = Callable[[Tensors], Tensors]
Use = Callable[[Tensors, Mapping[str, Any]], S]
"""Gets the leaves, which can be read until it returns, and what is known of them: JSON by name."""


def opened(
    owner: str,
    source: Any,
    which: int | str,
    use: Use[S],
    only: Selection | None = None,
    stores: Sequence[Store] | None = None,
    like: Any = None,
) -> S:
    """Return what `use` makes of the leaves of a source; `owner` asks for it.

    It may be called again with the leaves of another copy, if the first one is damaged.

    Args:
        owner: how the messages call who asks.
        source: a run directory, a checkpoint or an address, as `restore` takes it; a file or a
            folder in one of the `formats`; or a live state.
        which: in a run directory, an alias or a step.
        use: gets the leaves.
        only: which of them.
        stores: where to look for another copy, as in `restore`.
        like: what gives a file of Equinox its names, of which it has none.

    Raises:
        ConfigError: `source` is none of those, or has no `which`.
        StateMismatch: a live state has leaves without values.
        RecordError, CheckpointNotFound, CorruptCheckpoint: as `restore` has it.
    """

    def of_file(name: str, path: FilePath) -> S:
        tensors, metadata = formats.named(name).read(path)
        among = only and only.in_file(metadata)
        chosen = _chosen(owner, tensors.keys(), tensors, among, str(source))
        return use({at: x for at, x in tensors.items() if at in chosen}, metadata)

    if not isinstance(source, str | os.PathLike):
        _no_which(owner, "a live state", which)
        capture(source)  # raises what is wrong with it, all at once
        there = of_state(source)
        chosen = _chosen(owner, leaves_of(source).keys(), there, only, "the state")
        return use({at: x for at, x in there.items() if at in chosen}, {})
    elsewhere = is_address(source) or is_bucket(source)
    if name := None if elsewhere else _format(owner, FilePath(source)):
        _no_which(owner, str(source), which)
        path = FilePath(source).expanduser()
        if name == "equinox" and like is not None:
            into: Any = formats.named(name)
            said = into.hyper_parameters(path)
            known = said if isinstance(said, dict) else {}
            read, among = into.read_into(path, like), only and only.in_file(known)
            return opened(owner, read, which, lambda found, _: use(found, known), among)
        return of_file(name, path)

    def reader(path: FilePath, record: Record | None, files: Mapping[str, File]) -> S:
        return use(leaves_in(owner, path, files, only), about(path, record))

    weights = partial(of_file, "safetensors")
    return visit(owner, source, which, reader, only, stores, weights=weights)


def leaves_in(
    owner: str, path: FilePath, files: Mapping[str, File], only: Selection | None = None
) -> dict[Path, Tensor]:
    """Return the leaves of the checkpoint at `path`, or some; of no file before it was checked.

    Raises:
        CheckpointNotFound: there is nothing that is chosen and can be read.
        CorruptCheckpoint: a file is damaged.
    """

    def choose(names: list[str]) -> Collection[str]:
        return names if only is None else only.items(names, str(path))

    contents = Contents(path, None, choose, files)
    chosen = _chosen(
        owner, contents.leaves.keys(), contents.template(), only, str(path), contents.items
    )
    return of_contents(contents, chosen)


def as_transforms(owner: str, transform: Transform | Sequence[Transform] | None) -> list[Transform]:
    """Return the functions that are given as one, several, or none.

    Raises:
        ConfigError: one is no function.
    """
    if transform is None:
        return []
    functions: list[Any] = [transform]
    if isinstance(transform, Sequence) and not isinstance(transform, str):
        functions = list(transform)
    if wrong := [function for function in functions if not callable(function)]:
        raise ConfigError(f"{owner}: transform takes functions of leaves, which {wrong[0]!r} isn't")
    return functions


def _format(owner: str, path: FilePath) -> str | None:
    """Return the format of a file or folder, or `None` where a checkpoint of Orbax may be.

    Raises:
        ConfigError: there is nothing, a pickle, or a file that nothing here reads.
    """
    path = path.expanduser()
    if path.is_dir():
        ours = (path / ".ckpt_callbacks").is_dir() or orbax_io.is_checkpoint(path)
        return None if ours or orbax_io.steps(path) else formats.format_of(path)
    if not path.exists():
        raise ConfigError(f"{owner}: there is no {path}")
    if (name := formats.format_of(path)) is None:
        refuse_pickle(path)
        raise ConfigError(
            f"{owner}: {path} is in no format that is read here: {', '.join(formats.FORMATS)}"
        )
    return name


def _no_which(owner: str, source: str, which: int | str) -> None:
    if which != "last":
        raise ConfigError(f"{owner}: {source} has no steps; leave out {which=}")


def _chosen(
    owner: str,
    leaves: Collection[Path],
    readable: Collection[Path],
    only: Selection | None,
    where: str,
    items: Collection[str] = (),
) -> set[Path]:
    """Return the leaves that are chosen and can be read, and say which cannot."""
    chosen = set(leaves) if only is None else only.of(leaves, where, items)
    left = sorted(show(path) for path in chosen - set(readable))
    chosen &= set(readable)
    if not chosen:
        raise CheckpointNotFound(
            f"{owner}: {where} has nothing that can be read alone"
            + f": {', '.join(left)} saved themselves" * bool(left)
        )
    if left:
        logger.warning(
            "%s: left out of %s, since they save themselves: %s", owner, where, ", ".join(left)
        )
    return chosen


def about(path: FilePath, record: Record | None) -> dict[str, Any]:
    """Return what is known of a checkpoint, by its record if it has one: JSON by name."""
    if record is None:
        theirs = orbax_io.metadata(path)
        ours = {"run", "leaves"} <= theirs.keys()  # one of ours, without its record
        found = {} if ours or not theirs else {"metadata": theirs}
        return found | ({"step": int(path.name)} if path.name.isdecimal() else {})
    return {
        "step": record.step,
        "time": record.time,
        "run": record.owner,
        "metrics": numbers(record.metrics),
        "metadata": dict(record.metadata),
        "digest": tree_digest(record.files),
    }
