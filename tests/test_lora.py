"""Adapters of LoRA, apart from their weights and merged into them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import ckpt_callbacks as cc
from ckpt_callbacks import lora
from ckpt_callbacks.tensors import of_state


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        ones = nnx.initializers.ones
        self.inner = nnx.LoRALinear(3, 4, lora_rank=2, b_initializer=ones, rngs=rngs)
        outer = nnx.Linear(4, 5, rngs=rngs)
        self.outer = nnx.LoRA(4, 2, 5, base_module=outer, b_initializer=ones, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.outer(nnx.relu(self.inner(x)))


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(dtype)


def test_merged_weights_of_nnx_compute_the_same() -> None:
    model = Network(nnx.Rngs(0))
    x = random(7, 3)

    merged = {path: t.read() for path, t in lora.merge(of_state(model), scale=1).items()}

    hidden = nnx.relu(x @ merged["inner", "kernel"] + merged["inner", "bias"])
    linear = ("outer", "base_module")
    computed = hidden @ merged[*linear, "kernel"] + merged[*linear, "bias"]
    np.testing.assert_allclose(computed, model(x), rtol=1e-5, atol=1e-5)
    assert len(merged) == 4


def test_adapters_and_weights_are_taken_apart() -> None:
    tensors = of_state(Network(nnx.Rngs(0)))

    base, adapters = lora.split(tensors)

    assert {"/".join(path) for path in adapters} == {
        "inner/lora/lora_a", "inner/lora/lora_b", "outer/lora_a", "outer/lora_b",
    }  # fmt: skip
    assert base | adapters == tensors
    assert lora.split(of_state({"explora_a": 1, "lora_ab": 2}))[1] == {}


@pytest.mark.parametrize(
    ("w", "a", "b"),
    [
        ((3, 4), (3, 2), (2, 4)),
        ((3, 4, 5), (3, 2), (2, 20)),  # a projection to heads, which qwix flattens
        ((4, 5, 3), (20, 2), (2, 3)),
        ((3, 4, 5), (3, 2), (2, 4, 5)),  # of an einsum
        ((3, 3, 1, 4), (3, 3, 1, 2), (2, 4)),  # of a convolution
    ],
)
def test_the_names_and_shapes_of_qwix(w: Any, a: Any, b: Any) -> None:
    state = {"kernel": random(*w), "kernel_lora_a": random(*a), "kernel_lora_b": random(*b)}

    (merged,) = lora.merge(of_state(state), scale=0.5).values()

    flat = state["kernel_lora_a"].reshape(-1, 2) @ state["kernel_lora_b"].reshape(2, -1)
    np.testing.assert_allclose(
        merged.read(), state["kernel"] + flat.reshape(w) / 2, rtol=1e-5, atol=1e-6
    )


def test_layers_for_scan_are_merged_each() -> None:
    state = {"w": random(3, 4, 5), "w_lora_a": random(3, 4, 2), "w_lora_b": random(3, 2, 5)}

    (merged,) = lora.merge(of_state(state), scale=1).values()

    each = [w + a @ b for w, a, b in zip(*state.values(), strict=True)]
    np.testing.assert_allclose(merged.read(), each, rtol=1e-5, atol=1e-6)


def test_the_sum_is_rounded_once() -> None:
    """In bfloat16 itself each of the products, and then the sum, would be rounded."""
    w, a, b = (random(*s, dtype=ml_dtypes.bfloat16) for s in ((40, 50), (40, 8), (8, 50)))
    state = {"w": w, "w_lora_a": a, "w_lora_b": b}

    (merged,) = lora.merge(of_state(state), scale=0.3).values()

    w, a, b = (x.astype(np.float32) for x in (w, a, b))
    expected = (w + np.float32(0.3) * (a @ b)).astype(ml_dtypes.bfloat16)
    assert merged.leaf.dtype == "bfloat16"
    assert merged.read().tobytes() == expected.tobytes()


def test_nothing_is_read_before_it_is_asked_for() -> None:
    tensors = of_state(Network(nnx.Rngs(0)))

    def read() -> Any:
        raise AssertionError

    unread = {path: type(tensor)(tensor.leaf, read) for path, tensor in tensors.items()}
    merged = lora.merge(unread, scale=1)

    assert merged["inner", "kernel"].leaf == tensors["inner", "kernel"].leaf
    with pytest.raises(AssertionError):
        merged["inner", "kernel"].read()


def test_all_that_cannot_be_merged_is_told_at_once() -> None:
    state = {
        "half": {"kernel": random(3, 4), "kernel_lora_a": random(3, 2)},
        "alone": {"lora_a": random(3, 2), "lora_b": random(2, 4)},
        "einsum": {"w": random(6, 3, 4), "w_lora_a": random(3, 2), "w_lora_b": random(2, 6, 4)},
        "whole": {
            "w": np.zeros((3, 4), np.int8), "w_lora_a": random(3, 2), "w_lora_b": random(2, 4)
        },
    }  # fmt: skip

    with pytest.raises(cc.StateMismatch) as caught:
        lora.merge(of_state(state), scale=1)

    einsum = (
        "einsum.w has the shape (6, 3, 4), and (3, 2) @ (2, 6, 4) is to be added: if only its axes "
        "lie in another order, bring those of its inputs to the front by a KeyMap, and back after"
    )
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines] == [
        "the adapters cannot be merged",
        "alone.lora_a has no weight to be merged into: alone.base_module.kernel",
        "alone.lora_b has no weight to be merged into: alone.base_module.kernel",
        einsum,
        "half.kernel_lora_a is there without its other half",
        "whole.w is int8[3, 4]: dequantize it first",
    ]


def test_several_adapters_of_one_weight_are_refused() -> None:
    half = {"lora_a": random(3, 2), "lora_b": random(2, 4)}
    layer = {"kernel": random(3, 4), "lora": half}
    layer |= {f"kernel_{name}": array for name, array in half.items()}
    with pytest.raises(cc.StateMismatch, match=r"layer\.kernel has several adapters"):
        lora.merge(of_state({"layer": layer}), scale=1)


def test_weights_without_adapters_are_refused() -> None:
    with pytest.raises(cc.StateMismatch, match="there are no adapters"):
        lora.merge(of_state({"kernel": random(3, 4)}), scale=1)
