"""Runs a digits example and kills itself at the event named on the command line.

    python killed_demo.py EXAMPLE DIRECTORY STEPS EVENT N

kills at the Nth event of that kind; with EVENT `none` it runs to the end.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import ckpt_callbacks as cc


def load(example: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(example.stem, example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[example.stem] = module
    spec.loader.exec_module(module)
    return module


class Killer:
    def __init__(self, kind: str, nth: int) -> None:
        self.kind = kind
        self.left = nth

    def _count(self, event: cc.Event) -> None:
        if type(event).__name__ == self.kind:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    @cc.hookimpl
    def on_step(self, event: cc.Step) -> None:
        self._count(event)

    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        self._count(event)

    @cc.hookimpl
    def on_mirrored(self, event: cc.Mirrored) -> None:
        self._count(event)

    @cc.hookimpl
    def on_promoted(self, event: cc.Promoted) -> None:
        self._count(event)

    @cc.hookimpl
    def on_evicted(self, event: cc.Evicted) -> None:
        self._count(event)


def main() -> None:
    example, directory, steps, kind, nth = sys.argv[1:]
    module = load(Path(example))
    callbacks = module.callbacks_for(Path(directory))
    callbacks = cc.Callbacks(callbacks._checkpoint, *callbacks._plugins, Killer(kind, int(nth)))
    module.train(callbacks, int(steps))


if __name__ == "__main__":
    main()
