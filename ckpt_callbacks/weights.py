"""Which leaves are weights, by their names alone: of a checkpoint, of a file, and of a state."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.paths import STATES, Path, Selection
from ckpt_callbacks.payload import WEIGHTS

__all__ = ["ALONE", "selection_of", "weights_of", "wrapper_of"]

logger = logging.getLogger("ckpt_callbacks")
ALONE = ("leaf",)
"""Path of a state that is a leaf itself, as in a checkpoint."""


class _Weights(Selection):
    """What is called weights at the top, or all where nothing is."""

    def __init__(self, names: Collection[str] = WEIGHTS, *, tell: bool = True) -> None:
        super().__init__("params")
        self._names, self._tell = names, tell

    def of(self, paths: Collection[Path], where: str, items: Collection[str] = ()) -> set[Path]:
        if not {path[0] for path in paths if path} & set(self._names):
            return set(paths)
        chosen = super().of(paths, where, items)
        taken = {path[0] for path in chosen}
        left = {path[0] for path in paths if len(path) > 1} - taken
        if left and self._tell and "params" not in taken:  # which nobody calls a part of a model
            logger.warning(
                "%s: %s is taken for its weights, and the rest is left as it is: %s; only=None "
                "takes everything",
                where,
                ", ".join(sorted(taken)),
                ", ".join(sorted(left)),
            )
        return chosen

    def items(self, items: Collection[str], where: str) -> list[str]:
        if {*WEIGHTS, *STATES} & set(items):
            return super().items(items, where)
        return list(items)

    def in_file(self, metadata: Mapping[str, Any]) -> Selection:
        # What others call `model` in a file is a part of one, beside such as `lm_head`.
        return self if "digest" in metadata else _Weights(("params",))


def selection_of(only: str | Collection[str] | None) -> Selection | None:
    """Return what `only` of `load_params` chooses; nothing if all is."""
    if only is None:
        return None
    return _Weights() if only == "params" else Selection(only)


def wrapper_of(paths: Iterable[Path]) -> Path:
    """Return what all names begin with that only says that they are weights."""
    prefix: Path = ()
    while True:
        heads = {path[len(prefix) :][:1] for path in paths if len(path) > len(prefix) + 1}
        short = any(len(path) <= len(prefix) + 1 for path in paths)
        if short or len(heads) != 1 or (head := heads.pop())[0] not in WEIGHTS:
            return prefix
        prefix += head


def weights_of(
    paths: Collection[Path], only: Selection | None, prefix: Path | None, source: Collection[Path]
) -> dict[Path, Path]:
    """Return the paths of the weights in a state, by what they are without a wrapper.

    Args:
        paths: of all leaves of the state.
        only: what is chosen in the source.
        prefix: the wrapper that the source has, `None` if its names are others.
        source: the paths in the source, without its wrapper.
    """
    if only is None or isinstance(only, _Weights):
        tops, ours = ({path[0] for path in among if path} for among in (source, paths))
        if only and tops & set(WEIGHTS) and tops <= ours:  # such as `model` and `lm_head`
            return {at: at for at in paths if at[0] in tops}
        chosen = set(paths) if only is None else only.of(paths, "the state")
        wrapper = wrapper_of(chosen)
        return {at[len(wrapper) :] or ALONE: at for at in paths if at in chosen}
    wrapper = wrapper_of(_Weights(tell=False).of(paths, "the state"))
    bare = {at[len(wrapper) :]: at for at in paths if at[: len(wrapper)] == wrapper}
    if prefix is None:
        return bare
    try:
        chosen = only.of({(*prefix, *path) for path in bare}, "the state")
    except CheckpointNotFound:
        if not wrapper or prefix:
            raise
        bare = {at: at for at in paths}  # such as `params` and `batch_stats`, on both sides
        chosen = only.of(bare.keys(), "the state")
    return {path: at for path, at in bare.items() if (*prefix, *path) in chosen}
