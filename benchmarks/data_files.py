"""How large the data files of a checkpoint should be: how fast Orbax writes and reads them.

Run it with a Python that has the package, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/data_files.py
    python benchmarks/data_files.py --mebibytes 512 --leaves 1 --json data_files.json

`benchmarks/README.md` says what the rows are.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import click
import jax
from orbax.checkpoint import v1 as ocp

import measure
from ckpt_callbacks.manifest import files_in, fsync
from save_path import new_state, plain

SIZES = (16, 64, 128, 256, 2048)
"""MiB; the last is what Orbax does by default."""


def sample(folder: Path, state: dict[str, jax.Array], size: int) -> dict[str, float]:
    """Return the seconds until a checkpoint is durable, and until it is read again."""
    path = folder / "checkpoint"
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = size * 2**20
    begin = time.perf_counter()
    with context:
        ocp.save_checkpointables_async(path, {"params": state}).result()
    for file in files_in(path):
        fsync(file)
    saved = time.perf_counter()
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    jax.block_until_ready(ocp.load_checkpointables(path, {"params": target}))
    read = time.perf_counter()
    shutil.rmtree(path)
    return {"save": saved - begin, "load": read - saved}


@click.command()
@click.option("--mebibytes", default=1024, show_default=True, help="Size of the state.")
@click.option("--leaves", default=32, show_default=True, help="Arrays that it is made of.")
@click.option("--rounds", default=8, show_default=True, help="Of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
def main(mebibytes: int, leaves: int, rounds: int, file: Path | None) -> None:
    """Compare sizes of data files."""
    state = new_state(mebibytes, leaves)
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as name:
        folder = Path(name)
        ways = {str(s): lambda size=s: sample(folder, state, size) for s in SIZES}
        ways["plain"] = lambda: {"save": plain(folder, state)}
        found = measure.interleaved(ways, rounds)
    of = {
        f"{way}_{part}": [taken[part] for taken in samples]
        for way, samples in found.items()
        for part in samples[0]
    }
    rows = [measure.Row("write and fsync", of["plain_save"], "s")]
    for size in SIZES:
        rows += [
            measure.Row(f"files of {size} MiB, durable", of[f"{size}_save"], "s"),
            measure.Row("  by write", measure.ratio(of, f"{size}_save", "plain_save"), "x"),
            measure.Row("  read again", of[f"{size}_load"], "s"),
        ]
    title = f"{mebibytes} MiB in {leaves} arrays"
    measure.report(title, rows, ("jax", "orbax-checkpoint", "tensorstore"), file, seconds=found)


if __name__ == "__main__":
    main()
