"""What the benchmarks share: times, peak memory, disk usage, a table and a file of raw numbers."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

__all__ = [
    "Row",
    "at_most",
    "disk",
    "growth",
    "interleaved",
    "interval",
    "load",
    "machine",
    "mebibytes",
    "milliseconds",
    "once",
    "peak",
    "quantile",
    "ratio",
    "report",
    "seconds",
    "show",
    "status",
    "verdict",
    "write",
]

T = TypeVar("T")


def once(function: Callable[[], T]) -> tuple[float, T]:
    """Return how long a function takes, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def seconds(function: Callable[[], T], runs: int) -> tuple[list[float], T]:
    """Return how long each of several runs takes, after one that is not counted, and the result."""
    result = function()
    return [once(function)[0] for _ in range(runs)], result


def interleaved(samples: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Return what each takes in each of several rounds, after one that is not counted.

    In a round all are taken once, in an order of its own, so that what else the machine does
    meanwhile falls on none of them alone.
    """
    order = list(samples)
    chance = random.Random(0)  # noqa: S311  # the same orders each time
    found: dict[str, list[T]] = {name: [] for name in samples}
    for number in range(rounds + 1):
        chance.shuffle(order)
        for name in order:
            taken = samples[name]()
            if number:
                found[name].append(taken)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return where the median lies with a probability of 95 %, from 2,000 resamples."""
    chance = random.Random(0)  # noqa: S311  # the same each time
    medians = [statistics.median(chance.choices(values, k=len(values))) for _ in range(2000)]
    return quantile(medians, 0.025), quantile(medians, 0.975)


def peak(function: Callable[[], object]) -> int:
    """Return the bytes that Python allocated at most during one run, beyond those before it."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def status(name: str) -> int:
    """Return a line of this process' status in bytes, such as `VmRSS`; see proc(5)."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def disk(*roots: Path) -> int:
    """Return the bytes that all files below some folders take up, hard links counted once."""
    found = {}
    for root in roots:
        for path in root.rglob("*"):
            status = path.lstat()
            found[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(found.values())


def quantile(times: Sequence[float], part: float) -> float:
    """Return the time that `part` of all do not exceed; 1 for the longest."""
    return sorted(times)[max(0, math.ceil(part * len(times)) - 1)]


def milliseconds(times: list[float]) -> str:
    """Return the median for the table."""
    return f"{1000 * statistics.median(times):.1f}"


def mebibytes(count: int) -> str:
    """Return a number of bytes for the table."""
    return f"{count / 2**20:.1f}"


def growth(times: list[float], half: list[float] | None) -> str:
    """Return how many times longer it takes than for half of N: 2 is linear, 4 quadratic."""
    return f"{statistics.median(times) / statistics.median(half):.2f}" if half else "-"


def verdict(what: str, times: list[float], limit: float) -> str:
    """Return one line on whether a target is reached."""
    taken = statistics.median(times)
    reached = "reached" if taken < limit else "not reached"
    return f"Target: {what} under {limit:g} s: {taken:.3f} s, {reached}."


def at_most(what: str, value: float, limit: float, unit: str = "") -> str:
    """Return one line on whether a target is reached that is no median of times."""
    reached = "reached" if value <= limit else "not reached"
    return f"Target: {what} at most {limit:g}{unit}: {value:.3g}{unit}, {reached}."


def load() -> str:
    """Return one line on what else the machine is doing, which times depend on."""
    return f"Load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors."


def machine() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "load": os.getloadavg(),
    }


def write(path: Path | None, **values: Any) -> None:
    """Write raw numbers, in seconds and bytes, where `--json` was given."""
    if path:
        text = json.dumps({"machine": machine(), **values}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """What one line of the table shows: the samples, beside a limit if there is one.

    Whether it is reached is *unresolved* where the limit is in the interval of the median.
    """

    title: str
    values: list[float] | None
    unit: str = "us"
    limit: float | None = None

    def cells(self) -> list[str]:
        """Return the median, its interval, the spread of the samples, and the verdict."""
        if self.values is None:
            return [self.title, "not here", "", "", "", ""]
        scale = {"us": 1e6, "ms": 1e3, "s": 1, "MB": 1e-6, "x": 1}[self.unit]

        def show(value: float) -> str:
            return f"{value * scale:.3g}" if value * scale < 1000 else f"{value * scale:.0f}"

        middle = statistics.median(self.values)
        low, high = interval(self.values)
        spread = (quantile(self.values, part) for part in (0.05, 0.95))
        target = reached = ""
        if self.limit is not None:
            target = f"{show(self.limit)} {self.unit}"
            reached = "reached" if high <= self.limit else "not reached"
            if low <= self.limit < high:
                reached = "unresolved"
        return [
            self.title,
            f"{show(middle)} {self.unit}",
            f"{show(low)} to {show(high)}",
            " to ".join(map(show, spread)),
            target,
            reached,
        ]


def ratio(found: Mapping[str, list[float]], ours: str, theirs: str) -> list[float] | None:
    """Return one by the other, in each round."""
    if theirs not in found:
        return None
    return [a / b for a, b in zip(found[ours], found[theirs], strict=True)]


def report(
    title: str, rows: Sequence[Row], packages: Sequence[str], file: Path | None, **raw: Any
) -> None:
    """Print a table and what its numbers depend on, and write both where `--json` was given."""
    versions = {name: version(name) for name in packages}
    show(title, rows, versions)
    write(file, title=title, versions=versions, rows=[row.cells() for row in rows], **raw)


def show(title: str, rows: Sequence[Row], versions: Mapping[str, str]) -> None:
    """Print a table, and what its numbers depend on."""
    table = Table(title=title, title_justify="left")
    for name in ("what", "median", "95 % interval", "5 to 95 % of rounds", "target", ""):
        table.add_column(name, justify="left" if name in {"what", ""} else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    console = Console(width=max(140, Console().width))
    console.print(table)
    about = machine()
    console.print(
        f"Python {about['python']}, {about['system']}.", json.dumps(dict(versions)), soft_wrap=True
    )
    console.print(load())
