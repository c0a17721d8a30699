"""A short run that saves, evicts, mirrors and logs at every step; to be killed at a failpoint.

python killed_run.py DIRECTORY [ADDRESS]
"""

import sys
from pathlib import Path

import numpy as np

import ckpt_callbacks as cc
from ckpt_callbacks.inbox import Measured, submit
from ckpt_callbacks.remote import open_directory
from folder_store import FolderStore

REPORTED = 3
SCORES = [0.1, 0.9, 0.3, 0.2, 0.8, 0.4]


def main() -> None:
    root = Path(sys.argv[1])
    where = sys.argv[2] if len(sys.argv) > 2 else str(root / "run")
    run_directory, notes = open_directory(where), root / "notes.txt"
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            where,
            save=cc.EveryNSteps(1),
            keep=cc.LatestN(1) | cc.BestN(1, "score", mode="max"),
        ),
        FolderStore(root / "store"),
    )
    with callbacks.run({"w": np.zeros(1000)}) as run:
        state = run.state
        for step in range(run.next_step, len(SCORES)):
            state = {"w": state["w"] + step}
            run.on_eval(step, {"score": SCORES[step]})
            notes.write_text(f"at step {step}")
            run.log_artifact(notes, "notes/latest.txt")
            if step == REPORTED:
                # What an evaluator asks for; its file stays until it is applied.
                submit(run_directory, Measured(step - 1, {"late": 0.5}, 1.0))
            run.on_step(step, state, {"loss": float(step)})


if __name__ == "__main__":
    main()
