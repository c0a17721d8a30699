"""What a checkpoint holds, for people and programs: no array is read for it."""

from __future__ import annotations

import json
import os
import textwrap
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from ckpt_callbacks import orbax_io
from ckpt_callbacks.addresses import is_address
from ckpt_callbacks.catalog import addresses_of
from ckpt_callbacks.contents import Contents
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.manifest import files_in
from ckpt_callbacks.paths import Path, show
from ckpt_callbacks.record import File, Record
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.report import checkpoints, size
from ckpt_callbacks.sources import visit
from ckpt_callbacks.stores import Store
from ckpt_callbacks.tree import draw, measure

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Inspection", "inspect"]

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds. Print it, or `text(depth=2)`, for the tree of its leaves."""

    source: str
    """As it was given."""
    leaves: Mapping[str, Leaf]
    """By path in the state, such as `model/layers/0/kernel`."""
    bytes: int
    """Size of all files."""
    items: Mapping[str, int]
    """Size of the files of each item."""
    step: int | None = None
    time: float | None = None
    """Start of its save, seconds since the epoch; of one by others it is not known."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """As given to `on_step`, or by others to Orbax."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """As given last to `Callbacks.run`, in a run directory."""
    aliases: Sequence[str] = ()
    reason: str = ""
    """Why it is kept, in a run directory."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """By tracker that has a copy, its address; while it has none, its state."""

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(self.text())

    def text(self, depth: int | None = None) -> str:
        """Return all of it for people; `depth` is how many levels of the tree to show."""
        named = f" ({', '.join(self.aliases)})" if self.aliases else ""
        when = self.time and clock.strftime("%Y-%m-%d %H:%M:%S", clock.localtime(self.time))
        sizes = ", ".join(f"{name} {size(n)}" for name, n in self.items.items() if name)
        count, memory = measure(self.leaves.values())
        facts = {
            "kept as": self.reason,
            "saved": when,
            "metrics": ", ".join(f"{k} {v:g}" for k, v in self.metrics.items()),
            "metadata": _shown(self.metadata),
            "config": _shown(self.config),
            "copies": ", ".join(self.copies.values()),
            "on disk": size(self.bytes) + (f": {sizes}" if sizes else ""),
            "state": f"{len(self.leaves)} {'leaf' if len(self.leaves) == 1 else 'leaves'}"
            + (f", {count} numbers, {memory} in memory" if count else ""),
        }
        lines = [f"{'' if self.step is None else f'step {self.step} of '}{self.source}{named}"]
        for name, fact in facts.items():
            if fact:
                lines += textwrap.wrap(
                    f"{name:10}{fact}", _WIDTH, subsequent_indent=" " * 10,
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
        tree = {tuple(path.split("/")): leaf for path, leaf in self.leaves.items()}
        return "\n".join([*lines, "", *draw(tree, depth)])


def inspect(
    source: str | os.PathLike[str],
    which: int | str = "last",
    *,
    stores: Sequence[Store] | None = None,
) -> Inspection:
    """Return what a checkpoint holds, from its metadata: no array is read.

    Of an address in a tracker the whole checkpoint is fetched, to be removed again.

    Args:
        source: a run directory, a checkpoint or an address, as `restore` takes it.
        which: in a run directory, an alias such as `best` or `last`, or a step.
        stores: where to look for another copy, as in `restore`.

    Raises:
        ConfigError, RecordError, CheckpointNotFound: as `restore` has it.
        CorruptCheckpoint: its metadata is damaged, and there is no other copy.
    """

    def reader(path: FilePath, record: Record | None, files: Mapping[str, File]) -> Inspection:
        return _inspected(str(source), path, record, files)

    found = visit("inspect", source, which, reader, stores=stores)
    if is_address(source) or not (run := open_directory(source).read_run()):
        return found
    found = replace(found, config=run.config)
    row = next((row for row in checkpoints(source) if row.step == found.step), None)
    if row is None:
        return found
    address = addresses_of(run)
    copies = {
        store: address(store, row.step, copy) or f"{store} ({copy.state})"
        for store, copy in row.copies.items()
    }
    return replace(found, aliases=row.aliases, reason=row.reason, copies=copies)


def _inspected(
    source: str, path: FilePath, record: Record | None, files: Mapping[str, File]
) -> Inspection:
    # In the folders of the processes are arrays only: what they are is in the files beside them.
    about = {name: file for name, file in files.items() if "/ocdbt.process_" not in name}
    contents = Contents(path, files=about)
    found = Inspection(
        source=source,
        leaves={show(at): contents.leaves[at].leaf for at in sorted(contents.leaves, key=_order)},
        bytes=_on_disk(path),
        items={folder: _on_disk(path / folder) for folder in contents.folders},
        metadata={} if contents.ours else orbax_io.metadata(path),
    )
    if record is None:
        return replace(found, step=int(path.name) if path.name.isdecimal() else None)
    return replace(
        found,
        step=record.step,
        time=record.time,
        metrics=record.metrics,
        metadata=record.metadata,
    )


def _on_disk(folder: FilePath) -> int:
    return sum(file.stat().st_size for file in files_in(folder))


def _order(path: Path) -> list[tuple[bool, int, str]]:
    """Return what sorts names, with numbers by their value."""
    return [(n.isdecimal(), int(n) if n.isdecimal() else 0, n) for n in path]


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
    )
