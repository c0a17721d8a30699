"""The table of what is kept, why and where, read from a run directory alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.policy import Candidate, KeepPolicy, as_step
from ckpt_callbacks.record import Record, RunFile
from ckpt_callbacks.retention import Decision, decide, explain, policy_from_json, ranked_metrics
from ckpt_callbacks.text import as_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from ckpt_callbacks.profile import Profile

__all__ = ["CheckpointInfo", "Summary", "checkpoints", "find", "summarize", "why"]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint in the table."""

    step: int
    time: float
    """Start of its save, seconds since the epoch."""
    path: Path
    metrics: Mapping[str, float]
    reason: str
    """Why it is kept; empty for one that is on its way out."""
    where: list[str]
    """`local`, and each store with the state of its copy unless it is confirmed."""
    aliases: list[str]
    bytes: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """As given to `on_step`."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The checkpoints of a run. Print it for the table, plainly or with rich."""

    rows: list[CheckpointInfo]
    metrics: list[str]
    """Names of the metrics that the policy ranks by."""
    hints: list[str]
    """One line a tracker on how to open it."""
    profile: Profile | None = None
    """Where the time went, of a run with `Callbacks(profile=True)`."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table(title=f"{len(self.rows)} checkpoints", title_justify="left")
        table.add_column("step", justify="right")
        for name in self.metrics:
            table.add_column(name, justify="right")
        for title in ("kept because", "alias", "where"):
            table.add_column(title)
        table.add_column("size", justify="right")
        for row in self.rows:
            values = [row.metrics.get(m) for m in self.metrics]
            table.add_row(
                str(row.step),
                *("-" if v is None else f"{v:.4f}" for v in values),
                row.reason or "on its way out",
                ", ".join(row.aliases),
                ", ".join(row.where),
                size(row.bytes),
            )
        yield table
        yield from self.hints

    def __str__(self) -> str:
        return as_text(self)


def summarize(directory: str | os.PathLike[str], hints: Sequence[str] = ()) -> Summary:
    """Return what is kept in a run directory; its owner need not be running.

    Raises:
        ConfigError: `directory` is no run directory.
        RecordError: a record in it cannot be read.
    """
    run_directory = RunDirectory(directory)
    run = run_directory.open_run()
    policy = policy_from_json(run.policy)
    records = run_directory.read_records()
    decision = _decide(run, policy, _history(run_directory, records))
    rows: list[CheckpointInfo] = []
    for step, record in records.items():
        where = ["local"] if record.state == "complete" else []
        if where and not run_directory.is_committed(step):
            where = ["local (missing)"]
        for name, copy in sorted(record.copies.items()):
            title = run.stores.get(name, {}).get("title", name)
            where.append(title if copy.state == "confirmed" else f"{title} ({copy.state})")
        rows.append(
            CheckpointInfo(
                step=step,
                time=record.time,
                path=run_directory.path(step),
                metrics=record.metrics,
                reason=decision.kept.get(step, record.state if record.state == "saving" else ""),
                where=where,
                aliases=[name for name, named in decision.aliases.items() if named == step],
                bytes=record.bytes,
                metadata=record.metadata,
            )
        )
    return Summary(rows, ranked_metrics(policy), list(hints))


def checkpoints(directory: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """Return the checkpoints in a run directory, oldest first, reading no array.

    Raises:
        ConfigError: `directory` is no run directory.
        RecordError: a record in it cannot be read.
    """
    return summarize(directory).rows


def find(directory: str | os.PathLike[str], which: int | str = "last") -> CheckpointInfo:
    """Return one checkpoint in a run directory, reading no array: an alias or a step.

    Raises:
        ConfigError: `directory` is no run directory.
        CheckpointNotFound: nothing there answers `which`.
        RecordError: a record in it cannot be read.
    """
    which = which if isinstance(which, str) else as_step("find", which)
    rows = [row for row in checkpoints(directory) if row.reason and row.where[:1] == ["local"]]
    for row in rows:
        if which == row.step or which in row.aliases:
            return row
    aliases = ", ".join(sorted({a for row in rows for a in row.aliases})) or "no aliases"
    steps = ", ".join(str(row.step) for row in rows) or "none"
    raise CheckpointNotFound(
        f"{directory} has no checkpoint {which!r}; it has {aliases} and steps {steps}"
    )


def why(directory: str | os.PathLike[str], step: int) -> str:
    """Return why a step is kept, was evicted, or is not there.

    Raises:
        ConfigError: `directory` is no run directory.
        CheckpointNotFound: the run never saved that step.
        RecordError: a record in it cannot be read.
    """
    run_directory = RunDirectory(directory)
    run = run_directory.open_run()
    policy = policy_from_json(run.policy)
    records = run_directory.read_records()
    history = _history(run_directory, records)
    decision = _decide(run, policy, history)
    if step in decision.kept:
        names = [f" It is {name!r}." for name, named in decision.aliases.items() if named == step]
        return (
            f"Step {step} is kept: {decision.kept[step]}.{''.join(names)}\n"
            f"{explain(policy, history, step)}"
        )
    gone = [g for g in run_directory.read_evicted() if g.step == step]
    if gone:
        values = ", ".join(f"{k} {v:g}" for k, v in gone[-1].metrics.items()) or "none"
        return f"Step {step} was evicted: {gone[-1].reason}.\nIts metrics were: {values}"
    if step in records:
        return f"Step {step} is {records[step].discarded or records[step].state}."
    steps = ", ".join(map(str, records)) or "none"
    raise CheckpointNotFound(f"{run_directory.root} never had a step {step}; it has {steps}")


def _decide(run: RunFile, policy: KeepPolicy, history: list[Candidate]) -> Decision:
    old = policy_from_json(run.change.policy) if run.change else None
    return decide(policy, history, run.pins, old)


def _history(directory: RunDirectory, records: Mapping[int, Record]) -> list[Candidate]:
    """Return the checkpoints that are judged: those that are here, or in a store alone."""
    return [
        Candidate(r.step, r.metrics, r.time)
        for r in records.values()
        if directory.is_readable(r) or (r.lost and not r.discarded and r.copies)
    ]


def size(count: int) -> str:
    """Return a number of bytes for people, such as `1.4 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
