"""Whether a whole run directory is as its records say."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import RecordError
from ckpt_callbacks.manifest import damage

__all__ = ["Problem", "verify"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a run directory that is not as it was recorded."""

    step: int | None
    """The checkpoint it concerns, or `None` for a record that cannot be read."""
    text: str
    """The file, and both sides."""


def verify(directory: str | os.PathLike[str]) -> list[Problem]:
    """Return all that is damaged in a run directory; empty if all is well.

    Every file of every complete checkpoint is read. What is evicted meanwhile is no problem.

    Raises:
        ConfigError: it is no run directory.
        RecordError: `run.json` is damaged or of a newer format.
    """
    run_directory = RunDirectory(directory)
    run_directory.open_run()
    bad: list[RecordError] = []
    records = run_directory.read_records(on_damage=lambda path, error: bad.append(error))
    found = [Problem(None, str(error)) for error in bad]
    for step, record in records.items():
        if record.state == "complete" and not record.discarded:
            root = run_directory.path(step)
            problems = [Problem(step, text) for text in damage(root, record.files)]
            now = run_directory.read_record(step) if problems else None
            if now and (now.state, now.discarded, now.files) == ("complete", "", record.files):
                found += problems
    return found
