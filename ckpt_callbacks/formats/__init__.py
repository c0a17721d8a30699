"""Files of other libraries, in and out: one module a format, which satisfies `Format`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from ckpt_callbacks.tensors import Tensors

__all__ = ["FORMATS", "Format", "format_of", "named"]

FORMATS = ("safetensors", "npz", "msgpack", "equinox", "orbax")
"""Names of the modules here, and of the formats."""


class Format(Protocol):
    """What each module here offers."""

    def matches(self, path: Path) -> bool:
        """Return whether a file or a folder that exists is in this format, by name and content."""
        ...

    def read(self, path: Path) -> tuple[Tensors, dict[str, Any]]:
        """Return the leaves, of which no array was read yet, and the metadata: JSON by name.

        Raises:
            CorruptCheckpoint: it is damaged, or made to do harm; the message names file and place.
        """
        ...

    def write(
        self, path: Path, tensors: Tensors, metadata: Mapping[str, Any], **options: Any
    ) -> None:
        """Write the leaves so that `path` is there only once all of it is durable.

        Raises:
            StateMismatch: a leaf cannot be told in this format, or two have the same name in it.
            ConfigError: an option is none of this format.
        """
        ...


def named(name: str) -> Format:
    """Return the module of a format by its name in `FORMATS`."""
    return cast(Format, import_module(f"{__name__}.{name}"))


def format_of(path: Path) -> str | None:
    """Return the name of the format of a file or a folder that exists, if it is one of these."""
    return next((name for name in FORMATS if named(name).matches(path)), None)
