"""Checkpoints that go somewhere: `sync`, `pull` and `adopt`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from ckpt_callbacks.cli.output import emit, json_option
from ckpt_callbacks.cli.places import Directory, Source, directory_argument
from ckpt_callbacks.remote import open_directory

__all__ = ["adopt_command", "pull_command", "sync_command"]

_new = click.argument("directory", type=click.Path(path_type=Path, file_okay=False))


@click.command(short_help="Send what the trackers of a run lack.")
@directory_argument
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait for the stores.")
@json_option
def sync_command(directory: Path, timeout: float, *, as_json: bool) -> None:
    """Send what the stores of DIRECTORY do not have yet; exit with 1 if one still lacks some.

    A store that is down is tried again until the timeout.
    """
    from ckpt_callbacks.requests import sync

    names = [known.get("title", name) for name, known in _stores(directory).items()]
    if not as_json:
        told = f"sending to {', '.join(names)}, for {timeout:.0f} s at most"
        click.echo(told if names else "the run has no tracker")
    unsent = sync(directory, timeout=timeout)
    stores = _stores(directory)
    titles = {name: known.get("title", name) for name, known in stores.items()}
    text = "\n".join(
        f"{title} lacks {unsent[name]}" if name in unsent else f"{title} has everything"
        for name, title in titles.items()
    )
    facts = {"stores": {n: {"title": t, "lacks": unsent.get(n)} for n, t in titles.items()}}
    if as_json or text:
        emit(facts, text, as_json=as_json)
    if unsent:
        raise SystemExit(1)


@click.command(short_help="Fetch a checkpoint from a tracker into a new run directory.")
@click.argument("address", type=Source())
@_new
@click.option("--go-on", is_flag=True, help="Let the checkpoint's own run go on there.")
@json_option
def pull_command(address: str, directory: Path, *, go_on: bool, as_json: bool) -> None:
    """Fetch the checkpoint at ADDRESS in a tracker into the new run directory DIRECTORY.

    ADDRESS is such as mlflow:/digits@best or wandb:me/digits/run:best. All files are verified. A
    run there is a new one that begins after that step; with --go-on it is the same run.
    """
    from ckpt_callbacks.pulling import pull

    step = pull(address, directory, go_on=go_on)
    facts = {"address": address, "directory": str(directory), "step": step}
    emit(facts, f"step {step} of {address} is in {directory}", as_json=as_json)


@click.command(short_help="Take checkpoints of Orbax into a run directory.")
@click.argument("source", type=Directory())
@_new
@click.option("--step", "steps", type=int, multiple=True, help="Only this one; may be repeated.")
@json_option
def adopt_command(source: Path, directory: Path, steps: tuple[int, ...], *, as_json: bool) -> None:
    """Take the checkpoints of SOURCE, a directory of Orbax, into the run directory DIRECTORY."""
    from ckpt_callbacks.adoption import adopt

    taken = adopt(source, directory, steps=steps or None)
    text = f"took {', '.join(map(str, taken)) or 'nothing, since all is there'}"
    emit({"directory": str(directory), "taken": taken}, text, as_json=as_json)


def _stores(directory: Path) -> Mapping[str, Mapping[str, str]]:
    return open_directory(directory).open_run().stores
