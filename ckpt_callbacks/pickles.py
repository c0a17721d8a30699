"""Pickles, which are not read: to read one is to run the code that it names."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile, ZipFile

from ckpt_callbacks.errors import ConfigError

__all__ = ["refuse_pickle"]

_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


def refuse_pickle(path: Path) -> None:
    """Raise if a path that is in no known format is a file that holds a pickle, or may do so.

    Raises:
        ConfigError: it is one, by its content or its name; the message says what to do instead.
    """
    if why := _why(path):
        raise ConfigError(
            f"{path} {why}. A pickle can run any code when it is read, so none is read here: where "
            "it was made, save the arrays in a format that holds data only, such as with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors'), and give that"
        )


def _why(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80":  # the first instruction of each pickle since protocol 2
        return "is a pickle"
    if start == b"PK":  # what PyTorch writes is a zip archive
        try:
            with ZipFile(path) as archive:
                if any(name.split("/")[-1] == "data.pkl" for name in archive.namelist()):
                    return "is an archive that holds a pickle (data.pkl)"
        except BadZipFile:
            pass
    if path.suffix in _SUFFIXES:
        return f"has the suffix {path.suffix}, which pickles have"
    return None
