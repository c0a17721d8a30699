"""What a checkpoint holds: `show`, and `inspect`, which is the same with an option."""

from __future__ import annotations

from typing import Any

import click

from ckpt_callbacks.cli.output import emit, json_option, numbered
from ckpt_callbacks.cli.places import Source, Step, source_of

__all__ = ["inspect_command", "show_command"]

_depth = click.option("--depth", type=click.IntRange(min=1), help="Levels of the tree to show.")


@click.command()
@click.argument("source", type=Source())
@click.argument("step", type=Step(), required=False)
@_depth
@json_option
def show_command(source: str, step: int | str | None, depth: int | None, *, as_json: bool) -> None:
    """Show what a checkpoint holds, without reading an array.

    SOURCE is a run directory, whose STEP may be an alias, by default last; a checkpoint, such as
    runs/digits/best; or an address, such as mlflow:/digits@best.
    """
    _show(*source_of(source, step), depth, as_json=as_json)


@click.command()
@click.argument("source", type=Source())
@click.option(
    "--which", type=Step(), default="last", show_default=True, help="A step, or an alias."
)
@_depth
@json_option
def inspect_command(source: str, which: int | str, depth: int | None, *, as_json: bool) -> None:
    """Show what a checkpoint holds; the same as show.

    SOURCE is a run directory, a checkpoint of Orbax, or an address such as mlflow:/digits@best.
    """
    _show(source, which, depth, as_json=as_json)


def _show(source: str, which: int | str, depth: int | None, *, as_json: bool) -> None:
    from ckpt_callbacks.inspection import inspect

    found = inspect(source, which)
    facts: dict[str, Any] = {}
    if as_json:
        facts = {
            "source": found.source,
            "step": found.step,
            "time": found.time,
            "metrics": numbered(found.metrics),
            "metadata": dict(found.metadata),
            "config": dict(found.config),
            "aliases": [*found.aliases],
            "reason": found.reason,
            "bytes": found.bytes,
            "items": dict(found.items),
            "copies": dict(found.copies),
            "leaves": {
                path: {
                    "kind": leaf.kind,
                    "shape": [*leaf.shape],
                    "dtype": leaf.dtype,
                    "bytes": leaf.nbytes,
                }
                for path, leaf in found.leaves.items()
            },
        }
    emit(facts, found.text(depth), as_json=as_json)
