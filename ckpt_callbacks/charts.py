"""Charts as SVG: in a page they fit any width without a script, and each can be a file.

What is drawn lies in a box of 1000 by 1000 that is stretched to the room there is, with strokes
that are not. What must not be stretched, text and marks, is placed by percentages. The colours are
told apart by people with any kind of colour vision, and never tell anything alone.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from typing import NamedTuple

__all__ = [
    "COLOURS",
    "STYLE",
    "Axis",
    "Chart",
    "Key",
    "LogScale",
    "Scale",
    "figure",
    "mark",
    "number",
    "picture",
    "plain",
    "text_width",
    "thinned",
]

COLOURS = {
    "page": ("#ffffff", "#14181d"),
    "text": ("#1b1f24", "#e6eaef"),
    "dim": ("#59636e", "#9aa5b1"),
    "rule": ("#d9dee3", "#323a44"),
    "badge": ("#eef1f4", "#262d36"),
    "past": ("#7d8792", "#7f8b98"),
    "kept": ("#0b6bcb", "#58a6ff"),
    "best": ("#b35900", "#ffa657"),
    "third": ("#00796b", "#4fd1b5"),
    "fourth": ("#9c3d96", "#e79be0"),
}
"""Each by name, on a light page and on a dark one."""

STYLE = """
svg { overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--dim);
  font-variant-numeric: tabular-nums; }
svg text.y, svg text.end { text-anchor: end; }
svg text.x, svg text.middle { text-anchor: middle; }
svg text.label { fill: var(--text); stroke: var(--page); stroke-width: 3px; paint-order: stroke; }
svg text.named { font-weight: 600; }
.box path { vector-effect: non-scaling-stroke; }
.grid, .line, .dots, .bar { fill: none; }
.grid { stroke: var(--rule); }
.line { stroke-width: 2; stroke-linejoin: round; }
.dots, .bar { stroke-linecap: round; }
.dash { stroke-dasharray: 5 4; }
.faint { stroke-opacity: .5; }
.past { stroke: var(--past); }
.kept { stroke: var(--kept); }
.best { stroke: var(--best); }
.third { stroke: var(--third); }
.fourth { stroke: var(--fourth); }
.area { fill: var(--kept); fill-opacity: .15; stroke: none; }
.mark { stroke: var(--page); stroke-width: 1.5; }
.mark.kept { fill: var(--kept); }
.mark.best { fill: var(--best); }
.mark.past { fill: var(--page); stroke: var(--past); }
""".strip()

_CHARACTER = 6.6
"""Width of a character, about."""
_WIDTH, _RIGHT = 860, 24
_TOP, _BOTTOM = 26, 48
"""Room above and below what is drawn, for the names of the axes."""
Tick = tuple[float, str]


def plain(text: str) -> str:
    """Return the user's text as it may stand anywhere in a page, also in its SVG."""
    # What XML cannot hold at all, such as the rest of a file name that is not UTF-8.
    text = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    return html.escape(text)


def text_width(text: str) -> float:
    """Return about how many pixels wide a text is."""
    return _CHARACTER * len(text)


# Axes


@dataclass(frozen=True, slots=True)
class Scale:
    """Where values lie on an axis. Decimal, since a range of floats may overflow a float."""

    low: Decimal
    high: Decimal
    begin: float
    """Where `low` is, of 1000."""
    end: float

    @classmethod
    def over(cls, values: Iterable[float], begin: float, end: float) -> Scale:
        """Return the scale that has all of `values`."""
        exact = [number(value) for value in values]
        return cls(min(exact), max(exact), begin, end)

    def at(self, value: float) -> float:
        """Return where a value lies; in the middle if there is only one."""
        with localcontext(Context(prec=40)):
            span = self.high - self.low
            part = float((number(value) - self.low) / span) if span else 0.5
        return round(self.begin + part * (self.end - self.begin), 1)

    def ticks(self, about: int, least: Decimal = Decimal(0)) -> list[Tick]:
        """Return round numbers with their text, `least` apart or more."""
        with localcontext(Context(prec=40)):
            span = self.high - self.low
            if not span:
                whole = self.low == self.low.to_integral_value() and abs(self.low) < 10**9
                only = _tick(self.low, 0) if whole else f"{float(self.low):.7g}"
                return [(round((self.begin + self.end) / 2, 1), only)]
            unit = Decimal(1).scaleb((span / about).adjusted())
            steps = (unit * factor for factor in (1, 2, 5, 10))
            step = max(least, next(s for s in steps if span / s <= about))
            first = (self.low / step).to_integral_value(ROUND_CEILING)
            values = [(first + i) * step for i in range(int((self.high / step) - first) + 1)]
            places = max(0, -int(step.normalize().as_tuple().exponent))
            length = self.end - self.begin
            return [
                (round(self.begin + float((v - self.low) / span) * length, 1), _tick(v, places))
                for v in values
            ]


class LogScale:
    """Where seconds lie on an axis on which each ten times as many are as far away."""

    def __init__(self, values: Iterable[float], begin: float, end: float) -> None:
        powers = [math.log10(max(value, 1e-6)) for value in values]
        self._low = math.floor(min(powers))
        self._high = max(math.ceil(max(powers)), self._low + 1)
        self._begin, self._length = begin, end - begin

    def at(self, value: float) -> float:
        """Return where a value lies."""
        part = (math.log10(max(value, 1e-6)) - self._low) / (self._high - self._low)
        return round(self._begin + part * self._length, 1)

    def ticks(self) -> list[Tick]:
        """Return the powers of ten."""
        powers = range(self._low, self._high + 1)
        return [(self.at(10.0**power), _duration(power)) for power in powers]


def _duration(power: int) -> str:
    unit, shift = ("s", 0) if power >= 0 else ("ms", 3) if power >= -3 else ("µs", 6)
    return f"{10 ** (power + shift):,} {unit}"


def number(value: float) -> Decimal:
    """Return the number that people read: 0.99, which is a little less in binary."""
    return Decimal(str(value))


def _tick(value: Decimal, places: int) -> str:
    """Return a number on an axis, with as many decimals as its neighbours."""
    if not value:
        return "0"
    value = value.normalize()
    if not -5 < value.adjusted() < 9:
        return f"{value:e}".replace("e+", "e")
    return f"{value:,.{places}f}"


def thinned(
    points: Sequence[tuple[float, float]], most: int, always: frozenset[float] = frozenset()
) -> list[tuple[float, float]]:
    """Return about `most` points: those whose first number is one of `always`, and extremes.

    An even number of slices of the others, each with its lowest and its highest: a peak stays one.
    """
    if len(points) <= most:
        return list(points)
    others = [point for point in points if point[0] not in always]
    slices = max(most // 10, most - (len(points) - len(others))) // 2
    chosen = {point for point in points if point[0] in always} | {points[0], points[-1]}
    for i in range(slices):
        part = others[i * len(others) // slices : (i + 1) * len(others) // slices]
        if part:
            chosen |= {min(part, key=_second), max(part, key=_second)}
    return sorted(chosen)


def _second(point: tuple[float, float]) -> float:
    return point[1]


# Charts


class Axis(NamedTuple):
    """An axis: what it is, with its unit, and its numbers."""

    title: str
    ticks: list[Tick]


class Key(NamedTuple):
    """An entry of a legend."""

    kind: str
    """`dot`, `diamond`, `dots`, `line` or `bar`."""
    style: str
    """Its classes."""
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn between two axes."""

    title: str
    note: str
    """What it shows in words, which also stands for it where it cannot be seen."""
    x: Axis
    y: Axis
    box: Sequence[str]
    """Elements in the box that is stretched."""
    marks: Sequence[str] = ()
    """Elements that are placed by percentages."""
    legend: Sequence[Key] = ()
    height: int = 240

    @property
    def left(self) -> int:
        """The room that the numbers of the axis on the left need, in pixels."""
        return round(16 + max((text_width(text) for _, text in self.y.ticks), default=0))


def mark(kind: str, style: str, x: float, y: float, title: str) -> str:
    """Return a mark that keeps its shape, with what a pointer over it tells."""
    at = f'x="{x / 10:.2f}%" y="{y / 10:.2f}%"'
    if kind == "diamond":
        path = f'<path class="mark {style}" d="M0-7L7 0 0 7-7 0z">'
        return f'<svg {at} class="placed">{path}<title>{plain(title)}</title></path></svg>'
    at = f'cx="{x / 10:.2f}%" cy="{y / 10:.2f}%"'
    return f'<circle class="mark {style}" {at} r="5"><title>{plain(title)}</title></circle>'


def figure(chart: Chart) -> Iterator[str]:
    """Yield a chart as a part of a page."""
    yield f"<figure>\n<figcaption>{plain(chart.note)}</figcaption>"
    if chart.legend:
        items = "".join(f"<li>{_swatch(key)}{plain(key.text)}</li>" for key in chart.legend)
        yield f'<ul class="legend">{items}</ul>'
    about = plain(f"{chart.title}: {chart.note}")
    room = f"padding:{_TOP}px {_RIGHT}px {_BOTTOM}px {chart.left}px"
    yield f'<div class="frame" style="{room}">'
    yield f'<svg class="chart" role="img" aria-label="{about}" height="{chart.height}">'
    yield from _content(chart)
    yield "</svg>\n</div>\n</figure>"


def picture(chart: Chart) -> str:
    """Return a chart as an SVG file, on white."""
    inner = _WIDTH - chart.left - _RIGHT
    top, keys = 50 + _TOP, list(_legend_row(chart))
    height = top + chart.height + _BOTTOM
    style = re.sub(r"var\(--(\w+)\)", lambda found: COLOURS[found[1]][0], STYLE)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">'
        ),
        f"<title>{plain(chart.title)}</title>\n<desc>{plain(chart.note)}</desc>",
        f"<style>\n{style}\n</style>",
        f'<rect width="{_WIDTH}" height="{height}" fill="{COLOURS["page"][0]}"/>',
        f'<text class="label named" x="{chart.left}" y="22">{plain(chart.title)}</text>',
        *keys,
        f'<svg x="{chart.left}" y="{top}" width="{inner}" height="{chart.height}">',
        *_content(chart),
        "</svg>\n</svg>\n",
    ]
    return "\n".join(parts)


def _content(chart: Chart) -> Iterator[str]:
    lines = [f"M0 {at}H1000" for at, _ in chart.y.ticks]
    lines += [f"M{at} 1000v12" for at, _ in chart.x.ticks]
    yield '<svg class="box" viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" '
    yield f'height="100%">\n<path class="grid" d="{"".join(lines)}M0 1000H1000"/>'
    yield from chart.box
    yield "</svg>"
    for at, text in chart.y.ticks:
        yield f'<text class="y" x="-8" y="{at / 10:.2f}%" dy="4">{text}</text>'
    for place, (at, text) in enumerate(chart.x.ticks):
        # Every other one goes where there is little room.
        more = " more" if place % 2 and len(chart.x.ticks) > 3 else ""
        yield f'<text class="x{more}" x="{at / 10:.2f}%" y="100%" dy="20">{text}</text>'
    yield f'<text x="0" y="0" dx="-8" dy="-12">{plain(chart.y.title)}</text>'
    yield f'<text class="end" x="100%" y="100%" dy="40">{plain(chart.x.title)}</text>'
    yield from chart.marks


def _swatch(key: Key) -> str:
    shape = {
        "dot": f'<circle class="mark {key.style}" r="5"/>',
        "diamond": f'<path class="mark {key.style}" d="M0-7L7 0 0 7-7 0z"/>',
        "line": f'<path class="line {key.style}" d="M-9 0H9"/>',
        "dots": f'<path class="dots {key.style}" stroke-width="5" d="M-6 0h0M0 0h0M6 0h0"/>',
        "bar": f'<path class="bar {key.style}" stroke-width="5" d="M-7 0H7"/>',
    }[key.kind]
    return f'<svg class="swatch" width="20" height="14" viewBox="-10 -7 20 14">{shape}</svg>'


def _legend_row(chart: Chart) -> Iterator[str]:
    at = float(chart.left)
    for key in chart.legend:
        yield f'<svg x="{at:.0f}" y="34" width="20" height="14">{_swatch(key)}</svg>'
        yield f'<text x="{at + 26:.0f}" y="45">{plain(key.text)}</text>'
        at += 26 + text_width(key.text) + 18
