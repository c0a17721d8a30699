"""The table of what is kept, why and where, read from a run directory alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.policy import Candidate, KeepPolicy, as_step
from ckpt_callbacks.record import Copy, Record, RunFile
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.retention import Decision, decide, explain, policy_from_json, ranked_metrics
from ckpt_callbacks.situation import is_away
from ckpt_callbacks.text import as_text, counted, listed, suggestion

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from ckpt_callbacks.profile import Profile

__all__ = ["CheckpointInfo", "Summary", "Why", "checkpoints", "find", "summarize", "why"]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint in the table."""

    step: int
    time: float
    """Start of its save, seconds since the epoch."""
    directory: Path
    """The run directory."""
    metrics: Mapping[str, float]
    reason: str
    """Why it is kept; empty for one that is on its way out."""
    where: list[str]
    """`local`, or `s3` or `gs` for a directory there, and each store with the state of its copy
    unless it is confirmed."""
    aliases: list[str]
    bytes: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """As given to `on_step`."""
    copies: Mapping[str, Copy] = field(default_factory=dict)
    """By store, what it has of it."""
    complete: bool = True
    """Whether all of it is here, or confirmed by a store."""

    @property
    def path(self) -> Path:
        """Where it is in the run directory, if it is there."""
        return self.directory / str(self.step)


@dataclass(frozen=True, slots=True)
class Why:
    """Why a step is there, or is not. Its text is for people."""

    step: int
    state: str
    """`kept`, `evicted`, or what its record says."""
    reason: str
    details: str = ""
    """What each policy says of it."""
    aliases: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.state == "kept":
            names = "".join(f" It is {name!r}." for name in self.aliases)
            return f"Step {self.step} is kept: {self.reason}.{names}\n{self.details}"
        if self.state == "evicted":
            values = ", ".join(f"{k} {v:g}" for k, v in self.metrics.items()) or "none"
            return f"Step {self.step} was evicted: {self.reason}.\nIts metrics were: {values}"
        return f"Step {self.step} is {self.reason or self.state}."


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

        table = Table(title=counted(len(self.rows), "checkpoint"), title_justify="left")
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
    run_directory = open_directory(directory)
    run = run_directory.open_run()
    policy = policy_from_json(run.policy)
    records = run_directory.read_records()
    here = _here(run_directory, records)
    decision = _decide(run, policy, _history(records, here))
    kept = decision.kept
    if held := [s for s, r in records.items() if r.lost and r.copies and not is_away(r)]:
        # A tracker keeps these too, such as hard links to what somebody removed here.
        kept = {**_decide(run, policy, _history(records, {*here, *held})).kept, **kept}
    titles = {name: run.stores.get(name, {}).get("title", name) for name in run.stores}
    names: dict[int, list[str]] = {}
    for name, step in decision.aliases.items():
        names.setdefault(step, []).append(name)
    rows: list[CheckpointInfo] = []
    for step, record in records.items():
        where = [run_directory.kind] if step in here else []
        if record.state == "complete" and not where:
            where = [] if is_away(record) else [f"{run_directory.kind} (missing)"]
        for name, copy in sorted(record.copies.items()):
            title = titles.get(name, name)
            where.append(title if copy.state == "confirmed" else f"{title} ({copy.state})")
        rows.append(
            CheckpointInfo(
                step=step,
                time=record.time,
                directory=run_directory.root,
                metrics=record.metrics,
                reason=kept.get(step, record.state if record.state == "saving" else ""),
                where=where,
                aliases=names.get(step, []),
                bytes=record.bytes,
                metadata=record.metadata,
                copies=record.copies,
                complete=step in here or (record.lost and _is_sent(record)),
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
    """Return one checkpoint of a run directory, reading no array: an alias or a step.

    It may be in a tracker alone, as its `where` says.

    Raises:
        ConfigError: `directory` is no run directory.
        CheckpointNotFound: nothing there answers `which`.
        RecordError: a record in it cannot be read.
    """
    which = which if isinstance(which, str) else as_step("find", which)
    missing = [f"{open_directory(directory).kind} (missing)"]
    whole = [row for row in checkpoints(directory) if row.complete and row.where[:1] != missing]
    rows = [row for row in whole if row.reason]
    for row in rows:
        if which == row.step or which in row.aliases:
            return row
    aliases = sorted({a for row in rows for a in row.aliases})
    steps = [row.step for row in rows]
    raise CheckpointNotFound(
        f"{directory} has no checkpoint {which!r}; it has {', '.join(aliases) or 'no aliases'} and "
        f"steps {listed(steps)}{suggestion(which, aliases, steps)}"
    )


def why(directory: str | os.PathLike[str], which: int | str) -> Why:
    """Return why a step, or what an alias names, is kept, was evicted, or is not there.

    Raises:
        ConfigError: `directory` is no run directory.
        CheckpointNotFound: the run never saved that step, or has no such alias.
        RecordError: a record in it cannot be read.
    """
    run_directory = open_directory(directory)
    run = run_directory.open_run()
    policy = policy_from_json(run.policy)
    records = run_directory.read_records()
    history = _history(records, _here(run_directory, records))
    decision = _decide(run, policy, history)
    names = sorted(decision.aliases)
    if isinstance(which, str) and which not in names:
        raise CheckpointNotFound(
            f"{run_directory} has no checkpoint {which!r}; it has "
            f"{', '.join(names) or 'no aliases'}{suggestion(which, names)}"
        )
    step = decision.aliases[which] if isinstance(which, str) else which
    if step in decision.kept:
        aliases = [name for name, named in decision.aliases.items() if named == step]
        details, values = explain(policy, history, step), records[step].metrics
        return Why(step, "kept", decision.kept[step], details, aliases, values)
    if gone := [g for g in run_directory.read_evicted() if g.step == step]:
        return Why(step, "evicted", gone[-1].reason, metrics=gone[-1].metrics)
    if step in records:
        return Why(step, records[step].state, records[step].discarded)
    raise CheckpointNotFound(
        f"{run_directory} never had a step {step}; it has {listed(list(records))}"
        f"{suggestion(step, (), list(records))}"
    )


def _is_sent(record: Record) -> bool:
    return any(copy.state == "confirmed" for copy in record.copies.values())


def _decide(run: RunFile, policy: KeepPolicy, history: list[Candidate]) -> Decision:
    old = policy_from_json(run.change.policy) if run.change else None
    return decide(policy, history, run.pins, old, run.named)


def _here(directory: RunDirectory, records: Mapping[int, Record]) -> set[int]:
    """Return the complete checkpoints whose files are here."""
    complete = (step for step, record in records.items() if record.state == "complete")
    return set(filter(directory.is_committed, complete))


def _history(records: Mapping[int, Record], here: Collection[int]) -> list[Candidate]:
    """Return the checkpoints that are judged: those that are here, or in a store alone."""
    return [
        Candidate(step, r.metrics, r.time)
        for step, r in records.items()
        if not r.discarded and (step in here or is_away(r))
    ]


def size(count: int) -> str:
    """Return a number of bytes for people, such as `1.4 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
