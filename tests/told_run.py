"""A short run that is told to end in the middle of something, and obeys.

python told_run.py DIRECTORY [PLACE]: `step`, `upload`, a failpoint, or not at all.
"""

import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import ckpt_callbacks as cc
from ckpt_callbacks import failpoints
from ckpt_callbacks.stores import Checkpoint, Copy
from folder_store import FolderStore

SCORES = [0.1, 0.9, 0.3, 0.2, 0.8, 0.4, 0.7, 0.6]
TOLD, OBEYS = 3, 4
"""The step that is under way when the signal comes, and the one that waits for it."""
never = threading.Event()
seen: Counter[str] = Counter()


def tell(place: str) -> None:
    """Give the signal where it is to come in the work for that step, which is its own hit."""
    seen[place] += 1
    if place == PLACE and seen[place] == TOLD + 1:
        os.kill(os.getpid(), signal.SIGTERM)


class Interrupted(FolderStore):
    """One whose upload has brought one file when the signal comes."""

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        if checkpoint.step == TOLD:
            target = self.root / "steps" / str(TOLD)
            target.mkdir()
            shutil.copy(checkpoint.path / "_CHECKPOINT_METADATA", target)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for_the_notice()
        return super().put(checkpoint, aliases)


def wait_for_the_notice() -> None:
    while not run.should_stop:
        never.wait(0.01)


if __name__ == "__main__":
    root, PLACE = Path(sys.argv[1]), (sys.argv[2:] or [""])[0]
    store = (Interrupted if PLACE == "upload" else FolderStore)(root / "store")
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            root / "run",
            save=cc.EveryNSteps(1),
            keep=cc.LatestN(2) | cc.BestN(1, "score", mode="max"),
        ),
        store,
    )
    failpoints.arm(tell)
    with callbacks.run({"w": np.zeros(1000)}) as run:
        state = run.state
        for step in range(run.next_step, len(SCORES)):
            tell("step")
            state = {"w": state["w"] + step}
            run.on_eval(step, {"score": SCORES[step]})
            if PLACE and step == OBEYS:
                wait_for_the_notice()
            run.on_step(step, state, {"loss": float(step)})
            if run.should_stop:
                break
    print("last", step)
