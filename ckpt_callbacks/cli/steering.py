"""What a person wants otherwise than the policy: `pin`, `unpin`, `promote` and `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpt_callbacks.cli.output import emit, json_option, table
from ckpt_callbacks.cli.places import Step, directory_argument, step_in
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.report import size
from ckpt_callbacks.text import counted

__all__ = ["pin_command", "promote_command", "prune_command", "unpin_command"]

_LATER = "the run that owns the directory has not answered; it will do it later"
_timeout = click.option(
    "--timeout", default=60.0, show_default=True, help="Seconds to wait for the owner or stores."
)


@click.command(short_help="Keep a step everywhere, whatever the policy says.")
@directory_argument
@click.argument("step", type=Step())
@_timeout
@json_option
def pin_command(directory: Path, step: int | str, timeout: float, *, as_json: bool) -> None:
    """Keep STEP in DIRECTORY, and everywhere else, whatever the policy says.

    A run that is going on there does so within a second.
    """
    from ckpt_callbacks.requests import pin

    number = step_in(directory, step)
    applied = pin(directory, number, timeout=timeout)
    _told({"step": number, "pinned": True}, f"step {number} is pinned", applied, as_json=as_json)


@click.command(short_help="Leave a step to the policy again.")
@directory_argument
@click.argument("step", type=Step())
@_timeout
@json_option
def unpin_command(directory: Path, step: int | str, timeout: float, *, as_json: bool) -> None:
    """Leave STEP in DIRECTORY to the policy again, and take back what it was promoted to.

    In trackers such an alias stays where it is, with the copy, until another step gets it.
    """
    from ckpt_callbacks.requests import unpin

    number = step_in(directory, step)
    applied = unpin(directory, number, timeout=timeout)
    said = f"step {number} is left to the policy"
    _told({"step": number, "pinned": False}, said, applied, as_json=as_json)


@click.command(short_help="Give a step an alias everywhere, and pin it.")
@directory_argument
@click.argument("step", type=Step())
@click.argument("alias")
@_timeout
@json_option
def promote_command(
    directory: Path, step: int | str, alias: str, timeout: float, *, as_json: bool
) -> None:
    """Let ALIAS, such as production, name STEP in DIRECTORY and in every tracker.

    It is pinned for as long as it has the alias.
    """
    from ckpt_callbacks.requests import promote

    number = step_in(directory, step)
    before = open_directory(directory).open_run().named.get(alias)
    applied = promote(directory, number, alias, timeout=timeout)
    moved = f", which was step {before}" if before not in (None, number) else ""
    facts = {"step": number, "alias": alias, "previous": before}
    _told(facts, f"step {number} is {alias!r}{moved}", applied, as_json=as_json)


@click.command(short_help="Remove what a policy does not keep; it shows it and asks.")
@directory_argument
@click.option(
    "--keep",
    metavar="POLICY",
    help="What to keep, such as latest:2,best:3:val_accuracy:max; the run's policy if not given.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_timeout
@json_option
def prune_command(
    directory: Path, keep: str | None, timeout: float, *, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Remove what a policy does not keep from DIRECTORY and from every tracker.

    POLICY is one or several, with commas between: latest:N, best:N:METRIC:min or :max, every:N
    steps, seconds:N, step:N. It holds this once. The run's own policy stays in force for what is
    saved later. The newest checkpoint, and what is pinned or promoted, always stays.

    It shows what goes, and why, and asks. Without a terminal to ask on, give --yes.
    """
    from ckpt_callbacks.cli.policies import policy_from_text
    from ckpt_callbacks.pruning import plan_prune
    from ckpt_callbacks.requests import carry_out

    plan = plan_prune(directory, policy_from_text(keep) if keep else None)
    facts: dict[str, Any] = {
        "keep": str(plan.keep),
        "bytes": plan.bytes,
        "kept": {str(step): reason for step, reason in plan.kept.items()},
        "goes": [
            {"step": g.step, "reason": g.reason, "bytes": g.bytes, "where": [*g.where]}
            for g in plan.goes
        ],
        "applied": False,
    }
    free = f"{counted(len(plan.goes), 'checkpoint')} and {size(plan.bytes)}"
    shown: Any = f"nothing goes: {counted(len(plan.kept), 'checkpoint')}, all kept by {plan.keep}"
    if plan.goes:
        columns = {"step": True, "size": True, "goes because": False, "from": False}
        stores = open_directory(directory).open_run().stores
        rows = [
            [
                *(str(g.step), size(g.bytes), g.reason),
                ", ".join(stores.get(name, {}).get("title", name) for name in g.where),
            ]
            for g in plan.goes
        ]
        stays = ", ".join(f"{step} ({why})" for step, why in [*plan.kept.items()][-12:])
        shown = table(f"{free} go; these stay: {stays}", columns, rows)
    if dry_run or not plan.goes:
        emit(facts, shown, as_json=as_json)
        return
    if not as_json:
        emit({}, shown, as_json=False)
    elif not yes:
        raise click.UsageError("--json asks nothing: give --yes, or --dry-run to see the plan")
    if not yes:
        click.confirm(f"Remove {free} everywhere?", abort=True)
    applied = carry_out(directory, plan, timeout=timeout)
    _told(facts, f"removed {free}", applied, as_json=as_json)


def _told(facts: dict[str, Any], text: str, applied: bool, *, as_json: bool) -> None:
    """Say what was done, or that it will be; exit with 1 then."""
    emit({**facts, "applied": applied}, text if applied else _LATER, as_json=as_json)
    if not applied:
        raise SystemExit(1)
