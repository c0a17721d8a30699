"""The curve of a metric over all checkpoints: those that are kept are marked and named."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from ckpt_callbacks.charts import Axis, Chart, Key, Scale, mark, plain, text_width, thinned
from ckpt_callbacks.stores import Curve, Shown

__all__ = ["MOST_LABELS", "MOST_MARKS", "MOST_POINTS", "curve_chart"]

MOST_POINTS = 2000
"""Points that are drawn of a curve, about."""
MOST_MARKS = 200
"""Checkpoints that have a mark of their own; more are dots like the others."""
MOST_LABELS = 40
_HEIGHT = 260
_NARROW, _WIDE = 280, 720
"""Pixels that a chart is wide on a phone, where only aliases are named, and elsewhere."""
_LONGEST_LABEL = 40
_MARK = 12
_LINE = 14
_MOST_AVOIDED = 400
"""Points of the curve that names of marks keep away from."""
_Places = Mapping[int, tuple[float, float]]


def curve_chart(curve: Curve, rows: Sequence[Shown]) -> Chart | None:
    """Return the chart of a metric, or `None` if it has no values."""
    points = [(step, value) for step, value in curve.points if math.isfinite(value)]
    if not points:
        return None
    held = {row.step: row for row in rows}
    measured = {step for step, _ in points}
    kept = [row for step, row in held.items() if step in measured]
    first = sorted(kept, key=lambda row: (not row.aliases, -row.step))[:MOST_MARKS]
    marked = {row.step for row in first}
    # Of very many the newest, since the page is to stay small.
    always = held.keys() if len(held) < MOST_POINTS else marked
    drawn = thinned(points, MOST_POINTS, frozenset(always))
    room = 1000 * 24 / _HEIGHT  # for a label above the highest and below the lowest
    x = Scale.over([step for step, _ in drawn], 18, 982)
    y = Scale.over([value for _, value in drawn], 1000 - room, room)
    where = {int(step): (x.at(step), y.at(value)) for step, value in drawn}
    spots = {step: f"{across} {down}" for step, (across, down) in where.items()}
    legend = [Key("dot", "kept", "kept")] * (len(kept) > 0)
    legend += [Key("diamond", "best", "best")] * any("best" in row.aliases for row in kept)
    box = [f'<path class="line past faint" d="M{"L".join(spots.values())}"/>']
    if gone := [spot for step, spot in spots.items() if step not in held]:
        legend.append(Key("dots", "past", "evicted"))
        box.append(_dots("past", gone))
    if more := [spots[s] for s in where if s in held and s not in marked]:
        box.append(_dots("kept", more))
    values = dict(points)
    marks = [
        mark(
            "diamond" if "best" in row.aliases else "dot",
            "best" if "best" in row.aliases else "kept",
            *where[row.step],
            f"{_name(row)}: {values[row.step]:.6g} ({row.reason or 'on its way out'})",
        )
        for row in reversed(first)  # those with an alias on top
    ]
    return Chart(
        title=f"{curve.metric} by step",
        note=_note(curve, len(points), len(kept), len(drawn)),
        x=Axis("step", x.ticks(8, least=Decimal(1))),
        y=Axis(curve.metric, y.ticks(6)),
        box=box,
        marks=[*marks, *_labels(first[:MOST_LABELS], where)],
        legend=legend,
        height=_HEIGHT,
    )


def _note(curve: Curve, measured: int, kept: int, drawn: int) -> str:
    better = {"max": "Higher is better; ", "min": "Lower is better; "}.get(curve.mode or "", "")
    note = f"{better}{measured:,} checkpoint{'s' * (measured != 1)} measured, {kept:,} kept"
    return note + f"; {drawn:,} drawn" * (drawn < measured)


def _dots(style: str, spots: Sequence[str]) -> str:
    width = 6 if len(spots) <= 100 else 3.5 if len(spots) <= 400 else 2
    path = "".join(f"M{spot}h0" for spot in spots)
    return f'<path class="dots {style}" stroke-width="{width}" d="{path}"/>'


def _name(row: Shown) -> str:
    return " ".join([", ".join(sorted(row.aliases)), str(row.step)]).strip()


# Names of marks


_Rectangle = tuple[float, float, float, float]


class _Label(NamedTuple):
    text: str
    x: float
    y: float
    shift: int
    """Pixels from the mark to the middle of the text, downwards."""
    named: bool

    @property
    def anchor(self) -> str:
        return "start" if self.x < 200 else "end" if self.x > 800 else "middle"

    def rectangle(self, width: int) -> _Rectangle:
        """Return the room it takes in a chart of that width."""
        across, long = self.x / 1000 * width, text_width(self.text) + 6
        left = {"start": 0.0, "middle": long / 2, "end": long}[self.anchor]
        down = self.y / 1000 * _HEIGHT + self.shift
        return across - left, down - _LINE / 2, across - left + long, down + _LINE / 2


def _labels(rows: Sequence[Shown], where: _Places) -> Iterator[str]:
    """Yield names of marks where there is room for them; an alias always finds a place."""
    placed: list[_Label] = []
    for row in rows:
        named, text = bool(row.aliases), _name(row)
        if len(text) > _LONGEST_LABEL:
            text = text[: _LONGEST_LABEL - 1] + "…"
        width = _NARROW if named else _WIDE
        taken = [label.rectangle(width) for label in placed]
        taken += [_around(where[r.step], width, _MARK) for r in rows if r is not row]
        line = [_around(place, width, 4) for place in list(where.values())[:_MOST_AVOIDED]]
        choices = [_Label(text, *where[row.step], shift, named) for shift in (-16, 16, -30, 30)]
        met = {c: 100 * _meets(c.rectangle(width), taken) for c in choices}
        best = min(choices, key=lambda c: met[c] + _meets(c.rectangle(width), line))
        if named or not met[best]:
            placed.append(best)
    for label in placed:
        style = "label named" if label.named else "label more"
        yield (
            f'<text class="{style}" text-anchor="{label.anchor}" x="{label.x / 10:.2f}%" '
            f'y="{label.y / 10:.2f}%" dy="{label.shift + 4}">{plain(label.text)}</text>'
        )


def _around(place: tuple[float, float], width: int, size: float) -> _Rectangle:
    across, down = place[0] / 1000 * width, place[1] / 1000 * _HEIGHT
    return across - size / 2, down - size / 2, across + size / 2, down + size / 2


def _meets(this: _Rectangle, others: Sequence[_Rectangle]) -> int:
    """Return how many of the others a rectangle meets; that it leaves the chart counts as one."""
    outside = this[1] < -8 or this[3] > _HEIGHT + 8
    return outside + sum(
        this[0] < b[2] and b[0] < this[2] and this[1] < b[3] and b[1] < this[3] for b in others
    )
