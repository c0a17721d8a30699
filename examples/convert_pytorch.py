"""Take the weights of a PyTorch network into a Flax NNX one, and back.

    python examples/convert_pytorch.py

The state dict is made with NumPy, in the names and the layout of PyTorch: what it computes is
compared to a forward pass in plain NumPy that reads it as PyTorch does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import ckpt_callbacks as cc
from ckpt_callbacks.formats import safetensors
from ckpt_callbacks.state import apply
from ckpt_callbacks.tensors import Tensors, of_state

CHANNELS, SIDE, HIDDEN, CLASSES = 6, 8, 16, 10
StateDict = dict[str, np.ndarray]

KEY_MAP = cc.KeyMap([
    # PyTorch convolves (batch, channel, height, width), Flax (batch, height, width, channel).
    cc.Rule("conv1.weight", "conv.kernel", "o i h w -> h w i o"),
    # The first dense layer sees each picture flattened, so its rows are in another order too.
    cc.Rule("fc1.weight", "hidden.kernel", "o (c h w) -> (h w c) o", c=CHANNELS, h=SIDE // 2),
    cc.Rule("fc2.weight", "out.kernel", "o i -> i o"),
    cc.Rule("bn1.weight", "norm.scale"),
    cc.Rule("bn1.running_{moment}", "norm.{moment}", moment=("mean", "var")),
    cc.Rule("bn1.num_batches_tracked", None),
    cc.Rule("conv1.bias", "conv.bias"),
    cc.Rule("bn1.bias", "norm.bias"),
    cc.Rule("fc1.bias", "hidden.bias"),
    cc.Rule("fc2.bias", "out.bias"),
])  # fmt: skip


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, CHANNELS, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, use_running_average=True, rngs=rngs)
        self.hidden = nnx.Linear(CHANNELS * (SIDE // 2) ** 2, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(pixels)))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def pytorch_state_dict() -> StateDict:
    """Return what `torch.nn.Module.state_dict` would, of a network with random weights."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv1.weight": (CHANNELS, 1, 3, 3), "conv1.bias": (CHANNELS,),
        "bn1.weight": (CHANNELS,), "bn1.bias": (CHANNELS,),
        "bn1.running_mean": (CHANNELS,), "bn1.running_var": (CHANNELS,),
        "fc1.weight": (HIDDEN, CHANNELS * (SIDE // 2) ** 2), "fc1.bias": (HIDDEN,),
        "fc2.weight": (CLASSES, HIDDEN), "fc2.bias": (CLASSES,),
    }  # fmt: skip
    weights = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    weights["bn1.running_var"] = rng.uniform(0.5, 2, CHANNELS)
    state_dict = {name: x.astype(np.float32) for name, x in weights.items()}
    return state_dict | {"bn1.num_batches_tracked": np.array(1000)}


def forward(weights: StateDict, pixels: np.ndarray) -> np.ndarray:
    """Compute what PyTorch would; `pixels` are (batch, channel, height, width)."""
    padded = np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    x = np.einsum("bihwyx,oiyx->bohw", windows, weights["conv1.weight"])
    x = x + weights["conv1.bias"][:, None, None]
    factor = weights["bn1.weight"] / np.sqrt(weights["bn1.running_var"] + 1e-5)
    x = (x - weights["bn1.running_mean"][:, None, None]) * factor[:, None, None]
    x = np.maximum(x + weights["bn1.bias"][:, None, None], 0)
    x = x.reshape(len(x), CHANNELS, SIDE // 2, 2, SIDE // 2, 2).max(axis=(3, 5))
    x = np.maximum(x.reshape(len(x), -1) @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
    return x @ weights["fc2.weight"].T + weights["fc2.bias"]


def from_pytorch(state_dict: Tensors) -> Network:
    model = Network(nnx.Rngs(0))
    tensors = KEY_MAP.apply(state_dict, like=of_state(model))
    return apply(model, {path: tensor.read() for path, tensor in tensors.items()})


def to_pytorch(model: Network) -> StateDict:
    tensors = KEY_MAP.reverse().apply(of_state(model))
    return {".".join(path): tensor.read() for path, tensor in tensors.items()}


def main() -> None:
    state_dict = pytorch_state_dict()
    pixels = np.random.default_rng(1).normal(size=(5, 1, SIDE, SIDE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"  # as `safetensors.torch.save_file` writes it
        safetensors.write(path, of_state(state_dict), {})
        tensors, _ = safetensors.read(path)
        print(KEY_MAP.plan(tensors, like=of_state(Network(nnx.Rngs(0)))))
        model = from_pytorch(tensors)

    expected = forward(state_dict, pixels)
    computed = np.asarray(model(pixels.transpose(0, 2, 3, 1)))
    print(f"outputs differ by at most {np.abs(computed - expected).max():.1e}")

    back = to_pytorch(model)
    same = all(back[name].tobytes() == state_dict[name].tobytes() for name in back)
    lost = sorted(state_dict.keys() - back.keys())
    print(f"back in PyTorch: {len(back)} arrays, {'every bit the same' if same else 'changed'}")
    print(f"what NNX has no place for: {', '.join(lost)}")


if __name__ == "__main__":
    main()
