"""Files of other libraries, in and out: one module a format, which satisfies `Format`.

Each holds every kind of leaf bit for bit, with its dtype, shape and type, but for what is in this
table. What it refuses is a `StateMismatch` that names the leaf, and nothing is written. What is in
the table are kinds as `tests/test_format_matrix.py` names them, which tests all of it.

=========== =========================================== ===========================================
format      refuses                                     gives back as something else
=========== =========================================== ===========================================
safetensors nothing                                     nothing
npz         nothing                                     nothing
msgpack     typed PRNG keys: ``key *``, ``keys``,       nothing
            ``empty keys``; ``int1``, ``uint1``,
            ``float6_*``; ``Python int of 71 bits``
equinox     typed PRNG keys: ``key *``, ``keys``,       text is left out: the module that the file
            ``empty keys``; ``int1``, ``int2``,         is read into has ``Python str*`` and
            ``int4``, ``uint1``, ``uint2``, ``uint4``,  ``Python bytes``
            ``float4_*``, ``float6_*``, ``float8_*``;
            ``Python int of 71 bits``
orbax       ``int1``, ``uint1``, ``uint2``, ``uint4``,  arrays without dimensions: ``NumPy *``,
            ``float6_*``, ``float8_e4m3``,              ``Python bool``, ``Python complex``, but for
            ``empty *``, ``Python bytes``,              `load_params` with `like=`
            ``Python int of 71 bits``
=========== =========================================== ===========================================

Names that a format cannot have are refused too, and leaves that save themselves are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from ckpt_callbacks.tensors import Tensors

__all__ = ["FORMATS", "SUFFIXES", "Format", "format_of", "named"]

FORMATS = ("safetensors", "npz", "msgpack", "equinox", "orbax")
"""Names of the modules here, and of the formats."""
SUFFIXES = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".npy": "npz",
    ".msgpack": "msgpack",
    ".eqx": "equinox",
}
"""Of formats that are a single file, its suffix."""


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
