"""What a save costs beside Orbax alone and a plain write: the loop's wait, and until it is durable.

Run it with a Python that has the package, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/save_path.py
    python benchmarks/save_path.py --mebibytes 1024 --rounds 10 --json save_path.json

`benchmarks/README.md` says what the rows are.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

import ckpt_callbacks as cc
import measure
from ckpt_callbacks import orbax_io
from ckpt_callbacks.manifest import files_in, fsync

LEAVES = 32
State = dict[str, jax.Array]


@jax.jit(donate_argnums=0)
def step_of(state: State) -> State:
    """Take the step that follows a save, and that may use the buffers of the state again."""
    return jax.tree.map(lambda x: x * 1.0001, state)


def save_by_orbax(path: Path, state: State, *, compression: bool) -> Any:
    """Begin to save by Orbax alone, with its defaults but maybe for the compression."""
    context = ocp.Context()
    context.array.saving.use_compression = compression
    with context:
        return ocp.save_checkpointables_async(path, {"params": state})


def new_state(mebibytes: int, leaves: int = LEAVES) -> State:
    """Return float arrays of random normals, of a size in all."""
    normal = np.random.default_rng(0).standard_normal
    size = mebibytes * 2**20 // 4 // leaves
    state = {f"w{i}": jnp.asarray(normal(size, "f4")) for i in range(leaves)}
    return jax.block_until_ready(state)  # so that no copy is made later


def plain(folder: Path, state: State) -> float:
    """Return the seconds in which the same bytes are written to one file, and durable."""
    arrays = [np.asarray(leaf) for leaf in state.values()]
    path = folder / "plain"
    begin = time.perf_counter()
    with path.open("wb") as file:
        for array in arrays:
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())
    durable = time.perf_counter() - begin
    path.unlink()
    return durable


class Bench:
    """A state, and the ways to save it; each returns the seconds of its parts.

    `cpu` is that of all threads, for the save and for the step that each way takes with it.
    """

    def __init__(self, folder: Path, mebibytes: int, leaves: int = LEAVES) -> None:
        self.folder = folder
        self.state = new_state(mebibytes, leaves)
        self.number = 0

    def advance(self) -> float:
        """Take a step, to its end."""
        begin = time.perf_counter()
        self.state = jax.block_until_ready(step_of(self.state))
        return time.perf_counter() - begin

    def plain(self) -> dict[str, float]:
        """Write the same bytes to one file."""
        cpu = time.process_time()
        found = {"durable": plain(self.folder, self.state), "step": self.advance()}
        return found | {"cpu": time.process_time() - cpu}

    def committed(self) -> dict[str, float]:
        """Save as a run does, up to where the files are durable: no digests, no record."""
        path = self.folder / "committed"
        begin, cpu = time.perf_counter(), time.process_time()
        orbax_io.save(path, {"params": self.state}, {}).result()
        for file in files_in(path):
            fsync(file)
        durable = time.perf_counter() - begin
        self.advance()
        cpu = time.process_time() - cpu
        shutil.rmtree(path)
        return {"durable": durable, "cpu": cpu}

    def orbax(self, *, compression: bool) -> dict[str, float]:
        """Save by Orbax alone, and make what it wrote durable."""
        path = self.folder / "orbax"
        begin, cpu = time.perf_counter(), time.process_time()
        pending = save_by_orbax(path, self.state, compression=compression)
        blocked = time.perf_counter() - begin
        step = self.advance()
        pending.result()
        for file in files_in(path):
            fsync(file)
        durable, cpu = time.perf_counter() - begin, time.process_time() - cpu
        shutil.rmtree(path)
        return {"blocked": blocked, "step": step, "durable": durable, "cpu": cpu}

    def ours(self, run: cc.Run[Any], saved: Listener) -> dict[str, float]:
        """Save by `on_step`, which is due, and wait for the event."""
        saved.seen.clear()
        begin, cpu = time.perf_counter(), time.process_time()
        run.on_step(self.number, {"params": self.state})
        blocked = time.perf_counter() - begin
        step = self.advance()
        saved.seen.wait()
        durable, cpu = saved.at - begin, time.process_time() - cpu
        self.number += 1
        saved.settled.wait()
        return {"blocked": blocked, "step": step, "durable": durable, "cpu": cpu}


class Listener:
    """Notes when a checkpoint is complete, and when the one before is gone."""

    def __init__(self) -> None:
        self.seen, self.settled, self.at = threading.Event(), threading.Event(), 0.0
        self._first = True

    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        """Note the time: files, manifest and record are durable, and digests taken."""
        self.at = time.perf_counter()
        if self._first:  # nothing to evict yet
            self.settled.set()
        else:
            self.settled.clear()
        self._first = False
        self.seen.set()

    @cc.hookimpl
    def on_evicted(self, event: cc.Evicted) -> None:
        """Let the next sample begin."""
        self.settled.set()


def measured(folder: Path, mebibytes: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return the seconds of each way, in each round."""
    bench, listener = Bench(folder, mebibytes), Listener()
    checkpoint = cc.OrbaxCheckpoint(folder / "run", save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    with cc.Callbacks(checkpoint, listener).run({"params": bench.state}) as run:
        run.state  # noqa: B018  # the run lets go of it
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "plain": bench.plain,
            "orbax": lambda: bench.orbax(compression=True),
            "orbax_plain": lambda: bench.orbax(compression=False),
            "committed": bench.committed,
            "ours": lambda: bench.ours(run, listener),
        }
        return measure.interleaved(ways, rounds)


def held(way: str, mebibytes: int) -> int:
    """Return the bytes beyond the state that the host's memory held at most, in this process."""
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as name:
        folder = Path(name)
        checkpoint = cc.OrbaxCheckpoint(folder / "run", save=cc.EveryNSteps(1), keep=cc.LatestN(1))
        small = {"params": jnp.zeros(1)}
        with cc.Callbacks(checkpoint).run(small) as run:

            def save(number: int, state: Any) -> None:
                if way == "ours":
                    run.on_step(number, state)
                    run.wait()
                else:
                    save_by_orbax(
                        folder / f"o{number}", state["params"], compression=False
                    ).result()

            save(0, small)  # loads all modules
            bench = Bench(folder, mebibytes)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
            before = measure.status("VmRSS")
            save(1, {"params": bench.state})
            return measure.status("VmHWM") - before


def memory(mebibytes: int, rounds: int) -> dict[str, list[float]]:
    """Return what a save holds beyond the state, by its size, each in a process of its own."""

    def alone(way: str) -> float:
        command = [sys.executable, __file__, "--alone", way, "--mebibytes", str(mebibytes)]
        return int(subprocess.check_output(command, text=True)) / mebibytes / 2**20  # noqa: S603

    ways = ("ours", "orbax_plain")
    return measure.interleaved({way: lambda way=way: alone(way) for way in ways}, rounds)


def transfer(mebibytes: int, rounds: int) -> list[float] | None:
    """Return the bytes a second from the device to the host's memory, if there is a device."""
    if jax.default_backend() == "cpu":
        return None

    def sample() -> float:
        state = jax.block_until_ready(step_of(new_state(mebibytes)))  # not read before
        begin = time.perf_counter()
        jax.device_get(state)
        return mebibytes * 2**20 / (time.perf_counter() - begin)

    return [sample() for _ in range(rounds + 1)][1:]


def rows(
    found: dict[str, list[dict[str, float]]],
    memory: dict[str, list[float]],
    speed: list[float] | None,
) -> list[measure.Row]:
    """Return the lines of the table."""
    idle = measure.quantile([taken["step"] for taken in found["plain"]], 0.5)
    of = {
        f"{way}_{part}": [taken[part] for taken in samples]
        for way, samples in found.items()
        for part in samples[0]
    }
    for way in ("orbax", "orbax_plain", "ours"):
        pairs = zip(of[f"{way}_blocked"], of[f"{way}_step"], strict=True)
        of[f"{way}_wait"] = [blocked + max(0.0, step - idle) for blocked, step in pairs]

    def by(
        other: str, part: str, title: str, limit: float | None = None, mine: str = "ours"
    ) -> measure.Row:
        ratio = measure.ratio(of, f"{mine}_{part}", f"{other}_{part}")
        return measure.Row(f"  by {title}", ratio, "x", limit)

    return [
        measure.Row("the loop's wait, ours", of["ours_wait"], "ms"),
        measure.Row("  Orbax alone", of["orbax_wait"], "ms"),
        by("orbax", "wait", "Orbax alone", 1.05),
        by("orbax", "cpu", "Orbax alone, CPU of all threads"),
        measure.Row("committed and synced, ours", of["committed_durable"], "s"),
        by("plain", "durable", "write", 1.25, "committed"),
        by("plain", "cpu", "write, CPU", None, "committed"),
        by("orbax", "durable", "Orbax", 0.4, "committed"),
        by("orbax", "cpu", "Orbax, CPU", None, "committed"),
        measure.Row("until Saved, digests included", of["ours_durable"], "s"),
        measure.Row("  write and fsync", of["plain_durable"], "s"),
        measure.Row("  Orbax, durable", of["orbax_durable"], "s"),
        measure.Row("  Orbax without compression", of["orbax_plain_durable"], "s"),
        by("plain", "durable", "write", 1.5),
        by("plain", "cpu", "write, CPU"),
        by("orbax", "durable", "Orbax"),
        measure.Row("host memory beyond the state, by its size", memory["ours"], "x"),
        measure.Row("  Orbax without compression", memory["orbax_plain"], "x"),
        measure.Row("from the device to the host, a second", speed, "MB"),
    ]


@click.command()
@click.option("--mebibytes", default=1024, show_default=True, help="Size of the state.")
@click.option("--rounds", default=10, show_default=True, help="Of which the median counts.")
@click.option("--directory", type=click.Path(path_type=Path), help="On the disk to measure.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option("--alone", hidden=True)
def main(
    mebibytes: int, rounds: int, directory: Path | None, file: Path | None, alone: str | None
) -> None:
    """Measure what a save costs the loop, and how long it takes."""
    if alone:
        click.echo(held(alone, mebibytes))
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-", dir=directory) as folder:
        found = measured(Path(folder), mebibytes, rounds)
    most = memory(mebibytes, 3)
    packages = ("jax", "orbax-checkpoint", "tensorstore")
    speed = transfer(mebibytes, rounds)
    table = rows(found, most, speed)
    measure.report(f"Saving {mebibytes} MiB", table, packages, file, seconds=found, memory=most)


if __name__ == "__main__":
    main()
