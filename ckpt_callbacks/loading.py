"""Weights for a model, from whatever holds them and under whatever name it has them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar, get_args, overload

from ckpt_callbacks.contents import Stored, finished
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError, StateMismatch
from ckpt_callbacks.leaves import DType
from ckpt_callbacks.matching import check_same
from ckpt_callbacks.opening import Transform, as_transforms, opened
from ckpt_callbacks.paths import STATES, Path, Selection, show
from ckpt_callbacks.payload import WEIGHTS
from ckpt_callbacks.reading import tell_dtypes
from ckpt_callbacks.state import apply, is_abstract, leaves_of, put
from ckpt_callbacks.stores import Store
from ckpt_callbacks.tensors import Tensor, Tensors

__all__ = ["load_params"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")
_ALONE = ("leaf",)
"""Path of a state that is a leaf itself, as in a checkpoint."""


@overload
def load_params(
    source: Any,
    like: None = None,
    *,
    which: int | str = ...,
    only: str | Collection[str] | None = ...,
    dtype: DType = ...,
    group: str | None = ...,
    axis: int = ...,
    transform: Transform | Sequence[Transform] | None = ...,
    stores: Sequence[Store] | None = ...,
) -> dict[str, Any]: ...


@overload
def load_params(
    source: Any,
    like: S,
    *,
    which: int | str = ...,
    only: str | Collection[str] | None = ...,
    dtype: DType = ...,
    group: str | None = ...,
    axis: int = ...,
    transform: Transform | Sequence[Transform] | None = ...,
    stores: Sequence[Store] | None = ...,
) -> S: ...


def load_params(
    source: Any,
    like: Any = None,
    *,
    which: int | str = "last",
    only: str | Collection[str] | None = "params",
    dtype: DType = "saved",
    group: str | None = None,
    axis: int = 0,
    transform: Transform | Sequence[Transform] | None = None,
    stores: Sequence[Store] | None = None,
) -> Any:
    """Return the weights that a checkpoint, a file or a live state holds, as `like` has them.

    On either side the names may begin with `params`, `model` or `weights`, once or several times:
    that is left out before they are compared. So `params/params/dense/kernel` of a file is
    `dense/kernel` of a bare model. What does not fit is told all at once, before an array is read.

    Args:
        source: what `export` takes; of a file of Equinox, which has no names, `like` has to be
            the module, or an abstract one.
        like: a live state or an abstract one, as in `restore`: it says where arrays lie and how
            they are sharded. If it holds more than weights, the rest of it stays as it is. Without
            it, nested dicts of NumPy arrays, without the names above.
        which: in a run directory, an alias or a step.
        only: paths in the source. By default what is called `params`, `model` or `weights` at the
            top, or everything where nothing is. What is left beside a `model` may be weights too,
            such as `lm_head`, so that is told; `None` takes everything.
        dtype: `saved` gives the dtype that a leaf had, `cast` that of `like`, and with `error`
            the two must agree.
        group: the layers that are one array each on one side, with an axis for the layer, and
            numbered on the other, as `stack` takes them: `layers/{}` or `layers_{}`. All such
            layers if not given.
        axis: the axis of the layers where they are one array each.
        transform: a function of `Tensors`, or several, for the names in the source.
        stores: where to look for another copy of a damaged checkpoint.

    Raises:
        ConfigError: an argument is none of those.
        StateMismatch: `like` has other leaves or shapes, or places that do not fit.
        RecordError, CheckpointNotFound, CorruptCheckpoint: as `restore` has it.
    """
    if dtype not in get_args(DType):
        raise ConfigError(f"load_params: dtype must be one of {get_args(DType)}, not {dtype!r}")
    selection = _selection(only)
    transforms = as_transforms("load_params", transform)
    live = not isinstance(source, str | os.PathLike)
    where = "in memory" if live else str(source)

    def use(tensors: Tensors, _: Mapping[str, Any]) -> Any:
        for function in transforms:
            tensors = function(tensors)
        prefix = _wrapper(tensors)
        bare: Tensors = {p[len(prefix) :] or _ALONE: tensor for p, tensor in tensors.items()}
        if like is None:
            return _nested(bare, copy=live)
        wanted = _weights_of(like, selection, None if transforms else prefix)
        ours = leaves_of(like)
        targets = {path: ours[at] for path, at in wanted.items()}
        bare = _formed(
            {_without_value(p, targets): t for p, t in bare.items()}, targets, group, axis
        )
        _check(targets, bare, where, dtype)
        new = {at: _placed(bare[p], targets[p], dtype, copy=live) for p, at in wanted.items()}
        _tell_abstract(where, {at: x for at, x in ours.items() if at not in new})
        return apply(like, new)

    return opened("load_params", source, which, use, selection, stores, like)


class _Weights(Selection):
    """What is called weights at the top, or all where nothing is."""

    def __init__(self, *, tell: bool = True) -> None:
        super().__init__("params")
        self._tell = tell

    def of(self, paths: Collection[Path], where: str, items: Collection[str] = ()) -> set[Path]:
        if not {path[0] for path in paths if path} & set(WEIGHTS):
            return set(paths)
        chosen = super().of(paths, where, items)
        taken = {path[0] for path in chosen}
        left = {path[0] for path in paths if len(path) > 1} - taken
        if left and self._tell and "params" not in taken:  # which nobody calls a part of a model
            logger.warning(
                "%s: %s is taken for its weights, and the rest is left as it is: %s; only=None "
                "takes everything",
                where,
                ", ".join(sorted(taken)),
                ", ".join(sorted(left)),
            )
        return chosen

    def items(self, items: Collection[str], where: str) -> list[str]:
        if {*WEIGHTS, *STATES} & set(items):
            return super().items(items, where)
        return list(items)


def _selection(only: str | Collection[str] | None) -> Selection | None:
    if only is None:
        return None
    return _Weights() if only == "params" else Selection(only)


def _wrapper(paths: Iterable[Path]) -> Path:
    """Return what all names begin with that only says that they are weights."""
    prefix: Path = ()
    while True:
        heads = {path[len(prefix) :][:1] for path in paths if len(path) > len(prefix) + 1}
        short = any(len(path) <= len(prefix) + 1 for path in paths)
        if short or len(heads) != 1 or (head := heads.pop())[0] not in WEIGHTS:
            return prefix
        prefix += head


def _weights_of(like: Any, only: Selection | None, prefix: Path | None) -> dict[Path, Path]:
    """Return the paths of the weights in a state, by what they are without a wrapper.

    Args:
        like: the state.
        only: what is chosen in the source.
        prefix: the wrapper that the source has, `None` if its names are others.
    """
    paths = leaves_of(like).keys()
    if only is None or isinstance(only, _Weights):
        chosen = set(paths) if only is None else only.of(paths, "the state")
        wrapper = _wrapper(chosen)
        return {at[len(wrapper) :] or _ALONE: at for at in paths if at in chosen}
    wrapper = _wrapper(_Weights(tell=False).of(paths, "the state"))
    bare = {at[len(wrapper) :]: at for at in paths if at[: len(wrapper)] == wrapper}
    if prefix is None:
        return bare
    try:
        chosen = only.of({(*prefix, *path) for path in bare}, "the state")
    except CheckpointNotFound:
        if not wrapper or prefix:
            raise
        bare = {at: at for at in paths}  # such as `params` and `batch_stats`, on both sides
        chosen = only.of(bare.keys(), "the state")
    return {path: at for path, at in bare.items() if (*prefix, *path) in chosen}


def _without_value(path: Path, wanted: Collection[Path]) -> Path:
    """Return the path of a leaf without the level that an `nnx.State` has above each."""
    nnx = path[-1:] == ("value",) and path not in wanted and path[:-1] in wanted
    return path[:-1] if nnx else path


def _formed(tensors: Tensors, wanted: Collection[Path], group: str | None, axis: int) -> Tensors:
    """Return leaves with their layers in one array each, or in one of their own, as wanted."""
    here, there = _numbered(wanted), _numbered(tensors)
    for patterns, others, function in (
        (here - there, tensors, "unstack"),
        (there - here, wanted, "stack"),
    ):
        joined = {name for path in others for name in path[:-1]}
        for pattern in sorted(patterns):
            if _base(pattern) in joined and group in (None, pattern, _base(pattern)):
                from ckpt_callbacks import forms

                tensors = getattr(forms, function)(tensors, group=pattern, axis=axis)
    return tensors


def _numbered(paths: Iterable[Path]) -> set[str]:
    """Return what is numbered, as `stack` takes it: `layers/{}` or `layers_{}`."""
    found: set[str] = set()
    for path in paths:
        found |= {f"{name}/{{}}" for name, below in pairwise(path) if below.isdecimal()}
        found |= {f"{m[1]}_{{}}" for name in path[:-1] if (m := re.fullmatch(r"(.+)_\d+", name))}
    return found


def _base(pattern: str) -> str:
    """Return what layers in one array each are below, by what they are called one by one."""
    return pattern[: -len("/{}")]


def _check(targets: Mapping[Path, Any], tensors: Tensors, where: str, dtype: DType) -> None:
    """Raise StateMismatch if the leaves do not fit those that are wanted."""
    # All go where the state has them, also those that were not saved from a device.
    leaves = {path: replace(tensor.leaf, on_device=True) for path, tensor in tensors.items()}
    check_same(targets, leaves, where, dtype=dtype, hint=False)
    if dtype == "saved":
        tell_dtypes(where, targets, leaves)


def _placed(tensor: Tensor, wanted: Any, dtype: DType, *, copy: bool) -> Any:
    """Return a leaf where `wanted` is."""
    import jax
    import numpy as np

    value = _own(tensor.read(), copy=copy)
    on_device = isinstance(wanted, jax.Array | jax.ShapeDtypeStruct)
    if isinstance(value, np.ndarray) and not (value.shape or tensor.leaf.on_device):
        value = _number(value, wanted)
    if tensor.leaf.kind == "key":
        keys = jax.random.wrap_key_data(jax.numpy.asarray(value), impl=tensor.leaf.dtype)
        pinned = getattr(wanted, "committed", True)
        return jax.device_put(keys, wanted.sharding if pinned else None)
    if on_device and isinstance(value, np.generic):
        value = np.asarray(value)
    return finished(value, Stored("", None, None, tensor.leaf), wanted, dtype, numpy=False)


def _number(value: Any, wanted: Any) -> Any:
    """Return an array without dimensions as a number where the state has one, and Orbax none."""
    import numpy as np

    if isinstance(wanted, np.generic):
        return value[()]
    same = isinstance(wanted, bool | complex) and type(value.item()) is type(wanted)
    return value.item() if same else value


def _nested(tensors: Tensors, *, copy: bool) -> dict[str, Any]:
    """Return leaves as nested dicts of arrays in the host's memory."""
    above = {path[:n]: path for path in tensors for n in range(1, len(path))}
    if wrong := [path for path in tensors if path in above]:
        raise StateMismatch(
            f"{show(wrong[0])} is a leaf, and {show(above[wrong[0]])} is below it, which no dict "
            "can hold: give a state with like="
        )
    nested: dict[str, Any] = {}
    for path, tensor in tensors.items():
        put(nested, path, _own(tensor.read(), copy=copy))
    return nested


def _tell_abstract(where: str, left: Mapping[Path, Any]) -> None:
    """Say what of the state nobody has given values."""
    if tops := sorted({show(at[:1]) for at, value in left.items() if is_abstract(value)}):
        logger.warning(
            "%s: nothing was loaded for %s, which stays abstract", where, ", ".join(tops)
        )


def _own(value: Any, *, copy: bool) -> Any:
    """Return an array that is nobody else's: one that is read-only is mapped from a file."""
    import numpy as np

    others = isinstance(value, np.ndarray) and (copy or not value.flags.writeable)
    return np.array(value) if others else value
