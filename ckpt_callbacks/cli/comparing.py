"""How two checkpoints differ: `diff`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from ckpt_callbacks.cli.output import emit, json_option, number, table
from ckpt_callbacks.cli.places import Source, source_of
from ckpt_callbacks.text import counted

if TYPE_CHECKING:
    from ckpt_callbacks.differences import LeafDifference
    from ckpt_callbacks.leaves import Leaf

__all__ = ["diff_command"]


@click.command(short_help="Compare the leaves of two checkpoints.")
@click.argument("a", type=Source())
@click.argument("b", type=Source())
@click.option("--only", multiple=True, help="A path such as params, or a pattern; repeatable.")
@click.option("--all", "everything", is_flag=True, help="Show the leaves that are the same, too.")
@json_option
def diff_command(a: str, b: str, only: tuple[str, ...], *, everything: bool, as_json: bool) -> None:
    """Compare the leaves of two checkpoints; exit with 1 if they differ.

    A and B are checkpoints, such as runs/digits/best or runs/digits/900, run directories, of which
    the newest is meant, files such as model.safetensors, or addresses such as mlflow:/digits@best.
    For each leaf there is how many numbers differ, by how much at most, and the norm of the
    difference by that of A. One leaf is in memory at a time.
    """
    from ckpt_callbacks.differences import differences

    (source_a, which_a), (source_b, which_b) = source_of(a), source_of(b)
    found = differences(source_a, source_b, which_a, which_b, only=only or None)
    kinds = Counter(row.kind for row in found)
    facts = {
        "a": a,
        "b": b,
        "same": kinds["same"] == len(found),
        "leaves": [
            {
                "path": row.path,
                "kind": row.kind,
                "a": str(row.a) if row.a else None,
                "b": str(row.b) if row.b else None,
                "unequal": row.unequal,
                "largest": None if row.largest is None else number(row.largest),
                "relative": None if row.relative is None else number(row.relative),
            }
            for row in found
        ],
    }
    shown = [row for row in found if everything or row.kind != "same"]
    same = counted(kinds["same"], "leaf").replace("leafs", "leaves")
    text: Any = f"the same: {same}"
    if shown:
        columns = {"leaf": False, "difference": False, "unequal": True, "largest": True}
        title = f"A {a}, B {b}: {same} the same, {len(found) - kinds['same']} not"
        rows = [_cells(row) for row in shown]
        spare = ["difference"] * ({row[1] for row in rows} == {"numbers"})
        text = table(title, columns | {"relative": True}, rows, spare=spare)
    emit(facts, text, as_json=as_json)
    if kinds["same"] != len(found):
        raise SystemExit(1)


def _cells(row: LeafDifference) -> list[str]:
    what: str = row.kind
    if row.kind == "form":
        what = f"{row.a} in A, {row.b} in B"
    elif row.kind == "values":
        what = "text" if row.largest is None else "numbers"
    elif row.kind != "same":
        what = f"{row.kind}: {row.a or row.b}"
    if row.kind not in ("values", "same"):
        return [row.path, what, "", "", ""]
    total = _count(row.a)
    unequal = f"{row.unequal:,} of {total:,}"
    return [row.path, what, unequal, *("" if x is None else f"{x:.3g}" for x in _gaps(row))]


def _gaps(row: LeafDifference) -> tuple[float | None, float | None]:
    return row.largest, row.relative


def _count(leaf: Leaf | None) -> int:
    import math

    return math.prod(leaf.shape) if leaf else 0
