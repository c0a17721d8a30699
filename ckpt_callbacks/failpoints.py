"""Named points in the code at which a test can make something happen, such as a kill.

There is one on each side of every action that outlives the process. They do nothing unless
armed: in a test with `arm`, or in a process of its own by its environment::

    CKPT_CALLBACKS_FAILPOINT=record-complete:3    # SIGKILL at the third hit
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

__all__ = ["POINTS", "arm", "hit"]

POINTS = (
    "save-begins",
    "record-saving",
    "orbax-started",
    "metrics-recorded",
    "orbax-committed",
    "files-sealed",
    "record-complete",
    "eviction-begins",
    "record-evicting",
    "moved-to-trash",
    "record-evicted",
    "leaving-begins",
    "record-left",
    "left-for-trash",
    "trash-emptied",
    "file-written",
    "file-replaced",
    "metrics-written",
    "publish-begins",
    "record-pending",
    "published",
    "record-copied",
    "alias-begins",
    "alias-moved",
    "record-aliased",
    "delete-begins",
    "deleted",
    "record-deleted",
    "metrics-sent",
    "record-sent",
    "artifact-copied",
    "artifact-kept",
    "artifact-sent",
    "artifact-noted",
    "artifact-removed",
    "copy-fetched",
    "damage-set-aside",
    "copy-brought",
    "copy-taken-in",
    "request-written",
    "request-begins",
    "request-applied",
    "request-removed",
    "objects-sent",
    "objects-removed",
)
"""All names, in about the order in which a run meets them."""

_action: Callable[[str], None] | None = None


def hit(name: str) -> None:
    """Do what is armed, if anything is."""
    if _action is not None:
        _action(name)


def arm(action: Callable[[str], None] | None) -> None:
    """Call `action` with the name of every point that is hit from now on; `None` to stop."""
    global _action  # noqa: PLW0603  # one process, one set of failpoints
    _action = action


def _kill_at(spec: str) -> Callable[[str], None]:
    name, _, nth = spec.partition(":")
    if name not in POINTS:
        raise ValueError(f"CKPT_CALLBACKS_FAILPOINT: no failpoint {name!r}; see {__name__}.POINTS")
    left = int(nth or 1)

    def kill(point: str) -> None:
        nonlocal left
        left -= point == name
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


if _spec := os.environ.get("CKPT_CALLBACKS_FAILPOINT"):
    arm(_kill_at(_spec))
