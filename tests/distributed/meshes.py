"""One process that saves arrays over a mesh, or restores them on others: python meshes.py OPTIONS.

Prints what was restored on each mesh, or the traceback.
"""

import json
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

OPTIONS = json.loads(sys.argv[1])
RANK, COUNT = OPTIONS["rank"], OPTIONS["count"]
if COUNT > 1:
    jax.distributed.initialize(
        OPTIONS["address"], COUNT, RANK, cluster_detection_method="deactivate"
    )

import ckpt_callbacks as cc  # noqa: E402

PLACES = {
    "both": P("a", "b"),
    "rows": P(("a", "b")),
    "columns": P(None, "b"),
    "half": P("b"),
    "replicated": P(),
}


def values() -> dict[str, Any]:
    """Return what each array holds; no two elements of one are the same."""
    grid = np.arange(8 * 16, dtype=np.float32).reshape(8, 16) / 7
    kinds = {"float32": grid, "bfloat16": grid.astype(jnp.bfloat16), "int32": grid.view(np.int32)}
    return {f"{name} {kind}": value for name in PLACES for kind, value in kinds.items()}


def mesh(shape: list[int]) -> Mesh:
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("a", "b"))


def place(name: str, over: Mesh) -> NamedSharding:
    return NamedSharding(over, PLACES[name.split(maxsplit=1)[0]])


def state(over: Mesh) -> dict[str, Any]:
    arrays = {
        name: jax.make_array_from_callback(value.shape, place(name, over), value.__getitem__)
        for name, value in values().items()
    }
    data = jax.random.key_data(jax.random.split(jax.random.key(3), 8))
    keys = jax.make_array_from_callback(
        data.shape, NamedSharding(over, P("a")), np.asarray(data).__getitem__
    )
    own = {"count": jnp.asarray(7), "scale": np.float64(1 / 3), "name": "x"}
    return {"params": arrays, "rest": {"keys": jax.random.wrap_key_data(keys), **own}}


def same(got: Any, expected: Any, where: str) -> None:
    """Compare the parts that this process has, bit by bit."""
    if not isinstance(expected, jax.Array):
        assert type(got) is type(expected), where
        assert got == expected, where
        return
    assert got.dtype == expected.dtype, where
    assert got.sharding.is_equivalent_to(expected.sharding, got.ndim), f"{where}: {got.sharding}"
    if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
        got, expected = jax.random.key_data(got), jax.random.key_data(expected)
    for mine, theirs in zip(got.addressable_shards, expected.addressable_shards, strict=True):
        assert mine.index == theirs.index, where
        assert np.asarray(mine.data).tobytes() == np.asarray(theirs.data).tobytes(), where


def check(shape: list[int]) -> None:
    expected = state(mesh(shape))
    blank = jax.tree.map(lambda x: x, expected)
    blank["params"] = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in expected["params"].items()
    }
    blank["rest"] |= {"count": jnp.asarray(0), "scale": np.float64(0), "name": ""}
    for only in (None, "params"):
        got = cc.restore(OPTIONS["directory"], like=blank, only=only)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            got["params"] if only else got, is_leaf=lambda x: isinstance(x, str)
        ):
            wanted = expected["params"] if only else expected
            for key in path:
                wanted = wanted[key.key]
            same(leaf, wanted, jax.tree_util.keystr(path))


def main() -> None:
    if OPTIONS.get("save"):
        checkpoint = cc.OrbaxCheckpoint(
            OPTIONS["directory"],
            save=cc.EveryNSteps(1),
            keep=cc.LatestN(1),
            on_failure="raise",
        )
        with cc.Callbacks(checkpoint).run(state(mesh(OPTIONS["save"]))) as run:
            run.save(0, run.state)
    for shape in OPTIONS.get("restore", []):
        try:
            check(shape)
            result = "ok"
        except Exception:  # the other shapes are still of interest
            result = traceback.format_exc()
        print(json.dumps({"x".join(map(str, shape)): result}), flush=True)


if __name__ == "__main__":
    main()
