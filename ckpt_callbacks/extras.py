"""Optional libraries: asked for when they are needed, never imported before that."""

from __future__ import annotations

from importlib.util import find_spec

from ckpt_callbacks.errors import MissingExtra

__all__ = ["require"]


def require(module: str, *, extra: str, who: str) -> None:
    """Check, without importing it, that an optional library is installed.

    Raises:
        MissingExtra: it is not; the message says how to install it.
    """
    if find_spec(module) is None:
        raise MissingExtra(
            f"{who} needs {module}, which is not installed: pip install 'ckpt-callbacks[{extra}]'"
        )
