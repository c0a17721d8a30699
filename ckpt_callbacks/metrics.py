"""Metrics on their way from the loop to the trackers.

The loop appends what it has, device arrays included, to a list. A background thread reads the
values, a batch at a time, and appends them to a file; each tracker's worker reads on from where
it stopped. So the loop never waits for the device or a server, and an outage or a kill
loses nothing that has reached the file.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_callbacks.errors import ConfigError, UsageError
from ckpt_callbacks.failpoints import hit
from ckpt_callbacks.policy import as_step
from ckpt_callbacks.stores import MetricPoint
from ckpt_callbacks.timing import Timed, untimed

__all__ = ["MetricBuffer", "MetricLog", "host_floats"]

logger = logging.getLogger("ckpt_callbacks")

_REWOUND: dict[str, float] = {}
"""Stands for the values in a line that says that the run went back to its step."""

INTERVAL = 0.25
"""Seconds between two reads of the loop's metrics."""


def host_floats(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics as Python floats, waiting for the device where needed.

    The second value tells, by name, why a metric is left out: it is no number, or its device
    buffer was donated away.
    """
    values: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name, value in metrics.items():
        try:
            values[str(name)] = float(value)
        except Exception as error:  # whatever the user's object raises
            reason = (str(error) or type(error).__name__).splitlines()[0]
            problems[str(name)] = (
                f"metric {name!r} is left out: {type(value).__qualname__} is no number "
                f"that can be read ({reason})"
            )
    return values, problems


class MetricLog:
    """The file of metrics that some tracker does not have yet.

    Args:
        folder: where `metrics.jsonl` and `metrics.json` (how far each tracker is) are kept.
        resumed: step of the checkpoint that the run goes on from, -1 for none. A step after it
            whose metrics an earlier process logged is taken again with the same result,
            so these are not logged twice.
        rewound: the run went back to this step, and may go another way: what comes after it is
            logged again. `None` if it did not.
    """

    def __init__(self, folder: Path, resumed: int, *, rewound: int | None = None) -> None:
        self._closed = False
        self._path = folder / "metrics.jsonl"
        self._state_path = folder / "metrics.json"
        self._mutex = threading.Lock()
        self._resumed = resumed
        self._floor: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        if self._state_path.exists():
            try:
                state = json.loads(self._state_path.read_text())
                self._floor, self._sent = dict(state["floor"]), dict(state["sent"])
            except (ValueError, KeyError, TypeError):
                # After a power cut. Trackers get again what they have, and nothing is lost.
                logger.warning("%s is damaged: metrics are sent again", self._state_path)
        self._path.touch()
        self._drop_torn_tail()
        if rewound is not None:
            # In the file too, since what it holds counts as logged at the next start.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([rewound, 0.0, _REWOUND]) + "\n")
        self._repeated = dict(self._floor)
        for point in self._points(0, sys.maxsize)[0]:
            if point.values is _REWOUND:
                self._repeated = {k: min(s, point.step) for k, s in self._repeated.items()}
            for name in point.values:
                self._repeated[name] = max(point.step, self._repeated.get(name, -1))
        self._floor = dict(self._repeated)

    def append(self, points: Iterable[MetricPoint]) -> None:
        """Add points to the end of the file."""
        lines: list[str] = []
        highest: dict[str, int] = {}
        for point in points:
            values = {k: v for k, v in point.values.items() if not self._is_repeated(k, point.step)}
            if values:
                highest |= {k: max(point.step, highest.get(k, -1)) for k in values}
                lines.append(json.dumps([point.step, point.time, values]) + "\n")
        if not lines:
            return
        with self._mutex:
            size = self._path.stat().st_size
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write("".join(lines))
            except OSError:
                os.truncate(self._path, size)  # half a line would spoil the next one
                raise
            hit("metrics-written")
            for name, step in highest.items():
                self._floor[name] = max(step, self._floor.get(name, -1))

    def unsent(self, store: str, limit: int = 500) -> tuple[list[MetricPoint], int]:
        """Return the next points for a store, and what to give to `sent` afterwards."""
        found, offset = self._points(self._sent.get(store, 0), limit)
        points = [point for point in found if point.values]
        if found and not points:
            self.sent(store, offset)
            return self.unsent(store, limit)
        return points, offset

    def sent(self, store: str, offset: int) -> None:
        """A store has everything before `offset`."""
        with self._mutex:
            if self._closed:
                raise UsageError("the run has ended; nothing more is recorded")
            self._sent[store] = offset
            self._save()

    def close(self) -> None:
        """Refuse what a worker that outlived the drain limit may still report."""
        with self._mutex:
            self._closed = True

    def expect(self, stores: Sequence[str]) -> None:
        """From now on the metrics are kept until all of `stores` have them."""
        with self._mutex:
            if new := {name: 0 for name in stores if name not in self._sent}:
                self._sent |= new
                self._save()

    @property
    def expected(self) -> list[str]:
        """All stores that were ever expected."""
        with self._mutex:
            return list(self._sent)

    def unsent_values(self, store: str) -> int:
        """Return how many values a store does not have yet."""
        return sum(len(p.values) for p in self._points(self._sent.get(store, 0), sys.maxsize)[0])

    def compact(self) -> None:
        """Empty the file if every store that was ever expected has everything in it."""
        with self._mutex:
            size = self._path.stat().st_size
            if all(sent >= size for sent in self._sent.values()):
                self._sent = dict.fromkeys(self._sent, 0)
                # The state first: replaying sent points is harmless, losing the floor is not.
                self._save()
                os.truncate(self._path, 0)

    def _is_repeated(self, name: str, step: int) -> bool:
        return self._resumed < step <= self._repeated.get(name, -1)

    def _points(self, offset: int, limit: int) -> tuple[list[MetricPoint], int]:
        points: list[MetricPoint] = []
        with self._path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n") or len(points) == limit:
                    break
                offset += len(line)
                try:
                    step, at, values = json.loads(line)
                    points.append(MetricPoint(step, at, values or _REWOUND))
                except (ValueError, TypeError):
                    logger.warning("%s holds a damaged line: its metrics are lost", self._path)
        return points, offset

    def _drop_torn_tail(self) -> None:
        """Remove the incomplete last line that a kill may leave."""
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(self._path, whole)

    def _save(self) -> None:
        # Not fsynced: after a power cut some points are sent again, which trackers tolerate.
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"floor": self._floor, "sent": self._sent}))
        temporary.replace(self._state_path)


class MetricBuffer:
    """What the loop has logged and nobody has read yet, and the thread that reads it.

    Args:
        log: where the values go.
        wake: called after some went there.
        now: seconds since the epoch.
        timed: stands around what waits for the device.
    """

    def __init__(
        self,
        log: MetricLog,
        wake: Callable[[], None],
        now: Callable[[], float] = time.time,
        timed: Timed = untimed,
    ) -> None:
        self._timed = timed
        self._now = now
        self._log = log
        self._wake = wake
        self._waiting: deque[tuple[int, Mapping[str, Any]]] = deque()
        self.append = self._waiting.append
        """Add `(step, metrics)`; the mapping must not change afterwards."""
        self._reported: set[str] = set()
        self._unwritten: list[MetricPoint] = []
        self._failing = False
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read the rest and stop."""
        self._stop.set()
        self._thread.join()

    @property
    def unwritten(self) -> bool:
        """Whether there are metrics that could not be written down."""
        return bool(self._unwritten)

    def flush(self) -> None:
        """Write down all that was appended before this call."""
        with self._mutex:
            self._flush()

    def write(self, point: MetricPoint) -> None:
        """Write down one point of a request, which is gone for good once it is applied."""
        with self._mutex:
            self._unwritten.append(point)
            self._flush()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.flush()
        self.flush()

    def _flush(self) -> None:
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if taken:
            now = self._now()
            with self._timed("reading metrics"):
                host = _on_host([metrics for _, metrics in taken])
            points: list[MetricPoint] = []
            for (step, _), metrics in zip(taken, host, strict=True):
                values, problems = host_floats(metrics)
                try:
                    points.append(MetricPoint(as_step("metrics", step), now, values))
                except ConfigError as error:  # `on_step` looks at few steps only, to be fast
                    problems["step"] = str(error)
                for name in problems.keys() - self._reported:
                    logger.warning("%s", problems[name])
                self._reported |= problems.keys()
            self._unwritten += points
        if self._unwritten:
            try:
                self._log.append(self._unwritten)
            except OSError as error:  # such as a full disk: kept in memory and tried again
                if not self._failing:
                    logger.error("metrics can not be written: %s", error)
                self._failing = True
            else:
                self._unwritten, self._failing = [], False
                self._wake()


def _on_host(batch: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Fetch all device values of a batch in one go."""
    jax = sys.modules.get("jax")
    if jax is None:
        return batch
    try:
        fetched: list[Mapping[str, Any]] = jax.device_get(batch)
    except Exception:  # one was donated away, or is no array: `host_floats` finds out which
        return batch
    return fetched
