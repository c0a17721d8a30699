"""The stores of a run, made again by a process that has only its directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.policy import leaves
from ckpt_callbacks.record import Copy, RunFile
from ckpt_callbacks.retention import Opaque, policy_from_json
from ckpt_callbacks.stores import Rank, RunInfo, Store

__all__ = ["GROUP", "addresses_of", "info_of", "stores_of"]

logger = logging.getLogger("ckpt_callbacks")

GROUP = "ckpt_callbacks.stores"
"""Entry points of stores: each is a factory, and its name is that of the store."""


def stores_of(run: RunFile) -> list[Store]:
    """Return the stores that `run` was mirrored to, as far as they can be made here."""
    stores: list[Store] = []
    for name in run.stores:
        why = "it did not say how"
        if name in run.settings:
            try:
                stores.append(_make(name, run.settings[name]))
                continue
            except Exception as error:  # whatever a factory of somebody else raises
                why = f"{type(error).__name__}: {error}"
        logger.warning("the store %r is left out, since it can not be made here: %s", name, why)
    return stores


def addresses_of(run: RunFile) -> Callable[[str, int, Copy], str | None]:
    """Return what tells by store, step and copy the address at which other machines find it.

    Nothing is asked of a service; of a store that can not be made here none is known.
    """
    made: dict[str, Store | None] = {}

    def address(store: str, step: int, copy: Copy) -> str | None:
        if store not in made:
            made[store] = None
            with suppress(Exception):  # whatever a factory of somebody else raises
                made[store] = _make(store, run.settings[store])
        there = made[store]
        return there.address(step, copy, run.stores.get(store, {})) if there else None

    return address


def info_of(
    directory: RunDirectory,
    run: RunFile,
    store: str,
    config: Mapping[str, Any] | None,
    rank: Callable[[str, int], Rank | None] = lambda alias, step: None,
    *,
    sending: bool = False,
    drain_limit: float = 60.0,
) -> RunInfo:
    """Return what a store of `run` is opened with: to read only if there is no `config`."""
    reading = config is None
    return RunInfo(
        run_id=run.run_id,
        name=directory.name,
        config=config or {},
        scratch=directory.meta / "stores" / store if reading else directory.scratch(store),
        remembered={k: v for k, v in run.stores.get(store, {}).items() if k != "title"},
        reading=reading,
        rank=rank,
        sending=sending,
        drain_limit=drain_limit,
    )


def _make(name: str, settings: Mapping[str, Any]) -> Store:
    from importlib.metadata import entry_points

    (found,) = entry_points(group=GROUP, name=name)
    arguments = dict(settings)
    if keep := arguments.get("keep"):
        arguments["keep"] = policy = policy_from_json(keep)
        if any(isinstance(leaf, Opaque) for leaf in leaves(policy)):
            raise ValueError(f"its policy {policy} is a function, of which only the text is kept")
    store = found.load()(**arguments)
    if not isinstance(store, Store):
        raise TypeError(f"its factory returned {store!r}")
    return store
