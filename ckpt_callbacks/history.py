"""What happened to the checkpoints of a run, and when, for pictures.

Nothing is decided by it. A kill between a fact and its entry leaves that one out, which the records
make up for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from ckpt_callbacks.record import Record

__all__ = [
    "LOCAL",
    "Entry",
    "Life",
    "What",
    "entry_from_json",
    "entry_to_json",
    "lives",
    "with_records",
]

LOCAL = "local"
"""Stands for the run directory where a store is named."""
What = Literal["saved", "copied", "gone"]


class Entry(NamedTuple):
    """Something that happened to a checkpoint in one place."""

    time: float
    """Seconds since the epoch, when it was done."""
    what: What
    """`saved` in the run directory, `copied` to a store, or `gone` from either."""
    store: str
    """By name, `local` for the run directory."""
    step: int
    bytes: int = 0
    """Size of what was saved or copied."""
    seconds: tuple[float, ...] = ()
    """Of what was saved: how long the loop waited, and then until it was complete; of what was
    copied: how long that took."""


class Life(NamedTuple):
    """The time in which a place held a checkpoint, in seconds since the epoch."""

    step: int
    begin: float
    end: float | None
    """`None` if it is there still."""
    bytes: int


def entry_to_json(entry: Entry) -> str:
    """Return the line of an entry: `[time, what, store, step, bytes, [seconds, ...]]`."""
    times = [float(f"{seconds:.4g}") for seconds in entry.seconds]
    return json.dumps([round(entry.time, 3), *entry[1:5], times])


def entry_from_json(line: str) -> Entry:
    """Return the entry in a line.

    Raises:
        ValueError, TypeError, OverflowError: it is damaged, or of a newer version.
    """
    time, what, store, step, size, seconds = json.loads(line)
    entry = Entry(float(time), what, str(store), int(step), int(size), tuple(map(float, seconds)))
    if what not in get_args(What) or not all(map(math.isfinite, (entry.time, *entry.seconds))):
        raise ValueError(line)
    return entry


def with_records(entries: Iterable[Entry], records: Mapping[int, Record]) -> list[Entry]:
    """Return the entries in order of time, with what the records know better.

    A kill between a fact and its entry, or a version that wrote no history, leaves some out.
    """
    found = sorted(entries, key=lambda entry: entry.time)
    there: dict[tuple[str, int], Entry] = {}
    last: dict[int, float] = {}
    for entry in found:
        key = entry.store, entry.step
        last[entry.step] = entry.time
        if entry.what == "gone":
            there.pop(key, None)
        else:
            there[key] = entry
    held: set[tuple[str, int]] = set()
    for step, record in records.items():
        if record.state == "complete" and not record.lost:
            held.add((LOCAL, step))
        held |= {(name, step) for name, copy in record.copies.items() if copy.state != "pending"}
    for store, step in sorted(held - there.keys()):
        what: What = "saved" if store == LOCAL else "copied"
        begun = max(records[step].time, last.get(step, 0.0))
        found.append(Entry(begun, what, store, step, records[step].bytes))
    for store, step in sorted(there.keys() - held):
        found.append(Entry(last[step], "gone", store, step))
    return sorted(found, key=lambda entry: entry.time)


def lives(entries: Sequence[Entry]) -> dict[str, list[Life]]:
    """Return when each place held which checkpoint; the run directory is the first place."""
    begun: dict[tuple[str, int], Entry] = {}
    found: dict[str, list[Life]] = {LOCAL: []}
    for entry in entries:
        before = begun.pop((entry.store, entry.step), None)
        if before:
            life = Life(entry.step, before.time, entry.time, before.bytes)
            found.setdefault(entry.store, []).append(life)
        if entry.what != "gone":
            begun[entry.store, entry.step] = entry
    for (store, step), entry in begun.items():
        found.setdefault(store, []).append(Life(step, entry.time, None, entry.bytes))
    places = [LOCAL, *sorted(found.keys() - {LOCAL})]
    return {place: sorted(found[place], key=lambda life: life[:2]) for place in places}
