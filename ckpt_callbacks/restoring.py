"""Restoring a state from a checkpoint, wherever that is."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, overload

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.leaves import DType
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.reading import read, read_freely
from ckpt_callbacks.record import File, Record
from ckpt_callbacks.sources import visit
from ckpt_callbacks.stores import Store

__all__ = ["Weights", "restore"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")


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

    def reader(path: Path, _: Record | None, files: Mapping[str, File]) -> Any:
        if like is None:
            return read_freely(path, files, selection, as_numpy=as_numpy)
        return read(path, like, files, selection, dtype=dtype, as_numpy=as_numpy)

    return visit("restore", source, which, reader, selection, stores, verify=verify)


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
        made = restore(self.source, like=state, **options)
        logger.warning("a new run begins with %s of %s", self.only or "all", self.source)
        return made
