"""The files of a checkpoint: durable, counted and digested, and checked before they are read.

Orbax notices a flipped bit only where it stores a checksum of its own, which it does not for
array data, and it does not fsync what its Python code writes. Both are made up for here, in one
pass over the committed files.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ckpt_callbacks.errors import CorruptCheckpoint
from ckpt_callbacks.record import File

__all__ = [
    "damage",
    "difference",
    "digest_of",
    "files_in",
    "fsync",
    "fsync_tree",
    "link_tree",
    "seal",
    "settle",
    "tree_digest",
    "verify",
]

_CHUNK = 1 << 20


def files_in(root: Path) -> Iterator[Path]:
    """Yield the plain files below `root`; symbolic links are neither listed nor followed."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path


def digest_of(path: Path) -> str:
    """Return the XXH3 digest (128 bits) of a file as `xxh3:` and 32 hex digits."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"xxh3:{digest.hexdigest()}"


def tree_digest(files: Mapping[str, File]) -> str:
    """Return one digest for a whole checkpoint, from the names, sizes and digests of its files."""
    import xxhash

    lines = "\n".join(f"{name} {f.size} {f.digest}" for name, f in sorted(files.items()))
    return f"xxh3:{xxhash.xxh3_128_hexdigest(lines.encode())}"


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Make all files and folders below `root` survive a power cut, and its name."""
    for folder, _, _ in os.walk(root):
        fsync(Path(folder))
    for path in files_in(root):
        fsync(path)
    fsync(root.parent)


def seal(root: Path) -> dict[str, File]:
    """Make a committed checkpoint durable and read-only, and return its files.

    Read-only because copies in local stores are hard links to the same bytes.
    """
    for path in files_in(root):
        path.chmod(0o444)
    return settle(root)


def settle(root: Path) -> dict[str, File]:
    """Make a committed checkpoint durable, and return its files, whose modes stay."""
    fsync_tree(root)
    found = {path.relative_to(root).as_posix(): path for path in files_in(root)}
    return {n: File(p.stat().st_size, digest_of(p)) for n, p in sorted(found.items())}


def verify(root: Path, files: Mapping[str, File], only: Collection[str] | None = None) -> None:
    """Check files against their record; `only` limits it to top-level folders of those names.

    Raises:
        CorruptCheckpoint: a file is missing or differs; the message names it and both sides.
    """
    for problem in damage(root, files, only):
        raise CorruptCheckpoint(problem)


def damage(
    root: Path,
    files: Mapping[str, File],
    only: Collection[str] | None = None,
    *,
    where: str | None = None,
) -> Iterator[str]:
    """Yield what is wrong with each damaged file; the arguments are those of `verify`.

    `where` is what the text has for `root`, which may be a copy.
    """
    for name, expected in files.items():
        top, _, rest = name.partition("/")
        if only is not None and rest and top not in only:
            continue
        path = root / name
        shown = path if where is None else f"{where}/{name}"
        try:
            found = File(path.stat().st_size, "")
            if found.size == expected.size:
                found = File(found.size, digest_of(path))
        except OSError as error:
            yield f"{shown} cannot be read: {error.strerror}"
            continue
        if found != expected:
            yield difference(str(shown), found, expected)


def difference(where: str, found: File, expected: File) -> str:
    """Return what is wrong with a file that differs from its record."""
    what = "size" if found.size != expected.size else "digest"
    return (
        f"{where} is damaged: its {what} is {getattr(found, what)}, "
        f"but {getattr(expected, what)} was recorded when it was saved"
    )


def link_tree(source: Path, target: Path, names: Collection[str] | None = None) -> bool:
    """Copy a tree, or the files of it that are named, by hard links.

    What `target` already holds is kept, so an interrupted call can be repeated. Returns False if
    any file had to be copied.
    """
    import shutil

    linked = True
    for path in files_in(source):
        name = path.relative_to(source).as_posix()
        if names is not None and name not in names:
            continue
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.exists() and to.stat().st_size == path.stat().st_size:
            linked = linked and to.samefile(path)
            continue
        to.unlink(missing_ok=True)
        try:
            os.link(path, to)
        except OSError:  # another file system, or one without links
            part = to.with_name(f"{to.name}.part")
            shutil.copyfile(path, part)
            part.replace(to)
            linked = False
    return linked
