"""What people who wait are shown: bars in a terminal, and lines now and then elsewhere.

Bars are shown where standard error is a terminal, after a moment, so that what is done at once
shows none; in notebooks, logs and pipes there are none. All bars of a process are one display.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.events import Eval, RunEnded, RunStarted, Saved, SaveFailed, Step
from ckpt_callbacks.hookspecs import hookimpl
from ckpt_callbacks.policy import as_step, positive

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["ProgressBar", "growing", "hide", "size_of", "transfer", "watched"]

logger = logging.getLogger("ckpt_callbacks")

_AFTER = 0.5
"""Seconds after which something that is still under way gets a bar."""
_LOOK = 0.25
"""Seconds between two looks at how much there is."""
_MOST_METRICS = 4

_hidden = threading.Event()
_mutex = threading.Lock()
_display: Progress | None = None


def hide() -> None:
    """Show no bars in this process from now on."""
    _hidden.set()


def watched() -> bool:
    """Return whether a person sees at once what is written to standard error."""
    if _hidden.is_set() or sys.stderr is None or not sys.stderr.isatty():
        return False  # and rich, which takes a while, is not even imported
    from rich.console import Console

    console = Console(file=sys.stderr)
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def transfer(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far something is that moves bytes, while the block runs.

    Args:
        title: what is done, such as `verifying`.
        total: bytes that there are, if that is known.

    Yields:
        What is to be called with each number of bytes that has been moved; on any thread.
    """
    if not watched():
        yield _ignore
        return
    bar = _Bar(title, total)
    timer = threading.Timer(_AFTER, bar.show)
    timer.daemon, timer.name = True, "ckpt-progress"
    timer.start()
    try:
        yield bar.advance
    finally:
        timer.cancel()
        bar.close()


@contextmanager
def growing(title: str, *places: Path, total: int | None = None) -> Iterator[None]:
    """Show how many bytes there are in files and folders that something writes to meanwhile."""
    if not watched():
        yield
        return
    ended, before = threading.Event(), sum(map(size_of, places))
    with transfer(title, total) as advance:

        def follow() -> None:
            seen = before
            while not ended.wait(_LOOK):
                now = sum(map(size_of, places))
                if now > seen:
                    advance(now - seen)
                    seen = now

        thread = threading.Thread(target=follow, name="ckpt-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _ignore(count: int) -> None:
    """Take what nobody is shown."""


def size_of(place: Path) -> int:
    """Return the bytes in a folder or a file, which may change or go meanwhile."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118  # many
            except OSError:
                continue
    return total or (place.stat().st_size if place.is_file() else 0)


class _Bar:
    """A bar of bytes in the display; it is there between `show` and `close`."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._total = title, total
        self._moved, self._begun = 0, time.monotonic()
        self._mutex = threading.Lock()
        self._task: TaskID | None = None
        self._closed = False

    def advance(self, count: int) -> None:
        with self._mutex:
            self._moved += count
            if self._task is not None and _display:
                _display.update(self._task, completed=self._moved)

    def show(self) -> None:
        with self._mutex:
            if not self._closed:
                self._task = _add(self._title, self._total, self._text)
                if _display:
                    _display.update(self._task, completed=self._moved)

    def close(self) -> None:
        with self._mutex:
            self._closed = True
            task, self._task = self._task, None
        if task is not None:
            _remove(task)

    def _text(self) -> str:
        from ckpt_callbacks.report import size

        moved, seconds = self._moved, time.monotonic() - self._begun
        if not moved and self._total is None:
            return ""  # such as while a library is imported, or a service is asked
        of = f" of {size(self._total)}" if self._total is not None else ""
        return f"{size(moved)}{of}, {size(int(moved / seconds)) if seconds else 0}/s"


def _add(title: str, total: int | None, text: Callable[[], str]) -> TaskID:
    """Add a bar to the display, which is shown as long as it has one."""
    global _display  # noqa: PLW0603  # two would write over each other
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Told(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["text"]())

    with _mutex:
        if _display is None:
            columns: list[Any] = [TextColumn("{task.description}", markup=False)]
            columns += [BarColumn(bar_width=24), Told()]
            _display = Progress(*columns, console=Console(file=sys.stderr), transient=True)
            _display.start()
        return _display.add_task(title, total=total, text=text)


def _remove(task: TaskID) -> None:
    global _display  # noqa: PLW0603
    with _mutex:
        if _display:
            _display.remove_task(task)
            if not _display.task_ids:
                _display.stop()
                _display = None


# The loop


class ProgressBar:
    """Shows where a training loop is: steps, their rate, the last metrics, the last save.

    In a terminal it is a bar; elsewhere, such as in a notebook or a job's log, a line now and then
    of the logger `ckpt_callbacks`: an INFO where those are shown, and else a WARNING. It never
    waits for the device: of the metrics of a step it shows those that are numbers on the host; the
    others follow with the next evaluation or save, which have them on the host anyway.

    Args:
        total: the last step that there will be, for a percentage and the time that is left.
        every: of so many steps look at one; the others cost nothing.
        interval: seconds between two lines, where there is no bar.

    Raises:
        ConfigError: a number is not positive.
    """

    def __init__(
        self, total: int | None = None, *, every: int = 10, interval: float = 60.0
    ) -> None:
        self._total = None if total is None else as_step("ProgressBar", total)
        positive("ProgressBar", "every", every)
        if not isinstance(interval, Real) or not interval > 0:
            raise ConfigError(f"ProgressBar: interval must be seconds above 0, not {interval!r}")
        self._interval: float = interval
        self._task: TaskID | None = None
        self._step: int | None = None
        self._saved: str = ""
        self._metrics: dict[str, float] = {}
        self._at: float = 0.0
        self._told: float = 0.0
        self._first: int = 0

        @hookimpl(every=every)
        def on_step(event: Step) -> None:
            self._take(event)

        self.on_step = on_step

    @hookimpl
    def on_run_started(self, event: RunStarted) -> None:
        self._first, self._step, self._metrics = event.next_step, None, {}
        self._at = self._told = time.monotonic()
        self._saved = "" if event.resumed_from is None else f"saved {event.resumed_from:,}"
        if watched():
            self._task = _add("training", self._total, self._text)

    @hookimpl
    def on_eval(self, event: Eval) -> None:
        self._metrics = {**self._metrics, **event.metrics}

    @hookimpl
    def on_saved(self, event: Saved) -> None:
        self._saved = f"saved {event.step:,}"
        self._metrics = {**self._metrics, **event.metrics}

    @hookimpl
    def on_save_failed(self, event: SaveFailed) -> None:
        self._saved = f"step {event.step:,} NOT SAVED"

    @hookimpl
    def on_run_ended(self, event: RunEnded) -> None:
        task, self._task = self._task, None
        if task is not None:
            _remove(task)
        # The steps after the last one that was looked at are not known here.
        self._tell(f"{event.status}, last looked at ")

    def _take(self, event: Step) -> None:
        self._step = event.step
        host = {k: float(v) for k, v in event.metrics.items() if isinstance(v, Real)}
        if host:  # other threads read and replace it too
            self._metrics = {**self._metrics, **host}
        now = time.monotonic()
        if self._task is not None and _display:
            _display.update(self._task, completed=event.step)
        elif self._task is None and now - self._told >= self._interval:
            self._told = now
            self._tell()

    def _tell(self, before: str = "") -> None:
        # Where nobody set logging up, a line of INFO would be seen by nobody.
        level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
        logger.log(level, "%s%s", before, self._text())

    def _text(self) -> str:
        step, seconds = self._step, time.monotonic() - self._at
        if step is None:
            return ", ".join(filter(None, [f"step {self._first:,} is next", self._saved]))
        done = step - self._first + 1
        rate = done / seconds if seconds > 0 else 0.0
        where = f"step {step:,}"
        if self._total:
            where += f" of {self._total:,} ({100 * step / self._total:.0f} %)"
        parts = [where, f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step"]
        if self._total and rate and self._total - step >= rate:  # a second
            parts.append(f"{_duration((self._total - step) / rate)} left")
        latest = list(self._metrics.items())[:_MOST_METRICS]
        parts += [f"{name} {value:.4g}" for name, value in latest]
        return ", ".join(filter(None, [*parts, self._saved]))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
