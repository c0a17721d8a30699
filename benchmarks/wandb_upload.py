"""What a checkpoint in W&B costs: bytes on this machine's disk, online and offline.

Run it with a Python that has the package with its extra `wandb-testing`::

    python benchmarks/wandb_upload.py
    python benchmarks/wandb_upload.py --json upload.json --folder /mnt/disk

W&B's client is the real one; the server is the stand-in of the tests, which keeps all in memory:
about 1 GiB. It takes up to 1 GiB of disk for a while. `benchmarks/README.md` says what the columns
are.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import wandb
from rich.console import Console
from rich.table import Table

import ckpt_callbacks as cc
import measure
from ckpt_callbacks.manifest import seal, tree_digest
from ckpt_callbacks.record import Record, record_to_json
from ckpt_callbacks.stores import Checkpoint, RunInfo
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import WandbServer

MIRRORED = 256 << 20
LIMIT = 0.01
RUN = "0123456789ab"
PROJECT = "upload"
MODES = ("online", "offline")

Way = Callable[[Path, Path, "Gauge"], None]


def disk(folder: Path) -> dict[tuple[int, int], int]:
    """Return the bytes that each file below a folder takes up, by what it is and not by name.

    Other threads and processes may be at work there.
    """
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(f"{root}/{name}")
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                found[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return found


@dataclass
class Gauge:
    """The bytes of files that were not there at first; another name of one adds none."""

    folder: Path
    before: dict[tuple[int, int], int] = field(init=False)
    most: int = 0
    """Seen so far."""

    def __post_init__(self) -> None:
        self.before = disk(self.folder)

    def look(self) -> int:
        """Return the bytes at the moment."""
        now = sum(size for file, size in disk(self.folder).items() if file not in self.before)
        self.most = max(self.most, now)
        return now


def save(folder: Path) -> Path:
    """Let Orbax write a checkpoint of arrays that do not compress, and return its folder."""
    import numpy as np

    chance = np.random.default_rng(0)
    state = {str(i): chance.random(MIRRORED // 64, dtype=np.float32) for i in range(16)}
    callbacks = cc.Callbacks(cc.OrbaxCheckpoint(folder, save=cc.AtEnd(), keep=cc.LatestN(1)))
    with callbacks.run(state) as run:
        run.on_step(0, run.state)
    return folder / "0"


def checkpoint_at(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder as the engine gives it to a store."""
    files = seal(path)
    return Checkpoint(
        run_id=RUN,
        step=0,
        path=path,
        metrics={"loss": 0.5},
        files=files,
        digest=tree_digest(files),
        reason="latest #1",
        manifest=record_to_json(Record(0, "complete", RUN, 1.7e9, files=files)),
    )


def put(source: Path, folder: Path, gauge: Gauge) -> None:
    """Bring the checkpoint there as the engine does."""
    tracker = WandbTracker(PROJECT)
    scratch = folder / "scratch"
    scratch.mkdir()
    checkpoint = checkpoint_at(source)
    tracker.entered([])
    tracker.open(RunInfo(RUN, "upload", {}, scratch, {}))
    tracker.put(checkpoint, ["last"])
    gauge.look()
    tracker.close("finished")


def add_dir(source: Path, folder: Path, gauge: Gauge) -> None:
    """Bring it there as W&B's documentation says."""
    with wandb.init(project=PROJECT, dir=folder, settings=wandb.Settings(console="off")) as run:
        artifact = wandb.Artifact("upload", "model")
        artifact.add_dir(str(source))
        gauge.look()
        logged = run.log_artifact(artifact)
        if not run.offline:
            logged.wait()
        gauge.look()


WAYS: dict[str, Way] = {"put": put, "add_dir": add_dir}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set variables for a while."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def arrived(server: WandbServer, source: Path) -> None:
    """Raise unless the server has every file whole: only such an upload is worth measuring."""
    (version,) = server.versions(PROJECT)
    files = {name.removeprefix("checkpoint/"): digest(c) for name, c in version.files.items()}
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.is_file() and files.get(name) != digest(path.read_bytes()):
            raise RuntimeError(f"{name} did not arrive")


def digest(content: bytes) -> str:
    """Return what equal bytes have in common."""
    return hashlib.sha256(content).hexdigest()


def measured(way: Way, mode: str, source: Path, folder: Path) -> dict[str, int]:
    """Return the most bytes that there were on disk meanwhile, and those that are left."""
    names = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "TMPDIR")
    places = {name: str(folder / name.lower()) for name in names}
    for place in places.values():
        Path(place).mkdir(parents=True)
    gauge = Gauge(folder.parent)
    with (
        WandbServer() as server,
        environment(**server.environment(), **places, WANDB_MODE=mode, WANDB_CONSOLE="off"),
    ):
        server.on_request = lambda name: gauge.look() if name == "PUT file" else None
        way(source, folder, gauge)
        wandb.teardown()
        if mode == "online":
            arrived(server, source)
    left = gauge.look()
    return {"most": gauge.most, "left": left}


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where the files are made; by default where temporary files are.",
)
def main(file: Path | None, folder: Path | None) -> None:
    """Measure what a checkpoint of 256 MiB adds to this machine's disk."""
    found: dict[str, dict[str, dict[str, int]]] = {mode: {} for mode in MODES}
    for mode in MODES:
        for way, call in WAYS.items():
            with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-", dir=folder) as name:
                root = Path(name)
                source = save(root / "run")
                size = sum(disk(source).values())
                found[mode][way] = {"bytes": size, **measured(call, mode, source, root / "wandb")}

    table = Table(title="What a checkpoint adds to this machine's disk", title_justify="left")
    table.add_column("W&B")
    table.add_column("by")
    for title in ("checkpoint MiB", "at most MiB", "left MiB", "ratio"):
        table.add_column(title, justify="right")
    lines = []
    failed = False
    for mode, ways in found.items():
        for way, row in ways.items():
            ratio = row["most"] / row["bytes"]
            cells = (measure.mebibytes(row[key]) for key in ("bytes", "most", "left"))
            table.add_row(mode, way, *cells, f"{ratio:.4f}")
            if WAYS[way] is put:
                lines.append(measure.at_most(f"what put adds, {mode},", ratio, LIMIT))
                failed |= ratio > LIMIT
    console = Console()
    console.print(table)
    for line in lines:
        console.print(line)
    measure.write(file, bytes=found)
    if failed:
        raise click.ClickException("put has copied bytes")


if __name__ == "__main__":
    main()
