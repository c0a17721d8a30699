"""How far a download has come, for whoever waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt_callbacks.progress import growing, size_of, watched
from ckpt_callbacks.report import size

__all__ = ["arriving"]

logger = logging.getLogger("ckpt_callbacks")

_TOLD = 30.0
"""Seconds between two lines of the log."""


@contextmanager
def arriving(what: str, total: int, folder: Path) -> Iterator[None]:
    """Show how much of `total` bytes lies in `folder` while the body fills it.

    It is a bar where standard error is a terminal, and lines of the log (`INFO`) elsewhere. The
    folder is looked at, since the trackers' clients have no common way to tell.
    """
    done, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(_TOLD):
            logger.info("%s: %s of %s are here", what, size(size_of(folder)), size(total))

    thread = threading.Thread(target=tell, name="ckpt-arrival", daemon=True)
    logger.info("%s: %s are fetched", what, size(total))
    if not watched():
        thread.start()
    try:
        with growing(what, folder, total=total):
            yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
    taken = max(time.monotonic() - started, 1e-9)
    logger.info("%s: fetched in %.1f s, %s/s", what, taken, size(int(total / taken)))
