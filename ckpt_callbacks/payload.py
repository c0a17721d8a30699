"""What trackers send of a checkpoint: all of it, its weights, or where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.record import File

__all__ = ["WEIGHTS", "Send", "as_send", "chosen", "weights_among"]

Send = Literal["checkpoint", "weights", "reference"]
"""All of a checkpoint, its items that are weights, or where it is and no bytes."""

WEIGHTS = ("model", "params", "weights")
"""The names of items that are weights."""


def as_send(who: str, send: Send) -> Send:
    """Return `send` if it is one of those above.

    Raises:
        ConfigError: it is not; the message says so for `who`.
    """
    if send not in get_args(Send):
        raise ConfigError(f"{who}: send must be one of {get_args(Send)}, not {send!r}")
    return send


def weights_among(who: str, items: Sequence[str]) -> list[str]:
    """Return the items that are weights.

    Raises:
        ConfigError: none is; the message says so for `who`.
    """
    weights = [item for item in items if item in WEIGHTS]
    if not weights:
        raise ConfigError(
            f"{who}: send='weights' needs an item named {' or '.join(WEIGHTS)}, but the "
            f"items of the checkpoint are {', '.join(items)}: give the weights one of these names "
            "at the top level of the state, as in {'params': …, 'opt_state': …}"
        )
    return weights


def chosen(who: str, files: Mapping[str, File], send: Send) -> dict[str, File]:
    """Return the files of a checkpoint that are sent."""
    if send == "reference":
        return {}
    if send == "checkpoint":
        return dict(files)
    items = sorted({name.split("/")[0] for name in files if "/" in name})
    weights = weights_among(who, items)
    return {n: f for n, f in files.items() if "/" not in n or n.split("/")[0] in weights}
