"""Adapters of LoRA: apart from the weights that they change, or merged into them.

They are known by their names: those of qwix, which Tunix uses (`kernel_lora_a` beside `kernel`),
and of Flax NNX (`lora_a` in `nnx.LoRALinear`, or in `nnx.LoRA` around a `base_module`). Of other
names, such as those of PEFT, a `KeyMap` makes these.

There is no way back from what was merged: the sum was rounded, so that the weights before can only
be computed nearly, and of the adapters only their product. Keep the adapters, which are small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from ckpt_callbacks.errors import StateMismatch
from ckpt_callbacks.paths import Path, dotted
from ckpt_callbacks.tensors import Tensor, Tensors

__all__ = ["merge", "split"]

_A, _B = "lora_a", "lora_b"
_NAME = re.compile(r"(.+_)?lora_[ab]")


def split(tensors: Tensors) -> tuple[dict[Path, Tensor], dict[Path, Tensor]]:
    """Return the weights without adapters, and the adapters; `{**base, **adapters}` joins them."""
    adapters = {path: x for path, x in tensors.items() if path and _NAME.fullmatch(path[-1])}
    return {path: x for path, x in tensors.items() if path not in adapters}, adapters


def merge(tensors: Tensors, *, scale: float) -> dict[Path, Tensor]:
    """Return the weights with their adapters merged in: `w + scale * (a @ b)`.

    It is computed in float32 (of float64 weights in that), on the host, and rounded once to the
    dtype of the weight. A grouped convolution is not such a sum, though its shapes look like one.

    Args:
        tensors: the weights and their adapters, without the optimizer, which has such names too.
        scale: of qwix and Tunix `alpha / rank`; 1 for Flax, which has no scale.

    Raises:
        StateMismatch: there are no adapters, or some lack their weight or their other half, or do
            not fit it; all of them.
    """
    base, adapters = split(tensors)
    problems = [] if adapters else ["there are no adapters: no name ends with lora_a or lora_b"]
    merged = dict(base)
    for path in adapters:
        a, b = ((*path[:-1], path[-1][: -len(_A)] + half) for half in (_A, _B))
        weight = next((at for at in _weights(a) if at in base), None)
        if a not in adapters or b not in adapters:
            problems.append(f"{dotted(path)} is there without its other half")
        elif weight is None:
            names = " or ".join(map(dotted, _weights(a)))
            problems.append(f"{dotted(path)} has no weight to be merged into: {names}")
        elif path == a and merged[weight] is not base[weight]:
            problems.append(f"{dotted(weight)} has several adapters: merge one after the other")
        elif path == a:
            parts = base[weight], adapters[a], adapters[b]
            if problem := _unfit(*(part.leaf.shape for part in parts)):
                problems.append(f"{dotted(weight)} {problem}")
            elif "float" not in base[weight].leaf.dtype:
                problems.append(f"{dotted(weight)} is {base[weight].leaf}: dequantize it first")
            merged[weight] = Tensor(base[weight].leaf, partial(_merged, *parts, scale))
    if problems:
        raise StateMismatch("\n  ".join(["the adapters cannot be merged", *problems]))
    return merged


def _weights(a: Path) -> list[Path]:
    """Return where the weight of an adapter may be."""
    *parents, name = a
    if name != _A:
        return [(*parents, name.removesuffix(f"_{_A}"))]
    found = [(*parents, "base_module", "kernel")]
    return found + ([(*parents[:-1], "kernel")] if parents[-1:] == ["lora"] else [])


def _unfit(w: Sequence[int], a: Sequence[int], b: Sequence[int]) -> str | None:
    """Return why shapes do not fit, if so: the axes of `w` are those of `a`, then those of `b`."""
    if _is_batched(w, a, b):
        fits = a[2] == b[1] and w[1:] == (a[1], b[2])
    else:
        flat = len(a) == len(b) == 2 and any(
            (math.prod(w[:k]), math.prod(w[k:])) == (a[0], b[1]) for k in range(1, len(w))
        )
        fits = bool(a and b) and a[-1] == b[0] and ((*a[:-1], *b[1:]) == tuple(w) or flat)
    return None if fits else (
        f"has the shape {tuple(w)}, and {tuple(a)} @ {tuple(b)} is to be added: if only its axes "
        "lie in another order, bring those of its inputs to the front by a KeyMap, and back after"
    )  # fmt: skip


def _is_batched(w: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Return whether the first axis counts matrices, as of layers for `scan`."""
    return len(w) == len(a) == len(b) == 3 and w[0] == a[0] == b[0]


def _merged(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Any:
    import numpy as np

    weight = np.asarray(w.read())
    dtype = np.promote_types(weight.dtype, np.float32)
    left, right = (np.asarray(half.read()).astype(dtype) for half in (a, b))
    batched = _is_batched(weight.shape, left.shape, right.shape)
    change = left @ right if batched else np.tensordot(left, right, 1)
    merged = weight.astype(dtype) + dtype.type(scale) * change.reshape(weight.shape)
    return merged.astype(weight.dtype)
