"""Checkpoints as files of other libraries: `export`, and `convert`, which is the same."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_callbacks.cli.output import emit, json_option
from ckpt_callbacks.cli.places import ParamType, Source, Step, source_of

__all__ = ["convert_command", "export_command"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{name}B": 1000**i for i, name in enumerate("KMGT", 1)}
_UNITS |= {f"{name}IB": 1024**i for i, name in enumerate("KMGT", 1)}


class _Size(ParamType):
    """A number of bytes, such as `5GB` or `512MiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+) ?([A-Za-z]*)", str(value))
        if not match or match[2].upper() not in _UNITS:
            self.fail(f"{value!r} is no size, such as 5GB or 512MiB", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


@click.command(short_help="Write a checkpoint as a file of another library.")
@click.argument("source", type=Source())
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--format", help="Such as safetensors or npz; by the suffix of DEST if not given.")
@click.option(
    "--which", type=Step(), help="A step, or an alias, of a run directory; last if not given."
)
@click.option("--only", multiple=True, help="A path such as params, or a pattern; repeatable.")
@click.option("--unstack", multiple=True, metavar="GROUP", help="Give each layer its own arrays.")
@click.option("--stack", multiple=True, metavar="GROUP", help="Put all layers into one array.")
@click.option("--axis", type=int, help="The axis of the layers in one array; 0 if not given.")
@click.option("--max-shard-size", type=_Size(), help="Of safetensors, such as 5GB; then shards.")
@click.option("--naming", help="Of safetensors: dots, safejax or pytree2safetensors.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@json_option
def export_command(
    source: str,
    dest: Path,
    which: int | str | None,
    axis: int | None,
    unstack: tuple[str, ...],
    stack: tuple[str, ...],
    only: tuple[str, ...],
    max_shard_size: int | None,
    naming: str | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the checkpoint SOURCE as DEST, in a format of another library.

    SOURCE is a run directory, a checkpoint such as runs/digits/best, a file in one of the formats,
    or an address such as mlflow:/digits@best. GROUP is what the layers are below, such as layers.
    """
    from ckpt_callbacks.exporting import export

    if axis is not None and not (unstack or stack):
        raise click.UsageError("--axis says where --stack and --unstack have the layers; give one")
    forms = _forms(unstack, stack, axis or 0)
    given = {"max_shard_size": max_shard_size, "naming": naming}
    options |= {name: value for name, value in given.items() if value is not None}
    place, chosen = source_of(source, which)
    path = export(place, dest, which=chosen, only=only or None, transform=forms, **options)
    emit({"path": str(path)}, f"wrote {path}", as_json=as_json)


convert_command = export_command


def _forms(unstack: tuple[str, ...], stack: tuple[str, ...], axis: int) -> list[partial[Any]]:
    if not (unstack or stack):
        return []
    from ckpt_callbacks import forms

    return [partial(forms.unstack, group=group, axis=axis) for group in unstack] + [
        partial(forms.stack, group=group, axis=axis) for group in stack
    ]
