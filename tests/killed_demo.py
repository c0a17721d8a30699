"""Runs a digits example and kills itself at an event.

    python killed_demo.py nnx|equinox DIRECTORY STEPS EVENT N

kills at the Nth event of that kind; with EVENT `none` it runs to the end.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import ckpt_callbacks as cc
from ckpt_callbacks.testing import Recorder

EXAMPLES = Path(__file__).parent.parent / "examples"


class Fatal(list[cc.Event]):
    """A list of events that does not survive the Nth of a kind."""

    def __init__(self, kind: str, nth: int) -> None:
        self.kind = kind
        self.left = nth

    def append(self, event: cc.Event) -> None:
        self.left -= type(event).__name__ == self.kind
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    framework, directory, steps, kind, nth = sys.argv[1:]
    sys.path.insert(0, str(EXAMPLES))
    digits = importlib.import_module("digits")
    example = importlib.import_module(f"digits_{framework}")
    killer = Recorder()
    killer.events = Fatal(kind, int(nth))
    callbacks = digits.callbacks_for(f"digits-{framework}", Path(directory), killer)
    example.train(callbacks, int(steps))


if __name__ == "__main__":
    main()
