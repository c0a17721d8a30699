"""Whether the state of an optimizer has the form that its weights were given."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ckpt_callbacks.errors import StateMismatch
from ckpt_callbacks.leaves import Leaf, leaf_of
from ckpt_callbacks.paths import Path, show
from ckpt_callbacks.payload import WEIGHTS
from ckpt_callbacks.state import leaves_of, put

__all__ = ["check_alike", "check_like", "check_optimizer", "check_shapes"]

_Leaves = Mapping[Path, Leaf]
_ANEW = (
    "\nIts state depends on the form of the weights and cannot be given another: take the weights "
    "alone (strip), and begin with tx.init of them"
)


def check_like(made: _Leaves, like: _Leaves) -> None:
    """Check that a state has the names, kinds and shapes of another.

    Raises:
        StateMismatch: it has not; the message names the first difference.
    """
    here, there = (
        {path: leaf for path, leaf in leaves.items() if leaf.kind != "files"}
        for leaves in (made, like)
    )
    if problem := _difference(here, there, "in like"):
        fits = not _difference(_weights(here), _weights(there), "")
        raise StateMismatch(f"the new form is not that of like=: {problem}{_ANEW if fits else ''}")


def check_optimizer(before: _Leaves, after: _Leaves, tx: Any) -> None:
    """Check that an optimizer would begin with a state of the form that was made of its own.

    Raises:
        StateMismatch: it would not, there are no weights, or the state is of another optimizer.
    """
    begun, wanted = _begun(before, tx), _begun(after, tx)
    if not begun and not wanted:
        return
    roots = _roots(before, begun)
    if not roots:
        raise StateMismatch(
            "no part of the state is one of tx= for the weights: give the optimizer of the state, "
            "or like="
        )
    for root in roots:
        below = {p[len(root) :]: leaf for p, leaf in after.items() if p[: len(root)] == root}
        if problem := _difference(below, wanted, "as tx.init has it"):
            raise StateMismatch(
                f"the optimizer has no such state for the new form of the weights: below "
                f"{show(root)}, {problem}{_ANEW}"
            )


def check_shapes(leaves: _Leaves, layers: Set[Path]) -> None:
    """Check that what mirrors the weights of layers has their shapes.

    Raises:
        StateMismatch: it has not, so that nobody knows which of its axes are those of the weights.
    """
    weights = _weights(leaves)
    for root, mirrored in _mirrors(leaves, weights).items():
        for below in sorted(mirrored):
            path, leaf = (*root, *below), leaves[(*root, *below)]
            if path in layers and leaf.shape != weights[below].shape:
                raise StateMismatch(
                    f"{show(path)} is {leaf}, and the weight that it is for {weights[below]}: what "
                    f"has not the shape of its weight has no other form{_ANEW}"
                )


def check_alike(leaves: _Leaves, layers: Set[Path]) -> None:
    """Check that an optimizer treats all weights alike, as far as can be seen.

    Raises:
        StateMismatch: it does not, perhaps by their shapes.
    """
    mirrors = {
        root: mirrored
        for root, mirrored in _mirrors(leaves, _weights(leaves)).items()
        if any((*root, *below) in layers for below in mirrored)
    }
    for root, mirrored in mirrors.items():
        for other, theirs in mirrors.items():
            if lacking := sorted(theirs - mirrored):
                raise StateMismatch(
                    f"{show(root)} has nothing for {show(lacking[0])}, and {show(other)} has: the "
                    "optimizer does not treat all weights alike; give tx= or like= to tell whether "
                    f"it would the new ones{_ANEW}"
                )


def _weights(leaves: _Leaves) -> dict[Path, Leaf]:
    return {path[1:]: leaf for path, leaf in leaves.items() if path and path[0] in WEIGHTS}


def _mirrors(leaves: _Leaves, weights: _Leaves) -> dict[Path, set[Path]]:
    """Return where, besides the weights, something has their paths below it, and which it has."""
    found: dict[Path, set[Path]] = {}
    for path in leaves:
        tails = (k for k in range(1, len(path)) if path[k:] in weights)
        if path and path[0] not in WEIGHTS and (k := next(tails, 0)):
            found.setdefault(path[:k], set()).add(path[k:])
    return found


def _begun(leaves: _Leaves, tx: Any) -> dict[Path, Leaf]:
    """Return what an optimizer begins with for the weights among `leaves`."""
    import jax

    top = next((name for name in WEIGHTS if any(path[:1] == (name,) for path in leaves)), None)
    weights: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if len(path) > 1 and path[0] == top and leaf.kind == "array":
            dtype = jax.numpy.dtype(leaf.dtype)
            abstract = jax.ShapeDtypeStruct(leaf.shape, dtype)  # type: ignore[no-untyped-call]
            put(weights, path[1:], abstract)
    if not weights:
        names = ", ".join(WEIGHTS)
        raise StateMismatch(f"tx= needs the weights in the state, at the top as one of {names}")
    state = jax.eval_shape(tx.init, weights)
    if not jax.tree_util.tree_leaves(state):
        return {}
    found = leaves_of(state).items()
    return {path: known for path, value in found if (known := leaf_of(value))}


def _roots(leaves: _Leaves, wanted: _Leaves) -> list[Path]:
    """Return where in a state there is one that has all of `wanted`, with its shapes."""
    first = next(iter(wanted), ())
    ends = [path for path in leaves if path[len(path) - len(first) :] == first]
    roots = [path[: len(path) - len(first)] for path in ends]
    return [
        root
        for root in roots
        if all(
            (leaf := leaves.get((*root, *p))) and leaf.shape == w.shape for p, w in wanted.items()
        )
    ]


def _difference(made: _Leaves, wanted: _Leaves, where: str) -> str | None:
    for path in (*made, *wanted):
        here, there = made.get(path), wanted.get(path)
        same = here and there and here.shape == there.shape
        if not same:
            return (
                f"{show(path)} is {here or 'not there'} in the new form, and "
                f"{there or 'not there'} {where}"
            )
    return None
