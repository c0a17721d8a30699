"""Optional libraries: asked for when they are needed, never imported before that."""

from __future__ import annotations

import gc
import importlib
import threading
from importlib.util import find_spec

from ckpt_callbacks.errors import MissingExtra

__all__ = ["load", "require"]

_loading = threading.Lock()


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

    Without collecting garbage meanwhile: the many objects that an import makes set off full
    collections, each of which holds up all threads, the training loop's too, for up to 0.3 s.
    """
    with _loading:
        enabled = gc.isenabled()
        gc.disable()
        try:
            importlib.import_module(module)
        finally:
            if enabled:
                gc.enable()
