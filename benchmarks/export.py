"""What an export to safetensors costs beside that library and a plain write: time and memory.

Run it with a Python that has the package, such as the one that `tox run -e py` makes::

    .tox/py/bin/pip install "safetensors>=0.8"
    .tox/py/bin/python benchmarks/export.py
    python benchmarks/export.py --mebibytes 256 --rounds 5 --json export.json

It needs twice the size of the state on the disk, and removes what it wrote.
`benchmarks/README.md` says what the rows are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

import measure
from save_path import LEAVES, new_state

WAYS = ("plain", "flax", "state", "checkpoint")
"""Only the last one begins without the state in memory."""


def save(root: Path, mebibytes: int) -> None:
    """Save one checkpoint, which is step 0."""
    import ckpt_callbacks as cc

    checkpoint = cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    with cc.Callbacks(checkpoint).run({"params": new_state(mebibytes)}) as run:
        run.save(0, run.state)


def plain(state: dict[str, Any], path: Path) -> None:
    """Write the same bytes to one file, and take their digest."""
    import numpy as np
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for leaf in state.values():
            data = np.asarray(leaf).data
            file.write(data)
            digest.update(data)
    digest.hexdigest()


def flax(state: dict[str, Any], path: Path) -> None:
    """Write the file by the library that the format is of."""
    from safetensors.flax import save_file

    save_file(state, path)


def prepared(way: str, root: Path, mebibytes: int) -> Callable[[Path], None]:
    """Return what writes a file; all that is no part of an export was done."""
    from ckpt_callbacks.contents import Contents
    from ckpt_callbacks.formats import safetensors
    from ckpt_callbacks.tensors import of_contents, of_state

    if way == "checkpoint":
        tensors = of_contents(Contents(root / "0"))
        return lambda path: safetensors.write(path, tensors, {})
    state = new_state(mebibytes)
    if way == "state":
        return lambda path: safetensors.write(path, of_state(state), {})
    return partial({"plain": plain, "flax": flax}[way], state)


def child(way: str, root: Path, mebibytes: int) -> None:
    """Write once, durably, and print what it took beyond what was there before."""
    path = root.parent / "export.safetensors"
    for size in (1, mebibytes):  # once to load all modules
        source = root if size == mebibytes else root.parent / "small"
        write = prepared(way, source, size)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = measure.status("VmRSS")
        seconds, _ = measure.once(lambda write=write: durable(write, path))
        peak = measure.status("VmHWM") - before
        path.unlink()
    print(json.dumps({"seconds": seconds, "peak": peak}))  # noqa: T201


def durable(write: Callable[[Path], None], path: Path) -> None:
    """Write a file and make it durable, which is nothing more where it is."""
    from ckpt_callbacks.manifest import fsync

    write(path)
    fsync(path)
    fsync(path.parent)


def sample(way: str, root: Path, mebibytes: int) -> dict[str, float]:
    """Return what one export takes, in a process of its own."""
    command = [sys.executable, __file__, "--child", way, str(root), "--mebibytes", str(mebibytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(found: dict[str, list[dict[str, float]]], mebibytes: int) -> list[measure.Row]:
    """Return the lines of the table."""
    most = (mebibytes / LEAVES + 200) * 2**20
    seconds = {way: [taken["seconds"] for taken in samples] for way, samples in found.items()}
    peaks = {way: [taken["peak"] for taken in samples] for way, samples in found.items()}
    return [
        measure.Row("a state in memory, until durable", seconds["state"], "s"),
        measure.Row("  write, digest and fsync", seconds["plain"], "s"),
        measure.Row("  safetensors.flax and fsync", seconds.get("flax"), "s"),
        measure.Row("  by write", measure.ratio(seconds, "state", "plain"), "x", 1.3),
        measure.Row("  by safetensors.flax", measure.ratio(seconds, "state", "flax"), "x"),
        measure.Row("a checkpoint of Orbax, until durable", seconds["checkpoint"], "s"),
        measure.Row("memory beyond the state", peaks["state"], "MB", most),
        measure.Row("  write and digest", peaks["plain"], "MB"),
        measure.Row("  safetensors.flax", peaks.get("flax"), "MB"),
        measure.Row("memory for a checkpoint", peaks["checkpoint"], "MB", most),
    ]


@click.command()
@click.option("--mebibytes", default=2048, show_default=True, help="Size of the state.")
@click.option("--rounds", default=3, show_default=True, help="Of which the median counts.")
@click.option("--directory", type=click.Path(path_type=Path), help="On the disk to measure.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option("--child", "one", type=(str, click.Path(path_type=Path)), hidden=True)
def main(
    mebibytes: int,
    rounds: int,
    directory: Path | None,
    file: Path | None,
    one: tuple[str, Path] | None,
) -> None:
    """Measure what an export to safetensors takes."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if one:
        child(*one, mebibytes)
        return
    ways = [way for way in WAYS if way != "flax" or find_spec("safetensors")]
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-", dir=directory) as folder:
        root = Path(folder) / "run"
        save(root, mebibytes)
        save(Path(folder) / "small", 1)
        samples = {way: partial(sample, way, root, mebibytes) for way in ways}
        found = measure.interleaved(samples, rounds)
    packages = ["jax", "orbax-checkpoint", *(["safetensors"] if "flax" in ways else [])]
    table = rows(found, mebibytes)
    measure.report(f"Exporting {mebibytes} MiB", table, packages, file, found=found)


if __name__ == "__main__":
    main()
