"""Models of transformers and PyTorch: our folders of shards are read by them, and theirs by us.

`tox run -e transformers` runs this. `.ci/run` does not, since PyTorch takes long to install.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import ckpt_callbacks as cc
from ckpt_callbacks import formats
from ckpt_callbacks.state import put
from ckpt_callbacks.tensors import Tensors
from saved import save

CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=64),
    "llama": LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=64,
    ),
}
CLASSES: dict[str, Any] = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD = 8000


def made(name: str, dtype: str) -> Any:
    torch.manual_seed(1)
    return CLASSES[name](CONFIGS[name]).to(DTYPES[dtype])


def on_host(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which PyTorch gives NumPy no array of
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return np.asarray(tensor.numpy())


def weights(model: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a model; one with two names under the first of them, as it is stored."""
    found: dict[int, tuple[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        found.setdefault(tensor.data_ptr(), (name, tensor))
    return {name: on_host(tensor) for name, tensor in found.values()}


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def without_prefix(tensors: Tensors) -> Tensors:
    return {path[1:]: tensor for path, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_a_run_that_was_written_as_shards(
    name: str, dtype: str, tmp_path: Path
) -> None:
    model = made(name, dtype)
    params: dict[str, Any] = {}
    for path, array in weights(model).items():
        put(params, path.split("."), jnp.asarray(array))
    root = save(tmp_path / "run", {"params": params, "step": 3})

    folder = cc.export(
        root,
        tmp_path / "ours",
        format="safetensors",
        only="params",
        transform=without_prefix,
        max_shard_size=SHARD,
    )
    model.config.save_pretrained(folder)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )

    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(loaded.state_dict()[n], expected[n]) for n in expected)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("size", ["8KB", "1GB"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_is_read(name: str, dtype: str, size: str, tmp_path: Path) -> None:
    model = made(name, dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)

    tensors, _ = formats.named("safetensors").read(tmp_path / "theirs")

    expected = weights(model)
    assert {".".join(path) for path in tensors} == expected.keys()
    assert all(same(t.read(), expected[".".join(path)]) for path, t in tensors.items())
    loaded = cc.load_params(tmp_path / "theirs", only=None)
    assert len(jax.tree.leaves(loaded)) == len(expected)
