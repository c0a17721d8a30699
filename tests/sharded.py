"""Restores on eight devices, in a process of their own: python sharded.py DIRECTORY.

Prints the outcome of every check as JSON. `DIRECTORY/one` was saved on one device;
`DIRECTORY/eight` is left behind.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ckpt_callbacks as cc
from loops import callbacks_in
from saved import save, tree_digest

ROOT = Path(sys.argv[1])


def mesh(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))


LINE, GRID = mesh(x=8), mesh(a=4, b=2)


def values(factor: int = 1) -> dict[str, Any]:
    """Return a state on one device; `tests/test_restore.py` makes the same one."""
    w = factor * jnp.arange(128, dtype=jnp.float32).reshape(16, 8)
    return {
        "params": {"w": w, "b": w[0].astype(jnp.bfloat16), "u": (w[:8] % 16).astype(jnp.uint4)},
        "keys": jax.random.split(jax.random.key(factor), 8),
        "step": jnp.asarray(factor),
    }


def sharded(state: dict[str, Any], first: NamedSharding, whole: Any) -> dict[str, Any]:
    """Put what has a length of a multiple of 8 where `first` says, and the step as it is."""
    put = {name: jax.device_put(x, first) for name, x in state["params"].items()}
    return {"params": put, "keys": jax.device_put(state["keys"], whole), "step": state["step"]}


def same(got: Any, like: Any, expected: Any) -> None:
    assert tree_digest(jax.device_get(got)) == tree_digest(jax.device_get(expected))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(like), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert isinstance(x, jax.Array), name
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), f"{name}: {x.sharding}"
        assert x.committed == y.committed, f"{name}: committed is {x.committed}"


def line() -> dict[str, Any]:
    return sharded(values(), NamedSharding(LINE, P("x")), NamedSharding(LINE, P("x")))


def check_the_same_mesh() -> None:
    like = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), line()["params"])
    same(cc.restore(ROOT / "eight", like={**line(), "params": like}), line(), values())


def check_another_mesh() -> None:
    for first in (P("a"), P("b"), P(("b", "a")), P()):
        like = sharded(values(0), NamedSharding(GRID, first), NamedSharding(GRID, P("b")))
        same(cc.restore(ROOT / "eight", like=like), like, values())


def check_one_device_of_eight() -> None:
    device = SingleDeviceSharding(jax.devices()[3])
    like = sharded(values(0), device, device)
    same(cc.restore(ROOT / "eight", like=like), like, values())


def check_saved_on_one_device() -> None:
    like = sharded(values(0), NamedSharding(GRID, P("a")), NamedSharding(GRID, P()))
    same(cc.restore(ROOT / "one", like=like), like, values())


def check_abstract_and_cast() -> None:
    where = NamedSharding(GRID, P("a"))
    like = {"params": {"w": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=where)}}
    got = cc.restore(ROOT / "eight", like=like, only="params/w", dtype="cast")["params"]["w"]
    assert got.dtype == jnp.bfloat16
    assert got.sharding == where
    assert (np.asarray(got) == np.asarray(values()["params"]["w"].astype(jnp.bfloat16))).all()


def check_what_does_not_divide_is_told_before_anything_is_read() -> None:
    root = save(ROOT / "odd", {"layers": [{"w": jnp.ones((9, 8))}, {"w": jnp.ones((8, 8))}]})
    where = NamedSharding(LINE, P("x"))
    like = {
        "layers": [
            {"w": jax.ShapeDtypeStruct((9, 8), jnp.float32, sharding=where)},
            {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=where)},
        ]
    }
    with (
        mock.patch("ckpt_callbacks.orbax_io.load", side_effect=AssertionError("it reads")),
        pytest.raises(cc.StateMismatch) as error,
    ):
        cc.restore(root, like=like)
    assert "layers/0/w: float32[9, 8] can not be sharded" in str(error.value)
    assert "layers/1" not in str(error.value)


@jax.jit
def train_step(state: dict[str, Any]) -> dict[str, Any]:
    noise = jax.random.normal(state["keys"][0], (8,)) + jax.random.normal(state["key"], (8,))
    params = {name: x + noise.astype(x.dtype) for name, x in state["params"].items()}
    return state | {"params": params, "step": state["step"] + 1}


def fresh(factor: int) -> dict[str, Any]:
    """Return sharded weights beside what belongs to no device yet."""
    params = sharded(values(factor), NamedSharding(LINE, P("x")), None)["params"]
    del params["u"]
    return {
        "params": params,
        "step": jnp.asarray(factor),
        "key": jax.random.key(factor),
        "keys": jax.random.split(jax.random.key(factor), 3),
        "count": jnp.zeros((0, 2)),
        "small": jnp.full(3, factor, jnp.uint4),
    }


def check_what_belongs_to_no_device_can_be_used_beside_what_is_sharded() -> None:
    expected = train_step(fresh(1))
    root = save(ROOT / "fresh", fresh(1))
    like = fresh(0)
    assert not like["step"].committed
    got = cc.restore(root, like=like)
    same(got, like, fresh(1))
    assert tree_digest(jax.device_get(train_step(got))) == tree_digest(jax.device_get(expected))

    with callbacks_in(root).run(like) as run:
        state = run.state
        run.on_step(1, train_step(state))
    abstract = jax.eval_shape(lambda: fresh(0))  # names no sharding
    train_step(cc.restore(root, like=abstract, which="last"))
    train_step(cc.restore(root) | {})


def main() -> None:
    save(ROOT / "eight", line())
    results = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                results[name] = "ok"
            except Exception:  # the other checks are still of interest
                results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
