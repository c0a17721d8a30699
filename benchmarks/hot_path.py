"""What telling of a step costs a training loop, beside other libraries and reading one metric.

Run it with a Python that has the package, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/hot_path.py
    python benchmarks/hot_path.py --json hot_path.json

`benchmarks/README.md` says what the rows are.
"""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp

import ckpt_callbacks as cc
import measure
import peers
from ckpt_callbacks import orbax_io, saver
from ckpt_callbacks.hooks import Hooks

CALLS = 1000
"""Calls in one sample."""
SCALARS = 256
"""The same where each call needs metrics of its own."""
NEVER = 10**9
SAVES = 15
PLUGINS = 10
LISTENERS = 3

Sample = Callable[[], float]
Samples = dict[str, list[float]]


class Rare:
    """A plugin that wants no step of these."""

    @cc.hookimpl(every=NEVER)
    def on_step(self, event: cc.Step) -> None:
        """Do nothing."""


class Eager:
    """A plugin that wants every step."""

    @peers.impl
    @cc.hookimpl
    def on_step(self, event: cc.Step) -> None:
        """Do nothing."""

    @peers.impl
    @cc.hookimpl
    def on_saved(self, event: cc.Saved) -> None:
        """Do nothing."""


def per_call(
    loop: Callable[[Any], object],
    calls: int = CALLS,
    prepare: Callable[[range], object] = lambda steps: steps,
) -> Sample:
    """Return what takes one sample: the CPU of this thread for each call of a loop.

    The steps ascend from sample to sample. What `prepare` makes of them does not count.
    """
    firsts = itertools.count(0, calls)

    def sample() -> float:
        first = next(firsts)
        prepared = prepare(range(first, first + calls))
        begin = time.thread_time_ns()
        loop(prepared)
        return (time.thread_time_ns() - begin) / calls / 1e9

    return sample


def scalars(steps: range) -> list[jax.Array]:
    """Return a scalar for each step that is ready on the device, and that nobody has read."""
    return list(jax.block_until_ready(_scalars(jnp.float32(steps.start))))


@jax.jit
def _scalars(first: jax.Array) -> list[jax.Array]:
    return [first + i for i in range(SCALARS)]


def steps_with_metrics(steps: range) -> list[tuple[int, dict[str, jax.Array]]]:
    """Return each step with three metrics."""
    values = zip(scalars(steps), scalars(steps), scalars(steps), strict=True)
    names = ("loss", "gradient_norm", "learning_rate")
    return [(s, dict(zip(names, v, strict=True))) for s, v in zip(steps, values, strict=True)]


def entered(stack: ExitStack, *plugins: object) -> tuple[cc.Run[Any], Any]:
    """Return a run in a directory that saves its first step and no other, and its state."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-callbacks-")))
    checkpoint = cc.OrbaxCheckpoint(folder / "run", save=cc.EveryNSteps(NEVER), keep=cc.LatestN(1))
    state = {"params": jnp.zeros((64, 64)), "momentum": jnp.zeros((64, 64))}
    return stack.enter_context(cc.Callbacks(checkpoint, *plugins).run(state)), state


def nothing_due(stack: ExitStack, plugins: int = PLUGINS) -> dict[str, Sample]:
    """Return the samples where no plugin wants the step, and those of the peers."""
    run, state = entered(stack, *(Rare() for _ in range(plugins)))

    def ours(steps: Iterable[int]) -> None:
        for step in steps:
            run.on_step(step, state)

    return {
        "on_step": per_call(ours),
        **{name: per_call(tell) for name, tell in peers.tellers(plugins).items()},
    }


def with_metrics(stack: ExitStack) -> dict[str, Sample]:
    """Return the samples of metrics on the device: told, and read."""
    run, state = entered(stack, *(Rare() for _ in range(PLUGINS)))

    def ours(told: Iterable[tuple[int, dict[str, jax.Array]]]) -> None:
        for step, metrics in told:
            run.on_step(step, state, metrics)

    def by_reading(losses: Iterable[jax.Array]) -> None:
        for loss in losses:
            float(loss)

    return {
        "metrics": per_call(ours, SCALARS, steps_with_metrics),
        "float": per_call(by_reading, SCALARS, scalars),
    }


def every_step(stack: ExitStack) -> dict[str, Sample]:
    """Return the samples where every plugin wants every step, whose event is made for it."""
    run, state = entered(stack, *(Eager() for _ in range(LISTENERS)))
    hooks = Hooks([Eager() for _ in range(LISTENERS)])
    hooks.first_step(0)
    hook = peers.through_pluggy(Eager() for _ in range(LISTENERS))
    metrics: dict[str, float] = {}

    def ours(steps: Iterable[int]) -> None:
        for step in steps:
            hooks.step(cc.Step(step, state, metrics))

    def by_pluggy(steps: Iterable[int]) -> None:
        for step in steps:
            hook.on_step(event=cc.Step(step, state, metrics))

    def whole(steps: Iterable[int]) -> None:
        for step in steps:
            run.on_step(step, state)

    return {"step": per_call(ours), "step_pluggy": per_call(by_pluggy), "whole": per_call(whole)}


def every_checkpoint() -> dict[str, Sample]:
    """Return the samples of an event that any thread may emit, and that is made for it."""
    hooks = Hooks([Eager() for _ in range(LISTENERS)])
    hook = peers.through_pluggy(Eager() for _ in range(LISTENERS))
    metrics: dict[str, float] = {}
    path = Path("run")

    def ours(steps: Iterable[int]) -> None:
        for step in steps:
            hooks.emit(cc.Saved(step, path, metrics, 1, 1.0))

    def by_pluggy(steps: Iterable[int]) -> None:
        for step in steps:
            hook.on_saved(event=cc.Saved(step, path, metrics, 1, 1.0))

    return {"saved": per_call(ours), "saved_pluggy": per_call(by_pluggy)}


class Apart:
    """Adds up the CPU that this thread spends in some functions."""

    def __init__(self) -> None:
        self.spent = self.calls = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, whose time is noted."""

        def timed(*arguments: Any) -> Any:
            begin = time.thread_time_ns()
            try:
                return function(*arguments)
            finally:
                self.spent += time.thread_time_ns() - begin
                self.calls += 1

        return timed


def saving() -> Samples:
    """Return the CPU of the loop's thread at each save of 400 leaves: in all, and our own."""
    names = [f"layer{i}" for i in range(100)]
    leaves = {n: {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)} for n in names}
    state = {"params": leaves, "momentum": jax.tree.map(lambda x: 0 * x, leaves)}
    found: Samples = {"save": [], "save_own": []}
    real = saver.capture, orbax_io.save
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as folder:
        checkpoint = cc.OrbaxCheckpoint(folder, save=cc.EveryNSteps(1), keep=cc.LatestN(1))
        with cc.Callbacks(checkpoint).run(state) as run:
            for step in range(SAVES + 2):
                apart = Apart()
                saver.capture, orbax_io.save = map(apart.around, real)  # type: ignore[assignment]
                begin = time.thread_time_ns()
                run.on_step(step, state)
                spent = time.thread_time_ns() - begin
                saver.capture, orbax_io.save = real
                if apart.calls != len(real):
                    raise RuntimeError("a save did not go through capture and Orbax")
                run.wait()
                if step >= 2:  # the first save imports, and the second evicts for the first time
                    found["save"].append(spent / 1e9)
                    found["save_own"].append((spent - apart.spent) / 1e9)
    return found


IMPORT = """
import time
{}
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):  # of this program alone, as `ru_maxrss` is not
        print(time.process_time(), 1024 * int(line.split()[1]))
"""


def importing(runs: int) -> tuple[Samples, Samples]:
    """Return CPU and peak memory of a fresh process that imports, beyond one that does not."""
    lines = {"bare": "", "import": "import ckpt_callbacks", "import_pluggy": "import pluggy"}

    def fresh(line: str) -> tuple[float, float]:
        command = [sys.executable, "-c", IMPORT.format(line)]
        cpu, memory = subprocess.check_output(command, text=True).split()  # noqa: S603
        return float(cpu), float(memory)

    found = measure.interleaved({n: lambda line=x: fresh(line) for n, x in lines.items()}, runs)
    beyond = [
        {
            n: [of[i] - bare[i] for of, bare in zip(found[n], found["bare"], strict=True)]
            for n in ("import", "import_pluggy")
        }
        for i in range(2)
    ]
    return beyond[0], beyond[1]


def rows(found: Samples, cpu: Samples, memory: Samples) -> list[measure.Row]:
    """Return the lines of the table."""
    titles = {
        "pluggy": "pluggy",
        "keras": "Keras",
        "transformers": "Hugging Face",
        "ignite": "Ignite",
        "lightning": "Lightning",
    }
    return [
        measure.Row(f"on_step, {PLUGINS} plugins, nothing due", found["on_step"], limit=0.15e-6),
        *(measure.Row(f"  {title}", found.get(peer)) for peer, title in titles.items()),
        measure.Row("  by pluggy", measure.ratio(found, "on_step", "pluggy"), "x", 0.03),
        measure.Row("  by Keras", measure.ratio(found, "on_step", "keras"), "x", 0.07),
        measure.Row("on_step, 3 scalars on the device", found["metrics"], limit=1e-6),
        measure.Row("  float(loss)", found["float"]),
        measure.Row("  by float(loss)", measure.ratio(found, "metrics", "float"), "x", 0.1),
        measure.Row(f"Step to {LISTENERS} plugins", found["step"]),
        measure.Row("  pluggy", found["step_pluggy"]),
        measure.Row("  by pluggy", measure.ratio(found, "step", "step_pluggy"), "x", 0.25),
        measure.Row(f"Saved to {LISTENERS} plugins", found["saved"]),
        measure.Row("  pluggy", found["saved_pluggy"]),
        measure.Row("  by pluggy", measure.ratio(found, "saved", "saved_pluggy"), "x", 0.25),
        measure.Row(f"on_step, {LISTENERS} plugins, each due", found["whole"]),
        measure.Row("a save of 400 leaves, in all", found["save"], "ms"),
        measure.Row("  without capture and Orbax", found["save_own"], "ms", 1e-3),
        measure.Row("import ckpt_callbacks, CPU", cpu["import"], "s", 0.1),
        measure.Row("  import pluggy", cpu["import_pluggy"], "s"),
        measure.Row("import ckpt_callbacks, memory", memory["import"], "MB", 12e6),
        measure.Row("  import pluggy", memory["import_pluggy"], "MB"),
    ]


@click.command()
@click.option("--runs", default=60, show_default=True, help="Rounds, of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
def main(runs: int, file: Path | None) -> None:
    """Measure what the loop's thread spends on telling what happened."""
    with ExitStack() as stack:
        samples = nothing_due(stack) | with_metrics(stack)
        samples |= every_step(stack) | every_checkpoint()
        gc.collect()
        gc.freeze()  # else a collection looks at all that the libraries made, in whichever sample
        found: Samples = measure.interleaved(samples, runs)
        gc.unfreeze()
    found |= saving()
    cpu, memory = importing(max(5, runs // 6))
    table = rows(found, cpu, memory)
    packages = (
        "jax",
        "orbax-checkpoint",
        *(peers.PACKAGES[n] for n in peers.PACKAGES if n in found),
    )
    raw = {"seconds": found, "import_seconds": cpu, "import_bytes": memory}
    measure.report("CPU of the loop's thread", table, packages, file, **raw)


if __name__ == "__main__":
    main()
