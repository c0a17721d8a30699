"""What a run holds for W&B while there is no server: links of the files, and W&B's own log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_callbacks.stores import Checkpoint, Copy, Listing, Overview
from ckpt_callbacks_wandb._held import Held
from ckpt_callbacks_wandb._log import LOG_SECONDS, Artifact, Log

if TYPE_CHECKING:
    import wandb

__all__ = ["Offline"]


class Offline:
    """The checkpoints of a run that will be sent; each call returns when W&B has logged it.

    Args:
        run: the run of W&B, which is open.
        held: the files.
        log: the run's log file.
        earlier: the logs of its earlier starts, the oldest first.
        began: when the run began, seconds since the epoch.
    """

    moves_aliases = True

    def __init__(
        self, run: wandb.Run, held: Held, log: Log, earlier: Sequence[Log], began: float
    ) -> None:
        self._run = run
        self._held = held
        self._log_file = log
        self._earlier = earlier
        self._began = began

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        self._held.hold(checkpoint, self._began)
        self._log(checkpoint.step, [f"step-{checkpoint.step}", *aliases])
        return Copy("staged", f"{self._held.name}:step-{checkpoint.step}", shared=True)

    def listing(self) -> Listing:
        # There is no server to ask, but W&B's own log tells what it will send.
        named: dict[str, int] = {}
        for log in [*self._earlier, self._log_file]:
            for found in Log(log.path).new():
                if isinstance(found, Artifact) and found.name == self._held.name:
                    named |= dict.fromkeys(found.aliases, int(found.metadata["step"]))
        held = self._held.steps()
        copies = {
            step: Copy("staged", f"{self._held.name}:{alias}", shared=True)
            for alias, step in named.items()
            if alias == f"step-{step}" and step in held
        }
        return Listing(
            copies,
            {n: s for n, s in named.items() if s in copies and n not in ("latest", f"step-{s}")},
            exact=True,
        )

    def get(self, step: int, into: Path) -> None:
        self._held.get(step, into)

    def alias(self, name: str, step: int) -> bool:
        # An alias moves by logging the same content again: W&B's server stores it once.
        self._log(step, [name])
        return True

    def delete(self, step: int) -> bool:
        # What is in W&B's log stays there; without its files a sync leaves it out.
        self._held.release(step)
        return True

    def show(self, overview: Overview) -> None:
        return

    def _log(self, step: int, aliases: Sequence[str]) -> None:
        """Log the files held of a step, and return when that is in W&B's log."""
        self._run.log_artifact(self._held.artifact(step), aliases=[*aliases])
        for found in self._log_file.follow(LOG_SECONDS):
            if (
                isinstance(found, Artifact)
                and found.name == self._held.name
                and found.metadata.get("step") == step
                and found.aliases >= set(aliases)
            ):
                return
