"""Metrics as rows of W&B's history, each of them there once.

The client hands a row to its own log file within a moment, and to the server later; it has no call
that tells when. So a row counts as sent once it is in the log file, and the next start of the same
run sends what the server has not had from there: by the step that the server says it is at, which
counts rows, and by our own step and time, which name a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.stores import MetricPoint
from ckpt_callbacks_wandb._log import LOG_SECONDS, Log, Row, logs_of

if TYPE_CHECKING:
    import wandb

__all__ = ["STEP_KEY", "Rows"]

STEP_KEY = "trainer/step"
_TIME_KEY = "_timestamp"  # W&B's own, of which it takes ours
_W_AND_B = ("_step", "_runtime")
"""What W&B adds to a row."""

_Name = tuple[int, float, frozenset[str]]


class Rows:
    """The rows of one run of W&B.

    Args:
        run: the run, which is open.
        log: its log file.
        waits: whether to wait for that. A run that the user has opened writes it every 15 s, unless
            the user said otherwise, which would hold up all else.
    """

    def __init__(self, run: wandb.Run, log: Log, *, waits: bool) -> None:
        self._run = run
        self._log = log
        self._waits = waits
        # A step metric of our own: W&B drops values at a step lower than its current one.
        run.define_metric(STEP_KEY, hidden=True)
        run.define_metric("*", step_metric=STEP_KEY)
        self._known: set[_Name] = set()
        """Rows that are logged, until the points that follow them have come."""
        self._known.update(name for name, _ in self._read(log))  # if the user has it open

    def resume(self, folder: Path, done: Collection[str]) -> list[str]:
        """Log again what earlier starts of the run logged and the server has not had.

        Args:
            folder: where the logs of all its starts are.
            done: the starts of which the server has all rows, which need not be read.

        Returns:
            Those of which it has all rows now.
        """
        rows: dict[str, dict[_Name, dict[str, Any]]] = {}
        there: set[_Name] = set()
        logs = [log for log in logs_of(folder, self._run.id) if log.path != self._log.path]
        for log in reversed(logs):
            # The last ones tell which points come again.
            start, needed = log.path.parent.name, not self._known
            if needed or not (self._run.offline or start in done):
                rows[start] = dict(self._read(log))
                self._known |= rows[start].keys()
                there.update(n for n, row in rows[start].items() if self._has_arrived(log, row))
        if self._run.offline:
            return [*done]
        arrived = frozenset(there)
        for start in reversed(rows):  # the oldest first
            self._send([row for name, row in rows[start].items() if name not in there])
            there |= rows[start].keys()
        return sorted({*done, *(s for s in rows if rows[s].keys() <= arrived)})

    def log(self, points: Sequence[MetricPoint]) -> None:
        """Log points, and return when they are in W&B's log file, if that is waited for."""
        rows = [{STEP_KEY: p.step, _TIME_KEY: p.time, **p.values} for p in points if p.values]
        new = [row for row in rows if _name_of(row) not in self._known]
        # Until they have arrived: if that takes too long, the same points come again.
        self._known |= {name for row in new if (name := _name_of(row))}
        self._send(new)
        if len(new) == len(rows):  # past what a kill may have cut
            self._known.clear()

    def _has_arrived(self, log: Log, row: Mapping[str, Any]) -> bool:
        """Return whether the server has a row; in a log of an online start its steps are known."""
        return log.is_synced or (log.is_online and row["_step"] < self._run.starting_step)

    def _read(self, log: Log) -> Iterator[tuple[_Name, dict[str, Any]]]:
        for found in log.new():
            if isinstance(found, Row) and (name := _name_of(found.values)):
                yield name, found.values

    def _send(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._run.log({k: v for k, v in row.items() if k not in _W_AND_B})
        left = len(rows) if self._waits else 0
        arrived = (found for found in self._log.follow(LOG_SECONDS) if isinstance(found, Row))
        while left:
            left -= _name_of(next(arrived).values) is not None


def _name_of(row: Mapping[str, Any]) -> _Name | None:
    """Return what names a row of ours, or `None` if it is one of the user's."""
    if STEP_KEY not in row:
        return None
    names = frozenset(row.keys() - {STEP_KEY, _TIME_KEY, *_W_AND_B})
    return row[STEP_KEY], float(row[_TIME_KEY]), names
