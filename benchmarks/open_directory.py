"""How long it takes to open a run directory, to list it, and to ask why a step is there.

Run it with a Python that has the package, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/open_directory.py
    python benchmarks/open_directory.py --json open.json --folder /mnt/disk

It makes one directory after another, of up to 350 MB, and removes them.
`benchmarks/README.md` says what the columns are.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
from rich.console import Console
from rich.table import Table

import ckpt_callbacks as cc
import measure
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.manifest import seal
from ckpt_callbacks.record import Copy, Record, RunFile
from ckpt_callbacks.report import why
from ckpt_callbacks.retention import policy_to_json

SIZES = (125, 250, 500, 1000, 2000)
TARGET = (1000, 0.5)
POLICY = cc.EveryNSteps(1) | cc.BestN(3, "val_accuracy", mode="max")
"""It keeps every step: opening the directory evicts nothing."""

FILES = {
    "_CHECKPOINT_METADATA": 377,
    "commit_success.txt": 51,
    "orbax.checkpoint": 0,
} | {
    f"{item}/{name}": size
    for item in ("model", "optimizer")
    for name, size in {
        "_METADATA": 919,
        "_sharding": 353,
        "array_metadatas/process_0": 487,
        "d/0f72b36c7ac15f44615e60b0a2d8998d": 453,
        "manifest.ocdbt": 115,
        "ocdbt.process_0/d/afa1539aa8e651f9a2cc71d25ea98df5": 38365,
        "ocdbt.process_0/manifest.ocdbt": 117,
    }.items()
}
"""The files of a small checkpoint as Orbax writes them, with their sizes."""


def make(root: Path, count: int) -> None:
    """Make a run directory as a run with two trackers leaves it."""
    directory = RunDirectory(root)
    chance = random.Random(count)  # noqa: S311  # the same numbers each time
    with mock.patch("os.fsync"):  # it is only a fixture
        directory.acquire()
        run = RunFile("0123456789ab", policy_to_json(POLICY), status="finished")
        directory.write_run(run)
        for step in range(count):
            for name, size in FILES.items():
                path = directory.path(step) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(chance.randbytes(size))
            metrics = {"loss": chance.random(), "val_accuracy": round(chance.random(), 3)}
            directory.write_record(
                Record(
                    step=step,
                    state="complete",
                    owner=run.run_id,
                    time=1.7e9 + step,
                    metrics=metrics,
                    logged=True,
                    files=seal(directory.path(step)),
                    copies={
                        "mlflow": Copy("confirmed", f"m-{chance.randbytes(16).hex()}"),
                        "wandb": Copy("staged", f"run-0123456789ab:step-{step}", shared=True),
                    },
                )
            )
        points = (json.dumps([s, 1.7e9 + s, {"loss": chance.random()}]) for s in range(count))
        (directory.meta / "metrics.jsonl").write_text("".join(f"{p}\n" for p in points))
        directory.release()


def start(root: Path) -> Engine:
    """Do all that a run without trackers does before it restores the newest checkpoint."""
    engine = Engine(RunDirectory(root), POLICY, [], {}, Hooks([]))
    engine.begin()
    return engine


def opened(root: Path) -> float:
    """Return how long it takes to open the directory; closing it again does not count."""
    begin = time.perf_counter()
    engine = start(root)
    taken = time.perf_counter() - begin
    engine.close("finished", lambda: 0.0)
    return taken


def opening_peak(root: Path) -> int:
    """Return the bytes that Python allocated at most while the directory was opened."""
    tracemalloc.start()
    try:
        engine = start(root)
        found = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    engine.close("finished", lambda: 0.0)
    return found


def check(root: Path, count: int) -> None:
    """Raise unless all checkpoints are still there: only such a directory is worth measuring."""
    there = sum(row.where[:1] == ["local"] for row in cc.checkpoints(root))
    if there != count:
        raise RuntimeError(f"{root} has {there} checkpoints of {count}")


def measured(count: int, runs: int, folder: Path | None) -> dict[str, Any]:
    """Return the raw numbers of one directory."""
    root = Path(tempfile.mkdtemp(prefix="ckpt-callbacks-", dir=folder))
    try:
        make(root, count)
        reading: dict[str, Callable[[], object]] = {
            "reading": RunDirectory(root).read_records,
            "list": partial(cc.checkpoints, root),
            "why": partial(why, root, count // 2),
        }
        times: dict[str, list[float]] = {"open": [], "reading": [], "list": [], "why": []}
        for _ in range(runs + 1):  # in turn, so that a busy moment does not hit one of them alone
            times["open"].append(opened(root))
            for name, function in reading.items():
                times[name].append(measure.once(function)[0])
        peaks = {name: measure.peak(function) for name, function in reading.items()}
        row = {
            "checkpoints": count,
            **{f"{name}_seconds": taken[1:] for name, taken in times.items()},
            **{f"{name}_peak_bytes": peak for name, peak in peaks.items()},
            "open_peak_bytes": opening_peak(root),
        }
        check(root, count)
        return row
    finally:
        shutil.rmtree(root)


@click.command()
@click.option(
    "--runs", default=9, show_default=True, help="Timed runs, of which the median counts."
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where the directories are made; by default where temporary files are.",
)
def main(runs: int, file: Path | None, folder: Path | None) -> None:
    """Measure directories of more and more checkpoints."""
    table = Table(title="A run directory with N checkpoints", title_justify="left")
    for title in ("N", "open ms", "growth", "reading ms", "open MiB"):
        table.add_column(title, justify="right")
    for title in ("list ms", "growth", "list MiB", "why ms", "growth", "why MiB"):
        table.add_column(title, justify="right")
    rows = [measured(count, runs, folder) for count in SIZES]
    halves: dict[int, dict[str, Any]] = {2 * row["checkpoints"]: row for row in rows}
    for row in rows:
        half = halves.get(row["checkpoints"], {})
        cells = [f"{row['checkpoints']:,}"]
        for name in ("open", "list", "why"):
            times = row[f"{name}_seconds"]
            cells += [
                measure.milliseconds(times),
                measure.growth(times, half.get(f"{name}_seconds")),
                *([measure.milliseconds(row["reading_seconds"])] if name == "open" else []),
                measure.mebibytes(row[f"{name}_peak_bytes"]),
            ]
        table.add_row(*cells)
    console = Console()
    console.print(table)
    count, limit = TARGET
    times = next(row["open_seconds"] for row in rows if row["checkpoints"] == count)
    console.print(measure.verdict(f"open {count:,} checkpoints", times, limit))
    measure.write(file, policy=str(POLICY), rows=rows)


if __name__ == "__main__":
    main()
