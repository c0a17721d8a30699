"""What trackers publish beside a checkpoint: its weights as a file that other libraries read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from ckpt_callbacks.errors import CheckpointNotFound, ConfigError, StateMismatch
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.manifest import seal
from ckpt_callbacks.paths import Path as Location
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.policy import positive
from ckpt_callbacks.record import record_from_json
from ckpt_callbacks.stores import Checkpoint

__all__ = ["Safetensors", "as_payload"]


@dataclass(frozen=True)
class Safetensors:
    """Weights as safetensors, for a tracker to publish with each checkpoint (`payload=`).

    The tracker's own thread makes them from the checkpoint's verified files, and little more than
    one leaf is in memory at a time; on the disk they take their bytes until they are sent. Step,
    run, your `metadata=` and the digest of the checkpoint's record are in the file; metrics are
    not, since they may still come.

    What a state does not have, or not in the form that `unstack` looks for, and leaves that the
    format cannot hold are told when the run begins.

    Args:
        only: paths in the state, such as `params`, as `export` takes them.
        max_shard_size: bytes of the arrays of one file, of which there are several with an index
            where they have more; 5 GB if not given.
        naming: how leaves are called: `dots`, `safejax` or `pytree2safetensors`.
        unstack: layers that are stacked in the state and are to be one by one, such as `layers`
            or `layers/{}`, as `cc.unstack` takes them.
        axis: the axis of these layers.

    Raises:
        ConfigError: an option is not as said above.
    """

    only: str | Collection[str] = "params"
    _: KW_ONLY
    max_shard_size: int | None = None
    naming: str = "dots"
    unstack: str | Collection[str] | None = None
    axis: int = 0

    def __post_init__(self) -> None:
        from ckpt_callbacks.formats.naming import names_of
        from ckpt_callbacks.groups import as_groups

        object.__setattr__(self, "only", _plain("only", self.only))
        Selection(self.only)
        if self.max_shard_size is not None:
            positive("Safetensors", "max_shard_size", self.max_shard_size)
        names_of((), self.naming)
        if self.unstack is not None:
            object.__setattr__(self, "unstack", _plain("unstack", self.unstack))
            as_groups("Safetensors", self.unstack)
        if type(self.axis) is not int or self.axis < 0:
            raise ConfigError(f"Safetensors: axis must be 0 or more, not {self.axis!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values, of which `as_payload` makes the same again."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def check(self, who: str, items: Sequence[str]) -> None:
        """Check that checkpoints of these items have what is published; `who` asks.

        Raises:
            ConfigError: they have not.
        """
        try:
            Selection(self.only).items(items, "the state")
        except CheckpointNotFound as error:
            raise ConfigError(f"{who}: payload={self}: {error}") from None

    def fits(self, who: str, leaves: Mapping[Location, Leaf]) -> None:
        """Check that a state of these leaves can be published; `who` asks.

        Raises:
            ConfigError: it cannot be; the message names the leaf.
        """
        from ckpt_callbacks.formats.safetensors import check
        from ckpt_callbacks.forms import unstack
        from ckpt_callbacks.tensors import Tensor

        alone = {path: leaf for path, leaf in leaves.items() if leaf.kind != "files"}
        try:
            chosen = Selection(self.only).of(alone, "the state")
            tensors = {path: Tensor(alone[path], _unread) for path in alone if path in chosen}
            if self.unstack is not None:
                tensors = unstack(tensors, self.unstack, self.axis)
            check(tensors, self.naming)
        except (CheckpointNotFound, StateMismatch) as error:
            raise ConfigError(f"{who}: payload={self}: {error}") from None

    def write(self, checkpoint: Checkpoint, folder: Path) -> str:
        """Write a new `folder`, and return the text for `weights.json`.

        Of one checkpoint the bytes are always the same.

        Raises:
            StateMismatch: a leaf cannot be told in this format, or nothing is stacked there.
            CheckpointNotFound: the checkpoint has no such leaves.
            CorruptCheckpoint: a file of it is damaged.
        """
        from ckpt_callbacks import formats
        from ckpt_callbacks.forms import unstack
        from ckpt_callbacks.opening import about, leaves_in

        leaves = leaves_in("payload", checkpoint.path, checkpoint.files, Selection(self.only))
        if self.unstack is not None:
            leaves = unstack(leaves, self.unstack, self.axis)
        record = record_from_json(checkpoint.manifest, f"the record of step {checkpoint.step}")
        known = {k: v for k, v in about(checkpoint.path, record).items() if k != "metrics"}
        formats.named("safetensors").write(
            folder,
            leaves,
            {**known, "only": self.to_json()["only"]},
            max_shard_size=self.max_shard_size,
            naming=self.naming,
        )
        files = {name: asdict(file) for name, file in seal(folder).items()}
        options = {"format": "safetensors", **self.to_json()}
        return json.dumps({"digest": checkpoint.digest, **options, "files": files}, indent=1)


def as_payload(who: str, payload: Safetensors | Mapping[str, Any] | None) -> Safetensors | None:
    """Return what `who` is to publish, from what a user gave, or from JSON of the same options.

    Raises:
        ConfigError: it is nothing that can be published.
    """
    if payload is None or isinstance(payload, Safetensors):
        return payload
    if isinstance(payload, Mapping):
        return Safetensors(**payload)
    raise ConfigError(f"{who}: payload must be cc.Safetensors(...), not {payload!r}")


def _unread() -> Any:
    raise AssertionError("what is looked at before there are values is not read")


def _plain(option: str, value: Any) -> str | tuple[str, ...]:
    """Return names in an order that does not differ from one process to the next.

    Raises:
        ConfigError: they are none.
    """
    if isinstance(value, str):
        return value
    names = tuple(value) if isinstance(value, Collection) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"Safetensors: {option} must be a name or several, not {value!r}")
    return tuple(sorted(names)) if isinstance(value, Set) else names
