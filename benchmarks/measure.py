"""What the benchmarks share: median times, peak memory, a table and a file of raw numbers."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "growth",
    "machine",
    "mebibytes",
    "milliseconds",
    "once",
    "peak",
    "seconds",
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


def peak(function: Callable[[], object]) -> int:
    """Return the bytes that Python allocated at most during one run, beyond those before it."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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


def machine() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
    }


def write(path: Path | None, **values: Any) -> None:
    """Write raw numbers, in seconds and bytes, where `--json` was given."""
    if path:
        text = json.dumps({"machine": machine(), **values}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
