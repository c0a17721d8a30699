"""What a restore takes beside plain Orbax, and what its verification adds.

Run it with a Python that has the package, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/restore.py
    python benchmarks/restore.py --mebibytes 4096 --rounds 10 --json restore.json

`benchmarks/README.md` says what the rows are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
from orbax.checkpoint import v1 as ocp

import ckpt_callbacks as cc
import measure
from ckpt_callbacks.manifest import digest_of, files_in
from save_path import new_state


def sample(read: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of a restore, until all is in place: wall, and CPU of all threads."""
    begin, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(read())
    return {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}


def measured(folder: Path, mebibytes: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return what each way to read takes, in each round."""
    state = {"params": new_state(mebibytes)}
    root = folder / "run"
    checkpoint = cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    with cc.Callbacks(checkpoint).run(state) as run:
        run.on_step(0, state)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    path = root / "0"
    ways: dict[str, Callable[[], Any]] = {
        "orbax": lambda: ocp.load_checkpointables(path, like),
        "unverified": lambda: cc.restore(root, like=like, verify=False),
        "verified": lambda: cc.restore(root, like=like),
        "digests": lambda: [digest_of(file) for file in files_in(path)],
    }
    samples = {name: lambda read=read: sample(read) for name, read in ways.items()}
    return measure.interleaved(samples, rounds)


def rows(found: dict[str, list[dict[str, float]]]) -> list[measure.Row]:
    """Return the lines of the table."""
    of = {
        f"{way}_{part}": [taken[part] for taken in samples]
        for way, samples in found.items()
        for part in samples[0]
    }

    def by(way: str, other: str, part: str, limit: float | None = None) -> measure.Row:
        what = {"wall": "", "cpu": ", CPU"}[part]
        titles = {"orbax": "Orbax", "unverified": "without"}
        ratio = measure.ratio(of, f"{way}_{part}", f"{other}_{part}")
        return measure.Row(f"  by {titles[other]}{what}", ratio, "x", limit)

    return [
        measure.Row("restore, without verification", of["unverified_wall"], "s"),
        measure.Row("  plain Orbax", of["orbax_wall"], "s"),
        by("unverified", "orbax", "wall", 1.05),
        by("unverified", "orbax", "cpu"),
        measure.Row("restore, verified", of["verified_wall"], "s"),
        by("verified", "unverified", "wall", 1.25),
        by("verified", "unverified", "cpu", 1.10),
        measure.Row("  all digests alone", of["digests_wall"], "s"),
        by("digests", "orbax", "cpu"),
    ]


@click.command()
@click.option("--mebibytes", default=1024, show_default=True, help="Size of the state.")
@click.option("--rounds", default=10, show_default=True, help="Of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
def main(mebibytes: int, rounds: int, file: Path | None) -> None:
    """Measure what a restore takes."""
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as folder:
        found = measured(Path(folder), mebibytes, rounds)
    packages = ("jax", "orbax-checkpoint", "tensorstore", "xxhash")
    measure.report(f"Restoring {mebibytes} MiB", rows(found), packages, file, seconds=found)


if __name__ == "__main__":
    main()
