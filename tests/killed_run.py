"""A short run that saves, evicts, mirrors and logs at every step; to be killed at a failpoint.

python killed_run.py [--small-disk] DIRECTORY [ADDRESS]
"""

import argparse
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.inbox import Measured, submit
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.stores import Checkpoint, Copy
from folder_store import FolderStore

REPORTED = 3
SCORES = [0.1, 0.9, 0.3, 0.2, 0.8, 0.4]


class Noting(FolderStore):
    """Notes which steps are sent and fetched."""

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        note(self.root.parent / "sent", checkpoint.step)
        return super().put(checkpoint, aliases)

    def get(self, step: int, into: Path) -> None:
        note(self.root.parent / "fetched", step)
        super().get(step, into)


class Room:
    """Tells when the directory holds the newest checkpoint alone, and notes what was saved."""

    def __init__(self, root: Path, directory: RunDirectory) -> None:
        self.root = root
        self.directory = directory
        self.changed = threading.Event()

    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        note(self.root / "acknowledged", event.step)
        self.changed.set()

    @cc.hookimpl
    def on_evicted(self, event: cc.Evicted) -> None:
        self.changed.set()

    def wait_for(self, step: int) -> None:
        while True:
            self.changed.clear()
            records = self.directory.read_records()
            there = [s for s, r in records.items() if r.state == "complete" and not r.lost]
            if there == [step]:
                return
            if not self.changed.wait(60):
                raise TimeoutError(f"{self.directory} holds {there}, and not {step} alone")


def note(path: Path, what: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps(what) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small-disk", action="store_true", help="has room for one checkpoint")
    parser.add_argument("root", type=Path)
    parser.add_argument("where", nargs="?")
    options = parser.parse_args()
    root: Path = options.root
    where = options.where or str(root / "run")
    run_directory, notes = open_directory(where), root / "notes.txt"
    room = Room(root, run_directory)
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            where,
            save=cc.EveryNSteps(1),
            keep=cc.LatestN(2 if options.small_disk else 1) | cc.BestN(1, "score", mode="max"),
            keep_here=cc.LatestN(1) if options.small_disk else None,
        ),
        Noting(root / "store"),
        room,
    )
    with callbacks.run({"w": np.zeros(1000)}) as run:
        state = run.state
        note(root / "starts", [run.next_step, state["w"].tolist()])
        for step in range(run.next_step, len(SCORES)):
            state = {"w": state["w"] + step}
            run.on_eval(step, {"score": SCORES[step]})
            notes.write_text(f"at step {step}")
            run.log_artifact(notes, "notes/latest.txt")
            if step == REPORTED:
                # What an evaluator asks for; its file stays until it is applied.
                submit(run_directory, Measured(step - 1, {"late": 0.5}, 1.0))
            run.on_step(step, state, {"loss": float(step)})
            if options.small_disk:  # so that each of them leaves before the next is saved
                room.wait_for(step)


if __name__ == "__main__":
    main()
