"""The one setting that a run with checkpoints needs: where, when, and what stays."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

from ckpt_callbacks.bucket import is_bucket, require_client
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.policy import KeepPolicy, SavePolicy, as_policy, leaves

__all__ = ["OrbaxCheckpoint"]

Busy = Literal["wait", "skip"]
OnFailure = Literal["continue", "raise"]


@dataclass(frozen=True, slots=True)
class OrbaxCheckpoint:
    """Checkpoints of a run, in a directory that Orbax's own readers can open.

    Args:
        directory: the run directory. It is created if need be and used by one run at a time. It may
            be in object storage, such as `s3://bucket/runs/digits` or `gs://…`.
        save: when to save, such as `EveryNSteps(50)`, a save-decision policy of Orbax, or a
            function (see `Custom`).
        keep: what to keep, such as `LatestN(2) | BestN(2, "val_accuracy", mode="max")`, a
            preservation policy of Orbax, or a function; it holds for every store.
        keep_here: of what is kept, what the directory holds, such as `LatestN(1)` on a small disk:
            the rest goes once every tracker that is to hold it has it, and one of them has all of
            its bytes as its own. The newest, and what is pinned, stays here. All if not given.
        busy: when a save is due while the last one is in flight, `wait` for that, so that which
            steps exist never depends on timing, or `skip` this one.
        synchronous: for debugging, let `on_step` return only when what it saves is complete.
        on_failure: when a save fails, `continue` to train (there is a `SaveFailed` event), or
            also `raise` a `SaveError` from the next call of the run.

    Raises:
        ConfigError: a policy is not one, or a choice is none of those.
    """

    directory: str | os.PathLike[str]
    save: SavePolicy
    keep: KeepPolicy
    _: KW_ONLY
    busy: Busy = "wait"
    synchronous: bool = False
    on_failure: OnFailure = "continue"
    keep_here: KeepPolicy | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str | os.PathLike) or not str(self.directory):
            raise ConfigError(f"OrbaxCheckpoint: directory must be a path, not {self.directory!r}")
        if is_bucket(self.directory):
            require_client("OrbaxCheckpoint", str(self.directory))
        elif "://" in str(self.directory):
            raise ConfigError(
                f"OrbaxCheckpoint: {self.directory!s} is an address; only local directories and "
                "those at s3:// and gs:// are supported"
            )
        for option, kind, example in (
            ("save", SavePolicy, "EveryNSteps(50)"),
            ("keep", KeepPolicy, "LatestN(2)"),
            ("keep_here", KeepPolicy, "LatestN(1)"),
        ):
            if option == "keep_here" and self.keep_here is None:
                continue
            try:
                policy = as_policy(getattr(self, option))
            except ConfigError as error:
                raise ConfigError(f"OrbaxCheckpoint: {option}: {error}") from error
            if wrong := [leaf for leaf in leaves(policy) if not isinstance(leaf, kind)]:
                raise ConfigError(
                    f"OrbaxCheckpoint: {option} takes a {option} policy such as {example}, "
                    f"which {wrong[0]} is not"
                )
            object.__setattr__(self, option, policy)
        for option, choices in (("busy", get_args(Busy)), ("on_failure", get_args(OnFailure))):
            if getattr(self, option) not in choices:
                raise ConfigError(
                    f"OrbaxCheckpoint: {option} must be {' or '.join(map(repr, choices))}, not "
                    f"{getattr(self, option)!r}"
                )
