"""The command line, `ckpt-callbacks`."""

from __future__ import annotations

from pathlib import Path

import click

from ckpt_callbacks.errors import CkptCallbacksError
from ckpt_callbacks.report import summarize

__all__ = ["main"]


@click.group()
@click.version_option(package_name="ckpt-callbacks")
def main() -> None:
    """See the checkpoints of a run: which are kept, why, and where."""


@main.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
def ls(directory: Path) -> None:
    """List the checkpoints in the run directory DIRECTORY."""
    try:
        click.echo(summarize(directory))
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error
