"""A page that shows people the checkpoints of a run, and the same facts for programs.

The page needs nothing but itself: no script and nothing that is fetched, since services show it
in a frame that allows neither. Equal overviews give equal bytes, so an unchanged page is not
stored again. However many checkpoints there are, it stays below 2 MB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from ckpt_callbacks.charts import COLOURS, STYLE, figure, plain
from ckpt_callbacks.curves import curve_chart
from ckpt_callbacks.record import Gone
from ckpt_callbacks.report import size
from ckpt_callbacks.stores import Curve, Overview, Shown
from ckpt_callbacks.timelines import disk_chart, place_charts, times_chart

__all__ = ["as_json", "html"]

MOST_CURVES = 6
MOST_ROWS, MOST_EVICTED = 500, 200
"""Rows of the tables; of more the newest are shown."""
_MOST_FACTS = 4
_LONGEST = 200
"""Characters of the user's that a cell has."""

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 0; }
p, figcaption { color: var(--dim); margin: .25rem 0; }
code { font: .93em ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--text); }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0 0; }
.facts div { flex: 1 1 9rem; padding: .6rem .9rem; border: 1px solid var(--rule);
  border-radius: .6rem; }
.facts dt { color: var(--dim); }
.facts dd { margin: 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3; }
.facts small { display: block; font-size: .8rem; font-weight: 400; color: var(--dim); }
figure { margin: .25rem 0 0; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .35rem 0 .25rem; padding: 0;
  list-style: none; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.frame { overflow: hidden; }
.chart { display: block; width: 100%; }
.scroll { overflow-x: auto; }
table { margin-top: .75rem; border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); overflow-wrap: break-word; }
thead th { color: var(--dim); font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
.whole { white-space: nowrap; }
.alias { display: inline-block; padding: 0 .5em; border-radius: .6em; background: var(--badge);
  font-weight: 600; }
.alias.best { color: var(--best); }
details { margin-top: 1.5rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 44rem) {
  main { padding: 1rem .75rem; }
  .more { display: none; }
  table, tbody, tr, th, td { display: block; }
  thead { display: none; }
  tr { padding: .5rem 0; border-bottom: 1px solid var(--rule); }
  tbody th, tbody td { display: flex; gap: 1rem; justify-content: space-between; border: 0;
    padding: .1rem 0; text-align: right; white-space: normal; }
  tbody td:empty { display: none; }
  [data-as]::before { content: attr(data-as); color: var(--dim); font-weight: 400;
    text-align: left; white-space: nowrap; }
}
""".strip()


def html(overview: Overview) -> str:
    """Return a page for people: what there is in figures, in pictures, and in a table."""
    name = plain(overview.name)
    light, dark = (
        " ".join(f"--{colour}: {values[i]};" for colour, values in COLOURS.items()) for i in (0, 1)
    )
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}: checkpoints</title>\n<style>",
        f":root {{ color-scheme: light dark; {light} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}",
        f"{_STYLE}\n{STYLE}\n</style>\n</head>\n<body>\n<main>",
        f"<h1>{name}</h1>",
        (
            f"<p>{_count(len(overview.rows), 'checkpoint')}, "
            f"{size(sum(row.bytes for row in overview.rows))}. "
            f"Keep <code>{plain(overview.policy)}</code></p>"
        ),
        *_facts(overview),
        *_pictures(overview),
    ]
    metrics = [curve.metric for curve in overview.curves[:MOST_CURVES]]
    if overview.rows:
        parts += _table(overview.rows, metrics)
    if overview.evicted:
        parts += _evicted(overview.evicted, metrics)
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


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


# In figures


def _facts(overview: Overview) -> Iterator[str]:
    named = {name: row for row in overview.rows for name in row.aliases}
    by_alias = {f"best-{curve.metric}": curve.metric for curve in overview.curves}
    first = overview.curves[0].metric if overview.curves else ""
    facts = []
    for name in sorted(named)[:_MOST_FACTS]:
        metric = by_alias.get(name, first)
        value = named[name].metrics.get(metric)
        small = "" if value is None else f"{_cut(metric)} {_value(value)}"
        facts.append((_cut(name), f"step {named[name].step}", small))
    if overview.history or overview.evicted:
        sizes = {entry.step: entry.bytes for entry in overview.history if entry.what == "saved"}
        steps = {*sizes, *(g.step for g in overview.evicted), *(r.step for r in overview.rows)}
        kept = sum(row.bytes for row in overview.rows)
        facts.append(("kept", f"{len(overview.rows):,}", f"of {len(steps):,} saved"))
        instead = f"instead of {size(sum(sizes.values()))}" if sizes else ""
        facts.append(("size", size(kept), instead))
    if facts:
        yield '<dl class="facts">'
        for title, text, small in facts:
            more = f"<small>{plain(small)}</small>" if small else ""
            yield f"<div><dt>{plain(title)}</dt><dd>{plain(text)}{more}</dd></div>"
        yield "</dl>"


# In pictures


def _pictures(overview: Overview) -> Iterator[str]:
    for curve in overview.curves[:MOST_CURVES]:
        yield from _curve(curve, overview.rows)
    places = list(place_charts(overview.history, overview.titles))
    if places:
        yield "<section>\n<h2>Where each checkpoint was</h2>"
        for chart in places:
            yield from figure(chart)
        yield "</section>"
    for made in (disk_chart(overview.history), times_chart(overview.history, overview.titles)):
        if made:
            yield f"<section>\n<h2>{plain(made.title)}</h2>"
            yield from figure(made)
            yield "</section>"


def _curve(curve: Curve, rows: Sequence[Shown]) -> Iterator[str]:
    yield f"<section>\n<h2>{plain(curve.metric)}</h2>"
    if chart := curve_chart(curve, rows):
        yield from figure(chart)
    else:
        yield "<p>No checkpoint has a value of it.</p>"
    yield "</section>"


# In tables


def _table(rows: Sequence[Shown], metrics: Sequence[str]) -> Iterator[str]:
    first = sorted(rows, key=lambda row: (not row.aliases, -row.step))[:MOST_ROWS]
    yield "<section>\n<h2>Checkpoints</h2>"
    if len(first) < len(rows):
        yield f"<p>The newest {len(first):,} of {len(rows):,}, and all that have an alias.</p>"
    yield from _head(["step", "alias", "kept because", "where"], metrics, ["size", "saved (UTC)"])
    for row in sorted(first, key=lambda row: row.step):
        badges = [
            f'<span class="alias{" best" if name == "best" else ""}">{plain(_cut(name))}</span>'
            for name in sorted(row.aliases)
        ]
        yield (
            f'<tr><th scope="row" class="number" data-as="step">{row.step}</th>'
            f"<td{_as('alias', badges)}>{' '.join(badges)}</td>"
            f'<td data-as="kept because">{plain(_cut(row.reason)) or "on its way out"}</td>'
            f'<td data-as="where">{plain(_cut(row.ref))}</td>'
            f"{_values(row.metrics, metrics)}"
            f'<td class="number" data-as="size">{size(row.bytes)}</td>'
            f'<td class="whole" data-as="saved (UTC)">{_time(row.time)}</td></tr>'
        )
    yield "</tbody>\n</table>\n</div>\n</section>"


def _evicted(evicted: Sequence[Gone], metrics: Sequence[str]) -> Iterator[str]:
    shown = evicted[-MOST_EVICTED:]
    more = f", the last {len(shown):,} of them" * (len(shown) < len(evicted))
    yield f"<details>\n<summary>{_count(len(evicted), 'checkpoint')} evicted{more}</summary>"
    yield from _head(["step", "evicted because"], metrics, ["saved (UTC)"])
    for gone in shown:
        yield (
            f'<tr><th scope="row" class="number" data-as="step">{gone.step}</th>'
            f'<td data-as="evicted because">{plain(_cut(gone.reason))}</td>'
            f"{_values(gone.metrics, metrics)}"
            f'<td class="whole" data-as="saved (UTC)">{_time(gone.time)}</td></tr>'
        )
    yield "</tbody>\n</table>\n</div>\n</details>"


def _head(before: Sequence[str], metrics: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    yield '<div class="scroll">\n<table>\n<thead>\n<tr>'
    titles = [(before[0], True), *((title, False) for title in before[1:])]
    titles += [*((_cut(name), True) for name in metrics), *((t, t == "size") for t in after)]
    for title, is_number in titles:
        style = ' class="number"' if is_number else ""
        yield f'<th scope="col"{style}>{plain(title)}</th>'
    yield "</tr>\n</thead>\n<tbody>"


def _values(values: Mapping[str, float], metrics: Sequence[str]) -> str:
    return "".join(
        f'<td class="number" data-as="{plain(_cut(name))}">{_value(values.get(name))}</td>'
        for name in metrics
    )


def _as(title: str, content: Sequence[str]) -> str:
    """Return what names a cell on a phone, if there is something in it."""
    return f' data-as="{title}"' if content else ""


def _value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if math.isfinite(value) else str(_number(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (OSError, OverflowError, ValueError):  # a clock that was far off
        return "-"
