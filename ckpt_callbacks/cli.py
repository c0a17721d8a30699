"""The command line, `ckpt-callbacks`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ckpt_callbacks.errors import CkptCallbacksError
from ckpt_callbacks.report import summarize, why

__all__ = ["main"]


@click.group()
@click.version_option(package_name="ckpt-callbacks")
def main() -> None:
    """See the checkpoints of a run: which are kept, why, and where."""


_directory = click.argument(
    "directory", type=click.Path(path_type=Path, file_okay=False, exists=True)
)


@main.command()
@_directory
def ls(directory: Path) -> None:
    """List the checkpoints in the run directory DIRECTORY."""
    _print(summarize, directory)


@main.command(name="why")
@_directory
@click.argument("step", type=int)
def why_command(directory: Path, step: int) -> None:
    """Say why STEP is kept in DIRECTORY, or was evicted from it."""
    _print(why, directory, step)


def _print(function: Callable[..., object], *arguments: object) -> None:
    """Print what a function returns, or the message of its error."""
    try:
        click.echo(function(*arguments))
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error
