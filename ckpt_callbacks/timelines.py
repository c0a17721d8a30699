"""Charts over the time of a run: where each checkpoint was, what disk they took, what lasted.

All but the last have the time since the first save on their lower axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import accumulate

from ckpt_callbacks.charts import Axis, Chart, Key, LogScale, Scale, plain, thinned
from ckpt_callbacks.history import LOCAL, Entry, Life, lives

__all__ = ["BYTES", "disk_chart", "place_charts", "place_title", "times_chart"]

_MOST_BARS, _MOST_TITLES, _MOST_POINTS = 2000, 200, 1000
_STYLES = ("kept", "best", "third", "fourth")
_TIME = ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (259200.0, 3600.0, "h"), (1e18, 86400.0, "days"))
"""Up to which span a unit is used, its seconds, and its name."""
BYTES = ((1, "B"), (1 << 10, "KiB"), (1 << 20, "MiB"), (1 << 30, "GiB"), (1 << 40, "TiB"))


def place_title(place: str, titles: Mapping[str, str]) -> str:
    """Return what people call a place that holds checkpoints."""
    return "run directory" if place == LOCAL else titles.get(place, place)


class _Clock:
    """The axis of time, from the first entry to the last."""

    def __init__(self, history: Sequence[Entry]) -> None:
        self._begin, self.end = history[0].time, history[-1].time
        span = self.end - self._begin
        self._unit, name = next((unit, name) for most, unit, name in _TIME if span <= most)
        self._scale = Scale.over([0.0, span / self._unit], 0, 1000)
        self.axis = Axis(f"time since the first save ({name})", self._scale.ticks(8))

    def at(self, time: float) -> float:
        return self._scale.at((time - self._begin) / self._unit)


# Where each checkpoint was


def place_charts(history: Sequence[Entry], titles: Mapping[str, str]) -> Iterator[Chart]:
    """Yield a chart for each place, with a bar for each checkpoint, all on the same axes."""
    if not history:
        return
    clock, found = _Clock(history), lives(history)
    steps = Scale.over([entry.step for entry in history], 960, 40)
    axis = Axis("step", steps.ticks(5, least=Decimal(1)))
    for style, (place, there) in zip(_endless(_STYLES), found.items(), strict=False):
        title, held = place_title(place, titles), sum(life.end is None for life in there)
        yield Chart(
            title=title[:1].upper() + title[1:],
            note=f"{title[:1].upper()}{title[1:]}: {len(there):,} held at some time, "
            f"{held:,} held now",
            x=clock.axis,
            y=axis,
            box=list(_bars(there, style, clock, steps)),
            legend=[Key("bar", style, "held now"), Key("bar", "past faint", "gone")],
            height=150,
        )


def _endless(styles: Sequence[str]) -> Iterator[str]:
    while True:
        yield from styles


def _bars(there: Sequence[Life], style: str, clock: _Clock, steps: Scale) -> Iterator[str]:
    def path(life: Life) -> str:
        end = clock.end if life.end is None else life.end
        return f"M{clock.at(life.begin)} {steps.at(life.step)}H{clock.at(end)}"

    width = 5 if len(there) <= 30 else 3.5 if len(there) <= 100 else 2 if len(there) <= 400 else 1.5
    gone = [life for life in there if life.end is not None]
    if len(gone) > _MOST_BARS:  # those that can be seen, which are long, and a part of the others
        longest = sorted(gone, key=lambda life: life.begin - (life.end or 0.0))[: _MOST_BARS // 2]
        gone = sorted({*longest, *gone[:: 2 * len(gone) // _MOST_BARS + 1]})
    if gone:
        bars = "".join(map(path, gone))
        yield f'<path class="bar past faint" stroke-width="{width}" d="{bars}"/>'
    held = [life for life in there if life.end is None]
    for life in held[-_MOST_TITLES:]:
        yield f'<path class="bar {style}" stroke-width="{width}" d="{path(life)}">'
        yield f"<title>step {life.step}</title></path>"
    if more := held[:-_MOST_TITLES]:
        bars = "".join(map(path, more[:: len(more) // _MOST_BARS + 1]))
        yield f'<path class="bar {style}" stroke-width="{width}" d="{bars}"/>'


# What disk they took


def disk_chart(history: Sequence[Entry]) -> Chart | None:
    """Return the chart of the run directory's size, beside that of keeping everything."""
    there = lives(history)[LOCAL]
    if not there:
        return None
    clock = _Clock(history)
    changes = [(life.begin, life.bytes) for life in there]
    changes += [(life.end, -life.bytes) for life in there if life.end is not None]
    used, everything = _sums(changes), _sums([(life.begin, life.bytes) for life in there])
    most = max(1, everything[-1][1])
    scale, unit = next((s, u) for s, u in reversed(BYTES) if most >= s)
    y = Scale.over([0.0, most / scale], 1000, 40)

    def line(points: Sequence[tuple[float, float]]) -> str:
        parts = [f"H{clock.at(at)}V{y.at(value / scale)}" for at, value in points]
        return f"M{clock.at(points[0][0])} 1000{''.join(parts)}H1000"

    now, saved = _short(used[-1][1]), _short(everything[-1][1])
    path = line(thinned(used, _MOST_POINTS))
    return Chart(
        title="Disk use of the run directory",
        note=f"{now} now; {saved} if all {len(there):,} checkpoints had been kept",
        x=clock.axis,
        y=Axis(f"size ({unit})", y.ticks(5)),
        box=[
            f'<path class="area" d="{path}V1000z"/>',
            f'<path class="line best dash" d="{line(thinned(everything, _MOST_POINTS))}"/>',
            f'<path class="line kept" d="{path}"/>',
        ],
        legend=[
            Key("line", "kept", "run directory"),
            Key("line", "best dash", "keep everything"),
        ],
        height=200,
    )


def _sums(changes: Sequence[tuple[float, int]]) -> list[tuple[float, float]]:
    # What comes first of two at one time, since an eviction makes room for nothing before it.
    ordered = sorted(changes, key=lambda change: (change[0], -change[1]))
    sums = accumulate(size for _, size in ordered)
    return [(at, float(total)) for (at, _), total in zip(ordered, sums, strict=True)]


def _short(size: float) -> str:
    scale, unit = next(((s, u) for s, u in reversed(BYTES) if size >= s), BYTES[0])
    return f"{size / scale:.1f} {unit}" if scale > 1 else f"{size:.0f} B"


# How long it took


def times_chart(history: Sequence[Entry], titles: Mapping[str, str]) -> Chart | None:
    """Return the chart of what each save, commit and upload took."""
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        names = ["save: the loop waits", "commit, behind the loop"]
        if entry.what == "copied":
            names = [f"upload to {place_title(entry.store, titles)}"]
        for name, seconds in zip(names, entry.seconds, strict=False):
            series.setdefault(name, []).append((entry.step, seconds))
    if not series:
        return None
    points = [point for found in series.values() for point in found]
    x = Scale.over([step for step, _ in points], 18, 982)
    y = LogScale([seconds for _, seconds in points], 960, 40)
    box: list[str] = []
    legend: list[Key] = []
    for style, (name, found) in zip(_endless(_STYLES), series.items(), strict=False):
        drawn = thinned(sorted(found), _MOST_POINTS)
        spots = [f"{x.at(step)} {y.at(seconds)}" for step, seconds in drawn]
        dash = " dash" * (len(legend) % 2)
        dots = "".join(f"M{spot}h0" for spot in spots)
        width = 5 if len(spots) <= 100 else 2.5
        box += [
            f'<path class="line {style} faint{dash}" d="M{"L".join(spots)}"/>',
            (
                f'<path class="dots {style}" stroke-width="{width}" d="{dots}">'
                f"<title>{plain(name)}</title></path>"
            ),
        ]
        legend.append(Key("line", style + dash, name))
    medians = [f"{name} {_seconds(_median(found))}" for name, found in series.items()]
    return Chart(
        title="Times of saves, commits and uploads",
        note=f"Medians: {'; '.join(medians)}",
        x=Axis("step", x.ticks(8, least=Decimal(1))),
        y=Axis("time", y.ticks()),
        box=box,
        legend=legend,
        height=200,
    )


def _median(points: Sequence[tuple[float, float]]) -> float:
    values = sorted(value for _, value in points)
    return values[len(values) // 2]


def _seconds(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.2g} µs"
