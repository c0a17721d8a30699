"""Whether all files are as recorded: `verify`."""

from __future__ import annotations

from pathlib import Path

import click

from ckpt_callbacks.cli.output import emit, json_option
from ckpt_callbacks.cli.places import directory_argument

__all__ = ["verify_command"]


@click.command(short_help="Check every file against its record.")
@directory_argument
@json_option
def verify_command(directory: Path, *, as_json: bool) -> None:
    """Check every file in DIRECTORY against its record; exit with 1 if one is damaged."""
    from ckpt_callbacks.verification import verify

    problems = verify(directory)
    facts = {"problems": [{"step": p.step, "text": p.text} for p in problems]}
    text = "\n".join(problem.text for problem in problems) or "all files are as recorded"
    emit(facts, text, as_json=as_json)
    if problems:
        raise SystemExit(1)
