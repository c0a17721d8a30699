"""How costs grow: telling with the number of plugins, saving with bytes and with leaves.

Run it with a Python that has the package and matplotlib, or by `tox run -e benchmarks`::

    python benchmarks/scaling.py --json scaling.json --pictures .

`benchmarks/README.md` says what the pictures show.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp

import ckpt_callbacks as cc
import measure
import peers
from hot_path import nothing_due
from save_path import Bench, Listener

PLUGINS = (1, 3, 10, 30, 100)
MEBIBYTES = (1, 4, 16, 64, 256, 1024, 4096)
LEAVES = (10, 30, 100, 300, 1000, 3000, 10_000)
LEAVES_OF = 64
"""MiB that the leaves are of, together."""

Curves = dict[str, dict[int, list[float]]]
"""Seconds of each sample, by what is measured and by how much of it there is."""


def plugins(rounds: int) -> Curves:
    """Return what it takes to tell of a step."""
    curves: Curves = {}
    for count in PLUGINS:
        with ExitStack() as stack:
            samples = nothing_due(stack, count)
            gc.collect()
            gc.freeze()
            for name, found in measure.interleaved(samples, rounds).items():
                curves.setdefault(name, {})[count] = found
            gc.unfreeze()
    return curves


def saves(sizes: list[tuple[int, int, int]], rounds: int) -> Curves:
    """Return what a save takes for each of some: what to call it, its MiB and its leaves."""
    curves: Curves = {name: {} for name in ("wait", "orbax_wait", "saved", "orbax", "plain")}
    for key, mebibytes, leaves in sizes:
        with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as name:
            found = one_size(Path(name), mebibytes, leaves, rounds)
        for curve, values in found.items():
            curves[curve][key] = values
    return curves


def one_size(folder: Path, mebibytes: int, leaves: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each sample with one size of the state."""
    bench, listener = Bench(folder, mebibytes, leaves), Listener()
    checkpoint = cc.OrbaxCheckpoint(folder / "run", save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    with cc.Callbacks(checkpoint, listener).run({"params": bench.state}) as run:
        run.state  # noqa: B018  # the run lets go of it
        ways: dict[str, Any] = {
            "plain": bench.plain,
            "orbax": lambda: bench.orbax(compression=True),
            "ours": lambda: bench.ours(run, listener),
        }
        found = measure.interleaved(ways, rounds)
    idle = statistics.median(taken["step"] for taken in found["plain"])

    def waits(way: str) -> list[float]:
        return [taken["blocked"] + max(0.0, taken["step"] - idle) for taken in found[way]]

    return {
        "wait": waits("ours"),
        "orbax_wait": waits("orbax"),
        "saved": [taken["durable"] for taken in found["ours"]],
        "orbax": [taken["durable"] for taken in found["orbax"]],
        "plain": [taken["durable"] for taken in found["plain"]],
    }


TITLES = {
    "on_step": "ckpt_callbacks, nothing due",
    "pluggy": "pluggy",
    "keras": "Keras",
    "transformers": "Hugging Face",
    "ignite": "Ignite",
    "lightning": "Lightning",
    "wait": "the loop's wait",
    "orbax_wait": "the loop's wait, Orbax alone",
    "saved": "until Saved",
    "orbax": "until durable, Orbax alone",
    "plain": "write and fsync",
}


def draw(path: Path, curves: Curves, across: str, upward: str, scale: float) -> None:
    """Draw curves: medians, and in a lighter shade where they lie."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, found in curves.items():
        style = {"linewidth": 2.5} if name in {"on_step", "wait", "saved"} else {"linestyle": "--"}
        middle = [scale * statistics.median(values) for values in found.values()]
        (line,) = axes.plot(list(found), middle, marker="o", label=TITLES[name], **style)
        bounds = [measure.interval(values) for values in found.values()]
        low, high = ([scale * bound[i] for bound in bounds] for i in (0, 1))
        axes.fill_between(list(found), low, high, color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel=across, ylabel=upward)
    axes.set_xticks(list(found), [f"{x:,}" for x in found])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Of which the median counts.")
@click.option("--largest", default=MEBIBYTES[-1], show_default=True, help="MiB of a state.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
@click.option("--pictures", type=click.Path(path_type=Path), help="A folder for the pictures.")
def main(rounds: int, largest: int, file: Path | None, pictures: Path | None) -> None:
    """Measure how costs grow."""
    jnp.zeros(1)  # JAX is set up
    found = {
        "plugins": plugins(4 * rounds),
        "size": saves([(m, m, min(32, 8 * m)) for m in MEBIBYTES if m <= largest], rounds),
        "leaves": saves([(n, LEAVES_OF, n) for n in LEAVES], rounds),
    }
    rows = [
        measure.Row(f"{TITLES[name]}, {key:,} {of}", values, "us" if of == "plugins" else "s")
        for of, curves in found.items()
        for name, curve in curves.items()
        for key, values in curve.items()
    ]
    present = [p for n, p in peers.PACKAGES.items() if n in found["plugins"]]
    measure.report("How costs grow", rows, ["jax", "orbax-checkpoint", *present], file, **found)
    if pictures:
        micro = "CPU of the loop's thread a step, µs"
        draw(pictures / "plugins.png", found["plugins"], "plugins or callbacks", micro, 1e6)
        draw(pictures / "size.png", found["size"], "MiB of state", "seconds", 1)
        leaves = f"leaves, {LEAVES_OF} MiB together"
        draw(pictures / "leaves.png", found["leaves"], leaves, "seconds", 1)


if __name__ == "__main__":
    main()
