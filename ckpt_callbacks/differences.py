"""How two checkpoints differ: in their leaves, and in the numbers of those that both have.

One leaf of each is in memory at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.opening import opened
from ckpt_callbacks.paths import Path, Selection, show
from ckpt_callbacks.tensors import Tensor, Tensors

__all__ = ["LeafDifference", "differences"]

_AT_ONCE = 2**20
"""Numbers that are compared at once, each of which takes 8 bytes meanwhile."""


@dataclass(frozen=True, slots=True)
class LeafDifference:
    """What there is to say of one leaf."""

    path: str
    kind: Literal["same", "values", "form", "only in A", "only in B"]
    """`form` where shapes, dtypes or types differ; then the values are not compared."""
    a: Leaf | None
    b: Leaf | None
    unequal: int = 0
    """How many numbers differ; 1 for text."""
    largest: float | None = None
    """The largest distance of two numbers; infinite where one is not finite, `None` for text."""
    relative: float | None = None
    """Norm of the difference, divided by that of A."""


def differences(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    which_a: int | str = "last",
    which_b: int | str = "last",
    *,
    only: str | Collection[str] | None = None,
) -> list[LeafDifference]:
    """Compare two checkpoints leaf by leaf, in the order of A's.

    Args:
        a: a run directory, a checkpoint, an address, or a file in one of the formats.
        b: the other one.
        which_a: of a run directory, an alias or a step.
        which_b: the same of `b`.
        only: paths in both, as `restore` takes them.

    Raises:
        ConfigError, RecordError, CheckpointNotFound, CorruptCheckpoint: as `restore` has it.
    """
    selection = None if only is None else Selection(only)

    def with_a(tensors: Tensors, _: Mapping[str, Any]) -> list[LeafDifference]:
        return opened(
            "diff", b, which_b, lambda others, _: [*_compared(tensors, others)], selection
        )

    return opened("diff", a, which_a, with_a, selection)


def _compared(a: Mapping[Path, Tensor], b: Mapping[Path, Tensor]) -> Iterator[LeafDifference]:
    for path, tensor in a.items():
        other = b.get(path)
        if other is None:
            yield LeafDifference(show(path), "only in A", tensor.leaf, None)
        elif tensor.leaf != other.leaf:
            yield LeafDifference(show(path), "form", tensor.leaf, other.leaf)
        else:
            unequal, largest, relative = _distance(tensor.read(), other.read())
            kind: Literal["same", "values"] = "values" if unequal else "same"
            yield LeafDifference(
                show(path), kind, tensor.leaf, other.leaf, unequal, largest, relative
            )
    for path, tensor in b.items():
        if path not in a:
            yield LeafDifference(show(path), "only in B", None, tensor.leaf)


def _distance(a: Any, b: Any) -> tuple[int, float | None, float | None]:
    """Return how many numbers differ, by how much at most, and in proportion to all of A."""
    import numpy as np

    if isinstance(a, str | bytes):
        return int(a != b), None, None
    if not isinstance(a, np.ndarray | np.generic) and abs(a) > 2**53:  # no array has it
        return int(a != b), float(abs(a - b)), abs(a - b) / abs(a)
    flat_a, flat_b = np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)
    unequal, largest, gaps, norm = 0, 0.0, 0.0, 0.0
    for at in range(0, flat_a.size, _AT_ONCE):
        x, y = flat_a[at : at + _AT_ONCE], flat_b[at : at + _AT_ONCE]
        differ = (x != y) & ~(_is_nan(x) & _is_nan(y))  # a NaN in both is the same
        wide = np.complex128 if x.dtype.kind == "c" else np.float64
        with np.errstate(invalid="ignore", over="ignore"):
            norm += float(np.nansum(np.abs(x.astype(wide)) ** 2))
            gap = np.abs(x[differ].astype(wide) - y[differ].astype(wide))
            gap = np.where(np.isnan(gap), math.inf, gap)
            gaps += float(np.sum(gap**2))
        unequal += int(differ.sum())
        largest = max(largest, float(gap.max(initial=0.0)))
    relative = math.sqrt(gaps / norm) if norm else (math.inf if gaps else 0.0)
    return unequal, largest, relative


def _is_nan(x: Any) -> Any:
    return x != x  # noqa: PLR0124  # also of dtypes that NumPy has not
