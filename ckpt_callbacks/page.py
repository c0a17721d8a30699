"""A page that shows people what a store holds of a run, and the same facts for programs.

The page needs nothing but itself: no script and nothing that is fetched, since services show it
in a frame that allows neither. Equal overviews give equal bytes, so an unchanged page is not
stored again.
"""

from __future__ import annotations

import html as markup
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Context, Decimal, localcontext

from ckpt_callbacks.report import size
from ckpt_callbacks.stores import Curve, Overview, Shown

__all__ = ["as_json", "html"]

MOST_POINTS = 2000
"""Points that are drawn of a curve, unless more are kept."""
MOST_LABELS = 40
_WIDTH, _HEIGHT = 860, 280
_TOP, _RIGHT, _BOTTOM = 30, 32, 34
_LINE, _CHARACTER = 14, 6.6
"""Height of a line of text and width of one character, about."""
_MARK = 5.0
_LONGEST_LABEL = 40
_Point = tuple[int, float]

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --dim: #59636e; --rule: #d9dee3;
  --past: #8c959f; --kept: #0b6bcb; --best: #b35900; --badge: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --text: #e6eaef; --dim: #9aa5b1;
  --rule: #323a44; --past: #76818e; --kept: #58a6ff; --best: #ffa657; --badge: #262d36; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 0; }
p, figcaption { color: var(--dim); margin: .25rem 0; }
code { font: .93em ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--text); }
.wide, figure { overflow-x: auto; }
table { margin-top: 1.25rem; border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; min-width: 4rem;
  border-bottom: 1px solid var(--rule); overflow-wrap: break-word; }
.metric { display: inline-block; max-width: 16rem; white-space: normal; }
thead th { color: var(--dim); font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; min-width: 0; }
.reason { min-width: 9.5rem; }
.where { min-width: 15rem; }
.whole { white-space: nowrap; }
.alias { display: inline-block; padding: 0 .5em; border-radius: .6em; background: var(--badge);
  font-weight: 600; }
.best { color: var(--best); }
figure { margin: 0; }
svg { display: block; width: 100%; min-width: 38rem; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  fill: var(--dim); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke: var(--past); stroke-opacity: .55; stroke-linejoin: round; }
.past { stroke: var(--past); stroke-linecap: round; }
.kept { fill: var(--kept); stroke: var(--page); stroke-width: 1.5; }
.kept.best { fill: var(--best); }
svg text.label { fill: var(--text); stroke: var(--page); stroke-width: 3px; paint-order: stroke;
  text-anchor: middle; }
svg text.named { font-weight: 600; }
""".strip()


def html(overview: Overview) -> str:
    """Return a page for people: a table of what is held, and a curve of each ranked metric."""
    name = _text(overview.name)
    held = _count(len(overview.rows), "checkpoint")
    total = size(sum(row.bytes for row in overview.rows))
    metrics = [curve.metric for curve in overview.curves]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}: checkpoints</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>",
        f"<h1>{name}</h1>",
        f"<p>{held}, {total}. Keep <code>{_text(overview.policy)}</code></p>",
    ]
    if overview.rows:
        parts += _table(overview.rows, metrics)
    for number, curve in enumerate(overview.curves, 1):
        parts += _figure(number, curve, {row.step: row for row in overview.rows})
    parts.append("</main>\n</body>\n</html>\n")
    return "\n".join(parts)


def as_json(overview: Overview) -> str:
    """Return the same facts for programs.

    NaN and infinities, which JSON has no numbers for, are the strings `NaN`, `Infinity` and
    `-Infinity`. `float` reads them in Python and `Number` in JavaScript.
    """
    facts = {
        "name": overview.name,
        "policy": overview.policy,
        "checkpoints": [
            {
                "step": row.step,
                "time": _number(row.time),
                "reason": row.reason,
                "aliases": sorted(row.aliases),
                "metrics": {name: _number(value) for name, value in row.metrics.items()},
                "bytes": row.bytes,
                "ref": row.ref,
            }
            for row in overview.rows
        ],
        "curves": [
            {
                "metric": curve.metric,
                "mode": curve.mode,
                "points": [[step, _number(value)] for step, value in curve.points],
            }
            for curve in overview.curves
        ],
    }
    return json.dumps(facts, sort_keys=True, allow_nan=False) + "\n"


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _text(text: str) -> str:
    """Return the user's text as it may stand anywhere in the page, also in its SVG."""
    # What XML cannot hold at all, such as the rest of a file name that is not UTF-8.
    text = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    return markup.escape(text)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


# The table


def _table(rows: Sequence[Shown], metrics: Sequence[str]) -> Iterator[str]:
    yield '<div class="wide">\n<table>\n<thead>\n<tr>'
    yield '<th scope="col" class="number">step</th>'
    yield '<th scope="col">alias</th><th scope="col">kept because</th>'
    for name in metrics:
        yield f'<th scope="col" class="number"><span class="metric">{_text(name)}</span></th>'
    yield '<th scope="col" class="number">size</th>'
    yield '<th scope="col">saved (UTC)</th><th scope="col">where</th>'
    yield "</tr>\n</thead>\n<tbody>"
    for row in rows:
        badges = [
            f'<span class="alias{" best" if name == "best" else ""}">{_text(name)}</span>'
            for name in sorted(row.aliases)
        ]
        values = [f'<td class="number">{_value(row.metrics.get(name))}</td>' for name in metrics]
        yield (
            f'<tr><th scope="row" class="number">{row.step}</th>'
            f'<td class="whole">{" ".join(badges)}</td>'
            f'<td class="reason">{_text(row.reason) or "on its way out"}</td>{"".join(values)}'
            f'<td class="number">{size(row.bytes)}</td><td class="whole">{_time(row.time)}</td>'
            f'<td class="where">{_text(row.ref)}</td></tr>'
        )
    yield "</tbody>\n</table>\n</div>"


def _value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if math.isfinite(value) else str(_number(value))


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (OSError, OverflowError, ValueError):  # a clock that was far off
        return "-"


# The curves


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where values lie on an axis. Decimal, since a range of floats may overflow a float."""

    low: Decimal
    high: Decimal
    begin: float
    """Where `low` is drawn."""
    end: float

    def at(self, value: float) -> float:
        """Return where a value is drawn; in the middle if there is only one."""
        span = self.high - self.low
        part = float((_exact(value) - self.low) / span) if span else 0.5
        return round(self.begin + part * (self.end - self.begin), 1)

    def ticks(self, about: int, least: Decimal = Decimal(0)) -> list[tuple[float, str]]:
        """Return round numbers with their text, `least` apart or more."""
        span, middle = self.high - self.low, round((self.begin + self.end) / 2, 1)
        if not span:
            whole = self.low == self.low.to_integral_value() and abs(self.low) < 10**9
            return [(middle, _tick(self.low, 0) if whole else f"{float(self.low):.7g}")]
        unit = Decimal(1).scaleb((span / about).adjusted())
        steps = (unit * factor for factor in (1, 2, 5, 10))
        step = max(least, next(s for s in steps if span / s <= about))
        first = (self.low / step).to_integral_value(ROUND_CEILING)
        values = [(first + i) * step for i in range(int((self.high / step) - first) + 1)]
        places = max(0, -int(step.normalize().as_tuple().exponent))
        span_at = self.end - self.begin
        return [
            (round(self.begin + float((v - self.low) / span) * span_at, 1), _tick(v, places))
            for v in values
        ]


def _exact(value: float) -> Decimal:
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


def _figure(number: int, curve: Curve, held: Mapping[int, Shown]) -> Iterator[str]:
    points = [(step, value) for step, value in curve.points if math.isfinite(value)]
    kept = sum(step in held for step, _ in points)
    drawn = _thinned(points, held)
    better = "higher" if curve.mode == "max" else "lower"
    caption = f"{_count(len(points), 'checkpoint')} measured, {kept:,} of them held here"
    if len(drawn) < len(points):
        caption += f"; {len(drawn):,} drawn"
    yield f"<section>\n<h2>{_text(curve.metric)}</h2>\n<figure>"
    yield f"<figcaption>{better} is better; {caption}</figcaption>"
    if points:
        with localcontext(Context(prec=40)):
            svg = list(_svg(number, f"{curve.metric} by step, {better} is better", drawn, held))
        yield from svg
    yield "</figure>\n</section>"


def _thinned(points: Sequence[_Point], held: Collection[int]) -> list[_Point]:
    """Return about `MOST_POINTS` at most: all that are held, and the extremes of the others."""
    if len(points) <= MOST_POINTS:
        return list(points)
    others = [point for point in points if point[0] not in held]
    # An even number of slices, each with its lowest and its highest: a peak stays a peak.
    slices = max(MOST_POINTS // 10, MOST_POINTS - (len(points) - len(others))) // 2
    chosen = {point for point in points if point[0] in held} | {points[0], points[-1]}
    for i in range(slices):
        part = others[i * len(others) // slices : (i + 1) * len(others) // slices]
        if part:
            chosen |= {min(part, key=_by_value), max(part, key=_by_value)}
    return sorted(chosen)


def _by_value(point: _Point) -> float:
    return point[1]


def _svg(
    number: int, title: str, points: Sequence[_Point], held: Mapping[int, Shown]
) -> Iterator[str]:
    values = [_exact(value) for _, value in points]
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    # Room for the labels inside: nothing is drawn at the very edge.
    y = _Scale(min(values), max(values), bottom - 22, _TOP)
    levels = y.ticks(6)
    left = 14 + _CHARACTER * max(len(text) for _, text in levels)
    x = _Scale(_exact(points[0][0]), _exact(points[-1][0]), left + 14, right - 8)
    yield f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="curve-{number}">'
    yield f'<title id="curve-{number}">{_text(title)}</title>'
    for at, text in levels:
        yield f'<path class="grid" d="M{left:.1f} {at}H{right}"/>'
        yield f'<text x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
    yield f'<path class="grid" d="M{left:.1f} {bottom}H{right}"/>'
    for at, text in x.ticks(8, least=Decimal(1)):
        yield f'<path class="grid" d="M{at} {bottom}v5"/>'
        yield f'<text x="{at}" y="{bottom + 19}" text-anchor="middle">{text}</text>'
    where = {step: (x.at(step), y.at(value)) for step, value in points}
    spots = [f"{across} {down}" for across, down in where.values()]
    yield f'<path class="line" d="M{"L".join(spots)}"/>'
    dots = "".join(f"M{spot}h0" for spot in spots)
    yield f'<path class="past" stroke-width="{_dot(len(spots))}" d="{dots}"/>'
    marks = [(held[step], value) for step, value in points if step in held]
    for row, value in sorted(marks, key=lambda mark: bool(mark[0].aliases)):  # those on top
        across, down = where[row.step]
        kind = "kept best" if "best" in row.aliases else "kept"
        yield f'<circle class="{kind}" cx="{across}" cy="{down}" r="{_MARK:g}">'
        about = f"{_name(row)}: {value:.6g} ({row.reason or 'on its way out'})"
        yield f"<title>{_text(about)}</title></circle>"
    yield from _labels([row for row, _ in marks], where, (left, _WIDTH - 2))
    yield "</svg>"


def _dot(count: int) -> float:
    """Return the width of a dot: fine where there are many."""
    return 4 if count <= 100 else 2.5 if count <= 400 else 1.5


def _name(row: Shown) -> str:
    return " ".join([", ".join(sorted(row.aliases)), str(row.step)]).strip()


def _labels(
    rows: Sequence[Shown], where: Mapping[int, tuple[float, float]], edges: tuple[float, float]
) -> Iterator[str]:
    """Yield names of marks where there is room for them; an alias always finds a place."""
    first = sorted(rows, key=lambda row: (not row.aliases, -row.step))[:MOST_LABELS]
    taken = [_box(*where[row.step], 2 * _MARK, 2 * _MARK) for row in first]
    for row in first:
        text = _name(row)
        if len(text) > _LONGEST_LABEL:
            text = text[: _LONGEST_LABEL - 1] + "…"
        across, down = where[row.step]
        width = _CHARACTER * len(text) + 10
        middle = max(edges[0] + width / 2, min(across, edges[1] - width / 2))
        for shift in (-14, 14, -28, 28)[: 4 if row.aliases else 2]:
            box = _box(middle, down + shift, width, _LINE)
            if not any(_overlap(box, other) for other in taken):
                break
        else:
            if not row.aliases:
                continue
            box = _box(middle, down - 14, width, _LINE)
        taken.append(box)
        kind = "label named" if row.aliases else "label"
        yield f'<text class="{kind}" x="{middle:.1f}" y="{box[3] - 3:.1f}">{_text(text)}</text>'


_Box = tuple[float, float, float, float]


def _box(across: float, down: float, width: float, height: float) -> _Box:
    return across - width / 2, down - height / 2, across + width / 2, down + height / 2


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
