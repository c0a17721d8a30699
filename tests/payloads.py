"""What the tests of published weights share: real checkpoints, and looks into a file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.formats import safetensors
from ckpt_callbacks.manifest import tree_digest
from ckpt_callbacks.record import record_to_json
from ckpt_callbacks.stores import Checkpoint
from ckpt_callbacks.tensors import of_state
from loops import callbacks_in

KEY = "0123456789ab"
LEAVES = ("layers.kernel", "layers.bias", "head.w", "head.seed", "head.empty")
FILE = "weights/model.safetensors"


def state_of(value: float) -> dict[str, Any]:
    """Return a state with two stacked layers."""
    layers = {"kernel": jnp.full((2, 3, 4), value, jnp.bfloat16), "bias": jnp.ones((2, 4)) * value}
    seed = jax.random.key(3)
    head = {"w": jnp.linspace(-1.0, value, 7), "seed": seed, "empty": jnp.zeros((0, 2))}
    return {"params": {"layers": layers, "head": head}, "moments": {"m": jnp.zeros(3)}}


def saved(folder: Path, step: int = 0) -> tuple[Checkpoint, dict[str, Any]]:
    """Save a checkpoint; return it as a worker hands it to a store, and the state that it is of."""
    root, state = folder / f"saved-{step}", state_of(step + 0.5)
    with callbacks_in(root).run(state, config={}) as run:
        run.on_step(step, state, {"loss": 1.0})
    record = RunDirectory(root).read_record(step)
    assert record is not None
    checkpoint = Checkpoint(
        run_id=KEY,
        step=step,
        path=root / str(step),
        metrics=record.metrics,
        files=record.files,
        digest=tree_digest(record.files),
        reason="latest #1",
        time=record.time,
        manifest=record_to_json(replace(record, copies={})),
    )
    return checkpoint, state


def check_plainly(content: bytes, state: dict[str, Any]) -> None:
    """Check that a file holds the weights of a state bit for bit, with nothing of ours."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert header.pop("__metadata__")["format"] == "pt"
    assert header.keys() == {f"params.{name}" for name in LEAVES}
    for name, entry in header.items():
        _, group, leaf = name.split(".")
        value = state["params"][group][leaf]
        array = np.asarray(jax.random.key_data(value) if leaf == "seed" else value)
        begin, end = entry["data_offsets"]
        assert tuple(entry["shape"]) == array.shape
        assert content[start + begin : start + end] == array.tobytes()


def check_read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Check that a file or folder is read as the weights of a state; return its metadata."""
    found, about = safetensors.read(path)
    expected = of_state({"params": state["params"]})
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.leaf.dtype == expected[name].leaf.dtype
        assert tensor.leaf.shape == expected[name].leaf.shape
        assert tensor.read().tobytes() == expected[name].read().tobytes()
    return about
