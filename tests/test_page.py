"""The page for people: whatever a run is called and measures, it stands up and leaves none out."""

import json
import math
import random
import re
import time
from decimal import Decimal
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_callbacks import page
from ckpt_callbacks.charts import thinned
from ckpt_callbacks.curves import MOST_LABELS, MOST_MARKS, MOST_POINTS
from ckpt_callbacks.stores import Curve, Overview, Shown

VOID = {"meta"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "p", "code"),
    *("div", "span", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "small"),
    *("ul", "li", "details", "summary"),
    *("figure", "figcaption", "svg", "path", "text", "circle"),
}

names = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(), max_size=20),  # control characters and halves of surrogate pairs
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            "</title></style></svg><img src=x onerror=alert(1)>",
            "\" onload='alert(1)' x=\"",
            "&lt;b&gt; ]]> <!-- {}",
            "\udcff\x00\x1b\u202e",
        ]
    ),
)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def overviews(draw: Any) -> Overview:
    metrics = draw(st.lists(names, max_size=2, unique=True))
    steps = sorted(draw(st.sets(st.integers(0, 10**9), max_size=12)))
    kept = [step for step in steps if draw(st.booleans())]
    rows = [
        Shown(
            step=step,
            time=draw(st.floats()),
            reason=draw(names),
            aliases=draw(st.lists(st.one_of(st.just("best"), names), max_size=2)),
            metrics={name: draw(st.floats()) for name in metrics if draw(st.booleans())},
            bytes=draw(st.integers(0, 2**60)),
            ref=draw(names),
        )
        for step in kept
    ]
    curves = [
        Curve(
            name,
            draw(st.sampled_from(["min", "max"])),
            [(step, draw(finite)) for step in steps if draw(st.booleans())],
        )
        for name in metrics
    ]
    return Overview(draw(names), draw(names), rows, curves)


class Reader(HTMLParser):
    """Checks that every element is one of ours and is closed, and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("path", "circle")
        assert not [name for name, _ in attrs if name in ("src", "href", "onload")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def drawings(text: str) -> list[ElementTree.Element]:
    charts = re.findall(r'(<svg class="chart".*?)\n</div>', text, re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in charts]


def numbers(svg: ElementTree.Element) -> list[float]:
    """Return where things lie, of 1000."""
    lines = " ".join(e.attrib["d"] for e in svg.findall("svg[@class='box']/path"))
    found = [float(n) for n in re.findall(r"[-+.\d]+", re.sub("[MLHVhvz]", " ", lines))]
    parts = [v for e in svg.iter() for k, v in e.attrib.items() if k in ("x", "y", "cx", "cy")]
    return found + [10 * float(part[:-1]) for part in parts if part.endswith("%")]


def marks(svg: ElementTree.Element) -> list[str]:
    """Return the titles of what is marked."""
    found = [*svg.findall("circle/title"), *svg.findall("svg[@class='placed']/path/title")]
    return [title.text or "" for title in found]


def levels(svg: ElementTree.Element) -> list[ElementTree.Element]:
    return [e for e in svg.findall("text") if e.get("class") == "y"]


def shown(step: int, *aliases: str, **metrics: float) -> Shown:
    return Shown(step, 1.7e9, f"latest #{step}", aliases, metrics, 2048, f"digits v{step}")


def with_curve(points: list[tuple[int, float]], *kept: int) -> Overview:
    rows = [shown(step, loss=dict(points)[step]) for step in kept]
    return Overview("digits", "LatestN(2)", rows, [Curve("loss", "min", points)])


def test_it_says_what_is_held_why_and_where() -> None:
    rows = [shown(850, acc=0.98491), shown(1000, "best", "last", acc=math.nan)]
    curve = Curve("acc", "max", [(800, 0.5), (850, 0.98491), (900, 0.7)])

    text = "|".join(read(page.html(Overview("digits", "BestN(1, 'acc')", rows, [curve]))).text)

    for part in (
        "digits",
        "2 checkpoints, 4.0 KiB. Keep ",
        "BestN(1, 'acc')",
        "850|latest #850|digits v850|0.98491|2.0 KiB|2023-11-14 22:13:20",
        "1000|best| |last|latest #1000|digits v1000|NaN|2.0 KiB|2023-11-14 22:13:20",
        "Higher is better; 3 checkpoints measured, 1 kept",
        "850: 0.98491 (latest #850)",
    ):
        assert part in text.replace("\n", "").replace("||", "|")


@given(overviews())
def test_any_text_of_the_user_is_only_text(overview: Overview) -> None:
    text = page.html(overview)
    reader = read(text)

    text.encode()  # no halves of surrogate pairs
    heads = [attrs.get("scope") for tag, attrs in reader.tags if tag == "th"]
    assert heads.count("row") == len(overview.rows)
    assert heads.count("col") == (6 + len(overview.curves) if overview.rows else 0)
    assert text == page.html(overview)


@given(overviews())
def test_every_curve_is_drawn_inside_its_frame(overview: Overview) -> None:
    svgs = drawings(page.html(overview))

    curves = [curve for curve in overview.curves if curve.points]
    assert len(svgs) == len(curves)
    for svg, curve in zip(svgs, curves, strict=True):
        assert svg.attrib["aria-label"]
        assert all(0 <= n <= 1000 for n in numbers(svg))
        held = {row.step for row in overview.rows} & {step for step, _ in curve.points}
        assert len(marks(svg)) == len(held)


@given(st.floats(allow_nan=False, allow_infinity=False), finite, st.integers(0, 10**12))
def test_the_axes_have_a_few_numbers_that_are_in_order(a: float, b: float, step: int) -> None:
    (svg,) = drawings(page.html(with_curve([(step, a), (step + 7, b)])))

    texts = levels(svg)
    values = [Decimal((e.text or "").replace(",", "")) for e in texts]
    assert 1 <= len(values) <= 8
    assert values == sorted(set(values))
    heights = [float(e.attrib["y"][:-1]) for e in texts]
    assert heights == sorted(heights, reverse=True)
    low, high = sorted([Decimal(a), Decimal(b)])
    slack = max(abs(low), abs(high)) / 10**6  # of the one number where both are equal
    assert low - slack <= values[0] <= values[-1] <= high + slack


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.98, 0.99, ["0.980", "0.982", "0.984", "0.986", "0.988", "0.990"]),
        (-3.0, 12.0, ["0", "5", "10"]),
        (0.0, 25000.0, ["0", "5,000", "10,000", "15,000", "20,000", "25,000"]),
        (-1.7e308, 1.7e308, ["-1e308", "0", "1e308"]),
        (0.0, 5e-324, ["0", "1e-324", "2e-324", "3e-324", "4e-324", "5e-324"]),
        (3e-7, 3e-7, ["3e-07"]),
        (0.1234567891, 0.1234567891, ["0.1234568"]),
        (20_000_000.0, 20_000_000.0, ["20,000,000"]),
    ],
)
def test_numbers_on_an_axis(low: float, high: float, expected: list[str]) -> None:
    (svg,) = drawings(page.html(with_curve([(0, low), (10, high)])))

    assert [e.text for e in levels(svg)] == expected


@given(st.integers(2001, 7000), st.integers(0, 2**32), st.sets(st.integers(0, 2000)))
def test_thinning_out_drops_nothing_that_is_held_and_no_extreme(
    count: int, seed: int, held: set[int]
) -> None:
    chance = random.Random(seed)
    some: list[float] = [chance.choice([0.0, 1.0, chance.gauss(0, 1)]) for _ in range(count)]
    points = [(float(step), value) for step, value in enumerate(some)]

    drawn = thinned(points, MOST_POINTS, frozenset(held))

    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(points)
    assert len(drawn) <= MOST_POINTS + 2
    assert held <= {step for step, _ in drawn}
    values = [value for _, value in drawn]
    assert (min(values), max(values)) == (min(some), max(some))
    assert (drawn[0], drawn[-1]) == (points[0], points[-1])


def test_what_is_held_is_drawn_even_if_it_is_more_than_is_drawn_otherwise() -> None:
    points = [(float(step), float(step % 7)) for step in range(10_000)]

    drawn = thinned(points, MOST_POINTS, frozenset(range(0, 10_000, 4)))

    assert {step for step, _ in drawn} >= set(range(0, 10_000, 4))
    assert 2500 < len(drawn) <= 2500 + MOST_POINTS // 10 + 2


def test_a_hundred_thousand_checkpoints_are_a_small_page() -> None:
    points = [(10 * i, math.sin(i)) for i in range(100_000)]
    start = time.process_time()

    text = page.html(with_curve(points, 999_980, 999_990))

    assert time.process_time() - start < 5  # 0.1 s; it is not quadratic
    assert len(text) < 200_000
    assert "100,000 checkpoints measured, 2 kept; 2,00" in text


def test_best_and_last_are_named_however_crowded_it_is() -> None:
    points = [(step, 0.5) for step in range(300)]
    rows = [shown(step, *(["best"] if step == 150 else [])) for step in range(299)]
    rows.append(shown(299, "last"))

    (svg,) = drawings(page.html(Overview("d", "p", rows, [Curve("loss", "min", points)])))

    labels = [e.text for e in svg.findall("text") if "label" in e.get("class", "")]
    assert {"best 150", "last 299"} <= set(labels)
    assert len(labels) <= MOST_LABELS
    titles = marks(svg)
    assert len(titles) == MOST_MARKS
    assert {title.partition(":")[0] for title in titles} >= {"best 150", "last 299"}


def test_values_that_are_no_numbers_are_left_out_of_the_curve() -> None:
    points = [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)]

    text = page.html(with_curve(points, 2))

    assert "2 checkpoints measured, 1 kept" in text
    assert "inf" not in text.partition("<figure>")[2].partition("</figure>")[0].lower()


def test_nothing_held_and_nothing_measured_is_a_page_too() -> None:
    reader = read(page.html(Overview("d", "LatestN(1)", [], [Curve("loss", "min", [])])))

    assert "0 checkpoints, 0 B. Keep " in reader.text
    assert not [tag for tag, _ in reader.tags if tag in ("table", "svg")]


@given(overviews())
def test_programs_read_the_same_facts(overview: Overview) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = page.as_json(overview)
    facts = json.loads(text, parse_constant=refuse)

    assert text == json.dumps(facts, sort_keys=True) + "\n"
    assert (facts["name"], facts["policy"]) == (overview.name, overview.policy)
    assert [c["step"] for c in facts["checkpoints"]] == [row.step for row in overview.rows]
    for found, row in zip(facts["checkpoints"], overview.rows, strict=True):
        assert found["aliases"] == sorted(row.aliases)
        assert (found["reason"], found["bytes"], found["ref"]) == (row.reason, row.bytes, row.ref)
        for name, value in row.metrics.items():
            read_back = float(found["metrics"][name])
            assert read_back == value or (math.isnan(read_back) and math.isnan(value))
    for found, curve in zip(facts["curves"], overview.curves, strict=True):
        assert [tuple(point) for point in found["points"]] == list(curve.points)
