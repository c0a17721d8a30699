"""The one setting that a run with checkpoints needs: where, when, and what stays."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.policy import KeepPolicy, SavePolicy, as_policy, leaves

__all__ = ["OrbaxCheckpoint"]


@dataclass(frozen=True, slots=True)
class OrbaxCheckpoint:
    """Checkpoints of a run, in a directory that Orbax's own readers can open.

    Args:
        directory: the run directory. It is created if need be and used by one run at a time.
        save: when to save, such as `EveryNSteps(50)`, or a function (see `Custom`).
        keep: what to keep, such as `LatestN(2) | BestN(2, "val_accuracy", mode="max")`, or a
            function; it holds for every store.

    Raises:
        ConfigError: a policy is not one.
    """

    directory: str | os.PathLike[str]
    save: SavePolicy
    keep: KeepPolicy

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str | os.PathLike) or not str(self.directory):
            raise ConfigError(f"OrbaxCheckpoint: directory must be a path, not {self.directory!r}")
        if "://" in str(self.directory):
            raise ConfigError(
                f"OrbaxCheckpoint: {self.directory!s} is an address; only local directories are "
                "supported"
            )
        for option, kind, example in (
            ("save", SavePolicy, "EveryNSteps(50)"),
            ("keep", KeepPolicy, "LatestN(2)"),
        ):
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
