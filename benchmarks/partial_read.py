"""How many bytes are read to restore only the weights, counted by the operating system.

Run it with a Python that has the package, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/partial_read.py
    python benchmarks/partial_read.py --json read.json --folder /mnt/disk

It makes a run directory of 180 MB, and removes it.
`benchmarks/README.md` says what the columns are.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import measure

LAYERS, WIDTH = 14, 1024
LIMIT = 0.4
KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "params": {"only": "params"},
    "params, not verified": {"only": "params", "verify": False},
}
"""What is restored, and how."""


def new_state(layers: int, width: int) -> dict[str, Any]:
    """Return weights and what Adam keeps of them: twice as many bytes."""
    import jax
    import optax

    keys = jax.random.split(jax.random.key(0), layers)
    params = {f"layer{i}": jax.random.normal(k, (width, width)) for i, k in enumerate(keys)}
    return {"params": params, "opt_state": optax.adam(0.1).init(params)}


def save(root: Path, state: Any) -> None:
    """Save one checkpoint."""
    import ckpt_callbacks as cc

    checkpoint = cc.OrbaxCheckpoint(root, save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    with cc.Callbacks(checkpoint).run(state) as run:
        run.save(0, run.state)


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(root: Path) -> None:
    """Drop all files below a folder from the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)  # what is not written yet can not be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def counted() -> dict[str, int]:
    """Return the bytes that this process has read: by its calls, and from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    values = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return {"calls": values["rchar"], "disk": values["read_bytes"]}


def child(root: Path, small: Path, kind: str) -> None:
    """Restore once and print what was read for it."""
    import jax

    import ckpt_callbacks as cc

    def restore(directory: Path, layers: int, width: int) -> Any:
        like = jax.eval_shape(lambda: new_state(layers, width))
        return jax.block_until_ready(cc.restore(directory, like=like, **KINDS[kind]))

    restore(small, 1, 8)  # all modules are read
    before = counted()
    seconds, restored = measure.once(lambda: restore(root, LAYERS, WIDTH))
    after = counted()
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(restored) if isinstance(leaf, jax.Array))
    found = {name: after[name] - before[name] for name in before}
    print(json.dumps(found | {"seconds": seconds, "restored": read}))  # noqa: T201


def measured(root: Path, small: Path, runs: int) -> dict[str, dict[str, float]]:
    """Return the medians of each kind, each run in a process of its own."""
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(runs):
        for kind in KINDS:
            forget(root)
            command = [sys.executable, __file__, "--child", kind, str(root), str(small)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
            rows[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        kind: {name: statistics.median(row[name] for row in found) for name in found[0]}
        for kind, found in rows.items()
    }


@click.command()
@click.option("--runs", default=3, show_default=True, help="Processes, of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where the directory is made; by default where temporary files are.",
)
def main(runs: int, file: Path | None, folder: Path | None) -> None:
    """Restore a state with Adam's moments in whole, and its weights alone."""
    base = Path(tempfile.mkdtemp(prefix="ckpt-callbacks-", dir=folder))
    try:
        root, small = base / "run", base / "small"
        save(small, new_state(1, 8))
        save(root, new_state(LAYERS, WIDTH))
        total = size(root / "0")
        rows = measured(root, small, runs)
    finally:
        shutil.rmtree(base)
    table = Table(title=f"A checkpoint of {measure.mebibytes(total)} MiB", title_justify="left")
    for title in ("restored", "MiB", "calls MiB", "ratio", "disk MiB", "ratio", "of all", "s"):
        table.add_column(title, justify="left" if title == "restored" else "right")
    whole = rows["all"]
    ratios = {
        kind: {name: row[name] / max(1, whole[name]) for name in ("calls", "disk")}
        for kind, row in rows.items()
    }
    for kind, row in rows.items():
        table.add_row(
            kind,
            measure.mebibytes(row["restored"]),
            measure.mebibytes(row["calls"]),
            f"{ratios[kind]['calls']:.3f}",
            measure.mebibytes(row["disk"]),
            f"{ratios[kind]['disk']:.3f}",
            f"{row['disk'] / total:.3f}",
            f"{row['seconds']:.2f}",
        )
    console = Console()
    console.print(table)
    for name in ("calls", "disk"):
        what = f"weights alone, verified, of a full restore ({name})"
        console.print(measure.at_most(what, ratios["params"][name], LIMIT))
    console.print(
        measure.at_most("weights from the disk of all files", rows["params"]["disk"] / total, LIMIT)
    )
    if not whole["disk"]:
        console.print("Nothing came from a disk: --folder must be on one.")
    measure.write(file, bytes=total, rows=rows, ratios=ratios)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[2])
    else:
        main()
