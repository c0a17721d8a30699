"""Pictures of a run: `report` and `plot`."""

from __future__ import annotations

from pathlib import Path

import click

from ckpt_callbacks.cli.output import emit, json_option
from ckpt_callbacks.cli.places import directory_argument

__all__ = ["plot_command", "report_command"]

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Write all there is to see of a run as one page.")
@directory_argument
@click.option("-o", "--output", type=_FILE, help="The file; DIRECTORY/report.html if not given.")
@json_option
def report_command(directory: Path, output: Path | None, *, as_json: bool) -> None:
    """Write what there is to see of the run in DIRECTORY as one HTML file."""
    from ckpt_callbacks.pictures import write_report

    path = str(write_report(directory, output))
    emit({"path": path}, path, as_json=as_json)


@click.command(short_help="Draw the curve of a metric.")
@directory_argument
@click.option("-o", "--output", type=_FILE, help="An .svg; DIRECTORY/METRIC.svg if not given.")
@click.option("--metric", help="Its name; the first that the policy ranks by if not given.")
@json_option
def plot_command(
    directory: Path, output: Path | None, metric: str | None, *, as_json: bool
) -> None:
    """Write the curve of a metric over all checkpoints of DIRECTORY as an SVG file."""
    from ckpt_callbacks.pictures import plot

    path = str(plot(directory, output, metric=metric))
    emit({"path": path}, path, as_json=as_json)
