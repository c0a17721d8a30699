"""One state in several processes: what has to be the same of it, and how Orbax takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["VALUES", "as_global", "describe"]

VALUES = "values of "
"""How the names of what is described begin where each process has a value of its own."""
_TOPS = 32
"""How many parts of a state are compared one by one."""


def describe(state: Any) -> dict[str, str]:
    """Return what has to be the same of a state in all processes, by name, in short.

    That is its leaves, and the values of those that are no global arrays.
    """
    import xxhash

    from ckpt_callbacks.leaves import leaf_of
    from ckpt_callbacks.paths import show
    from ckpt_callbacks.state import leaves_of

    leaves = leaves_of(state)
    tops = {path[:1] for path in leaves}
    texts: dict[str, list[str]] = {}
    digests: dict[str, Any] = {}
    for path, leaf in leaves.items():
        top = show(path[:1]) if len(tops) <= _TOPS else "the state"
        texts.setdefault(f"leaves of {top}", []).append(f"{show(path)} {leaf_of(leaf)}")
        if (data := _own_bytes(leaf)) is not None:
            digests.setdefault(f"{VALUES}{top}", xxhash.xxh3_64()).update(data)
    shapes = {
        name: xxhash.xxh3_64_hexdigest("\n".join(lines).encode()) for name, lines in texts.items()
    }
    return {name: f"{len(texts[name])}, digest {digest}" for name, digest in shapes.items()} | {
        name: f"digest {digest.hexdigest()}" for name, digest in digests.items()
    }


def _own_bytes(leaf: Any) -> bytes | None:
    """Return the bytes of what each process has for itself; `None` of all else."""
    import jax
    import numpy as np

    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable or leaf.is_deleted():
            return None
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
    elif isinstance(leaf, bool | int | float | complex | str | bytes):
        return repr(leaf).encode()
    elif not isinstance(leaf, np.ndarray | np.generic):
        return None
    return np.asarray(leaf).tobytes()


def as_global(items: Mapping[str, Any]) -> dict[str, Any]:
    """Return items with a global array for each array that this process has for itself.

    Orbax takes no others where there are several processes. Nothing is sent: all have the same,
    and that of process 0 is written.
    """
    import jax
    import numpy as np

    from ckpt_callbacks.leaves import is_files, key_impl

    firsts: dict[int, Any] = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    mesh = jax.sharding.Mesh(np.array(list(firsts.values())), ("process",))
    whole = jax.sharding.PartitionSpec()  # type: ignore[no-untyped-call]  # jax leaves it untyped
    everywhere = jax.sharding.NamedSharding(mesh, whole)
    mine = firsts[jax.process_index()]

    def shared(leaf: Any) -> Any:
        if is_files(leaf):
            return _Written(leaf)
        if not isinstance(leaf, jax.Array) or not leaf.is_fully_addressable:
            return leaf
        if impl := key_impl(leaf.dtype):
            return jax.random.wrap_key_data(shared(jax.random.key_data(leaf)), impl=impl)
        part = jax.device_put(leaf, mine)
        return jax.make_array_from_single_device_arrays(leaf.shape, everywhere, [part])

    return {name: jax.tree.map(shared, item, is_leaf=is_files) for name, item in items.items()}


class _Written:
    """An object that saves itself, and has done so when its `save` returns.

    Orbax commits once the arrays of all processes are written; for other items it waits in process
    0 only.
    """

    def __init__(self, item: Any) -> None:
        self._item = item

    async def save(self, directory: Any) -> Any:
        await (await self._item.save(directory))
        return _nothing()

    async def load(self, directory: Any) -> Any:
        return await self._item.load(directory)


async def _nothing() -> None:
    pass
