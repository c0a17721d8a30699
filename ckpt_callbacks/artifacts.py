"""Files of the user's on their way to the trackers: a plot, a configuration, a vocabulary.

A file is copied into a folder of its own in the run directory, from where each tracker's worker
sends it. So the loop waits for one copy and never for a server, and an outage or a kill loses
nothing that was copied::

    artifacts/<number>/artifact.json    its name, and which trackers are to have it
                      /file/            the copy
                      /sent-<tracker>   is there once that tracker has it

A folder counts from the moment at which it is renamed to its number. One whose name begins with a
dot is on its way in or out, and is removed at the next start.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from ckpt_callbacks.directory import replace_text
from ckpt_callbacks.errors import ConfigError, UsageError
from ckpt_callbacks.failpoints import hit
from ckpt_callbacks.manifest import fsync

__all__ = ["Artifact", "Spool", "artifact_name"]

logger = logging.getLogger("ckpt_callbacks")

FORMAT = 1
_OURS = "checkpoints"
"""The folder of a tracker's run that holds checkpoints and what is shown of them."""
_LONGEST_PART = 255
"""Bytes that a file system takes as a name."""


def artifact_name(path: Path, name: str | None) -> str:
    """Return the name that a file goes by in trackers, which is its own if none is given.

    Raises:
        ConfigError: there is no such file, it cannot be read, or the name cannot be used.
    """
    if not path.is_file():
        raise ConfigError(f"log_artifact: {path} is no file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"log_artifact: {path} cannot be read: {error.strerror}") from error
    name = path.name if name is None else name
    if problem := _problem(name):
        raise ConfigError(
            f"log_artifact: the name {name!r} {problem}; give a path below the run, such as "
            "'plots/loss.png'"
        )
    return name


def _problem(name: object) -> str:
    """Return what is wrong with a name, or nothing."""
    if not isinstance(name, str) or not name:
        return "is empty" if name == "" else "is no text"
    parts = name.split("/")
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in parts)
    checks = (
        (not parts[0], "is absolute"),
        (not all(parts), "has an empty part"),
        ({".", ".."} & set(parts), "has a part '.' or '..'"),
        ("\\" in name or not name.isprintable(), "has a backslash or is not printable"),
        (set("#?%") & set(name), "has one of '#', '?' and '%', which URLs have other uses for"),
        (longest > _LONGEST_PART, f"has a part of more than {_LONGEST_PART} bytes"),
        (parts[0] == _OURS, f"is in {_OURS}/, where the checkpoints are"),
    )
    return next((text for wrong, text in checks if wrong), "")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that some tracker does not have yet."""

    name: str
    path: Path
    """Its copy, which is called as the last part of `name`."""


class Spool:
    """The files that some tracker does not have yet, in the order in which they came.

    Args:
        folder: where they are kept; made when the first one comes.
        trackers: those that get what is added from now on.
    """

    def __init__(self, folder: Path, trackers: Sequence[str]) -> None:
        self._folder = folder
        self._trackers = sorted(trackers)
        self._mutex = threading.Lock()
        self._closed = False
        self._lacking: dict[Artifact, set[str]] = {}
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in found:
            if path.name.startswith("."):  # a kill left it on its way
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.isdecimal():
                self._load(path)
        numbers = [int(path.name) for path in found if path.name.isdecimal()]
        self._numbers = count(max(numbers, default=0) + 1)

    def add(self, path: Path, name: str) -> None:
        """Copy a file, durably, for all trackers; it may be changed or removed afterwards.

        A copy and no hard link, since whoever changes the file would change that too.

        Raises:
            OSError: it cannot be copied.
        """
        if not self._trackers:
            return
        with self._mutex:
            number = f"{next(self._numbers):08d}"
        new = self._folder / f".{number}.new"
        copy = Path("file", name.rpartition("/")[2])
        try:
            (new / copy).parent.mkdir(parents=True)
            shutil.copyfile(path, new / copy)
            fsync(new / copy)
            fsync(new / copy.parent)
            about = {"format": FORMAT, "name": name, "trackers": self._trackers}
            replace_text(new / "artifact.json", json.dumps(about))
            hit("artifact-copied")
            new.rename(self._folder / number)
        except BaseException:  # such as a full disk, or Ctrl-C
            shutil.rmtree(new, ignore_errors=True)
            raise
        hit("artifact-kept")
        fsync(self._folder)
        with self._mutex:
            self._lacking[Artifact(name, self._folder / number / copy)] = set(self._trackers)

    def lacking(self, tracker: str) -> list[Artifact]:
        """Return the files that a tracker lacks, in order."""
        with self._mutex:
            return [a for a, lacking in self._lacking.items() if tracker in lacking]

    def sent(self, tracker: str, artifact: Artifact) -> None:
        """A tracker has a file; once all of them have it, the copy goes."""
        folder = artifact.path.parent.parent
        with self._mutex:
            if self._closed:
                raise UsageError("the run has ended; nothing more is recorded")
            (folder / f"sent-{tracker}").touch()
            fsync(folder)
            hit("artifact-noted")
            lacking = self._lacking[artifact]
            lacking.discard(tracker)
            if not lacking:
                del self._lacking[artifact]
                self._remove(folder)

    def close(self) -> None:
        """Refuse what a worker that outlived the drain limit may still report."""
        with self._mutex:
            self._closed = True

    def _load(self, folder: Path) -> None:
        """Take in what an earlier process has left."""
        try:
            about = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']}")
            name = str(about["name"])
            lacking = {str(t) for t in about["trackers"] if not (folder / f"sent-{t}").exists()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.error("%s can not be read and is left alone: %s", folder, error)
            return
        if lacking:
            self._lacking[Artifact(name, folder / "file" / name.rpartition("/")[2])] = lacking
        else:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Let a folder not count any more, by a rename, and remove it."""
        old = folder.with_name(f".{folder.name}.old")
        folder.rename(old)
        hit("artifact-removed")
        shutil.rmtree(old)
