"""Arguments that name a run directory, a step in it, or a checkpoint anywhere."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ckpt_callbacks.addresses import is_address
from ckpt_callbacks.bucket import is_bucket
from ckpt_callbacks.errors import CkptCallbacksError
from ckpt_callbacks.nearby import nearby
from ckpt_callbacks.remote import open_directory

__all__ = [
    "Directory",
    "ParamType",
    "Source",
    "Step",
    "as_which",
    "directory_argument",
    "source_of",
    "step_in",
]

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # of which older versions know no type of the value


class Directory(ParamType):
    """A run directory that exists, or a bucket as it is given."""

    name = "directory"

    def __init__(self, *, buckets: bool = False) -> None:
        self._buckets = buckets

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        if is_bucket(str(value)):
            if not self._buckets:
                self.fail(f"{value} is in object storage, where this command can not look", param)
            return str(value)
        path = Path(value).expanduser()
        if is_address(str(value)) and not path.exists():
            self.fail(
                f"{value} is an address in a tracker: `ckpt-callbacks pull {value} NEW` brings it "
                "into a run directory",
                param, ctx,
            )  # fmt: skip
        if not path.is_dir():
            what = "is a file" if path.exists() else "is not there"
            self.fail(f"{value} {what}{nearby(path)}", param, ctx)
        return path

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class Step(ParamType):
    """A step, or an alias, of the run directory that is given before it."""

    name = "step"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return as_which(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        place = ctx.params.get("directory") or ctx.params.get("source")
        place = place or next(iter(ctx.args), None)  # before an option that has no value yet
        there: list[str] = []
        if place and not is_address(str(place)):
            with suppress(CkptCallbacksError, OSError):  # then there is nothing to offer
                from ckpt_callbacks.report import checkpoints

                rows = checkpoints(place)
                there = sorted({alias for row in rows for alias in row.aliases})
                there += [str(row.step) for row in rows]
        return [CompletionItem(name) for name in there if name.startswith(incomplete)]


class Source(ParamType):
    """A run directory, a checkpoint, or an address in a tracker."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


directory_argument = click.argument("directory", type=Directory(buckets=True))


def as_which(value: int | str) -> int | str:
    """Return a step as a number, and an alias as it is."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def source_of(source: str, which: int | str | None = None) -> tuple[str, int | str]:
    """Return what `restore` takes: of `runs/digits/best` the run directory, and `best`."""
    path = Path(source).expanduser()
    if is_address(source) or which is not None or (path / ".ckpt_callbacks").is_dir():
        return source, "last" if which is None else which
    if is_bucket(source):
        root, _, name = source.rstrip("/").rpartition("/")
        below = "/" in root.partition("://")[2]
        named = below and open_directory(source).read_run() is None
        return (root, as_which(name)) if named else (source, "last")
    named = path.name.isdecimal() or not path.exists()
    if named and (path.parent / ".ckpt_callbacks").is_dir():
        return str(path.parent), as_which(path.name)
    return source, "last"


def step_in(directory: Path, which: int | str) -> int:
    """Return the step that an alias names in a run directory, and a step as it is.

    Raises:
        CheckpointNotFound: there is no such alias.
    """
    if isinstance(which, int):
        return which
    from ckpt_callbacks.report import find

    return find(directory, which).step
