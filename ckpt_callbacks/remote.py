"""A run directory in object storage.

It has the layout of a local one, so that each checkpoint is what Orbax wrote. Orbax writes it on
this machine, from where it is sent, and counts once its record says so, the last thing that is
written. What is on this machine is scratch: the newest checkpoint, and what was not sent yet.
There is no rename, so what is evicted gets a marker and goes after a while.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_callbacks import orbax_io
from ckpt_callbacks.bucket import Bucket, is_bucket
from ckpt_callbacks.clock import Clock
from ckpt_callbacks.directory import Listed, RunDirectory
from ckpt_callbacks.errors import (
    CkptCallbacksError,
    ConfigError,
    CorruptCheckpoint,
    DirectoryLocked,
    RecordError,
)
from ckpt_callbacks.failpoints import hit
from ckpt_callbacks.history_file import entries_in
from ckpt_callbacks.lease import Card, Lease
from ckpt_callbacks.manifest import damage, difference, files_in, seal
from ckpt_callbacks.memory import Memory
from ckpt_callbacks.record import File, Gone, Record

if TYPE_CHECKING:
    from ckpt_callbacks.history import Entry
    from ckpt_callbacks.nearby import Folder
    from ckpt_callbacks.paths import Selection

__all__ = ["RemoteDirectory", "copy_referenced", "is_bucket", "open_directory", "refuse_bucket"]

logger = logging.getLogger("ckpt_callbacks")

GRACE = 60.0
"""Seconds for which one who reads an evicted checkpoint may go on; the end of a run waits for
nobody."""
_ABANDONED = 86400.0
"""Seconds after which what somebody has fetched to read it is taken for left by a kill."""
_TELL = 60.0
"""Seconds between two times at which what happened is sent, which is for people only."""
_META = ".ckpt_callbacks"
_COMMITTED = "_CHECKPOINT_METADATA"
_LAST = ("commit_success.txt", _COMMITTED)
"""By these Orbax knows that a checkpoint is whole: they come last, and go first."""


def open_directory(where: str | os.PathLike[str], clock: Clock | None = None) -> RunDirectory:
    """Return the run directory at a path or an address."""
    if isinstance(where, str) and is_bucket(where):
        return RemoteDirectory(where, clock)
    return RunDirectory(where)


def copy_referenced(where: str, into: Path, only: Selection | None = None) -> bool:
    """Copy a checkpoint to which a tracker refers by its path or address into an empty folder.

    Returns whether it is there. In object storage the files are checked, and of `only` its items
    are copied.

    Raises:
        CheckpointNotFound: it has no such item.
        CorruptCheckpoint: a file is damaged.
    """
    if not is_bucket(where):
        if there := Path(where).is_dir():
            shutil.copytree(where, into, dirs_exist_ok=True)
        return there
    root, _, step = where.rstrip("/").rpartition("/")
    directory = RemoteDirectory(root)
    record = directory.read_record(int(step))
    if record is None or not directory.is_readable(record):
        return False
    directory.fetch(record, into, only)
    return True


class RemoteDirectory(RunDirectory):
    """A run directory at an address such as `s3://bucket/runs/digits`."""

    interval = 5.0

    def __init__(self, address: str, clock: Clock | None = None) -> None:
        self.bucket = Bucket(address)
        where = self.bucket.address
        name = where.rpartition("/")[2]
        super().__init__(_scratch() / f"{name}-{hashlib.sha256(where.encode()).hexdigest()[:12]}")
        self.name = name
        self.kind = self.bucket.kind
        self._clock = clock or Clock()
        self._memory = Memory(self.bucket, _META, self.meta)
        self._told = self._clock.monotonic()
        self._lease: Lease | None = None
        self._cache = ""
        self._stale = False
        self._ready = False
        """Whether what is on this machine is what the last owner left."""
        self._saving: dict[int, Record | None] = {}
        """Saves that are under way, and their records as long as those are not sent."""
        self._trash: dict[str, float] = {}
        """The markers of what was evicted, and when that was."""
        self._lent: Counter[int] = Counter()
        self._mutex = threading.Lock()

    def __str__(self) -> str:
        return self.bucket.address

    def address(self, step: int) -> str:
        return f"{self}/{step}"

    # Ownership

    def _acquire(self, brief: bool) -> None:
        super()._acquire(brief)  # of what is on this machine
        self._cache, self._ready, self._trash = "", False, {}  # others may have owned it since
        try:
            lease = Lease(self.bucket, f"{_META}/lease", self._clock)
            lease.take(brief=brief, cache=self._cache_after)
            self._lease = lease
            lease.start()
            self._begin()
        except BaseException as error:
            self.release()
            if isinstance(error, OSError) and not isinstance(error, CkptCallbacksError):
                raise ConfigError(f"cannot use the run directory {self}: {error}") from error
            raise

    def _cache_after(self, before: Card) -> str:
        """Return the id of what is on this machine; a new one if others have owned it since."""
        with suppress(FileNotFoundError):
            self._cache = (self.meta / "cache-id").read_text(encoding="utf-8")
        self._stale = not self._cache or before.get("cache") != self._cache
        if self._stale:
            self._cache = os.urandom(8).hex()
        return self._cache

    def _begin(self) -> None:
        if self._stale:
            for path in [*self.root.iterdir(), *self.meta.iterdir()]:
                if path != self.meta and path.name not in ("lock", "owner.json"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in (self.records, self.trash, self.inbox):
                folder.mkdir()
            self._memory.pull()
            (self.meta / "cache-id").write_text(self._cache, encoding="utf-8")
        else:
            self._memory.push()  # before what was emptied grows again
            self._tell()
        for path in self.meta.glob("reading-*"):  # of a process that was killed
            shutil.rmtree(path)
        for found in self.bucket.listing(f"{_META}/trash")[0]:
            self._trash[found.name] = int(found.name.partition("-")[2]) / 1e9
        for path in self.root.iterdir():
            step = path.name.partition(".")[0]
            # Of a save that was cut, or its objects were removed by somebody else: it would be in
            # the way of the next save of that step.
            if step.isdecimal() and not (step == path.name and self.is_committed(int(step))):
                shutil.rmtree(path)
        self._ready = True

    def release(self) -> None:
        try:
            if self._lease and self._ready:  # else it would be lost elsewhere too
                self.check()
                self._memory.push()
                self._tell()
                self._empty(grace=0)
        except (OSError, CkptCallbacksError) as error:
            logger.warning("%s: the next run there does what is left: %s", self, error)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        lease, self._lease = self._lease, None
        try:
            if lease:
                lease.release()
        except OSError as error:
            logger.warning("the lease of %s can not be released: %s", self, error)
        finally:
            super().release()

    def _read_owner(self) -> dict[str, Any]:
        return dict(Lease(self.bucket, f"{_META}/lease", self._clock).holder())

    def check(self) -> None:
        if self._lease is None:
            raise DirectoryLocked(f"{self} is not owned by this process")
        self._lease.check()

    def _tell(self, every: float = 0.0) -> None:
        """Send what happened, if that is due; what cannot be sent goes the next time."""
        now = self._clock.monotonic()
        if now - self._told >= every:
            self._told = now
            with suppress(OSError):
                self._memory.history.push()

    # Small files

    def _where(self, name: str) -> str:
        return f"{self}/{_META}/{name}"

    def _read(self, name: str) -> str | None:
        content = self.bucket.read(f"{_META}/{name}")
        try:
            return None if content is None else content.decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"{self._where(name)} is damaged: {error}") from error

    def _replace(self, name: str, text: str) -> None:
        self.check()
        self.bucket.write(f"{_META}/{name}", text.encode())

    def _remove(self, name: str) -> None:
        self.check()
        self.bucket.remove([f"{_META}/{name}"])

    def _listing(self) -> set[Listed]:
        found = self.bucket.listing(f"{_META}/records")[0]
        split = [(f.name.partition("."), f.stamp) for f in found]
        return {Listed(int(n), 0, s) for (n, _, end), s in split if n.isdecimal() and end == "json"}

    def write_record(self, record: Record) -> None:
        if record.state == "saving" and not record.logged:
            # The loop waits for this, and there is nothing of the save there yet.
            self._saving[record.step] = record
            return
        super().write_record(record)
        if record.step in self._saving:
            self._saving[record.step] = None

    def remove_record(self, step: int) -> None:
        self._saving.pop(step, None)
        super().remove_record(step)

    def log_evicted(self, gone: Gone) -> None:
        super().log_evicted(gone)
        self.check()
        self._memory.evicted.push()

    def read_history(self) -> list[Entry]:
        if self._lease:
            return super().read_history()
        return list(entries_in(self._memory.history.read()))

    def last_lines(self, name: str) -> list[bytes]:
        return self._memory.last_lines(name)

    def seen(self) -> object:
        return self._listing(), self._read("run.json")

    def unfit(self) -> str:
        name = f"{_META}/probe-{os.urandom(8).hex()}"
        try:
            created = [self.bucket.create(name, content) for content in (b"1", b"2")]
            self.bucket.remove([name])
        except OSError as error:
            return f"may not be written: {error}"
        if created == [True, False]:
            return ""
        return (
            "an object that is there can be created again (the store ignores If-None-Match), so "
            "two runs that start at once both own the directory, for up to half a minute"
        )

    def _place(self) -> Folder:
        return self.bucket.place()

    def _evicted_text(self) -> str:
        return super()._evicted_text() if self._lease else self._memory.evicted.read().decode()

    # What other processes ask

    def post(self, name: str, text: str) -> Path:
        self.bucket.write(f"{_META}/inbox/{name}", text.encode())
        return self.inbox / name

    def posted(self) -> list[str]:
        return sorted(found.name for found in self.bucket.listing(f"{_META}/inbox")[0])

    def is_posted(self, name: str) -> bool:
        return self.bucket.exists(f"{_META}/inbox/{name}")

    def read_posted(self, name: str) -> str:
        content = self.bucket.read(f"{_META}/inbox/{name}")
        if content is None:
            raise FileNotFoundError(f"{self._where(f'inbox/{name}')} is gone")
        return content.decode(errors="replace")

    def withdraw(self, name: str) -> None:
        self.check()
        self._memory.push()  # its metrics, which nobody would ask for again
        self.bucket.remove([f"{_META}/inbox/{name}"])

    # Checkpoints

    def folders(self) -> list[int]:
        steps = [int(name) for name in self.bucket.listing("")[1] if name.isdecimal()]
        return sorted(set(steps) - self._trashed())

    def is_of_others(self) -> bool:
        return not any(self.bucket.listing(_META))

    def is_committed(self, step: int) -> bool:
        return step not in self._trashed() and self.bucket.exists(f"{step}/{_COMMITTED}")

    def saved_by(self, step: int) -> object:
        with _folder() as folder:
            self.bucket.download(str(step), [_COMMITTED], folder)
            return orbax_io.metadata(folder).get("run")

    def commit(self, step: int) -> dict[str, File]:
        path = self.path(step)
        if record := self._saving.get(step):  # it could not be sent earlier
            super().write_record(record)
        if not (path / _COMMITTED).is_file():  # sent by another machine, which was cut then
            shutil.rmtree(path, ignore_errors=True)
            self.bucket.download(str(step), self.bucket.tree(str(step)), path)
        files = seal(path)
        if step in self._saving:
            self._send(step)
        self._ensure_sent(step, _sizes(path))
        self._memory.push()
        self._tell(_TELL)
        self._saving.pop(step, None)
        self._shrink()
        return files

    def bring(self, record: Record) -> None:
        with self._mutex:
            path = self.path(record.step)
            if not path.is_dir() or any(damage(path, record.files)):
                self._fetch_here(record)

    @contextmanager
    def lend(
        self, record: Record, only: Selection | None = None, *, check: bool = True
    ) -> Iterator[tuple[Path, Mapping[str, File]]]:
        step = record.step
        if self._lease is None:
            with _folder() as folder:
                path = folder / str(step)
                path.mkdir()
                self.fetch(record, path, only, check=check)
                yield path, {}
            return
        with self._mutex:
            self._lent[step] += 1
        try:
            with self._mutex:
                if not self.path(step).is_dir():
                    self._fetch_here(record)
            yield self.path(step), record.files if check else {}
        finally:
            with self._mutex:
                self._lent[step] -= 1
            self._shrink()

    def fetch(
        self, record: Record, into: Path, only: Selection | None = None, *, check: bool = True
    ) -> None:
        """Copy the files of a checkpoint into a folder, and check them.

        Raises:
            CheckpointNotFound: it has nothing of what is wanted.
            CorruptCheckpoint: one is missing or differs.
        """
        names: Collection[str] = record.files
        if only is not None:
            items = {name.partition("/")[0] for name in names if "/" in name}
            chosen = only.items(items, self.address(record.step))
            names = [n for n in names if "/" not in n or n.partition("/")[0] in chosen]
        self.bucket.download(str(record.step), names, into)
        wanted = {name: record.files[name] for name in names}
        for problem in damage(into, wanted, where=self.address(record.step)) if check else ():
            raise CorruptCheckpoint(problem)

    def damage(self, record: Record) -> Iterator[str]:
        for name, expected in record.files.items():
            found = self.bucket.file(f"{record.step}/{name}")
            where = f"{self.address(record.step)}/{name}"
            if found is None:
                yield f"{where} cannot be read: there is no such object"
            elif found != expected:
                yield difference(where, found, expected)

    def take_in(self, step: int, whole: Path) -> None:
        shutil.rmtree(self.path(step), ignore_errors=True)
        whole.rename(self.path(step))
        self._send(step)

    def put_in_place(self, step: int, whole: Path) -> None:
        shutil.rmtree(self.path(step), ignore_errors=True)
        whole.rename(self.path(step))
        self._upload(step)  # in the place of the damaged ones, so that none is ever missing

    def remove_uncommitted(self, step: int) -> None:
        super().remove_uncommitted(step)
        shutil.rmtree(self.path(step), ignore_errors=True)
        self._remove_objects(step)

    def to_trash(self, step: int) -> None:
        shutil.rmtree(self.path(step), ignore_errors=True)
        if step not in self._trashed() and self.bucket.tree(str(step)):
            self.check()
            at = self._clock.time()
            name = f"{step}-{int(at * 1e9)}"
            self.bucket.write(f"{_META}/trash/{name}", b"")
            self._trash[name] = at

    def empty_trash(self) -> None:
        super().empty_trash()
        self._empty(GRACE)

    def set_aside(self, path: Path) -> str:
        self.check()
        target = f"{_META}/damaged/{path.name}-{time.time_ns()}"
        self.bucket.move(path.relative_to(self.root).as_posix(), target)
        if path.is_dir():
            shutil.rmtree(path)
        return f"{self}/{target}"

    def _empty(self, grace: float) -> None:
        for name, at in list(self._trash.items()):
            if self._clock.time() - at < grace:
                continue
            step = int(name.partition("-")[0])
            record = self.read_record(step)
            if (
                record is None
                or record.state in ("evicting", "gone")
                or record.discarded
                or record.lost
            ):
                self._remove_objects(step)
            self._remove(f"trash/{name}")
            del self._trash[name]

    def _trashed(self) -> set[int]:
        return {int(name.partition("-")[0]) for name in self._trash}

    def _remove_objects(self, step: int) -> None:
        self.check()
        names = self.bucket.tree(str(step))
        for name in reversed(_LAST):
            if name in names:
                self.bucket.remove([f"{step}/{name}"])
        hit("objects-removed")
        self.bucket.remove(f"{step}/{name}" for name in names if name not in _LAST)

    def _send(self, step: int) -> None:
        """Let a checkpoint on this machine be that of `step`."""
        self._remove_objects(step)  # of an earlier save of it, which was evicted
        for name in [n for n in self._trash if n.partition("-")[0] == str(step)]:
            self._remove(f"trash/{name}")
            del self._trash[name]
        self._upload(step)

    def _upload(self, step: int) -> None:
        path = self.path(step)
        names = _sizes(path)
        others = [name for name in names if name not in _LAST]
        self.bucket.upload(path, others, str(step), self.check)
        hit("objects-sent")
        for name in filter(names.__contains__, _LAST):
            self.bucket.upload(path, [name], str(step), self.check)

    def _ensure_sent(self, step: int, sizes: Mapping[str, int]) -> None:
        there = self.bucket.tree(str(step))
        if wrong := sorted(name for name in sizes if there.get(name) != sizes[name]):
            raise OSError(
                f"{self.address(step)} lacks what was sent: {wrong[0]} has "
                f"{there.get(wrong[0], 'no')} bytes there, and {sizes[wrong[0]]} here"
            )

    def _fetch_here(self, record: Record) -> None:
        path = self.path(record.step)
        shutil.rmtree(path, ignore_errors=True)
        with _folder(self.meta) as folder:
            whole = folder / path.name
            whole.mkdir()
            self.fetch(record, whole)
            whole.rename(path)

    def _shrink(self) -> None:
        """Leave no checkpoint on this machine but the newest, and those that are read now."""
        with self._mutex:
            here = [p for p in self.root.iterdir() if p.name.isdecimal()]
            newest = max((int(p.name) for p in here), default=-1)
            for path in here:
                step = int(path.name)
                if step != newest and step not in self._saving and not self._lent[step]:
                    shutil.rmtree(path)


def _scratch() -> Path:
    """Return the folder on this machine for what is on its way."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("CKPT_CALLBACKS_SCRATCH") or Path(cache, "ckpt_callbacks")
    return Path(chosen).expanduser().absolute()


@contextmanager
def _folder(parent: Path | None = None) -> Iterator[Path]:
    import tempfile

    parent = parent or _scratch()
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.glob("reading-*"):
        with suppress(FileNotFoundError):  # another reader has just removed it
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="reading-") as folder:
        yield Path(folder)


def refuse_bucket(where: str | os.PathLike[str]) -> None:
    """Refuse a place that several processes can not save to together.

    Raises:
        ConfigError: it is in object storage.
    """
    if is_bucket(where):
        raise ConfigError(
            f"{where}: several processes can not share a run directory in object storage, since "
            "what Orbax writes has to be on one machine first: choose a shared file system"
        )


def _sizes(path: Path) -> dict[str, int]:
    return {p.relative_to(path).as_posix(): p.stat().st_size for p in files_in(path)}
