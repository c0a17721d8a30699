"""Where the time of the callbacks goes: a table of what was called, how often and how long.

It is put around callables when they are put together, so that a run without it has none of it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

from ckpt_callbacks.clock import Clock
from ckpt_callbacks.text import as_text
from ckpt_callbacks.timing import Timing

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Profile", "Row"]

logger = logging.getLogger("ckpt_callbacks")
F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")

_NAMED = 3
"""How many of the largest are named in one line."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one piece of work took; of several plugins of one class it is the sum."""

    name: str
    thread: Literal["loop", "background"]
    calls: int
    """Those that have returned or raised."""
    seconds: float
    own: float
    """Seconds without those of the rows that were called meanwhile, on the same thread."""
    cpu: float
    """Seconds of CPU of the thread."""
    max: float
    """Seconds of the longest call; of a wrapper, of the longer part of one."""

    @property
    def mean(self) -> float:
        """Seconds of a call, on average."""
        return self.seconds / self.calls


class _Sum(NamedTuple):
    calls: int = 0
    seconds: float = 0.0
    own: float = 0.0
    cpu: float = 0.0
    max: float = 0.0

    def plus(self, other: _Sum) -> _Sum:
        return _Sum(
            self.calls + other.calls,
            self.seconds + other.seconds,
            self.own + other.own,
            self.cpu + other.cpu,
            max(self.max, other.max),
        )


@dataclass(slots=True)
class _UnderWay:
    cpu: float
    begun: float
    within: float = 0.0
    """Seconds of other work that was done meanwhile."""


class _Mine(threading.local):
    """What belongs to one thread alone: no thread waits for another, nor a forked child for ever.

    Args:
        threads: gets the thread and its sums by name, of which each is replaced as a whole.
    """

    def __init__(self, threads: list[tuple[int, dict[str, _Sum]]]) -> None:
        self.under_way: list[_UnderWay] = []
        self.sums: dict[str, _Sum] = {}
        threads.append((threading.get_ident(), self.sums))


class _Span(Timing):
    """Times what it stands around. It may be used again, by other threads and within itself."""

    __slots__ = ("_calls", "_cpu", "_mine", "_name", "_now")

    def __init__(
        self, name: str, mine: _Mine, now: Callable[[], float], cpu: Callable[[], float]
    ) -> None:
        self._name, self._mine, self._now, self._cpu = name, mine, now, cpu
        self._calls = 1

    def __enter__(self) -> None:
        self._mine.under_way.append(_UnderWay(self._cpu(), self._now()))

    def __exit__(self, *error: object) -> None:
        mine = self._mine
        this = mine.under_way.pop()
        seconds, cpu = self._now() - this.begun, self._cpu() - this.cpu
        if mine.under_way:
            mine.under_way[-1].within += seconds
        took = _Sum(self._calls, seconds, seconds - this.within, cpu, seconds)
        mine.sums[self._name] = mine.sums.get(self._name, _Sum()).plus(took)

    def __call__(self, function: F) -> F:
        if inspect.isgeneratorfunction(function):
            return cast(F, self._around(function))

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self:
                return function(*arguments, **options)

        return cast(F, timed)

    def _around(self, function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Any]:
        """Time a hook that wraps others while it runs itself, and not while they do."""
        rest = _Span(self._name, self._mine, self._now, self._cpu)
        rest._calls = 0  # it is one call, in two parts

        @functools.wraps(function)
        def timed(*arguments: Any) -> Generator[Any, Any, Any]:
            wrapper = function(*arguments)
            go_on: Callable[[], Any] = functools.partial(next, wrapper)
            span = self
            while True:
                try:
                    with span:
                        given = go_on()
                except StopIteration as end:
                    return end.value
                span = rest
                try:
                    go_on = functools.partial(wrapper.send, (yield given))
                except BaseException as error:
                    go_on = functools.partial(wrapper.throw, error)

        return timed


class Profile:
    """What a run did, how often, and how long it took; print it for a table.

    Args:
        clock: its monotonic reading is what time is measured by.
        cpu: returns the seconds of CPU that the calling thread has used.
    """

    def __init__(self, clock: Clock, cpu: Callable[[], float] = time.thread_time) -> None:
        self._now, self._cpu = clock.monotonic, cpu
        self._threads: list[tuple[int, dict[str, _Sum]]] = []
        self._mine = _Mine(self._threads)
        self.begin()

    def begin(self) -> None:
        """The run begins, and its loop is on this thread."""
        self._loop, self._begun = threading.get_ident(), self._now()
        self._ended: float | None = None

    def end(self) -> None:
        """The run has ended."""
        self._ended = self._now()

    def timed(self, name: str) -> Timing:
        """Return what times the work of that name, as a context manager or a decorator."""
        return _Span(name, self._mine, self._now, self._cpu)

    @property
    def rows(self) -> list[Row]:
        """What was done, on the thread of the loop first, and what took longest itself first."""
        sums: dict[tuple[str, Literal["loop", "background"]], _Sum] = {}
        for thread, found in list(self._threads):
            where: Literal["loop", "background"] = "loop" if thread == self._loop else "background"
            for name, took in list(found.items()):
                sums[name, where] = sums.get((name, where), _Sum()).plus(took)
        rows = [Row(name, where, *took) for (name, where), took in sums.items()]
        return sorted(rows, key=lambda row: (row.thread != "loop", -row.own))

    @property
    def seconds(self) -> float:
        """How long the run took, or takes so far."""
        return (self._now() if self._ended is None else self._ended) - self._begun

    @property
    def share(self) -> float:
        """The part of that time, from 0 to 1, which the thread of the loop was in callbacks."""
        inside = sum(row.own for row in self.rows if row.thread == "loop")
        return inside / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """Return the share and what took longest, in one line."""
        share = f"{100 * self.share:.1f}" if self.share >= 0.001 else "less than 0.1"
        largest = [r for r in self.rows if r.thread == "loop" and r.own][:_NAMED]
        names = ", ".join(f"{row.name} {_text(row.own)}" for row in largest)
        return f"callbacks took {share} % of {_text(self.seconds)}" + (
            f"; the largest: {names}" if names else ""
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table()
        table.add_column("what", overflow="fold")
        for title in ("calls", "own", "total", "max", "CPU"):
            table.add_column(title, justify="right", no_wrap=True)
        for where, title in (("loop", "loop's thread"), ("background", "background")):
            table.add_section()
            table.add_row(f"[bold]{title}[/bold]")
            for row in self.rows:
                if row.thread == where:
                    times = (row.own, row.seconds, row.max, row.cpu)
                    table.add_row(row.name, f"{row.calls:,}", *map(_text, times))
        yield self.line()
        yield table

    def __str__(self) -> str:
        return as_text(self)


def _text(seconds: float) -> str:
    """Return a time for people, such as `1.25 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        value = seconds * scale
        if value >= 1:
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{seconds * 1e6:.2g} µs"
