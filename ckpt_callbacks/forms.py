"""The forms of a model: with or without what training needs, layers stacked or one by one.

`jax.lax.scan` goes over layers whose arrays are stacked along an axis, and inference often wants
one entry a layer; checkpoints come in either form. What is here turns states into each other, live
or abstract ones and the leaves of a checkpoint (`Tensors`), which are read one at a time::

    served = cc.unstack(cc.strip(state), axis=1)  # {"params": {"layers_0": …}}
    scanned = cc.stack(state, tx=optimizer)  # parameters and moments
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

from ckpt_callbacks.containers import Stacked, Unstacked, rebuild
from ckpt_callbacks.errors import ConfigError, StateMismatch
from ckpt_callbacks.groups import Group, as_groups, check_layers, counts, inside
from ckpt_callbacks.leaves import Leaf, leaf_of
from ckpt_callbacks.moments import check_alike, check_like, check_optimizer, check_shapes
from ckpt_callbacks.paths import Path
from ckpt_callbacks.payload import WEIGHTS
from ckpt_callbacks.stacking import joined, split
from ckpt_callbacks.state import children, leaves_of
from ckpt_callbacks.tensors import Tensor

__all__ = ["stack", "strip", "unstack"]

S = TypeVar("S")


def strip(state: Any, also: str | Collection[str] = ()) -> Any:
    """Return the weights of a training state alone: what inference needs.

    They are what is named `params`, `model` or `weights` at the top, and keep that name.

    Args:
        state: a live or abstract state, or the leaves of a checkpoint (`Tensors`).
        also: names at the top of what is kept besides, such as `batch_stats`.

    Returns:
        A dict by the names at the top, or the leaves that are left.

    Raises:
        StateMismatch: there are no weights, or nothing is named as `also` says.
    """
    if _is_tensors(state):
        kept = _kept({path[0] for path in state if path}, also)
        return {path: tensor for path, tensor in state.items() if path and path[0] in kept}
    parts = _children(state)
    kept = _kept(parts.keys(), also)
    return {name: part for name, part in parts.items() if name in kept}


def stack(
    state: S,
    group: str | Collection[str] = "layers",
    axis: int = 0,
    *,
    tx: Any = None,
    like: Any = None,
) -> S:
    """Return a state with numbered layers stacked, as `jax.lax.scan` and `nn.scan` have them.

    This is done wherever the names of a group are met, thus to the moments of an optimizer as
    well, to groups within groups, and with further axes, such as one of experts, left as they are.

    Args:
        state: a live or abstract state, which may be traced (`jax.eval_shape`), or the leaves of
            a checkpoint (`Tensors`), which are read when what is made of them is. Give the state
            of objects that are changed in place, such as `nnx.state(model)`.
        group: what the layers are called, or several such patterns: `layers_{}`, short `layers`,
            for `layers_0, layers_1`, and `layers/{}` for the children of `layers`, a list or
            what has numbers for names. Names in front narrow it: `decoder/layers_{}`. What is
            stacked is called `layers`; if a layer is a list itself, only `layers_{}` in full says
            that this is not one entry a layer.
        axis: where the axis of layers is in a stacked array; the last axis of arrays that have
            fewer, so that with 1 a bias becomes (features, layers).
        tx: the Optax optimizer of the state: what it would begin with for the new weights has to
            have the form of the new state. Weights are `params`, `model` or `weights` at the top.
        like: a state of the form that is to come out, live or abstract; shapes are compared.

    What mirrors a weight must have its shape, unless `like` says what comes out, and without `tx`
    and `like` all weights must be mirrored alike: more cannot be seen of an optimizer. Whether it
    updates a stacked array as it does the layers is not: one that takes norms, as LAMB, does not.

    Raises:
        ConfigError: `group` or `axis` cannot be what they are.
        StateMismatch: layers are not numbered from 0 without a gap, are not alike, or hold
            something else than arrays; or the optimizer's state has no such form, as of
            Adafactor and Muon. Nothing has been read or computed yet.
    """
    groups = _arguments("stack", group, axis)
    before = _leaves(state)
    check_layers(before, groups)
    if like is None:
        check_shapes(before, inside(before, groups))
    _check(before, joined(before, groups, axis), tx, like)
    if _is_tensors(state):
        return cast(S, joined(cast(Any, state), groups, axis))
    values = joined(leaves_of(state), groups, axis)
    return cast(S, rebuild(Stacked(groups, values), state))


def unstack(
    state: S,
    group: str | Collection[str] = "layers",
    axis: int = 0,
    *,
    tx: Any = None,
    like: Any = None,
) -> S:
    """Return a state with one entry a layer, where layers were stacked; see `stack`.

    With `layers/{}`, the entries are a list, or have numbers for names in an `nnx.State`.

    Of a checkpoint's leaves, the layers of one are in a row: in this order each stacked leaf is
    read once, and no more than one of them is kept in memory.

    Raises:
        ConfigError: as `stack` has it.
        StateMismatch: nothing is stacked there, leaves do not agree on the number of layers, or
            the optimizer's state has no such form. Nothing has been read or computed yet.
    """
    groups = _arguments("unstack", group, axis)
    before = _leaves(state)
    if like is None:
        check_shapes(before, inside(before, groups))
    sizes = counts(before, groups, axis)
    _check(before, split(before, groups, axis, sizes), tx, like)
    if _is_tensors(state):
        return cast(S, split(cast(Any, state), groups, axis, sizes))
    values = split(leaves_of(state), groups, axis, sizes)
    return cast(S, rebuild(Unstacked(groups, values, sizes), state))


def _kept(tops: Collection[str], also: str | Collection[str]) -> set[str]:
    more = (also,) if isinstance(also, str) else also
    missing = [name for name in more if name not in tops]
    kept = {*WEIGHTS, *more} & {*tops}
    if missing or not kept:
        wanted = ", ".join(missing) or f"{', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}"
        there = ", ".join(sorted(tops)) or "nothing"
        raise StateMismatch(
            f"strip: nothing at the top is named {wanted}; there is {there}: give the weights one "
            "of these names, as in {'params': …}, or name with also= what is kept"
        )
    return kept


def _arguments(who: str, group: str | Collection[str], axis: int) -> list[Group]:
    if not isinstance(axis, int) or isinstance(axis, bool) or axis < 0:
        raise ConfigError(f"{who}: axis must be 0 or more, not {axis!r}")
    return as_groups(who, group)


def _check(before: Mapping[Path, Leaf], after: Mapping[Path, Leaf], tx: Any, like: Any) -> None:
    if tx is not None:
        check_optimizer(before, after, tx)
    if like is not None:
        check_like(after, _leaves(like))
    if tx is None and like is None:
        check_alike(before, before.keys() - after.keys())


def _leaves(state: Any) -> dict[Path, Leaf]:
    if _is_tensors(state):
        return {path: tensor.leaf for path, tensor in state.items()}
    leaves = leaves_of(state).items()
    return {path: leaf_of(value) or Leaf(type(value).__name__) for path, value in leaves}


def _is_tensors(state: Any) -> bool:
    values = state.values() if isinstance(state, Mapping) else ()
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def _children(state: Any) -> dict[str, Any]:
    if isinstance(state, Mapping):
        return {str(key): child for key, child in state.items()}
    return children(state)
