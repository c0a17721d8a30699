"""What commands print: for people, or as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import click

from ckpt_callbacks import text

__all__ = ["ago", "emit", "json_option", "lines", "number", "numbered", "table"]

F = TypeVar("F", bound=Callable[..., Any])
_MOST_DRAWN = 300
"""Rows of a table that is drawn; more are plain lines, since rich takes about 1 ms for a row."""
_ENDLESS = 10_000
"""Columns where there is no terminal: what a pipe or a file gets is not folded."""
_SPANS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def json_option(function: F) -> F:
    """Give a command the option `--json`, its argument `as_json`."""
    option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
    return option(function)


def emit(facts: Mapping[str, Any], printable: Any, *, as_json: bool) -> None:
    """Print facts as JSON, or else what is for people: lines, or what rich can print."""
    if as_json:
        click.echo(json.dumps(facts, allow_nan=False))
    else:
        click.echo(printable if isinstance(printable, str) else text.as_text(printable, _ENDLESS))


def number(value: float) -> float | str:
    """Return a number as JSON has it, which knows neither NaN nor infinities."""
    return value if math.isfinite(value) else str(value)


def numbered(values: Mapping[str, float]) -> dict[str, float | str]:
    """Return metrics as JSON has them."""
    return {name: number(value) for name, value in values.items()}


def ago(seconds: float) -> str:
    """Return a span of time for people, such as `5 min`."""
    for span, unit in _SPANS:
        if seconds >= span:
            return f"{seconds // span:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def table(
    title: str,
    columns: Mapping[str, bool],
    rows: Sequence[Sequence[str]],
    *,
    plain: bool = False,
    spare: Sequence[str] = (),
) -> Any:
    """Return a table to print.

    Where a terminal is too narrow for it, it has no frame; if that is not enough it lacks some
    columns, and then cells are folded, of which nothing is lost.

    Args:
        title: stands above it.
        columns: the names, each with whether its values are numbers.
        rows: the values.
        plain: no frame, and all columns, in lines as long as they have to be.
        spare: the columns that people can do without, first those that matter least.
    """
    if plain or len(rows) > _MOST_DRAWN:
        return "\n".join([title, *lines(columns, rows)])
    from rich.cells import cell_len
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    room = text.columns(_ENDLESS)
    cells = {name: [row[at] for row in rows] for at, name in enumerate(columns)}
    widths = {name: max(map(cell_len, [name, *column])) for name, column in cells.items()}
    framed = sum(widths.values()) + 3 * len(widths) + 1 <= room
    left = [] if framed else list(_left_out(widths, spare, room))
    drawn = Table() if framed else Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    shown = [name for name in columns if name not in left]
    for name in shown:
        drawn.add_column(
            Text(name),
            justify="right" if columns[name] else "left",
            no_wrap=columns[name],
            overflow="fold",
            min_width=cell_len(name),
        )
    for row in zip(*(cells[name] for name in shown), strict=True):
        drawn.add_row(*map(Text, row))
    note = [Text(f"no room for {', '.join(left)}")] if left else []
    return Group(Text(title), drawn, *note)  # as a title of the table it would be folded


def _left_out(widths: Mapping[str, int], spare: Sequence[str], room: int) -> Iterator[str]:
    """Yield the columns without which a table without a frame has room."""
    wide = sum(widths.values()) + 2 * (len(widths) - 1)
    for name in spare:
        if wide > room:
            wide -= widths[name] + 2
            yield name


def lines(columns: Mapping[str, bool], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table without a frame."""
    everything = [[*columns], *rows]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    form = "  ".join(
        f"{{:{'>' if is_number else '<'}{width}}}"
        for is_number, width in zip(columns.values(), widths, strict=True)
    )
    for row in everything:
        yield form.format(*row).rstrip()
