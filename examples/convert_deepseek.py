"""Take the weights of a DeepSeek-like model from the layout of Hugging Face into one for `scan`,
and back.

    python examples/convert_deepseek.py

Hugging Face has one array for each layer and each expert, (out, in). In JAX a model is compiled
faster when one `scan` goes through all layers that are alike, so these are stacked here in two
groups: the dense ones at the beginning and those with experts, of which all are one array too.
The model is tiny, and its weights are random; the names and the axes are those of DeepSeek-V3 in
bfloat16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import ckpt_callbacks as cc
from ckpt_callbacks.formats import safetensors
from ckpt_callbacks.tensors import of_state

VOCABULARY, WIDTH, DENSE_WIDTH, EXPERT_WIDTH = 64, 32, 48, 16
HEADS, NOPE, ROPE, VALUE = 4, 8, 4, 8
"""Heads, and in each the sizes of a query without and with rotation, and of a value."""
QUERY_RANK, KEY_RANK, EXPERTS = 24, 12, 8
GROUPS = {"dense": range(2), "moe": range(2, 5)}
"""The numbers of the layers."""


def attention(group: str, layers: range) -> list[cc.Rule]:
    """Return the rules for what all layers have: latent attention, and norms."""
    here, there = "model.layers.{l}.self_attn", f"{group}.attention"
    return [
        cc.Rule(f"{here}.q_a_proj.weight", f"{there}.query_down", "r i -> l i r", l=layers),
        cc.Rule(f"{here}.q_a_layernorm.weight", f"{there}.query_norm", "r -> l r", l=layers),
        cc.Rule(f"{here}.q_b_proj.weight", f"{there}.query_up", "(h d) r -> l r h d",
                l=layers, h=HEADS),
        cc.Rule(f"{here}.kv_a_proj_with_mqa.weight", f"{there}.key_value_down", "r i -> l i r",
                l=layers),
        cc.Rule(f"{here}.kv_a_layernorm.weight", f"{there}.key_value_norm", "r -> l r", l=layers),
        cc.Rule(f"{here}.kv_b_proj.weight", f"{there}.key_value_up", "(h d) r -> l r h d",
                l=layers, h=HEADS),
        cc.Rule(f"{here}.o_proj.weight", f"{there}.out", "o (h d) -> l h d o", l=layers, h=HEADS),
        cc.Rule("model.layers.{l}.{which}_layernorm.weight", f"{group}.norm.{{which}}",
                "i -> l i", l=layers),
    ]  # fmt: skip


def feed_forward() -> list[cc.Rule]:
    dense, moe = GROUPS.values()
    here = "model.layers.{l}.mlp"
    return [
        cc.Rule(f"{here}.{{w}}_proj.weight", "dense.mlp.{w}", "o i -> l i o", l=dense),
        cc.Rule(f"{here}.gate.weight", "moe.router.kernel", "e i -> l i e", l=moe),
        cc.Rule(f"{here}.gate.e_score_correction_bias", "moe.router.bias", "e -> l e", l=moe),
        cc.Rule(f"{here}.shared_experts.{{w}}_proj.weight", "moe.shared.{w}", "o i -> l i o",
                l=moe),
        cc.Rule(f"{here}.experts.{{e}}.{{w}}_proj.weight", "moe.experts.{w}", "o i -> l e i o",
                l=moe, e=EXPERTS),
    ]  # fmt: skip


KEY_MAP = cc.KeyMap([
    cc.Rule("model.embed_tokens.weight", "embed.embedding"),
    cc.Rule("model.norm.weight", "norm.scale"),
    cc.Rule("lm_head.weight", "head.kernel", "o i -> i o"),
    *(rule for group, layers in GROUPS.items() for rule in attention(group, layers)),
    *feed_forward(),
])  # fmt: skip


def mlp(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "gate_proj.weight": (width, WIDTH),
        "up_proj.weight": (width, WIDTH),
        "down_proj.weight": (WIDTH, width),
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of Hugging Face."""
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer in [*GROUPS["dense"], *GROUPS["moe"]]:
        below: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (WIDTH,),
            "post_attention_layernorm.weight": (WIDTH,),
            "self_attn.q_a_proj.weight": (QUERY_RANK, WIDTH),
            "self_attn.q_a_layernorm.weight": (QUERY_RANK,),
            "self_attn.q_b_proj.weight": (HEADS * (NOPE + ROPE), QUERY_RANK),
            "self_attn.kv_a_proj_with_mqa.weight": (KEY_RANK + ROPE, WIDTH),
            "self_attn.kv_a_layernorm.weight": (KEY_RANK,),
            "self_attn.kv_b_proj.weight": (HEADS * (NOPE + VALUE), KEY_RANK),
            "self_attn.o_proj.weight": (WIDTH, HEADS * VALUE),
        }
        if layer in GROUPS["dense"]:
            below |= {f"mlp.{name}": shape for name, shape in mlp(DENSE_WIDTH).items()}
        else:
            below |= {"mlp.gate.weight": (EXPERTS, WIDTH)}
            below |= {"mlp.gate.e_score_correction_bias": (EXPERTS,)}
            for part in ["shared_experts", *(f"experts.{e}" for e in range(EXPERTS))]:
                below |= {f"mlp.{part}.{n}": shape for n, shape in mlp(EXPERT_WIDTH).items()}
        names |= {f"model.layers.{layer}.{name}": shape for name, shape in below.items()}
    return names


def weights() -> dict[str, np.ndarray]:
    """Return random ones, bfloat16 but for the bias of the router."""
    rng = np.random.default_rng(0)
    kinds = {name: jnp.float32 if name.endswith("bias") else jnp.bfloat16 for name in shapes()}
    return {name: rng.normal(size=shape).astype(kinds[name]) for name, shape in shapes().items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        huggingface, ours, back = (Path(folder) / name for name in ("hf", "ours", "back"))
        safetensors.write(huggingface, of_state(weights()), {}, max_shard_size=50_000)

        theirs, _ = safetensors.read(huggingface)
        print(KEY_MAP.plan(theirs))
        # Little more is in memory at a time than one stack: of a large model, of all its experts.
        safetensors.write(ours, KEY_MAP.apply(theirs), {})

        stacked, _ = safetensors.read(ours)
        safetensors.write(back, KEY_MAP.reverse().apply(stacked), {}, max_shard_size=50_000)

        again, _ = safetensors.read(back)
        values = {".".join(path): tensor.read() for path, tensor in again.items()}
    same = all(values[name].tobytes() == x.tobytes() for name, x in weights().items())
    print(f"{len(theirs)} arrays became {len(stacked)}, and {len(again)} again: ", end="")
    print("every bit the same" if same else "changed")


if __name__ == "__main__":
    main()
