"""Optional libraries: asked for when they are needed, never imported before that."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

from ckpt_callbacks.errors import MissingExtra

__all__ = ["ahead", "load", "require"]

_loading = threading.Lock()
_ahead: list[threading.Event] = []
"""What goes ahead now; the last one ends first."""
_LONGEST_WAIT = 0.05
_frozen = gc.get_freeze_count()
"""Objects that Python itself has frozen, as 3.12 does with a few hundred."""


def require(module: str, *, extra: str, who: str) -> None:
    """Check, without importing it, that an optional library is installed.

    Raises:
        MissingExtra: it is not; the message says how to install it.
    """
    if find_spec(module) is None:
        raise MissingExtra(
            f"{who} needs {module}, which is not installed: pip install 'ckpt-callbacks[{extra}]'"
        )


def load(module: str) -> None:
    """Import an optional library, on a worker's thread.

    One at a time: two large libraries that are imported at once, each parsing code as they do,
    fail with a `SystemError` in Python 3.11 (python/cpython#106905).

    Beside a JAX loop, after Orbax: else the loop's first capture imports that meanwhile, and takes
    0.32 s instead of 0.18 s, since the two imports hold each other up. So it waits for this one,
    or finds it done.

    Without collecting garbage meanwhile: the many objects that an import makes set off full
    collections, each of which holds up all threads, the training loop's too, for up to 0.3 s.

    And it lets the loop go `ahead` with a capture, which has to hand the interpreter's lock over
    dozens of times.
    """
    with _loading:
        enabled = gc.isenabled()
        gc.disable()
        finder = _GiveWay()
        sys.meta_path.insert(0, finder)
        try:
            if "jax" in sys.modules:
                importlib.import_module("orbax.checkpoint")
            importlib.import_module(module)
        finally:
            sys.meta_path.remove(finder)
            if enabled:
                _age()
                gc.enable()


@contextmanager
def ahead() -> Iterator[None]:
    """Let what this thread does go ahead of libraries that are being imported on others."""
    _ahead.append(threading.Event())
    try:
        yield
    finally:
        _ahead.pop().set()


class _GiveWay(MetaPathFinder):
    """Finds nothing, but waits before each module that this thread imports, if need be.

    Once and not for long for each that goes ahead, since that one may wait for a module of ours.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._waited: threading.Event | None = None

    def find_spec(self, *_: object) -> None:
        if threading.get_ident() == self._thread and _ahead and _ahead[-1] is not self._waited:
            self._waited = _ahead[-1]
            self._waited.wait(_LONGEST_WAIT)


def _age() -> None:
    """Move all objects to the oldest generation, without looking at any.

    Else the next two collections of young objects look at all that an import made, MLflow's
    120,000, and hold up all threads for 0.1 s each. What a user has frozen stays so.
    """
    if gc.get_freeze_count() <= _frozen:
        gc.freeze()
        gc.unfreeze()
