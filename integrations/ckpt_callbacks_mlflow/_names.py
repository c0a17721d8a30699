"""Names as MLflow takes them."""

from __future__ import annotations

__all__ = ["as_key", "as_tag"]

_LONGEST = 250  # characters; MLflow's own limit


def as_key(name: str) -> str:
    """Return a name that MLflow accepts for a metric or parameter.

    It takes letters, digits and `_-. /:`, at most 250, and refuses names that a path could
    not have, since a name may become a file.
    """
    allowed = "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)
    parts = [part for part in allowed.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:_LONGEST].rstrip("/") or "_"


def as_tag(name: str) -> str:
    """Return the name of a tag, not longer than MLflow takes."""
    return name[:_LONGEST].rstrip("/")
