"""The run directory: where things are, who owns it, and how its small files change.

::

    <root>/<step>/                      checkpoints, as Orbax writes them
    <root>/.ckpt_callbacks/run.json     the run as a whole
                          /records/     one small file a checkpoint
                          /evicted.jsonl   what is remembered of evicted checkpoints
                          /history.jsonl   when what happened, for pictures
                          /trash/       evicted checkpoints on their way out
                          /damaged/     checkpoints and records that cannot be read
                          /inbox/       what other processes ask of the owner
                          /stores/      a folder for each store
                          /artifacts/   files of the user's not yet sent everywhere
                          /metrics.jsonl, metrics.json    metrics not yet sent everywhere
                          /lock, owner.json               who owns the directory
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ckpt_callbacks import orbax_io
from ckpt_callbacks.errors import ConfigError, DirectoryLocked, NewerFormat, RecordError
from ckpt_callbacks.failpoints import hit
from ckpt_callbacks.manifest import damage, fsync, seal, verify
from ckpt_callbacks.record import (
    File,
    Gone,
    Record,
    RunFile,
    gone_from_json,
    gone_to_json,
    record_from_json,
    record_to_json,
    run_from_json,
    run_to_json,
)

if sys.platform == "win32":
    raise ConfigError("ckpt_callbacks needs POSIX file locks and hard links: use Linux or macOS")
import fcntl

if TYPE_CHECKING:
    from ckpt_callbacks.history import Entry
    from ckpt_callbacks.nearby import Folder
    from ckpt_callbacks.paths import Selection

__all__ = ["Listed", "RunDirectory", "replace_text"]

logger = logging.getLogger("ckpt_callbacks")

ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
"""Suffix of the folder that Orbax writes before it commits by renaming."""

_ABANDONED = 600.0
"""Seconds after which a file that another process was writing is taken for left behind."""

_TAIL = 1 << 16
"""Bytes at the end of a file that grows, in which its last lines are."""
_AT_ONCE = 1 << 16
"""Bytes that are read at once; nearly every record has fewer."""

_owned: dict[Path, IO[str]] = {}
"""The lock files of this process. Held here, since a lock goes when its file object does."""
_owned_mutex = threading.Lock()
os.register_at_fork(after_in_child=_owned.clear)


class Listed(NamedTuple):
    """What tells a record from each other one that has been there."""

    step: int
    inode: int
    changed: int | str


def replace_text(path: Path, text: str) -> None:
    """Replace a file at once and durably: after a crash it has the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        hit("file-written")
        temporary.replace(path)
    except OSError:  # such as a full disk, which it would keep full
        with suppress(OSError):
            temporary.unlink()
        raise
    hit("file-replaced")
    fsync(path.parent)


def _content(path: str) -> bytes:
    """Return what is in a small file; there may be thousands, and a `Path` takes twice the time."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.read(descriptor, _AT_ONCE)
        while more := os.read(descriptor, _AT_ONCE):
            content += more
        return content
    finally:
        os.close(descriptor)


class RunDirectory:
    """One run directory. Reading needs no lock; whoever writes calls `acquire` first."""

    kind = "local"
    """What people call such a place."""
    interval = 0.25
    """Seconds between two looks at what other processes ask."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        if re.match(r"(s3|gs|gcs|memory):/", str(root)):
            raise ConfigError(
                f"{root} is an address in object storage, and this needs a local directory; what "
                "takes an address takes it as text, not as a Path"
            )
        # Orbax wants absolute paths, and the loop may change its working directory.
        self.root = Path(root).expanduser().absolute()
        self.name = self.root.name
        self.meta = self.root / ".ckpt_callbacks"
        self.records = self.meta / "records"
        self.trash = self.meta / "trash"
        self.damaged = self.meta / "damaged"
        self.inbox = self.meta / "inbox"

    def __str__(self) -> str:
        return str(self.root)

    def address(self, step: int) -> str:
        """Return where others find the checkpoint of `step`."""
        return str(self.path(step))

    def path(self, step: int) -> Path:
        """Return where the checkpoint of `step` is or will be."""
        return self.root / str(step)

    def scratch(self, store: str) -> Path:
        """Return the folder that belongs to a store."""
        folder = self.meta / "stores" / store
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # Ownership

    def acquire(self, *, brief: bool = False, patience: float = 90.0) -> None:
        """Create the directory if need be and become its owner.

        Args:
            brief: for a moment only, to apply a request.
            patience: seconds to wait for an owner that has it for a moment only.

        Raises:
            ConfigError: it cannot be written.
            DirectoryLocked: another process, or another run in this one, owns it.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                self._acquire(brief)
            except DirectoryLocked:
                # Of two brief ones the second sees to its own waiting.
                if brief or self.is_taken() or time.monotonic() > deadline:
                    raise
                time.sleep(self.interval / 5)
            else:
                return

    def _acquire(self, brief: bool) -> None:
        try:
            for folder in (self.records, self.trash, self.inbox):
                folder.mkdir(parents=True, exist_ok=True)
            with _owned_mutex:
                self._lock()
        except OSError as error:
            raise ConfigError(
                f"cannot write to the run directory {self}: {error.strerror}; "
                "choose another directory, or change its permissions"
            ) from error
        me = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.time()}
        me |= {"brief": brief}
        try:
            self._sweep()
            replace_text(self.meta / "owner.json", json.dumps(me))
        except BaseException:
            self.release()
            raise

    def _lock(self) -> None:
        real = self.root.resolve()
        if real in _owned:  # record locks do not exclude within one process
            raise DirectoryLocked(f"{self} is in use by another run of this process")
        # Opened by its owner only: closing any other handle to the file would drop the lock.
        # A record lock, because a plain flock survives in forked children.
        lock = (self.meta / "lock").open("a")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise DirectoryLocked(
                f"{self} is in use by {self._owner()}: wait until it ends, "
                "or choose another directory"
            ) from error
        _owned[real] = lock

    @property
    def is_mine(self) -> bool:
        """Whether this process owns the directory."""
        return self.root.resolve() in _owned

    def check(self) -> None:
        """Make sure that this process still owns it, before anything is done that an owner does.

        Raises:
            DirectoryLocked: somebody else has taken over, which a local disk does not let happen.
            OSError: it cannot be known.
        """

    def _sweep(self) -> None:
        """Remove what a `replace_text` that was killed left behind."""
        for folder in (self.meta, self.records):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)
        for path in self.inbox.glob(".*.tmp"):  # another process may be at it just now
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    def release(self) -> None:
        """Give up ownership."""
        with _owned_mutex:
            if lock := _owned.pop(self.root.resolve(), None):
                with suppress(OSError):
                    (self.meta / "owner.json").unlink(missing_ok=True)
                lock.close()

    def owner(self) -> str | None:
        """Return who owns the directory for more than a moment, in words, or `None`."""
        return self._owner() if self.is_taken() else None

    def _owner(self) -> str:
        try:
            owner = self._read_owner()
            since = time.strftime("%F %T", time.localtime(owner["since"]))
            return f"process {owner['pid']} on {owner['host']} (since {since})"
        except (KeyError, TypeError):
            return "another process"

    def is_taken(self) -> bool:
        """Return whether the owner has said that it is there for more than a moment.

        One that has just begun has not said anything yet, or what an earlier one said is there.
        """
        owner = self._read_owner()
        pid = owner.get("pid")
        here = owner.get("host") == os.uname().nodename and isinstance(pid, int)
        if not owner or (here and not Path(f"/proc/{pid}").exists() and Path("/proc").exists()):
            return self.is_mine
        return not owner.get("brief")

    def _read_owner(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.meta / "owner.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    # Records

    def open_run(self) -> RunFile:
        """Return what is known of the run.

        Raises:
            ConfigError: this is no run directory.
            RecordError: `run.json` is damaged or of a newer format.
        """
        run = self.read_run()
        if run is None:
            from ckpt_callbacks.nearby import nearby

            raise ConfigError(
                f"{self} is no run directory: it has no .ckpt_callbacks/run.json"
                f"{nearby(self._place())}"
            )
        return run

    def read_run(self) -> RunFile | None:
        """Return the content of `run.json`, or `None` where no run ever started."""
        text = self._read("run.json")
        return None if text is None else run_from_json(text, self._where("run.json"))

    def write_run(self, run: RunFile) -> None:
        """Replace `run.json`."""
        self._replace("run.json", run_to_json(run))

    def read_record(self, step: int) -> Record | None:
        """Return the record of a step, or `None` if it has none.

        Raises:
            RecordError: it is damaged, or of a newer format.
        """
        name = f"records/{step}.json"
        if (text := self._read(name)) is None:
            return None
        record = record_from_json(text, self._where(name))
        if record.step != step:
            raise RecordError(f"{self._where(name)} is the record of step {record.step}")
        return record

    def read_records(
        self, on_damage: Callable[[Path, RecordError], None] | None = None
    ) -> dict[int, Record]:
        """Return all records by step, in order.

        Args:
            on_damage: told of damaged ones, which are then left out, instead of an error.

        Raises:
            RecordError: one is damaged, or not the one its name says.
            NewerFormat: one is of a newer format; then none is touched.
        """
        records: dict[int, Record] = {}
        bad: dict[Path, RecordError] = {}
        for step, record in self._at_one_moment(lambda record: True).items():
            if isinstance(record, Record):
                records[step] = record
            elif on_damage is None or isinstance(record, NewerFormat):
                raise record
            else:
                bad[self.records / f"{step}.json"] = record
        for path, problem in bad.items():
            if on_damage:
                on_damage(path, problem)
        return records

    def complete_records(self) -> dict[int, Record]:
        """Return the records of the checkpoints that can be read, in order.

        Raises:
            RecordError: one is damaged, or of a newer format.
        """
        return self._whole(self.is_readable)

    def known_records(self) -> dict[int, Record]:
        """Return the records of those, and of the checkpoints that are in trackers alone, in order.

        Raises:
            RecordError: one is damaged, or of a newer format.
        """
        from ckpt_callbacks.situation import is_away  # which saving and restoring do without

        return self._whole(lambda record: self.is_readable(record) or is_away(record))

    def _whole(self, accept: Callable[[Record], bool]) -> dict[int, Record]:
        whole: dict[int, Record] = {}
        for step, record in self._at_one_moment(accept).items():
            if isinstance(record, RecordError):
                raise record
            whole[step] = record
        return whole

    def _at_one_moment(self, accept: Callable[[Record], bool]) -> dict[int, Record | RecordError]:
        """Return the records that are accepted, and the damaged ones, in order of steps.

        Between a reader's listing and its reading the owner may save a step and evict the one
        before. So a reader looks again, until nothing was changed while it read.
        """
        seen: dict[Listed, Record | RecordError | None] = {}
        while True:
            listing = self._listing()
            for listed in listing - seen.keys():
                try:
                    seen[listed] = self.read_record(listed.step)
                except RecordError as error:
                    seen[listed] = error
            found: dict[int, Record | RecordError] = {}
            for listed in sorted(listing):
                record = seen[listed]
                if isinstance(record, RecordError) or (record and accept(record)):
                    found[listed.step] = record
            if self._listing() == listing:
                return found

    def _listing(self) -> set[Listed]:
        """Return what records there are."""
        listing: set[Listed] = set()
        with suppress(FileNotFoundError), os.scandir(self.records) as entries:
            for entry in entries:
                step, _, suffix = entry.name.partition(".")
                if suffix == "json" and step.isdecimal():
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:  # its owner removed it just now
                        continue
                    listing.add(Listed(int(step), stat.st_ino, stat.st_mtime_ns))
        return listing

    def is_readable(self, record: Record) -> bool:
        """Return whether the checkpoint of a record counts and is there."""
        whole = record.state == "complete" and not record.discarded
        return whole and self.is_committed(record.step)

    def write_record(self, record: Record) -> None:
        """Replace the record of a step."""
        self._replace(f"records/{record.step}.json", record_to_json(record))

    def remove_record(self, step: int) -> None:
        """Forget a step."""
        self._remove(f"records/{step}.json")

    def log_evicted(self, gone: Gone) -> None:
        """Remember a checkpoint that was evicted."""
        line = gone_to_json(gone).encode() + b"\n"
        with (self.meta / "evicted.jsonl").open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read(1) not in (b"\n", b""):
                line = b"\n" + line  # what a kill or a full disk cut stays a line of its own
            file.write(line)

    def read_evicted(self) -> list[Gone]:
        """Return the checkpoints that were evicted, oldest first; damaged lines are left out."""
        evicted: list[Gone] = []
        for line in self._evicted_text().splitlines():
            with suppress(RecordError):
                evicted.append(gone_from_json(line, self._where("evicted.jsonl")))
        return evicted

    def _evicted_text(self) -> str:
        path = self.meta / "evicted.jsonl"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def read_history(self) -> list[Entry]:
        """Return what happened so far, oldest first, but for what was damaged."""
        from ckpt_callbacks.history_file import HistoryFile

        return HistoryFile(self.meta).entries()

    def last_lines(self, name: str) -> list[bytes]:
        """Return the last lines of a file that grows: `metrics` or `evicted`; not all, if long."""
        path = self.meta / f"{name}.jsonl"
        if not path.exists():
            return []
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            return file.read().splitlines()

    def seen(self) -> object:
        """Return what is another once a record or the run file has changed."""
        paths = self.records, self.meta / "run.json"
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]

    def unfit(self) -> str:
        """Return why no run can write there, or nothing."""
        closed = [p for p in (self.root, self.meta, self.records) if not os.access(p, os.W_OK)]
        return f"may not be written: {', '.join(map(str, closed))}" if closed else ""

    # The small files, which a directory elsewhere has elsewhere

    def _place(self) -> Folder:
        return self.root

    def _where(self, name: str) -> str:
        return f"{self.meta}/{name}"

    def _read(self, name: str) -> str | None:
        """Return the text of a small file, or `None` where there is none."""
        try:
            return _content(f"{self.meta}/{name}").decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise RecordError(f"{self._where(name)} is damaged: {error}") from error

    def _replace(self, name: str, text: str) -> None:
        replace_text(self.meta / name, text)

    def _remove(self, name: str) -> None:
        (self.meta / name).unlink(missing_ok=True)

    # What other processes ask

    def post(self, name: str, text: str) -> Path:
        """Put a request into the inbox, whole or not at all."""
        self.inbox.mkdir(exist_ok=True)
        replace_text(self.inbox / name, text)
        return self.inbox / name

    def posted(self) -> list[str]:
        """Return the names of the requests, oldest first."""
        with suppress(FileNotFoundError):  # a copy of the directory may lack what was empty
            return sorted(p.name for p in self.inbox.iterdir() if p.name[0] != ".")
        return []

    def is_posted(self, name: str) -> bool:
        """Return whether a request is not applied yet."""
        return (self.inbox / name).exists()

    def read_posted(self, name: str) -> str:
        """Return the text of a request."""
        return (self.inbox / name).read_text(encoding="utf-8", errors="replace")

    def withdraw(self, name: str) -> None:
        """Remove a request."""
        (self.inbox / name).unlink()

    # Checkpoint folders

    def folders(self) -> list[int]:
        """Return the steps that a folder is named after, in order."""
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdecimal())

    def is_of_others(self) -> bool:
        """Return whether it is there and no run of ours ever was in it."""
        return self.root.is_dir() and not self.meta.exists()

    def commit(self, step: int) -> dict[str, File]:
        """Make what Orbax has committed durable and read-only, and return its files."""
        return seal(self.path(step))

    def bring(self, record: Record) -> None:
        """Have the files of a checkpoint at its `path`, for its owner, and check them all.

        Raises:
            CorruptCheckpoint: one is missing or differs.
        """
        verify(self.path(record.step), record.files)

    @contextmanager
    def lend(
        self, record: Record, only: Selection | None = None, *, check: bool = True
    ) -> Iterator[tuple[Path, Mapping[str, File]]]:
        """Give the files of a checkpoint on this disk while the body runs.

        Args:
            record: of the checkpoint.
            only: the leaves that are wanted; other items may be absent.
            check: whether the files are to be checked.

        Yields:
            Where they are, and those of them that the caller has to check.
        """
        yield self.path(record.step), record.files if check else {}

    def damage(self, record: Record) -> Iterator[str]:
        """Yield what is wrong with each damaged file of a checkpoint, or with all of it."""
        path = self.path(record.step)
        if path.is_dir():
            yield from damage(path, record.files)
        else:
            yield f"{path} is not there"

    def take_in(self, step: int, whole: Path) -> None:
        """Let a checkpoint that came from elsewhere be that of `step`."""
        self.to_trash(step)  # of a start that was killed here
        whole.rename(self.path(step))
        fsync(self.root)

    def put_in_place(self, step: int, whole: Path) -> None:
        """Let a checkpoint that came from elsewhere take the place of a damaged one."""
        path = self.path(step)
        whole = whole.rename(self.fetched(step))
        hit("copy-fetched")
        self.set_aside(path)
        hit("damage-set-aside")
        whole.rename(path)

    def is_committed(self, step: int) -> bool:
        """Return whether Orbax has committed the step: it renames the folder when all is there."""
        return os.path.isfile(f"{self.root}/{step}/_CHECKPOINT_METADATA")  # noqa: PTH113  # as above

    def saved_by(self, step: int) -> object:
        """Return the id of the run that saved a committed checkpoint, by its own metadata."""
        return orbax_io.metadata(self.path(step)).get("run")

    def remove_uncommitted(self, step: int) -> None:
        """Remove what a save that did not commit left behind."""
        leftover = self.root / f"{step}{ORBAX_TEMPORARY}"
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)

    def to_trash(self, step: int) -> None:
        """Take a checkpoint out of the listing at once, by a rename."""
        path = self.path(step)
        if path.is_symlink() or not path.exists():
            return
        # A name of its own, since the step may have been saved, evicted and saved again.
        path.rename(self.trash / f"{step}-{time.time_ns()}")
        fsync(self.root)

    def fetching(self, step: int) -> Path:
        """Return the folder for a checkpoint that comes from elsewhere."""
        return self.trash / f"{step}-fetching"

    def fetched(self, step: int) -> Path:
        """Return the folder of a checkpoint that came from elsewhere and is whole."""
        return self.trash / f"{step}-fetched"

    def set_aside(self, path: Path) -> Path | str:
        """Move a damaged file or folder to where nothing reads it and nothing removes it."""
        self.damaged.mkdir(exist_ok=True)
        target = self.damaged / f"{path.name}-{time.time_ns()}"
        path.rename(target)
        fsync(path.parent)
        return target

    def empty_trash(self) -> None:
        """Free the bytes of evicted checkpoints."""
        for path in self.trash.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
