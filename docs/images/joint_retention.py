"""Draw `joint-retention.svg`: which steps a policy keeps, in all places alike.

    python docs/images/joint_retention.py

What is kept, and what `best` and `last` name, is not drawn by hand: the library decides it.
"""

from __future__ import annotations

from pathlib import Path

import ckpt_callbacks as cc
from ckpt_callbacks.retention import decide

TARGET = Path(__file__).parent / "joint-retention.svg"
PLACES = ("Orbax directory", "MLflow", "W&amp;B")
KEEP = cc.LatestN(2) | cc.BestN(2, "val_accuracy", mode="max")
ACCURACY = (0.84, 0.88, 0.905, 0.918, 0.93, 0.945, 0.962, 0.941, 0.955, 0.936, 0.948)
HISTORY = [cc.Candidate(50 * i, {"val_accuracy": value}) for i, value in enumerate(ACCURACY)]

WIDTH, HEIGHT = 960, 484
LEFT, APART = 200, 68
"""Where the first step is, and how far the next ones are from each other."""
TOP, BOTTOM = 100, 188
"""Of the curve."""
LANE, LANES = 62, 262
"""Height of a lane, and the middle of the first."""

STYLE = """
.paper { fill: #ffffff; stroke: #d0d7de }
text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 19px; font-weight: 600 }
.code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.quiet { fill: #59636e; font-size: 12.5px }
.middle { text-anchor: middle }
.line { fill: none; stroke: #8c959f; stroke-width: 1.5 }
.lane { stroke: #d8dee4; stroke-width: 1 }
.kept { fill: #0969da }
.in { fill: #ffffff; font-size: 13px; font-weight: 600; text-anchor: middle }
.gone { fill: none; stroke: #8c959f; stroke-width: 1.2; stroke-dasharray: 3 3 }
.dot { fill: #ffffff; stroke: #8c959f; stroke-width: 1.5 }
.best { fill: #1a7f37 }
.last { fill: #8250df }
.tag { fill: #ffffff; font-size: 11.5px; font-weight: 600; text-anchor: middle }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117; stroke: #30363d }
  text { fill: #e6edf3 }
  .quiet { fill: #9198a1 }
  .lane { stroke: #30363d }
  .kept { fill: #4493f8 }
  .in, .tag { fill: #0d1117 }
  .dot { fill: #0d1117 }
  .best { fill: #3fb950 }
  .last { fill: #ab7df8 }
}
"""


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{content}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a box around a point."""
    corner = f'x="{x - width / 2:g}" y="{y - height / 2:g}"'
    return f'<rect class="{kind}" {corner} width="{width:g}" height="{height:g}" rx="6"/>'


def column(index: int) -> float:
    return LEFT + APART * index


def height_of(value: float) -> float:
    return BOTTOM - (value - min(ACCURACY)) / (max(ACCURACY) - min(ACCURACY)) * (BOTTOM - TOP)


def curve(kept: dict[int, str]) -> list[str]:
    """Return the accuracy at each checkpoint."""
    places = [(column(i), height_of(value)) for i, value in enumerate(ACCURACY)]
    line = " ".join(f"{x:g},{y:g}" for x, y in places)
    dots = [
        f'<circle class="{"kept" if c.step in kept else "dot"}" cx="{x:g}" cy="{y:g}" r="4.5"/>'
        for (x, y), c in zip(places, HISTORY, strict=True)
    ]
    return [text(28, 150, "val_accuracy"), f'<polyline class="line" points="{line}"/>', *dots]


def lane(y: float, place: str, kept: dict[int, str], aliases: dict[int, str]) -> list[str]:
    """Return what one place holds."""
    drawn = [
        f'<line class="lane" x1="28" x2="{WIDTH - 28}" y1="{y - 31:g}" y2="{y - 31:g}"/>',
        text(28, y + 9, place),
    ]
    for index, candidate in enumerate(HISTORY):
        x, step = column(index), candidate.step
        if step not in kept:
            drawn.append(box(x, y + 4, 22, 20, "gone"))
            continue
        drawn += [box(x, y + 4, 44, 26, "kept"), text(x, y + 8.5, str(step), "in")]
        if alias := aliases.get(step):
            drawn += [box(x, y - 17, 38, 15, alias), text(x, y - 13, alias, "tag")]
    return drawn


def drawing() -> str:
    decision = decide(KEEP, HISTORY)
    kept = dict(decision.kept)
    aliases = {decision.aliases[name]: name for name in ("best", "last")}
    end = LANES + LANE * len(PLACES)
    parts = [
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
        text(28, 40, "One decision, applied in every place", "title"),
        text(28, 66, f"keep={str(KEEP).replace(chr(39), '&quot;')}", "code"),
        *curve(kept),
        text(28, BOTTOM + 30, "step"),
        *(text(column(i), BOTTOM + 30, str(c.step), "quiet middle") for i, c in enumerate(HISTORY)),
    ]
    for index, place in enumerate(PLACES):
        parts += lane(LANES + LANE * index, place, kept, aliases)
    parts += [
        f'<line class="lane" x1="28" x2="{WIDTH - 28}" y1="{end - 31}" y2="{end - 31}"/>',
        text(28, end - 6, "kept because"),
        *(text(column(c.step // 50), end - 6, kept[c.step], "quiet middle")
          for c in HISTORY if c.step in kept),
        box(39, HEIGHT - 19, 22, 16, "kept"),
        text(58, HEIGHT - 14, "a complete checkpoint", "quiet"),
        box(269, HEIGHT - 19, 18, 16, "gone"),
        text(286, HEIGHT - 14, "evicted, its bytes are freed", "quiet"),
        box(535, HEIGHT - 19, 38, 15, "best"),
        text(535, HEIGHT - 15, "best", "tag"),
        box(579, HEIGHT - 19, 38, 15, "last"),
        text(579, HEIGHT - 15, "last", "tag"),
        text(606, HEIGHT - 14, "names, which move to complete copies only", "quiet"),
    ]  # fmt: skip
    named = f'role="img" aria-label="Steps {", ".join(map(str, kept))} are kept everywhere"'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {named}>'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
