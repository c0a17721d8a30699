"""The command line, `ckpt-callbacks`.

Each command is a function `<name>_command` in a module of its own kind, which is imported when the
command is used; what is heavy, such as JAX, is imported where a command needs it.

The exit status is 0 where all is well, 1 where something was found that is not, such as a damaged
file, a difference, or a tracker that lacks something, and 2 where what was asked for can not be
done as it was asked, such as an unknown option, directory, step or address.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import click

from ckpt_callbacks.errors import (
    CheckpointNotFound,
    CkptCallbacksError,
    ConfigError,
    NewerFormat,
    RecordError,
    UsageError,
)
from ckpt_callbacks.text import suggestion

__all__ = ["main"]

COMMANDS = {
    "See": {
        "ls": "listing",
        "why": "listing",
        "show": "showing",
        "inspect": "showing",
        "diff": "comparing",
        "watch": "watching",
        "report": "pictures",
        "plot": "pictures",
    },
    "Check": {"verify": "checking", "doctor": "doctor", "plugins": "plugins"},
    "Steer": {
        "pin": "steering",
        "unpin": "steering",
        "promote": "steering",
        "prune": "steering",
    },
    "Move": {
        "sync": "moving",
        "pull": "moving",
        "adopt": "moving",
        "export": "exporting",
        "convert": "exporting",
    },
}
"""By what they are for, the names of the commands, and the modules here that have them."""


class _Wrong(click.ClickException):
    """What was asked for can not be done as it was asked."""

    exit_code = 2


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for section in COMMANDS.values():
            if module := section.get(cmd_name):
                found = vars(import_module(f"{__name__}.{module}"))[f"{cmd_name}_command"]
                return found if isinstance(found, click.Command) else None
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-"):
            raise click.UsageError(
                f"There is no command {args[0]!r}{suggestion(args[0], names)}", ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(list(self._helps(ctx, section)))

    def _helps(self, ctx: click.Context, names: dict[str, str]) -> Iterator[tuple[str, str]]:
        for name in names:
            if command := self.get_command(ctx, name):
                yield name, command.get_short_help_str(60)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # nobody reads on, which is click's to handle
            raise
        except (ConfigError, CheckpointNotFound, UsageError) as error:
            raise _Wrong(str(error)) from error
        except PermissionError as error:
            raise _Wrong(_of_system(error)) from error
        except NewerFormat as error:
            raise click.ClickException(str(error)) from error
        except RecordError as error:
            raise click.ClickException(
                f"{error}. `ckpt-callbacks doctor` and `verify` tell all that is damaged; a run "
                "there, or `sync`, makes the record of a checkpoint again, without its metrics"
            ) from error
        except CkptCallbacksError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(_of_system(error)) from error


def _of_system(error: OSError) -> str:
    """Return what the system refuses, and of which file."""
    known = error.strerror and error.filename
    return f"{error.filename}: {error.strerror}" if known else str(error)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ckpt-callbacks")
def main() -> None:
    """See and steer the checkpoints of a run: which are kept, why, and where."""
