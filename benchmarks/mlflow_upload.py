"""What a checkpoint in MLflow costs: bytes on this machine's disk, and time over HTTP.

Run it with a Python that has the package and mlflow, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/mlflow_upload.py
    python benchmarks/mlflow_upload.py --json upload.json --folder /mnt/disk

It takes up to 1 GiB of disk for a while, and starts an `mlflow server` of its own on loopback.
`benchmarks/README.md` says what the columns are.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import ckpt_callbacks as cc
import measure
import servers
from ckpt_callbacks.manifest import seal, tree_digest
from ckpt_callbacks.record import Record, record_to_json
from ckpt_callbacks.stores import Checkpoint, RunInfo
from ckpt_callbacks_mlflow import MLflowTracker

MIRRORED = 256 << 20
LIMIT_OF_BYTES, LIMIT_OF_TIME = 0.01, 1.0
SHAPES = {
    "1 file of 1 byte": [1],
    "4 files of 64 MiB": [64 << 20] * 4,
    "600 files of 20 KiB": [20 << 10] * 600,
}
"""Few big files and many small ones; the first shows what everything but the files takes."""
JUDGED = ("4 files of 64 MiB", "600 files of 20 KiB")
RUN = "0123456789ab"


def save(folder: Path) -> Path:
    """Let Orbax write a checkpoint of arrays that do not compress, and return its folder."""
    import numpy as np

    chance = np.random.default_rng(0)
    state = {str(i): chance.random(MIRRORED // 64, dtype=np.float32) for i in range(16)}
    callbacks = cc.Callbacks(cc.OrbaxCheckpoint(folder, save=cc.AtEnd(), keep=cc.LatestN(1)))
    with callbacks.run(state) as run:
        run.on_step(0, run.state)
    return folder / "0"


def checkpoint_at(path: Path, step: int) -> Checkpoint:
    """Return the checkpoint in a folder as the engine gives it to a store."""
    files = seal(path)
    record = Record(step, "complete", RUN, 1.7e9, files=files)
    return Checkpoint(
        run_id=RUN,
        step=step,
        path=path,
        metrics={"loss": 0.5},
        files=files,
        digest=tree_digest(files),
        reason="latest #1",
        manifest=record_to_json(record),
    )


def opened(uri: str, scratch: Path, artifacts: Path | None = None) -> MLflowTracker:
    """Return a tracker that has begun its run."""
    tracker = MLflowTracker(
        experiment="upload",
        register_as="upload",
        tracking_uri=uri,
        artifact_location=str(artifacts) if artifacts else None,
    )
    scratch.mkdir()
    tracker.open(RunInfo(RUN, "upload", {}, scratch, {}))
    return tracker


def mirrored(folder: Path) -> dict[str, int]:
    """Return the bytes that a checkpoint takes, and what a copy of it adds, ours and MLflow's.

    By the blocks of all files, those with several names counted once, rather than by what the
    process wrote: a file system in memory counts nothing as written.
    """
    from mlflow import MlflowClient

    source = save(folder / "run")
    uri = f"sqlite:///{folder}/mlflow.db"
    tracker = opened(uri, folder / "scratch", folder / "artifacts")
    size = measure.disk(source)
    before = measure.disk(folder)
    tracker.put(checkpoint_at(source, 0), ["last"])
    added = measure.disk(folder) - before

    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("log-artifacts", str(folder / "copies"))
    run = client.create_run(experiment)
    before = measure.disk(folder)
    client.log_artifacts(run.info.run_id, str(source))
    return {"bytes": size, "added": added, "log_artifacts": measure.disk(folder) - before}


def write_files(path: Path, sizes: list[int]) -> None:
    """Write the files of a checkpoint in a few folders, as Orbax does."""
    chance = random.Random(0)  # noqa: S311  # the same bytes each time
    for number, size in enumerate(sizes):
        file = path / f"item-{number % 4}" / "d" / f"{number:032x}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(chance.randbytes(size))


def uploads(uri: str, folder: Path, stored: Path, runs: int) -> dict[str, dict[str, list[float]]]:
    """Return how long both ways took, by shape; `stored` is the server's own folder."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    tracker = opened(uri, folder / "scratch-http")
    run = client.create_run(client.create_experiment("log-artifacts")).info.run_id
    times: dict[str, dict[str, list[float]]] = {}
    step = 0
    for shape, sizes in SHAPES.items():
        source = folder / shape.replace(" ", "-")
        write_files(source, sizes)
        times[shape] = {"put": [], "log_artifacts": []}
        for number in range(runs + 1):  # in turn, and each first as often as second
            step += 1
            checkpoint = checkpoint_at(source, step)
            ways = {
                "put": lambda checkpoint=checkpoint: tracker.put(checkpoint, ["last"]),
                "log_artifacts": lambda source=source, step=step: client.log_artifacts(
                    run, str(source), str(step)
                ),
            }
            for way in sorted(ways, reverse=bool(number % 2)):
                seconds, _ = measure.once(ways[way])
                if number:
                    times[shape][way].append(seconds)
                arrived(stored, checkpoint)
                shutil.rmtree(stored)  # also the server's: neither finds a fuller disk
                stored.mkdir()
    return times


def arrived(stored: Path, checkpoint: Checkpoint) -> None:
    """Raise unless the server has every file whole: only such an upload is worth measuring."""
    sizes: Mapping[str, int] = {p.name: p.stat().st_size for p in stored.rglob("*") if p.is_file()}
    for name, file in checkpoint.files.items():
        if sizes.get(Path(name).name) != file.size:
            raise RuntimeError(f"{name} did not arrive")


@click.command()
@click.option("--runs", default=8, show_default=True, help="Uploads, of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where the files are made; by default where temporary files are.",
)
def main(runs: int, file: Path | None, folder: Path | None) -> None:
    """Measure a checkpoint in a local store, and on a server."""
    servers.quiet()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-", dir=folder) as name:
        root = Path(name)
        local = mirrored(root)
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-", dir=folder) as name:
        root = Path(name)
        with servers.mlflow_server(root / "server") as uri:
            times = uploads(uri, root, root / "server" / "artifacts", runs)

    table = Table(title="A checkpoint in a local store", title_justify="left")
    for title in ("checkpoint MiB", "put adds MiB", "log_artifacts adds MiB"):
        table.add_column(title, justify="right")
    table.add_row(*(measure.mebibytes(local[key]) for key in ("bytes", "added", "log_artifacts")))
    console.print(table)
    table = Table(title="A checkpoint over HTTP", title_justify="left")
    table.add_column("files")
    for title in ("put ms", "log_artifacts ms", "ratio"):
        table.add_column(title, justify="right")
    lines = [
        measure.at_most("what put adds by the checkpoint", added := _added(local), LIMIT_OF_BYTES)
    ]
    for shape, ways in times.items():
        # Of each pair, since two that follow each other meet the same machine.
        pairs = zip(ways["put"], ways["log_artifacts"], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        cells = [measure.milliseconds(ways[way]) for way in ("put", "log_artifacts")]
        table.add_row(shape, *cells, f"{ratio:.2f}")
        if shape in JUDGED:
            lines.append(measure.at_most(f"put by log_artifacts, {shape},", ratio, LIMIT_OF_TIME))
    console.print(table)
    for line in lines:
        console.print(line)
    console.print(measure.load())
    raw: dict[str, Any] = {"local": {**local, "ratio": added}, "seconds": times}
    measure.write(file, **raw)


def _added(local: Mapping[str, int]) -> float:
    return local["added"] / local["bytes"]


if __name__ == "__main__":
    main()
