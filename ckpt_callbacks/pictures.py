"""Pictures of a run, from its directory alone: the report, and a metric's curve as a file."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt_callbacks import page
from ckpt_callbacks.atomic import new_file
from ckpt_callbacks.charts import picture
from ckpt_callbacks.curves import curve_chart
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.history import with_records
from ckpt_callbacks.policy import Candidate
from ckpt_callbacks.remote import is_bucket, open_directory
from ckpt_callbacks.report import summarize
from ckpt_callbacks.retention import policy_from_json
from ckpt_callbacks.situation import Situation, candidate
from ckpt_callbacks.stores import Curve, Overview, Shown
from ckpt_callbacks.text import suggestion

__all__ = ["plot", "write_report"]


def write_report(
    directory: str | os.PathLike[str], dest: str | os.PathLike[str] | None = None
) -> Path:
    """Write what there is to see of a run as one HTML file that needs no network.

    It shows the metrics with the checkpoints that are kept and evicted, where each of them was
    and when, what disk they took, how long saves and uploads lasted, and why each is kept. The run
    may go on meanwhile.

    Args:
        directory: the run directory. Of one in object storage there is no history, so the report
            shows what the records know.
        dest: the file, which is replaced; `report.html` in the run directory if not given, or in
            the working directory if that one is in object storage.

    Returns:
        The file.

    Raises:
        ConfigError: `directory` is no run directory, or the file cannot be written.
        RecordError: a record in it cannot be read.
    """
    overview = _overview(directory)
    path = _beside(directory, "report.html") if dest is None else Path(dest)
    return _write(path.expanduser().absolute(), page.html(overview))


def plot(
    directory: str | os.PathLike[str],
    dest: str | os.PathLike[str] | None = None,
    *,
    metric: str | None = None,
) -> Path:
    """Write the curve of a metric over all checkpoints as an SVG file.

    Args:
        directory: the run directory.
        dest: the file, which is replaced; if not given it is named after the metric, where the
            report would be.
        metric: its name; the first that the policy ranks by, or else the first by name, if not
            given.

    Returns:
        The file.

    Raises:
        ConfigError: `directory` is no run directory, no checkpoint has such a metric, or the file
            is no `.svg` or cannot be written.
        RecordError: a record in it cannot be read.
    """
    overview = _overview(directory)
    names = [curve.metric for curve in overview.curves]
    found = next((c for c in overview.curves if metric in (None, c.metric)), None)
    chart = curve_chart(found, overview.rows) if found else None
    if found is None or chart is None:
        there = f"the metrics are {', '.join(names)}" if names else "there is none"
        what = f"metric {metric!r}" if metric else "metric"
        raise ConfigError(
            f"plot: no checkpoint of {directory} has a value of a {what}; {there}"
            f"{suggestion(metric, names) if metric else ''}"
        )
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in found.metric)
    path = _beside(directory, f"{safe}.svg") if dest is None else Path(dest)
    if path.suffix != ".svg":
        raise ConfigError(f"plot: {path.name} is no name for an SVG file: it must end in .svg")
    return _write(path.expanduser().absolute(), picture(chart))


def _overview(directory: str | os.PathLike[str]) -> Overview:
    """Return all that is known of a run, for people."""
    run_directory = open_directory(directory)
    summary = summarize(directory)
    run, records = run_directory.open_run(), run_directory.read_records()
    evicted = run_directory.read_evicted()
    policy = policy_from_json(run.policy)
    gone = [Candidate(g.step, g.metrics, g.time) for g in evicted]
    ranked = Situation(records, run, policy, {}).curves(gone)
    past = {c.step: c for c in [*gone, *map(candidate, records.values())]}
    others = {name for c in past.values() for name in c.metrics} - {c.metric for c in ranked}
    return Overview(
        name=run_directory.name,
        policy=str(policy),
        rows=[
            Shown(
                step=row.step,
                time=row.time,
                reason=row.reason,
                aliases=tuple(row.aliases),
                metrics=row.metrics,
                bytes=row.bytes,
                ref=", ".join(row.where),
            )
            for row in summary.rows
            if row.where
        ],
        curves=[*ranked, *(_curve(name, past) for name in sorted(others))],
        titles={name: known.get("title", name) for name, known in run.stores.items()},
        history=with_records(run_directory.read_history(), records),
        evicted=evicted,
    )


def _beside(directory: str | os.PathLike[str], name: str) -> Path:
    return Path(name) if is_bucket(directory) else Path(directory) / name


def _curve(name: str, past: dict[int, Candidate]) -> Curve:
    points = [(s, past[s].metrics[name]) for s in sorted(past) if name in past[s].metrics]
    return Curve(name, None, points)


def _write(path: Path, text: str) -> Path:
    try:
        with new_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give another file"
        ) from error
    return path
