"""One plugin of each kind for ckpt_callbacks: a store, a keep policy, and a listener.

::

    import ckpt_callbacks as cc
    from ckpt_callbacks_zip import Journal, PowersOfTwo, ZipStore

    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            "runs/digits",
            save=cc.EveryNSteps(50),
            keep=PowersOfTwo() | cc.BestN(2, "val_accuracy", mode="max"),
        ),
        ZipStore("/mnt/backup/checkpoints"),
        Journal("runs/digits.jsonl"),
    )
"""

from __future__ import annotations

import json
import math
import os
import shlex
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote

import ckpt_callbacks as cc
from ckpt_callbacks.stores import Checkpoint, Copy, Listing, RunInfo, Store

__all__ = ["Journal", "PowersOfTwo", "ZipStore"]


class ZipStore(Store):
    """Keeps each checkpoint as one zip file, in `<folder>/<run directory>-<run id>/<step>.zip`.

    Beside them, the file `aliases/best` holds a step. A file that is there is always whole.
    Runs may share the folder, which is created if need be.
    """

    name = "zip"
    title = "Zip"
    put_moves_aliases = False

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._root = self._folder = Path(folder).expanduser().absolute()  # the loop may chdir

    def open(self, run: RunInfo) -> Mapping[str, str]:
        name = run.remembered.get("folder", f"{run.name}-{run.run_id}")  # the name may change
        self._folder = self._root / name
        if not run.reading:
            (self._folder / "aliases").mkdir(parents=True, exist_ok=True)
        return {"folder": name}

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        path = self._zip(checkpoint.step)
        with _replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name in checkpoint.files:  # not compressed: weights hardly get smaller
                archive.write(checkpoint.path / name, name)
        return Copy("confirmed", str(path))

    def listing(self) -> Listing:
        zips = (p for p in self._folder.glob("*.zip") if p.stem.isdecimal())
        copies = {int(p.stem): Copy("confirmed", str(p)) for p in zips}
        named = {unquote(p.name): int(p.read_text()) for p in self._folder.glob("aliases/[!.]*")}
        return Listing(copies, {n: s for n, s in named.items() if s in copies}, exact=True)

    def get(self, step: int, into: Path) -> None:
        try:
            with zipfile.ZipFile(self._zip(step)) as archive:
                # It checks CRCs, drops `..` and a leading `/`, makes no links: all stays in `into`.
                archive.extractall(into)
        except FileNotFoundError as error:
            raise cc.CheckpointNotFound(f"{self._folder} has no copy of step {step}") from error
        except zipfile.BadZipFile as error:
            raise cc.CorruptCheckpoint(f"{self._zip(step)} is damaged: {error}") from error

    def alias(self, name: str, step: int) -> None:
        with _replacing(self._folder / "aliases" / quote(name, safe="")) as file:  # it may have /
            file.write(f"{step}\n".encode())

    def delete(self, step: int) -> None:
        for path in (self._zip(step), _part(self._zip(step))):  # a put may have been cut
            path.unlink(missing_ok=True)

    def close(self, status: str) -> None: ...

    def hint(self) -> str:
        folder = shlex.quote(str(self._folder))
        return f'cd {folder} && python3 -m zipfile -e "$(cat aliases/last).zip" last'

    def _zip(self, step: int) -> Path:
        return self._folder / f"{step}.zip"


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write to; once that is done and on disk, it takes the place of `path`."""
    with _part(path).open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _part(path).replace(path)


@dataclass(frozen=True)
class PowersOfTwo(cc.KeepPolicy):
    """Keep checkpoints that lie further apart the older they are.

    For each k, cut the steps into windows of 2^k. Of the two newest windows that have a checkpoint,
    the first one in each stays (reason `2^6: first of 128+`, for the largest such k).

    So the two newest checkpoints stay, and the very first. Of a run that saves every step there is
    one of an age between 2^k and 2^(k+1) steps for each k, about log2(newest step) in all.

    What is dropped is never wanted again, as a keep policy must see to: the files are gone. Windows
    only grow older, and the first checkpoint in one stays for as long as the window counts, so no
    other in it can become the first.
    """

    def keep(self, history: Sequence[cc.Candidate]) -> Mapping[int, str]:
        newest = history[-1].step if history else 0
        kept: dict[int, str] = {}
        for k in range(newest.bit_length() + 1):  # up to a window that holds everything
            first: dict[int, int] = {}
            for candidate in history:
                first.setdefault(candidate.step >> k, candidate.step)
            for window in list(first)[-2:]:
                kept[first[window]] = f"2^{k}: first of {window << k}+"
        return kept

    def explain(self, history: Sequence[cc.Candidate], step: int) -> str:
        kept = self.keep(history).get(step)
        return kept or "for no power of two the first in one of the two newest windows"

    def __str__(self) -> str:
        return "PowersOfTwo()"


class Journal:
    """Appends a line of JSON to a file whenever a checkpoint is saved, named or evicted.

    Besides, it notes the first step in each 100, which shows the pace of the loop. A line has
    `time` (seconds since the epoch), `event`, `step`, and what is known of the event::

        {"time": 1767225600.0, "event": "promoted", "step": 100, "store": "zip", "alias": "best"}

    Args:
        path: of the file. A run that goes on appends to it.
        clock: returns seconds since the epoch.
    """

    def __init__(
        self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time
    ) -> None:
        self._path = Path(path).expanduser().absolute()
        self._clock = clock
        self._mutex = threading.Lock()  # `on_step` comes on the loop's thread, the others do not

    @cc.hookimpl(every=100)
    def on_step(self, event: cc.Step) -> None:
        # Nothing of its state and metrics: to read them is to wait for the device.
        self._append("step", event.step)

    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        # JSON knows neither NaN nor infinity.
        metrics = {k: v if math.isfinite(v) else str(v) for k, v in event.metrics.items()}
        self._append("saved", event.step, seconds=event.seconds, bytes=event.bytes, metrics=metrics)

    @cc.hookimpl
    def on_promoted(self, event: cc.Promoted) -> None:
        self._append("promoted", event.step, store=event.store, alias=event.alias)

    @cc.hookimpl
    def on_evicted(self, event: cc.Evicted) -> None:
        self._append("evicted", event.step, store=event.store, reason=event.reason)

    def _append(self, event: str, step: int, **about: object) -> None:
        with self._mutex, self._path.open("a", encoding="utf-8") as file:
            line = {"time": self._clock(), "event": event, "step": step, **about}
            file.write(json.dumps(line, allow_nan=False) + "\n")
