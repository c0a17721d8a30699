"""How long it takes to decide what to keep, and to plan from it what one store must do.

Run it with a Python that has the package, such as the one that `tox run -e py` makes::

    .tox/py/bin/python benchmarks/decide.py
    python benchmarks/decide.py --json decide.json

It touches no disk. `benchmarks/README.md` says what the columns are.
"""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import measure
from ckpt_callbacks.plan import Action, View, plan
from ckpt_callbacks.policy import Candidate
from ckpt_callbacks.retention import BestN, Decision, LatestN, decide
from ckpt_callbacks.schedule import EveryNSteps

SIZES = (12_500, 25_000, 50_000, 100_000, 200_000)
TARGET = (100_000, 1.0)
SPACING = 10
"""Steps from one checkpoint to the next."""
POLICY = LatestN(3) | BestN(3, "val_accuracy", mode="max") | EveryNSteps(1000)


def history(count: int) -> list[Candidate]:
    """Return checkpoints with metrics as they come: ties, and some NaN or missing."""
    chance = random.Random(count)  # noqa: S311  # the same numbers each time
    candidates: list[Candidate] = []
    for i in range(count):
        accuracy = round(chance.random(), 3)
        metrics = {"loss": chance.random(), "val_accuracy": accuracy}
        if i % 20 == 7:
            metrics["val_accuracy"] = math.nan
        elif i % 20 == 13:
            del metrics["val_accuracy"]
        candidates.append(Candidate(SPACING * i, metrics, 60.0 * i))
    return candidates


def view(candidates: list[Candidate], decision: Decision) -> View:
    """Return a store that holds all that must go and lacks all that must stay.

    Its aliases are stale; `mine` is one that no policy moves.
    """
    unwanted = [c.step for c in candidates if c.step not in decision.kept]
    aliases = {"best": unwanted[0], "last": unwanted[-1], "mine": unwanted[1]}
    return View(frozenset(unwanted), aliases, frozenset(unwanted[2:100]))


def both(candidates: list[Candidate], held: View, readable: frozenset[int]) -> list[Action]:
    """Decide and plan."""
    return plan(POLICY, candidates, decide(POLICY, candidates), held, readable)


def measured(count: int, runs: int) -> dict[str, Any]:
    """Return the raw numbers for one number of records."""
    candidates = history(count)
    readable = frozenset(c.step for c in candidates)
    deciding, decision = measure.seconds(partial(decide, POLICY, candidates), runs)
    held = view(candidates, decision)
    planning, actions = measure.seconds(
        partial(plan, POLICY, candidates, decision, held, readable), runs
    )
    return {
        "records": count,
        "decide_seconds": deciding,
        "plan_seconds": planning,
        "both_seconds": [d + p for d, p in zip(deciding, planning, strict=True)],
        "actions": len(actions),
        "kept": len(decision.kept),
        "peak_bytes": measure.peak(partial(both, candidates, held, readable)),
    }


@click.command()
@click.option(
    "--runs", default=5, show_default=True, help="Timed runs, of which the median counts."
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
def main(runs: int, file: Path | None) -> None:
    """Measure deciding and planning over more and more records."""
    table = Table(title=f"Keep {POLICY}", title_justify="left")
    titles = ("records", "decide ms", "plan ms", "both ms", "growth", "actions", "kept", "peak MiB")
    for title in titles:
        table.add_column(title, justify="right")
    rows = [measured(count, runs) for count in SIZES]
    totals = {row["records"]: row["both_seconds"] for row in rows}
    for row in rows:
        table.add_row(
            f"{row['records']:,}",
            measure.milliseconds(row["decide_seconds"]),
            measure.milliseconds(row["plan_seconds"]),
            measure.milliseconds(row["both_seconds"]),
            measure.growth(row["both_seconds"], totals.get(row["records"] // 2)),
            f"{row['actions']:,}",
            f"{row['kept']:,}",
            measure.mebibytes(row["peak_bytes"]),
        )
    console = Console()
    console.print(table)
    count, limit = TARGET
    console.print(measure.verdict(f"decide and plan {count:,} records", totals[count], limit))
    measure.write(file, policy=str(POLICY), rows=rows)


if __name__ == "__main__":
    main()
