"""A place in object storage, by the file systems of fsspec: `s3://…` and `gs://…`.

An object is written whole or not at all, and what was written is what everybody reads next. There
is no rename, no appending and no lock; what there is instead is an object that is created only if
none has its name, in one request (`If-None-Match: *`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.extras import require
from ckpt_callbacks.record import File
from ckpt_callbacks.stores import redact

__all__ = ["Bucket", "Found", "Place", "is_bucket", "require_client"]

_CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
"""The package for each kind of address; `memory` is for tests, in one process."""
_OPTIONS: dict[str, dict[str, Any]] = {
    # Else a store that does not answer is waited for much longer than a run can do without it.
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60}}
}
_AT_ONCE = 16
"""Requests under way at a time."""
_CHUNK = 8 * 2**20


class Found(NamedTuple):
    """An object that a listing shows."""

    name: str
    size: int
    stamp: str
    """Differs from that of each other content that the name ever had."""


def is_bucket(where: object) -> bool:
    """Return whether it is the address of a place in object storage."""
    scheme, separator, _ = where.partition("://") if isinstance(where, str) else ("", "", "")
    return bool(separator) and scheme in _CLIENTS


def require_client(who: str, address: str) -> None:
    """Check, without importing it, that the package for an address is installed.

    Raises:
        MissingExtra: it is not; the message says how to install it.
        ConfigError: the address names no bucket, or nothing in it.
    """
    scheme, _, path = address.partition("://")
    require(_CLIENTS[scheme], extra="object-storage", who=f"{who}: {scheme}://")
    bucket, _, below = path.strip("/").partition("/")
    if not bucket or not below or redact(address) != address:
        raise ConfigError(
            f"{who}: {redact(address)!r} must name a bucket and a place in it, such as "
            f"'{scheme}://bucket/runs/digits', and nothing else"
        )


class Place:
    """A folder in object storage, with as much of `pathlib.Path` as looking for a name needs."""

    def __init__(self, fs: Any, kind: str, path: str, *, listed: bool = False) -> None:
        self._fs, self._kind, self._path, self._listed = fs, kind, path, listed

    def __str__(self) -> str:
        return f"{self._kind}://{self._path.lstrip('/')}"

    def __truediv__(self, name: str) -> Place:
        return Place(self._fs, self._kind, f"{self._path}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> Place:
        """The folder that it is in; itself where it is a bucket."""
        above = self._path.rpartition("/")[0]
        return Place(self._fs, self._kind, above) if above else self

    def is_dir(self) -> bool:
        """Return whether there is anything in it; one request, unless it was listed."""
        return self._listed or bool(self._fs.isdir(self._path))

    def iterdir(self) -> list[Place]:
        """Return the folders in it; one request."""
        found = self._fs.ls(self._path, detail=True)
        paths = [str(entry["name"]).rstrip("/") for entry in found if entry["type"] == "directory"]
        return [Place(self._fs, self._kind, path, listed=True) for path in paths]


class Bucket:
    """The objects below an address; names are relative to it, with slashes.

    Raises:
        MissingExtra: the package for the address is not installed.
        OSError: the store refuses, or does not answer; from every method.
    """

    def __init__(self, address: str) -> None:
        require_client("object storage", address)
        from fsspec.core import url_to_fs

        self.address = address.rstrip("/")
        self.kind = address.partition("://")[0]
        options = _OPTIONS.get(self.kind, {})
        # A listing that is remembered would hide what others write.
        self._fs, self._root = url_to_fs(self.address, use_listings_cache=False, **options)

    def place(self) -> Place:
        """Return where it is, to look around."""
        return Place(self._fs, self.kind, str(self._root))

    def read(self, name: str) -> bytes | None:
        """Return what an object holds, or `None` if there is none of that name."""
        with self._asked(name), suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(self._at(name)))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write an object, in the place of one that is there."""
        with self._asked(name):
            self._fs.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object only if there is none of that name; return whether this one is there.

        The content must be of one's own: a reply that was lost shows itself by it.
        """
        try:
            with self._asked(name):
                self._fs.pipe_file(self._at(name), content, mode="create")
        except FileExistsError:
            return self.read(name) == content
        except OSError:
            if self.read(name) is None:
                raise
            return self.read(name) == content
        return True

    def exists(self, name: str) -> bool:
        """Return whether there is such an object."""
        try:
            with self._asked(name):
                self._fs.info(self._at(name))
        except FileNotFoundError:
            return False
        return True

    def listing(self, folder: str) -> tuple[list[Found], list[str]]:
        """Return the objects in a folder, and the names of the folders in it; one request."""
        try:
            with self._asked(folder):
                entries = self._fs.ls(self._at(folder), detail=True)
        except FileNotFoundError:
            return [], []
        files: list[Found] = []
        folders: list[str] = []
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if entry["type"] == "directory":
                folders.append(name)
            else:
                files.append(Found(name, int(entry["size"]), _stamp(entry)))
        return files, folders

    def tree(self, folder: str) -> dict[str, int]:
        """Return the sizes of all objects below a folder, by their name below it."""
        root = self._at(folder)
        try:
            with self._asked(folder):
                found = self._fs.find(root, detail=True)
        except FileNotFoundError:
            return {}
        start = len(root.strip("/")) + 1
        return {
            path.strip("/")[start:]: int(about["size"])
            for path, about in found.items()
            if about["type"] == "file" and len(path.strip("/")) >= start
        }

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; one that is gone is no error."""

        def remove(name: str) -> None:
            with self._asked(name), suppress(FileNotFoundError):
                self._fs.rm_file(self._at(name))

        _at_once(remove, names)

    def upload(
        self,
        folder: Path,
        names: Iterable[str],
        to: str,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Write files below a local folder as objects of the same names below `to`.

        `before` is called before each, and may raise.
        """

        def put(name: str) -> None:
            before()
            with self._asked(f"{to}/{name}"):
                self._fs.put_file(os.fspath(folder / name), self._at(f"{to}/{name}"))

        _at_once(put, names)

    def download(self, source: str, names: Iterable[str], folder: Path) -> None:
        """Copy objects below `source` to files of the same names; what is not there is left out."""

        def get(name: str) -> None:
            to = folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._asked(f"{source}/{name}"):
                    self._fs.get_file(self._at(f"{source}/{name}"), os.fspath(to))
            except FileNotFoundError:
                to.unlink(missing_ok=True)

        _at_once(get, names)

    def move(self, source: str, to: str) -> None:
        """Move all below a folder, or one object, without bringing it here."""
        names = [f"/{name}" for name in self.tree(source)] or [""]

        def copy(name: str) -> None:
            with self._asked(source + name):
                self._fs.cp_file(self._at(source + name), self._at(to + name))

        _at_once(copy, names)
        self.remove([source + name for name in names])

    def file(self, name: str) -> File | None:
        """Return size and digest of an object, read piece by piece, or `None` if there is none."""
        import xxhash

        digest, size = xxhash.xxh3_128(), 0
        try:
            with (
                self._asked(name),
                self._fs.open(self._at(name), "rb", block_size=_CHUNK) as stream,
            ):
                while piece := stream.read(_CHUNK):
                    digest.update(piece)
                    size += len(piece)
        except FileNotFoundError:
            return None
        return File(size, f"xxh3:{digest.hexdigest()}")

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    @contextmanager
    def _asked(self, name: str) -> Iterator[None]:
        """Make every failure of the client one of the operating system's kind, which is told."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each client has errors of its own
            text = redact(f"{type(error).__name__}: {error}")
            raise OSError(f"{self.address}/{name}: {text}") from error


def _stamp(entry: dict[str, Any]) -> str:
    known = ("ETag", "etag", "generation", "LastModified", "updated", "created", "size")
    return " ".join(str(entry.get(key, "")) for key in known)


def _at_once(call: Callable[[str], None], names: Iterable[str]) -> None:
    """Call a function with each name, several at a time, and raise the first error."""
    from concurrent.futures import ThreadPoolExecutor

    todo: Collection[str] = list(names)
    if todo:
        with ThreadPoolExecutor(min(_AT_ONCE, len(todo)), "ckpt-bucket") as pool:
            for _ in pool.map(call, todo):
                pass
