"""How long `ckpt-callbacks ls`, a process of its own, takes with 10,000 checkpoints.

    .tox/py/bin/python benchmarks/cli_scale.py
    python benchmarks/cli_scale.py --json scale.json --folder /mnt/disk

The records are written by the package's own code, and have the files of a small checkpoint as Orbax
writes them, and copies in two trackers; of the checkpoints themselves there is only the file that
says that they are whole. Target: under 1 s.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import click
from rich.console import Console

import ckpt_callbacks as cc
import measure
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.record import Copy, File, Record, RunFile
from ckpt_callbacks.retention import policy_to_json
from open_directory import FILES

POLICY = cc.EveryNSteps(1) | cc.BestN(3, "val_accuracy", mode="max")
TARGET = 1.0


def make(root: Path, count: int) -> None:
    """Make the directory of a run with two trackers, which are not installed here."""
    directory = RunDirectory(root)
    chance = random.Random(count)  # noqa: S311  # the same numbers each time
    files = {name: File(size, f"xxh3:{chance.randbytes(16).hex()}") for name, size in FILES.items()}
    with mock.patch("os.fsync"):  # it is only a fixture
        directory.acquire()
        directory.write_run(RunFile("0123456789ab", policy_to_json(POLICY), status="finished"))
        for step in range(0, 10 * count, 10):
            directory.path(step).mkdir()
            (directory.path(step) / "_CHECKPOINT_METADATA").touch()
            metrics = {"loss": chance.random(), "val_accuracy": round(chance.random(), 3)}
            copies = {
                "mlflow": Copy("confirmed", f"digits v{step} (m-{chance.randbytes(16).hex()})"),
                "wandb": Copy("confirmed", f"model-0123456789ab:v{step}"),
            }
            directory.write_record(
                Record(
                    step=step,
                    state="complete",
                    owner="0123456789ab",
                    time=1.7e9 + step,
                    metrics=metrics,
                    logged=True,
                    files=files,
                    copies=copies,
                )
            )
        directory.release()


def once(root: Path, *options: str) -> float:
    """Return how long a process takes to list the directory."""
    command = [Path(sys.executable).with_name("ckpt-callbacks"), "ls", root, *options]
    # What Python has compiled is kept for the next time, as where people use it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    subprocess.run(  # noqa: S603  # our own command
        command, check=True, stdout=subprocess.DEVNULL, env=environment
    )
    return time.perf_counter() - begin


@click.command()
@click.option("--count", default=10_000, show_default=True, help="Checkpoints.")
@click.option("--runs", default=9, show_default=True, help="Timed runs.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where the directory is made; by default where temporary files are.",
)
def main(count: int, runs: int, file: Path | None, folder: Path | None) -> None:
    """Measure `ls`, and `ls --json`."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-", dir=folder) as name:
        root = Path(name) / "run"
        make(root, count)
        times = {
            option: [once(root, *option.split()) for _ in range(runs + 1)][1:]
            for option in ("", "--json")
        }
    for option, taken in times.items():
        what = f"ls {option} of {count:,} checkpoints".replace("  ", " ")
        console.print(measure.verdict(what, taken, TARGET))
    measure.write(file, checkpoints=count, seconds=times)


if __name__ == "__main__":
    main()
