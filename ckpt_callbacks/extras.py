"""Optional libraries: asked for when they are needed, never imported before that."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from importlib.util import find_spec

from ckpt_callbacks.errors import MissingExtra

__all__ = ["load", "require"]

_loading = threading.Lock()
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
    """
    with _loading:
        enabled = gc.isenabled()
        gc.disable()
        try:
            if "jax" in sys.modules:
                importlib.import_module("orbax.checkpoint")
            importlib.import_module(module)
        finally:
            if enabled:
                _age()
                gc.enable()


def _age() -> None:
    """Move all objects to the oldest generation, without looking at any.

    Else the next two collections of young objects look at all that an import made, MLflow's
    120,000, and hold up all threads for 0.1 s each. What a user has frozen stays so.
    """
    if gc.get_freeze_count() <= _frozen:
        gc.freeze()
        gc.unfreeze()
