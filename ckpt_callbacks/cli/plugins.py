"""What is installed beside us: `plugins`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import click

from ckpt_callbacks.cli.output import emit, json_option, table

__all__ = ["Plugin", "installed", "plugins_command"]

_GROUPS = {
    "ckpt_callbacks.stores": "store",
    "ckpt_callbacks.addresses": "address",
    "ckpt_callbacks.adapters": "state adapter",
}


@dataclass(frozen=True, slots=True)
class Plugin:
    """An entry point of ours, or of somebody else."""

    kind: str
    name: str
    value: str
    package: str
    version: str
    error: str
    """Why it cannot be loaded; empty if it can."""


def installed() -> Iterator[Plugin]:
    """Yield what is installed, each loaded once to see whether it can be."""
    for group, kind in _GROUPS.items():
        for point in sorted(entry_points(group=group), key=lambda point: point.name):
            package, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
            yield Plugin(kind, point.name, point.value, package, version, _error(point))


def _error(point: EntryPoint) -> str:
    try:
        point.load()
    except Exception as error:  # whatever the code of somebody else raises
        return f"{type(error).__name__}: {error}"
    return ""


@click.command(short_help="List what is installed: stores, addresses, state adapters.")
@json_option
def plugins_command(*, as_json: bool) -> None:
    """List the stores, addresses and state adapters that are installed."""
    found = list(installed())
    facts = {
        "plugins": [
            {
                "kind": p.kind,
                "name": p.name,
                "value": p.value,
                "package": p.package,
                "version": p.version,
                "error": p.error or None,
            }
            for p in found
        ]
    }
    rows = [[p.kind, p.name, p.value, f"{p.package} {p.version}", p.error or "yes"] for p in found]
    columns = dict.fromkeys(("kind", "name", "from", "package", "loads"), False)
    emit(facts, table("Plugins", columns, rows), as_json=as_json)
    if any(p.error for p in found):
        raise SystemExit(1)
