"""The command line, `ckpt-callbacks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from ckpt_callbacks.adoption import adopt
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CkptCallbacksError
from ckpt_callbacks.pictures_cli import plot_command, report_command
from ckpt_callbacks.report import summarize, why
from ckpt_callbacks.requests import pin, sync, unpin
from ckpt_callbacks.verification import verify

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


@main.command(name="inspect")
@click.argument("source")
@click.option("--which", default="last", show_default=True, help="A step, or an alias.")
@click.option("--depth", type=click.IntRange(min=1), help="Levels of the tree to show.")
def inspect_command(source: str, which: str, depth: int | None) -> None:
    """Show what a checkpoint holds, without reading an array.

    SOURCE is a run directory, a checkpoint of Orbax, or an address such as mlflow:/digits@best.
    """
    from ckpt_callbacks.inspection import inspect

    step = int(which) if which.isdecimal() else which
    _print(lambda: inspect(source, step).text(depth))


@main.command(name="export")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--format", help="Such as safetensors or npz; by the suffix of DEST if not given.")
@click.option("--which", default="last", show_default=True, help="A step, or an alias.")
@click.option("--only", multiple=True, help="A path such as params, or a pattern; repeatable.")
@click.option("--unstack", multiple=True, metavar="GROUP", help="Give each layer its own arrays.")
@click.option("--stack", multiple=True, metavar="GROUP", help="Put all layers into one array.")
@click.option("--axis", type=int, help="The axis of the layers in one array; 0 if not given.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
def export_command(
    source: str,
    dest: Path,
    axis: int | None,
    unstack: tuple[str, ...],
    stack: tuple[str, ...],
    only: tuple[str, ...],
    **options: Any,
) -> None:
    """Write the checkpoint SOURCE as DEST, in a format of another library.

    SOURCE is a run directory, a checkpoint of Orbax, a file in one of the formats, or an address
    such as mlflow:/digits@best. GROUP is what the layers are below, such as layers.
    """
    from ckpt_callbacks.exporting import export

    if axis is not None and not (unstack or stack):
        raise click.UsageError("--axis says where --stack and --unstack have the layers; give one")
    forms = _forms(unstack, stack, axis or 0)
    try:
        path = export(source, dest, only=only or None, transform=forms, **options)
    except (CkptCallbacksError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {path}")


main.add_command(export_command, "convert")
main.add_command(report_command)
main.add_command(plot_command)


def _forms(unstack: tuple[str, ...], stack: tuple[str, ...], axis: int) -> list[partial[Any]]:
    if not (unstack or stack):
        return []
    from ckpt_callbacks import forms

    return [partial(forms.unstack, group=group, axis=axis) for group in unstack] + [
        partial(forms.stack, group=group, axis=axis) for group in stack
    ]


@main.command(name="verify")
@_directory
def verify_command(directory: Path) -> None:
    """Check every file in DIRECTORY against its record; exit with 1 if one is damaged."""
    try:
        problems = verify(directory)
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error
    for problem in problems:
        click.echo(problem.text)
    if problems:
        raise SystemExit(1)
    click.echo("all files are as recorded")


@main.command(name="pin")
@_directory
@click.argument("step", type=int)
def pin_command(directory: Path, step: int) -> None:
    """Keep STEP in DIRECTORY, and everywhere else, whatever the policy says."""
    _ask(pin, directory, step)


@main.command(name="unpin")
@_directory
@click.argument("step", type=int)
def unpin_command(directory: Path, step: int) -> None:
    """Leave STEP in DIRECTORY to the policy again."""
    _ask(unpin, directory, step)


@main.command(name="adopt")
@click.argument("source", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--step", "steps", type=int, multiple=True, help="Only this one; may be repeated.")
def adopt_command(source: Path, directory: Path, steps: tuple[int, ...]) -> None:
    """Take the checkpoints of SOURCE, a directory of Orbax, into the run directory DIRECTORY."""
    try:
        taken = adopt(source, directory, steps=steps or None)
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"took {', '.join(map(str, taken)) or 'nothing, since all is there'}")


@main.command(name="sync")
@_directory
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait for the stores.")
def sync_command(directory: Path, timeout: float) -> None:
    """Send what the stores of DIRECTORY do not have yet; exit with 1 if one still lacks some.

    A store that is down is tried again until the timeout.
    """
    try:
        names = [known.get("title", name) for name, known in _stores(directory).items()]
        click.echo(f"sending to {', '.join(names) or 'no store'}, for {timeout:.0f} s at most")
        unsent = sync(directory, timeout=timeout)
        stores = _stores(directory)
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error
    for name, known in stores.items():
        title = known.get("title", name)
        if name in unsent:
            click.echo(f"{title} lacks {unsent[name]}")
        else:
            click.echo(f"{title} has everything")
    if unsent:
        raise SystemExit(1)


def _stores(directory: Path) -> Mapping[str, Mapping[str, str]]:
    return RunDirectory(directory).open_run().stores


def _ask(function: Callable[[Path, int], bool], directory: Path, step: int) -> None:
    try:
        if not function(directory, step):
            click.echo("the run that owns the directory has not answered; it will do it later")
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error


def _print(function: Callable[..., object], *arguments: object) -> None:
    """Print what a function returns, or the message of its error."""
    try:
        click.echo(function(*arguments))
    except CkptCallbacksError as error:
        raise click.ClickException(str(error)) from error
