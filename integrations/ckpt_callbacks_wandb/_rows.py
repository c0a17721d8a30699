"""Metrics as rows of W&B's history, each of them there once.

The client hands a row to its own log file within a moment, and to the server later; it has no call
that tells when. So a row counts as sent once it is in the log file, and the next start of the same
run sends what the server has not had from there. Our own step and time name a row; the server tells
how many rows it has, which is enough where all of them are ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.stores import MetricPoint
from ckpt_callbacks_wandb._log import LOG_SECONDS, Log, Row
from ckpt_callbacks_wandb._starts import Starts

if TYPE_CHECKING:
    import wandb

__all__ = ["STEP_KEY", "Rows"]

STEP_KEY = "trainer/step"
_TIME_KEY = "_timestamp"  # W&B's own, of which it takes ours
_W_AND_B = ("_step", "_runtime")
"""What W&B adds to a row."""

_Name = tuple[int, float, frozenset[str]]
_Values = Mapping[str, Any]


class Rows:
    """The rows of one run of W&B.

    Args:
        run: the run, which is open.
        log: its log file.
        waits: whether to wait until a row is there. A run that the user has opened writes it every
            15 s, unless the user said otherwise, which would hold up all else.
        api: of W&B, if others log to the run too: then what it has is asked for, not counted.
    """

    def __init__(
        self, run: wandb.Run, log: Log, *, waits: bool, api: wandb.Api | None = None
    ) -> None:
        self._run = run
        self._log = log
        self._waits = waits
        self._api = api
        self._defined: set[str] = set()
        self._logged = {name for name, _ in _rows_in(log)}
        """Rows that are in a log, until the points that follow them have come."""
        self._under_way: set[_Name] = set()
        """Rows that were given to the client and have not been seen in its log."""
        self._last: dict[str, int] = {}
        """The last step of each metric that another machine logged to the run."""

    def resume(self, logs: Sequence[Log], starts: Starts) -> None:
        """Log again what earlier starts of the run logged and the server has not had.

        Args:
            logs: theirs, the oldest first.
            starts: tells of which the server has all, and is told.
        """
        rows: list[tuple[Log, dict[_Name, Row]]] = []
        for log in reversed(logs):
            # The last ones tell which points come again.
            if not self._logged or not (self._run.offline or starts.is_settled(log)):
                rows.insert(0, (log, dict(_rows_in(log))))
                self._logged |= rows[0][1].keys()
        if self._run.offline:
            return
        if self._api and any(found for _, found in rows):
            there = self._listed(self._api, {n for _, found in rows for n in found})
        else:
            there = {n for log, found in rows for n, row in found.items() if self._has(log, row)}
        starts.settle(log for log, found in rows if found.keys() <= there)
        missing = {n: row for _, found in rows for n, row in found.items() if n not in there}
        self._send({name: row.values for name, row in missing.items()})

    def go_on(self, api: wandb.Api) -> None:
        """Leave out from now on what another machine has logged: its steps are taken again here."""
        for row in api.run(self._run.path).scan_history():
            for name in row.keys() if STEP_KEY in row else ():
                self._last[name] = max(self._last.get(name, -1), int(row[STEP_KEY]))

    def log(self, points: Sequence[MetricPoint]) -> None:
        """Log points, and return when they are in W&B's log file, if that is waited for."""
        points = [p for p in map(self._new_of, points) if p.values]
        rows = [{**p.values, STEP_KEY: p.step, _TIME_KEY: p.time} for p in points]
        named = {_name(p.step, p.time, p.values): row for p, row in zip(points, rows, strict=True)}
        new = {name: row for name, row in named.items() if name not in self._logged}
        self._send(new)
        if new and len(new) == len(named):  # past what a kill may have cut
            self._logged.clear()

    def _new_of(self, point: MetricPoint) -> MetricPoint:
        new = {k: v for k, v in point.values.items() if point.step > self._last.get(k, -1)}
        return point if len(new) == len(point.values) else replace(point, values=new)

    def _has(self, log: Log, row: Row) -> bool:
        """Return whether the server has a row; in a log of an online start its steps are known."""
        online = log.is_online and int(row.items["_step"]) < self._run.starting_step
        return online or log.is_synced

    def _listed(self, api: wandb.Api, names: set[_Name]) -> set[_Name]:
        """Return those rows that the server lists."""
        # Whole rows: when some keys are asked for, the client asks another way.
        history = api.run(self._run.path).scan_history()
        there = {(r[STEP_KEY], float(r[_TIME_KEY])) for r in history if STEP_KEY in r}
        return {name for name in names if name[:2] in there}

    def _send(self, rows: Mapping[_Name, _Values]) -> None:
        # What a call that failed gave to the client is waited for, and not given again.
        for name in [n for n in rows if n not in self._under_way]:
            row = {k: v for k, v in rows[name].items() if k not in _W_AND_B}
            self._define(row.keys() - {STEP_KEY, _TIME_KEY})
            self._run.log(row)
            if self._waits:
                self._under_way.add(name)
        if self._under_way:
            for found in self._log.follow(LOG_SECONDS):
                name_ = _name_of(found) if isinstance(found, Row) else None
                if name_ in self._under_way:
                    self._under_way.discard(name_)
                    self._logged.add(name_)
                if not self._under_way:
                    break

    def _define(self, names: set[str]) -> None:
        """Give metrics a step of our own: W&B drops values at a step lower than its current one."""
        if not self._defined:
            self._run.define_metric(STEP_KEY, hidden=True)
        # By name, since the user may have rules of their own for all others.
        for name in sorted(names - self._defined):
            if "*" not in name:
                self._run.define_metric(name, step_metric=STEP_KEY)
        self._defined |= names


def _rows_in(log: Log) -> Iterator[tuple[_Name, Row]]:
    for found in log.new():
        if isinstance(found, Row) and (name := _name_of(found)):
            yield name, found


def _name_of(row: Row) -> _Name | None:
    """Return what names a row of ours, or `None` if it is one of the user's."""
    try:
        step, at = json.loads(row.items[STEP_KEY]), json.loads(row.items[_TIME_KEY])
    except KeyError:
        return None
    return _name(step, at, row.items)


def _name(step: int, at: float, names: Iterable[str]) -> _Name:
    keys = frozenset(names) - {STEP_KEY, _TIME_KEY, *_W_AND_B}
    return step, float(at), _keys.setdefault(keys, keys)


_keys: dict[frozenset[str], frozenset[str]] = {}
"""Each set of names once: a run has few, and many rows."""
