"""The commands that make pictures: `report` and `plot`."""

from __future__ import annotations

from pathlib import Path

import click

from ckpt_callbacks.errors import CkptCallbacksError
from ckpt_callbacks.pictures import plot, write_report

__all__ = ["plot_command", "report_command"]

_directory = click.argument(
    "directory", type=click.Path(path_type=Path, file_okay=False, exists=True)
)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(name="report")
@_directory
@click.option("-o", "--output", type=_FILE, help="The file; DIRECTORY/report.html if not given.")
def report_command(directory: Path, output: Path | None) -> None:
    """Write what there is to see of the run in DIRECTORY as one HTML file."""
    try:
        click.echo(write_report(directory, output))
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error


@click.command(name="plot")
@_directory
@click.option("-o", "--output", type=_FILE, help="An .svg; DIRECTORY/METRIC.svg if not given.")
@click.option("--metric", help="Its name; the first that the policy ranks by if not given.")
def plot_command(directory: Path, output: Path | None, metric: str | None) -> None:
    """Write the curve of a metric over all checkpoints of DIRECTORY as an SVG file."""
    try:
        click.echo(plot(directory, output, metric=metric))
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error
