"""Reading of safetensors files, of ours and of others; of no array before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from ckpt_callbacks.errors import CorruptCheckpoint
from ckpt_callbacks.formats._held import Held
from ckpt_callbacks.formats._safetensors_header import Header, is_text, json_of, parse
from ckpt_callbacks.formats._safetensors_leaves import tensor_of
from ckpt_callbacks.formats.naming import NAMINGS, guess, split
from ckpt_callbacks.paths import Path, show
from ckpt_callbacks.tensors import Tensor, Tensors

__all__ = ["ABOUT", "INDEX", "NAMING", "NOTES", "SUFFIX", "loads", "main_file", "read"]

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
ABOUT = "ckpt_callbacks.metadata"
NAMING = "ckpt_callbacks.naming"
NOTES = "ckpt_callbacks.leaves"


def read(path: FilePath) -> tuple[Tensors, dict[str, Any]]:
    """Return the leaves, of which no array was read yet, and the metadata: JSON by name.

    Arrays are mapped, and read-only: nobody may write into a file while arrays are in use. Another
    file may take its name: the arrays are still those of the one that was opened.

    Args:
        path: a file, an index of shards, or a folder with one of them.

    Raises:
        CorruptCheckpoint: it is damaged, or made to do harm; the message names file and place.
    """
    main = main_file(path) if path.is_dir() else path
    if main is None:
        raise CorruptCheckpoint(f"{path} holds no safetensors file, or several without an index")
    if main.name.endswith(INDEX):
        return _read_shards(main)
    return _leaves([_opened(main)])


def loads(content: bytes) -> tuple[Tensors, dict[str, Any]]:
    """Return the leaves and the metadata of a file's content.

    Raises:
        CorruptCheckpoint: as `read`.
    """
    import numpy as np

    raw = np.frombuffer(content, np.uint8)
    return _leaves([_Source("the content given", raw.size, lambda start, stop: raw[start:stop])])


def main_file(folder: FilePath) -> FilePath | None:
    """Return the file that a folder is about: the one of the whole, or the index of shards."""
    for suffix in (SUFFIX, INDEX):
        if (usual := folder / f"model{suffix}").is_file():
            return usual
    for suffix in (INDEX, SUFFIX):
        if found := [file for file in folder.iterdir() if file.name.endswith(suffix)]:
            return found[0] if len(found) == 1 else None
    return None


class _Source:
    """A file, or the content of one; `raw` returns bytes of it as an array."""

    def __init__(self, where: str, size: int, raw: Callable[[int, int], Any]) -> None:
        self.where, self.raw = where, raw
        self.header: Header = parse(where, size, lambda a, b: raw(a, b).tobytes())

    def json(self, name: str) -> dict[str, Any]:
        """Return what the metadata has of ours under a name."""
        what = f"{name} in its metadata"
        value = json_of(self.where, what, self.header.metadata.get(name, "{}").encode())
        if not isinstance(value, dict):
            raise CorruptCheckpoint(f"{self.where} is damaged: {what} is no object of JSON")
        return value


def _opened(path: FilePath) -> _Source:
    import numpy as np

    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing, or no file")
    held = Held(path.absolute())

    def raw(start: int, stop: int) -> Any:
        if start == stop:
            return np.zeros(0, np.uint8)
        with held.open() as file:
            mapped = np.memmap(file, np.uint8, "r", start, (stop - start,))
        return mapped.view(np.ndarray)

    return _Source(str(held.path), held.size, raw)


def _leaves(sources: Sequence[_Source]) -> tuple[dict[Path, Tensor], dict[str, Any]]:
    """Return the leaves of files that are one checkpoint, and what else they say."""
    first = sources[0].header.metadata
    naming = first.get(NAMING, "")
    if naming not in NAMINGS:
        naming = guess([name for source in sources for name in source.header.entries])
    found: dict[Path, Tensor] = {}
    for source in sources:
        notes = source.json(NOTES)
        for name, entry in source.header.entries.items():
            note = notes.get(name, {})
            tensor = tensor_of(source.where, name, entry, note, source.raw)
            path = _path(source.where, name, note, naming)
            if path in found:
                raise CorruptCheckpoint(f"{source.where} is damaged: {show(path)} is there twice")
            found[path] = tensor
    if ABOUT in first:
        return found, sources[0].json(ABOUT)
    return found, {k: v for source in reversed(sources) for k, v in source.header.metadata.items()}


def _path(where: str, name: str, note: Mapping[str, Any], naming: str) -> Path:
    names = note.get("path", split(name, naming))
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise CorruptCheckpoint(f"{where} is damaged: the path of {name!r} is {str(names)[:200]}")
    return tuple(names)


def _read_shards(index: FilePath) -> tuple[dict[Path, Tensor], dict[str, Any]]:
    if not index.is_file():
        raise CorruptCheckpoint(f"{index} is missing, or no file")
    fields = json_of(str(index), "it", index.read_bytes())
    where = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(where, dict) or not where:
        raise CorruptCheckpoint(f"{index} is damaged: it has no weight_map")
    for name, shard in where.items():
        # Nothing outside the folder, whatever the system takes for a separator.
        plain = is_text(shard) and shard.endswith(SUFFIX) and not set(shard) & set("/\\\0:")
        if not plain:
            raise CorruptCheckpoint(
                f"{index} is damaged: weight_map has {str(shard)[:200]!r} for {name!r}; expected "
                "the name of a safetensors file beside it"
            )
    sources = {shard: _opened(index.parent / shard) for shard in sorted(set(where.values()))}
    held = {(name, shard) for shard, source in sources.items() for name in source.header.entries}
    for name, shard in sorted(held ^ set(where.items())):
        other = where.get(name)
        what = f"{other} for it" if other else "nothing for it"
        raise CorruptCheckpoint(
            f"{index} is damaged: {name!r} is in {shard}, and weight_map has {what}"
            if (name, shard) in held
            else f"{index} is damaged: weight_map has {shard} for {name!r}, which is not there"
        )
    leaves, metadata = _leaves(list(sources.values()))
    if ABOUT in next(iter(sources.values())).header.metadata:
        return leaves, metadata
    more = fields.get("metadata")
    more = more if isinstance(more, dict) else {}
    return leaves, metadata | {k: v for k, v in more.items() if k != "total_size"}
