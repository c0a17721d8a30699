"""Files of `eqx.tree_serialise_leaves`, also with a first line of JSON as Equinox's guide has it.

Such a file has arrays one after the other, and no names: it is read into a module, or what
`eqx.filter_eval_shape` makes of one, and the leaves have to fit in number, shape and dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, NoReturn

from ckpt_callbacks.atomic import new_file
from ckpt_callbacks.errors import ConfigError, StateMismatch
from ckpt_callbacks.extras import require
from ckpt_callbacks.formats._equinox_file import header, is_stored, read_into
from ckpt_callbacks.leaves import key_impl
from ckpt_callbacks.paths import show
from ckpt_callbacks.state import apply, leaves_of, names_of
from ckpt_callbacks.tensors import Tensor, Tensors

__all__ = ["hyper_parameters", "matches", "read", "read_into", "write", "write_module"]

_KEYS = (
    "holds typed PRNG keys, which Equinox cannot store: have jax.random.key_data(keys) in its place"
)


def matches(path: FilePath) -> bool:
    """Return whether a file has Equinox's suffix."""
    return path.suffix == ".eqx" and path.is_file()


def read(path: FilePath) -> NoReturn:
    """Raise, since the file has no names to read the leaves by.

    Raises:
        ConfigError: always; it says what to do instead.
    """
    raise ConfigError(
        f"{path} was written by Equinox and has no names, only arrays one after the other: give "
        "like=, the module that was saved, or what eqx.filter_eval_shape makes of its class"
    )


def write(
    path: FilePath,
    tensors: Tensors,
    metadata: Mapping[str, Any],
    *,
    like: Any = None,
    hyper_parameters: Any = None,
    **options: Any,
) -> None:
    """Write the leaves in the order that a module has them in, one in memory at a time.

    Only nodes that an adapter takes apart, such as modules of NNX, are put together as a whole
    first: Equinox has the leaves that are in them in an order of its own.

    Args:
        path: of the file.
        tensors: the leaves.
        metadata: is left out: what there may be before the arrays is what a module is made by.
        like: the module, which has the same leaves as the tensors; it may be abstract.
        hyper_parameters: JSON for a first line, as the guide of Equinox has it. Who reads the file
            has to read that line before `eqx.tree_deserialise_leaves` gets it; without it, that
            takes the file as it is.
        options: none.

    Raises:
        ConfigError: there is no `like`, or the hyper-parameters are no JSON.
        StateMismatch: the leaves are not those of `like`, or as `write_module` has it.
    """
    import jax
    import numpy as np

    if options:
        raise ConfigError(
            f"a file of Equinox has no option {', '.join(options)}: it has like and "
            "hyper_parameters"
        )
    if like is None:
        raise ConfigError(
            f"{path} is to be written as Equinox does, in the order in which a module has its "
            "leaves: give like=, the module"
        )
    wanted = leaves_of(like).keys()
    if unlike := sorted(map(show, wanted ^ tensors.keys())):
        raise StateMismatch(
            f"like and what is to be written have different leaves: {', '.join(unlike[:5])}"
        )
    for names, tensor in tensors.items():
        if why := _why_not(tensor):
            raise StateMismatch(f"the leaf at {show(names)} {why}")
    line = _line(hyper_parameters)
    flat = jax.tree_util.tree_flatten_with_path(like)[0]
    order = [names_of(keys) for keys, leaf in flat if is_stored(leaf)]
    if set(order) != {at for at, x in tensors.items() if x.leaf.kind not in ("str", "bytes")}:
        whole = apply(like, {names: tensor.read() for names, tensor in tensors.items()})
        write_module(path, whole, hyper_parameters)
        return
    with new_file(path) as file:
        file.write(line)
        for names in order:
            np.save(file, np.asarray(tensors[names].read()), allow_pickle=False)


def write_module(
    path: FilePath, module: Any, hyper_parameters: Any = None, filter_spec: Any = None
) -> None:
    """Write a module as `eqx.tree_serialise_leaves` does, at exactly the path that is given.

    Args:
        path: of the file; no suffix is put to it.
        module: any pytree; what is neither an array nor a number is left out, as Equinox does.
        hyper_parameters: JSON for the first line, which Equinox's own function does not have.
        filter_spec: as Equinox has it; what it writes is not checked.

    Raises:
        ConfigError: the hyper-parameters are no JSON.
        StateMismatch: a leaf is of a dtype that Equinox could not read back.
    """
    import jax
    import numpy as np

    line = _line(hyper_parameters)
    leaves = jax.tree_util.tree_flatten_with_path(module)[0] if filter_spec is None else []
    for keys, leaf in leaves:
        if why := _unstorable(leaf):
            raise StateMismatch(f"the leaf at {show(names_of(keys))} {why}")
    with new_file(path) as file:
        file.write(line)
        if filter_spec is not None:
            require("equinox", extra="equinox", who="filter_spec")
            import equinox

            equinox.tree_serialise_leaves(file, module, filter_spec=filter_spec)
        for _, leaf in leaves:
            if is_stored(leaf):
                np.save(file, np.asarray(leaf), allow_pickle=False)


def hyper_parameters(path: FilePath) -> Any:
    """Return the JSON in the first line of a file; `None` if there is no such line.

    Raises:
        CorruptCheckpoint: the first line is neither JSON nor an array.
    """
    with path.open("rb") as file:
        return header(path, file)


def _line(hyper_parameters: Any) -> bytes:
    """Return the first line of a file; nothing if there is nothing to say."""
    if hyper_parameters is None:
        return b""
    try:
        return json.dumps(hyper_parameters).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the hyper-parameters are no JSON: {error}") from error


def _unstorable(leaf: Any) -> str | None:
    """Return why Equinox could not read back a leaf that it writes, if so."""
    import jax
    import numpy as np

    if not is_stored(leaf):
        return None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "is abstract: it has a shape and a dtype, but no values"
    if key_impl(getattr(leaf, "dtype", np.dtype(bool))):
        return _KEYS
    return _refused(np.asarray(leaf).dtype)  # of a large whole number: an object


def _why_not(tensor: Tensor) -> str | None:
    """Return why Equinox could not read back a leaf, which is not read for it if it is large."""
    import jax
    import numpy as np

    match tensor.leaf.kind:
        case "key":
            return _KEYS
        case "array":
            return _refused(jax.numpy.dtype(tensor.leaf.dtype))
        case "int":
            return _refused(np.asarray(tensor.read()).dtype)
    return None


def _refused(dtype: Any) -> str | None:
    import jax

    plain = dtype.kind in "biufc" and dtype.isbuiltin != 2  # one that was added to NumPy
    if not plain and dtype != jax.numpy.bfloat16:
        return f"is of dtype {dtype}, which Equinox cannot store"
    return None
