"""Whether a whole run directory is as its records say."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import RecordError
from ckpt_callbacks.progress import transfer
from ckpt_callbacks.record import Record
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.situation import is_away

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

    Every file of every complete checkpoint is read, but for those that are only in a tracker. What
    is evicted meanwhile is no problem.

    Raises:
        ConfigError: it is no run directory.
        RecordError: `run.json` is damaged or of a newer format.
    """
    run_directory = open_directory(directory)
    run_directory.open_run()
    bad: list[RecordError] = []
    records = run_directory.read_records(on_damage=lambda path, error: bad.append(error))
    found = [Problem(None, str(error)) for error in bad]
    whole = {
        s: r
        for s, r in records.items()
        if r.state == "complete" and not r.discarded and not is_away(r)
    }
    with transfer("verifying", sum(record.bytes for record in whole.values())) as advance:
        for record in whole.values():
            found += _problems(run_directory, record, advance)
    return found


def _problems(
    directory: RunDirectory, record: Record, advance: Callable[[int], None]
) -> list[Problem]:
    problems = []
    for name, file in record.files.items():
        one = replace(record, files={name: file})
        problems += [Problem(record.step, text) for text in directory.damage(one)]
        advance(file.size)
    now = directory.read_record(record.step) if problems else None
    same = (
        now
        and not is_away(now)
        and (now.state, now.discarded, now.files) == ("complete", "", record.files)
    )
    return list(dict.fromkeys(problems)) if same else []
