"""Text for people, of what rich can print."""

from __future__ import annotations

import io
import shutil
from typing import Any

__all__ = ["as_text"]


def as_text(printable: Any) -> str:
    """Return as plain text what rich can print."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=shutil.get_terminal_size((100, 25)).columns)
    console.print(printable, soft_wrap=True)  # what is no table in whole lines, to be copied
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
