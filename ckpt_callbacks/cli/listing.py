"""What a run directory holds: `ls` and `why`."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ckpt_callbacks.catalog import addresses_of
from ckpt_callbacks.cli.output import ago, emit, json_option, numbered, table
from ckpt_callbacks.cli.places import Step, directory_argument
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.record import ADOPTED, RunFile
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.report import CheckpointInfo, size, summarize, why
from ckpt_callbacks.retention import policy_from_json
from ckpt_callbacks.text import counted

__all__ = ["facts_of", "listing", "ls_command", "state_of", "why_command"]

_METRICS = 3
"""How many are shown where the policy ranks by none."""


@click.command(short_help="List the checkpoints of a run.")
@directory_argument
@click.option("--plain", is_flag=True, help="Draw no frame.")
@json_option
def ls_command(directory: Path, *, plain: bool, as_json: bool) -> None:
    """List the checkpoints in the run directory DIRECTORY.

    Complete is one of which all is here, or confirmed by a tracker. Below the table are addresses
    by which other machines read what has an alias; --json has those of all.
    """
    gc.disable()  # there may be thousands of records, of which none becomes garbage
    root = open_directory(directory)
    if as_json:
        emit(facts_of(root), "", as_json=True)
        return
    summary, run, owner = summarize(directory), root.open_run(), root.owner()
    emit({}, listing(root, run, owner, summary.rows, summary.metrics, plain=plain), as_json=False)
    address = addresses_of(run)
    for row in summary.rows:
        found = [address(s, row.step, c) for s, c in row.copies.items() if row.aliases]
        if there := [text for text in found if text]:
            click.echo(f"{', '.join(row.aliases)}: {'  '.join(there)}")


def listing(
    root: RunDirectory,
    run: RunFile,
    owner: str | None,
    rows: Sequence[CheckpointInfo],
    ranked: Sequence[str],
    *,
    plain: bool = False,
    most: int = sys.maxsize,
) -> Any:
    """Return the table of the newest checkpoints, of which `most` are shown."""
    now = time.time()
    metrics = ranked or (sorted(rows[-1].metrics)[:_METRICS] if rows else ())
    columns = {"step": True, "age": True, **dict.fromkeys(metrics, True), "size": True}
    columns |= dict.fromkeys(("kept because", "where", "aliases", "complete"), False)
    cells = [
        [
            str(row.step),
            ago(now - row.time),
            *(f"{row.metrics[m]:.4g}" if m in row.metrics else "-" for m in metrics),
            size(row.bytes),
            row.reason or "on its way out",
            ", ".join(row.where),
            ", ".join(row.aliases),
            "yes" if row.complete else "no",
        ]
        for row in rows[-most:]
    ]
    name = str(root).rpartition("/")[2]
    about = f"{name}: {counted(len(rows), 'checkpoint')}, "
    about += f"{size(sum(row.bytes for row in rows))}, keep {policy_from_json(run.policy)}, "
    about += state_of(run, owner)
    whole = all(row.complete for row in rows[-most:])  # then it tells nothing
    spare = [*["complete"] * whole, "size", "age"]
    return table(about, columns, cells, plain=plain, spare=spare)


def state_of(run: RunFile, owner: str | None) -> str:
    """Return what a run is doing, or how the last one ended, in words."""
    if owner:
        return f"in use by {owner}"
    if run.status == ADOPTED:
        return "no run yet"
    return f"last run {'killed' if run.status == 'running' else run.status}"


def facts_of(root: RunDirectory) -> dict[str, Any]:
    """Return what is in a run directory, as JSON values."""
    rows, run, owner = summarize(str(root)).rows, root.open_run(), root.owner()
    address = addresses_of(run)
    return {
        "directory": str(root),
        "run": {
            "id": run.run_id,
            "status": "running" if owner else run.status,
            "owner": owner,
            "policy": str(policy_from_json(run.policy)),
            "pins": sorted(run.pins),
            "promoted": run.named,
        },
        "checkpoints": [
            {
                "step": row.step,
                "time": row.time,
                "path": f"{root}/{row.step}",
                "metrics": numbered(row.metrics),
                "bytes": row.bytes,
                "reason": row.reason,
                "aliases": row.aliases,
                "complete": row.complete,
                "local": row.where[:1] == [root.kind],
                "copies": {
                    store: {
                        "state": copy.state,
                        "ref": copy.ref,
                        "address": address(store, row.step, copy),
                    }
                    for store, copy in row.copies.items()
                },
                "metadata": dict(row.metadata),
            }
            for row in rows
        ],
    }


@click.command(short_help="Say why a step is kept, or was evicted.")
@directory_argument
@click.argument("step", type=Step())
@json_option
def why_command(directory: Path, step: int | str, *, as_json: bool) -> None:
    """Say why STEP, or what an alias names, is kept in DIRECTORY or was evicted from it."""
    found = why(directory, step)
    facts = {
        "step": found.step,
        "state": found.state,
        "reason": found.reason,
        "details": found.details,
        "aliases": [*found.aliases],
        "metrics": numbered(found.metrics),
    }
    emit(facts, str(found), as_json=as_json)
