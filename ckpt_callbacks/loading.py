"""Weights for a model, from whatever holds them and under whatever name it has them."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args, overload

from ckpt_callbacks import streams
from ckpt_callbacks.contents import Stored, finished
from ckpt_callbacks.errors import ConfigError, StateMismatch
from ckpt_callbacks.layering import check_form, formed
from ckpt_callbacks.leaves import DType
from ckpt_callbacks.matching import check_same
from ckpt_callbacks.opening import Transform, as_transforms, opened
from ckpt_callbacks.paths import Path, show
from ckpt_callbacks.reading import tell_dtypes
from ckpt_callbacks.state import apply, is_abstract, leaves_of, put
from ckpt_callbacks.stores import Store
from ckpt_callbacks.tensors import Tensor, Tensors
from ckpt_callbacks.weights import ALONE, selection_of, weights_of, wrapper_of

__all__ = ["load_params"]

logger = logging.getLogger("ckpt_callbacks")
S = TypeVar("S")


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
    format: str | None = ...,
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
    format: str | None = ...,
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
    format: str | None = None,
) -> Any:
    """Return the weights that a checkpoint, a file or a live state holds, as `like` has them.

    On either side the names may begin with `params`, `model` or `weights`, once or several times:
    that is left out before they are compared. So `params/params/dense/kernel` of a file is
    `dense/kernel` of a bare model. What does not fit is told all at once, before an array is read.

    Args:
        source: what `export` takes; of a file of Equinox, which has no names, `like` has to be
            the module, or an abstract one. With `format=`, bytes or a stream of them.
        like: a live state or an abstract one, as in `restore`: it says where arrays lie and how
            they are sharded. If it holds more than weights, the rest of it stays as it is. Without
            it, nested dicts of NumPy arrays, without the names above.
        which: in a run directory, an alias or a step.
        only: paths in the source. By default what is called `params`, `model` or `weights` at the
            top, or everything where nothing is. What is left beside a `model` may be weights too,
            such as `lm_head`, so that is told, and `None` takes everything. Of a file that was not
            made from a checkpoint, everything unless it has `params`.
        dtype: `saved` gives the dtype that a leaf had, `cast` that of `like`, and with `error`
            the two must agree.
        group: the layers that are one array each on one side, with an axis for the layer, and
            numbered on the other, as `stack` takes them: `layers/{}` or `layers_{}`, or `layers`
            for both. All such layers if not given.
        axis: the axis of the layers where they are one array each.
        transform: a function of `Tensors`, or several, for the names in the source.
        stores: where to look for another copy of a damaged checkpoint.
        format: of bytes, or of a stream: `safetensors`, `npz`, `npy`, `msgpack` or `equinox`.
            Nothing that is a folder.

    Raises:
        ConfigError: an argument is none of those, or nothing is called as `group` says.
        StateMismatch: `like` has other leaves or shapes, or places that do not fit.
        RecordError, CheckpointNotFound, CorruptCheckpoint: as `restore` has it.
    """
    if format is not None:
        with streams.file_of("load_params", source, format) as path:
            return load_params(
                path, like, which=which, only=only, dtype=dtype, group=group, axis=axis,
                transform=transform, stores=stores,
            )  # fmt: skip
    if streams.is_content(source):
        raise ConfigError(
            f"load_params: {type(source).__name__} does not say what it holds: give format=, such "
            "as 'safetensors'"
        )
    if dtype not in get_args(DType):
        raise ConfigError(f"load_params: dtype must be one of {get_args(DType)}, not {dtype!r}")
    check_form("load_params", group, axis)
    if group is not None and like is None:
        raise ConfigError(
            "load_params: group= names the layers that are to have the form of those in like=; "
            "give that, or transform=partial(cc.unstack, group=…)"
        )
    selection = selection_of(only)
    transforms = as_transforms("load_params", transform)
    live = not isinstance(source, str | os.PathLike)
    where = "in memory" if live else str(source)

    def use(tensors: Tensors, _: Mapping[str, Any]) -> Any:
        for function in transforms:
            tensors = function(tensors)
        prefix = wrapper_of(tensors)
        bare: Tensors = {p[len(prefix) :] or ALONE: tensor for p, tensor in tensors.items()}
        if like is None:
            return _nested(bare, copy=live)
        ours = leaves_of(like)
        wanted = weights_of(ours, selection, None if transforms else prefix, bare)
        targets = {path: ours[at] for path, at in wanted.items()}
        bare = {_without_value(path, targets): tensor for path, tensor in bare.items()}
        bare = formed("load_params", bare, targets, group, axis)
        _check(targets, bare, where, dtype)
        new = {at: _placed(bare[p], targets[p], dtype, copy=live) for p, at in wanted.items()}
        _tell_abstract(where, {at: x for at, x in ours.items() if at not in new})
        return apply(like, new)

    return opened("load_params", source, which, use, selection, stores, like)


def _without_value(path: Path, wanted: Collection[Path]) -> Path:
    """Return the path of a leaf without the level that an `nnx.State` has above each."""
    nnx = path[-1:] == ("value",) and path not in wanted and path[:-1] in wanted
    return path[:-1] if nnx else path


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
