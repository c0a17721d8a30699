"""What a run remembers in files on this machine, kept in object storage too.

Metrics and files that a tracker lacks, what was evicted, and what happened when. An object cannot
grow, so a file that does is kept as pieces, each named after the bytes that it holds::

    metrics/000000000000-000000004096
           /000000004096-000000009000

Pieces may overlap after a kill: where they do, they hold the same.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from ckpt_callbacks.bucket import Bucket
from ckpt_callbacks.manifest import files_in

__all__ = ["Memory", "Tail"]

_PIECES = 64
"""Pieces of a file, after which they are made one again."""
_ATTEMPTS = 5
"""Times that pieces are looked for which another process is making one."""


class Tail:
    """A file of lines that grows, until it is emptied.

    Args:
        bucket: where its pieces are kept.
        folder: the folder for them there.
        path: the file.
    """

    def __init__(self, bucket: Bucket, folder: str, path: Path) -> None:
        self._bucket = bucket
        self._folder = folder
        self._path = path
        self._mutex = threading.Lock()

    def push(self) -> None:
        """Send what is new in the file, up to its last whole line."""
        with self._mutex:
            self._push()

    def _push(self) -> None:
        content = self._path.read_bytes() if self._path.exists() else b""
        content = content[: content.rfind(b"\n") + 1]
        pieces = self._pieces()
        kept = _covered(pieces)
        if kept == len(content):
            return
        grows = kept < len(content) and len(pieces) < _PIECES
        start = kept if grows else 0
        if content:
            name = f"{start:012d}-{len(content):012d}"
            self._bucket.write(f"{self._folder}/{name}", content[start:])
        if not grows:
            ours = (0, len(content))
            self._bucket.remove(self._name(piece) for piece in pieces if piece != ours)

    def is_emptied(self) -> bool:
        """Return whether there is more of it there than here."""
        size = self._path.stat().st_size if self._path.exists() else 0
        return size < _covered(self._pieces())

    def read(self) -> bytes:
        """Return the content, from its pieces."""
        for _ in range(_ATTEMPTS):
            content = b""
            for start, end in sorted(self._pieces(), key=lambda piece: (piece[0], -piece[1])):
                if start <= len(content) < end:
                    piece = self._bucket.read(self._name((start, end)))
                    if piece is None:
                        break
                    content += piece[len(content) - start :]
            else:
                return content
        raise OSError(f"{self._bucket.address}/{self._folder} changes while it is read")

    def last(self) -> bytes:
        """Return the end of the content: the last piece."""
        last = max(self._pieces(), key=lambda piece: piece[1], default=None)
        return (last and self._bucket.read(self._name(last))) or b""

    def _pieces(self) -> list[tuple[int, int]]:
        names = [found.name.partition("-") for found in self._bucket.listing(self._folder)[0]]
        return [(int(start), int(end)) for start, dash, end in names if dash]

    def _name(self, piece: tuple[int, int]) -> str:
        return f"{self._folder}/{piece[0]:012d}-{piece[1]:012d}"


def _covered(pieces: list[tuple[int, int]]) -> int:
    """Return up to where pieces hold a file without a gap."""
    reached = 0
    for start, end in sorted(pieces):
        if start <= reached:
            reached = max(reached, end)
    return reached


class Memory:
    """All of it, of one run directory.

    Args:
        bucket: where it is kept.
        meta: its folder there.
        local: the folder with the files.
    """

    def __init__(self, bucket: Bucket, meta: str, local: Path) -> None:
        self._bucket = bucket
        self._local = local
        self._mutex = threading.Lock()
        self._state = f"{meta}/metrics.json"
        self._files = f"{meta}/artifacts"
        self.metrics = Tail(bucket, f"{meta}/metrics", local / "metrics.jsonl")
        self.evicted = Tail(bucket, f"{meta}/evicted", local / "evicted.jsonl")
        self.history = Tail(bucket, f"{meta}/history", local / "history.jsonl")
        self._tails = {"metrics": self.metrics, "evicted": self.evicted, "history": self.history}

    def push(self) -> None:
        """Send what has changed."""
        with self._mutex:
            self._push()

    def _push(self) -> None:
        state = self._local / "metrics.json"
        # Before the metrics: how far each tracker is must never be more than there are.
        text = state.read_bytes() if state.exists() else None
        if self.metrics.is_emptied():
            self._send(text)
        self.metrics.push()
        self._send(text)
        self.evicted.push()
        folder = self._local / "artifacts"
        found = {p.relative_to(folder).as_posix(): p for p in files_in(folder)}
        here = {n: p.stat().st_size for n, p in found.items() if n[0] != "." and p.exists()}
        there = self._bucket.tree(self._files)
        with suppress(FileNotFoundError):  # a tracker has just got it
            new = [name for name, size in here.items() if there.get(name) != size]
            # Last what says that the rest is there.
            self._bucket.upload(folder, [n for n in new if not _describes(n)], self._files)
            self._bucket.upload(folder, filter(_describes, new), self._files)
        gone = sorted(there.keys() - here.keys(), key=_describes, reverse=True)
        self._bucket.remove(f"{self._files}/{name}" for name in gone)

    def last_lines(self, name: str) -> list[bytes]:
        """Return the last lines of a file that grows, as they were sent."""
        return self._tails[name].last().splitlines()

    def pull(self) -> None:
        """Fetch all of it, on a machine that has nothing."""
        for name, tail in self._tails.items():
            if content := tail.read():
                (self._local / f"{name}.jsonl").write_bytes(content)
        if (state := self._bucket.read(self._state)) is not None:
            (self._local / "metrics.json").write_bytes(state)
        names = self._bucket.tree(self._files)
        self._bucket.download(self._files, names, self._local / "artifacts")

    def _send(self, state: bytes | None) -> None:
        if state is not None and state != self._bucket.read(self._state):
            self._bucket.write(self._state, state)


def _describes(name: str) -> bool:
    return name.endswith("/artifact.json")
