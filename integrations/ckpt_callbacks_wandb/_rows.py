"""Metrics as rows of W&B's history, each of them there once.

The client hands a row to its own log file within a moment, and to the server later; it has no call
that tells when. So a row counts as sent once it is in the log file, and the next start of the same
run sends what the server has not had from there: by the step that the server says it is at, which
counts rows, and by our own step and time, which name a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        for found in log.new():  # of a run that the user has open
            if isinstance(found, Row) and (name := _name_of(found.values)):
                self._known.add(name)

    def resume(self, folder: Path) -> None:
        """Log again what earlier starts of the run logged and the server has not had.

        Args:
            folder: where the logs of all its starts are.
        """
        online = not self._run.offline
        logs = [log for log in logs_of(folder, self._run.id) if log.path != self._log.path]
        there: set[_Name] = set()
        missing: dict[_Name, dict[str, Any]] = {}
        for log in logs:
            for found in log.new():
                if not isinstance(found, Row) or (name := _name_of(found.values)) is None:
                    continue
                self._known.add(name)
                arrived = log.is_synced
                if log.is_online:  # its steps are those of the server
                    arrived = arrived or found.values["_step"] < self._run.starting_step
                if arrived:
                    there.add(name)
                else:
                    missing[name] = found.values
        if online:
            self._send([row for name, row in missing.items() if name not in there])

    def log(self, points: Sequence[MetricPoint]) -> None:
        """Log points, and return when they are in W&B's log file, if that is waited for."""
        rows = [{STEP_KEY: p.step, _TIME_KEY: p.time, **p.values} for p in points if p.values]
        new = [row for row in rows if _name_of(row) not in self._known]
        # Until they have arrived: if that takes too long, the same points come again.
        self._known |= {name for row in new if (name := _name_of(row))}
        self._send(new)
        if len(new) == len(rows):  # past what a kill may have cut
            self._known.clear()

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
