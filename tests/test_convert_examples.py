"""The examples of conversion end with the same outputs, and back with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import convert_deepseek
import convert_pytorch
from ckpt_callbacks.tensors import of_state


def test_a_network_of_pytorch_computes_the_same_in_nnx() -> None:
    state_dict = convert_pytorch.pytorch_state_dict()
    pixels = np.random.default_rng(2).normal(size=(3, 1, 8, 8)).astype(np.float32)

    model = convert_pytorch.from_pytorch(of_state(state_dict))

    expected = convert_pytorch.forward(state_dict, pixels)
    assert np.std(expected) > 0.1
    computed = model(pixels.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_flattened_axes_matters() -> None:
    """So that the comparison would find a wrong one."""
    state_dict = convert_pytorch.pytorch_state_dict()
    pixels = np.random.default_rng(2).normal(size=(3, 1, 8, 8)).astype(np.float32)
    expected = convert_pytorch.forward(state_dict, pixels)

    rows = state_dict["fc1.weight"].reshape(16, 6, 16).transpose(0, 2, 1)
    changed = convert_pytorch.forward(state_dict | {"fc1.weight": rows.reshape(16, 96)}, pixels)

    assert np.abs(changed - expected).max() > 0.1


def test_back_in_pytorch_every_bit_is_the_same() -> None:
    state_dict = convert_pytorch.pytorch_state_dict()

    back = convert_pytorch.to_pytorch(convert_pytorch.from_pytorch(of_state(state_dict)))

    del state_dict["bn1.num_batches_tracked"]
    assert {n: x.tobytes() for n, x in back.items()} == {
        n: np.asarray(x).tobytes() for n, x in state_dict.items()
    }


def test_experts_and_layers_of_deepseek_are_stacked_where_they_belong() -> None:
    weights = convert_deepseek.weights()

    stacked = {
        ".".join(path): tensor.read()
        for path, tensor in convert_deepseek.KEY_MAP.apply(of_state(weights)).items()
    }

    def same(ours: Any, theirs: Any) -> bool:
        return bool(ours.dtype == theirs.dtype) and ours.tobytes() == theirs.tobytes()

    layer = "model.layers.3"  # the second one with experts
    for expert in range(8):
        theirs = weights[f"{layer}.mlp.experts.{expert}.down_proj.weight"]
        assert same(stacked["moe.experts.down"][1, expert], theirs.T)
    heads = weights[f"{layer}.self_attn.q_b_proj.weight"].reshape(4, 12, 24)
    assert same(stacked["moe.attention.query_up"][1, :, 2], heads[2].T)
    assert same(stacked["dense.mlp.gate"][1], weights["model.layers.1.mlp.gate_proj.weight"].T)
    assert same(
        stacked["moe.router.bias"][2], weights["model.layers.4.mlp.gate.e_score_correction_bias"]
    )
    assert len(stacked) == 32


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (convert_pytorch, "back in PyTorch: 10 arrays, every bit the same\n"),
        (convert_deepseek, "141 arrays became 32, and 141 again: every bit the same\n"),
    ],
)
def test_each_example_says_so(
    example: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main()

    assert expected in capsys.readouterr().out
