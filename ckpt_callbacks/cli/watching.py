"""A run while it goes on: `watch`."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt_callbacks.cli.listing import facts_of, listing
from ckpt_callbacks.cli.output import ago, emit, json_option
from ckpt_callbacks.cli.places import directory_argument
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.report import Summary, summarize

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["watch_command"]

_INTERVAL = 0.5
"""Seconds between two looks at whether a file has changed, of those that are on this machine."""


@click.command(short_help="Watch a run while it goes on.")
@directory_argument
@click.option("--rows", type=click.IntRange(min=1), help="How many checkpoints to show, at most.")
@click.option("--once", is_flag=True, help="Show it once, as it does where there is no terminal.")
@json_option
def watch_command(directory: Path | str, rows: int | None, *, once: bool, as_json: bool) -> None:
    """Watch the run in DIRECTORY until Ctrl-C: its newest checkpoints, and what it is doing.

    With --json a line is printed whenever something has changed, as ls --json prints it.
    """
    view = _View(open_directory(directory), rows)
    if as_json:
        _tell(view, once=once)
        return
    from rich.console import Console

    console = Console()
    if once or not console.is_terminal:
        emit({}, view.render(console.height), as_json=False)
        return
    from rich.live import Live

    stop = threading.Event()
    try:
        with Live(view.render(console.height), console=console, auto_refresh=False) as live:
            while not stop.wait(view.interval):
                live.update(view.render(console.height), refresh=True)
    except KeyboardInterrupt:
        return


def _tell(view: _View, *, once: bool) -> None:
    stop = threading.Event()
    try:
        while True:
            if view.has_changed():
                emit(facts_of(view.root), "", as_json=True)
            if once or stop.wait(view.interval):
                return
    except KeyboardInterrupt:
        return


class _View:
    """What is shown; the records are read again only when one has changed."""

    def __init__(self, root: RunDirectory, rows: int | None) -> None:
        self.root = root
        self.interval = max(_INTERVAL, root.interval)
        self._rows = rows
        self._seen: object = None
        self._summary: Summary

    def render(self, height: int) -> RenderableType:
        """Return the picture of now, for a terminal that is so high."""
        from rich.console import Group
        from rich.text import Text

        root = self.root
        if self.has_changed():
            self._summary = summarize(str(root))
        room = max(1, height - 10 if self._rows is None else self._rows)
        summary, run, owner = self._summary, root.open_run(), root.owner()
        table = listing(root, run, owner, summary.rows, summary.metrics, most=room)
        left = len(summary.rows) - room
        notes = [f"and {left:,} older"] if left > 0 else []
        notes += filter(None, [_latest(root), _evicted(root)])
        waiting = [name for row in summary.rows for name in row.where if "pending" in name]
        if waiting:
            notes.append(f"to be sent: {len(waiting)}")
        return Group(table, *map(Text, notes))

    def has_changed(self) -> bool:
        """Return whether a record was changed since this was asked last."""
        now = self.root.seen()
        changed, self._seen = now != self._seen, now
        return changed


def _latest(root: RunDirectory) -> str:
    """Return the last metrics that the loop logged and a tracker does not have for sure."""
    for line in reversed(root.last_lines("metrics")):
        try:
            step, at, values = json.loads(line)
        except ValueError:
            continue
        if values:
            told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            return f"at step {step}, {ago(time.time() - at)} ago: {told}"
    return ""


def _evicted(root: RunDirectory) -> str:
    """Return what was evicted last."""
    for line in reversed(root.last_lines("evicted")):
        try:
            gone = json.loads(line)
        except ValueError:
            continue
        return f"evicted last: step {gone['step']} ({gone['reason']})"
    return ""
