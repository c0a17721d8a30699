"""All that has a target, measured one after the other, beside the peers; then table and pictures.

Run it in an environment that has the peers, on a machine that does nothing else meanwhile::

    tox run -e benchmarks
    tox run -e benchmarks -- --write      # and put what was found into benchmarks/README.md

`benchmarks/README.md` says what the rows are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
SCRIPTS = {
    "hot_path": ["--runs", "60"],
    "save_path": ["--rounds", "10"],
    "mirrors": [],
    "restore": [],
    "whole_loop": ["--rounds", "8"],
    "data_files": [],
    "export": ["--rounds", "5"],
    "scaling": ["--rounds", "3"],
}
SHORT = {
    "hot_path": ["--runs", "3"],
    "save_path": ["--mebibytes", "16", "--rounds", "2"],
    "mirrors": ["--mebibytes", "16", "--rounds", "2"],
    "restore": ["--mebibytes", "16", "--rounds", "2"],
    "whole_loop": ["--rounds", "1"],
    "data_files": ["--mebibytes", "16", "--rounds", "2"],
    "export": ["--mebibytes", "16", "--rounds", "1"],
    "scaling": ["--rounds", "1", "--largest", "16"],
}
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def markdown(found: dict[str, Any], when: str) -> str:
    """Return the tables as Markdown."""
    machine = next(iter(found.values()))["machine"]
    versions: dict[str, str] = {}
    lines: list[str] = []
    for name, of in found.items():
        versions |= of["versions"]
        if name == "scaling":  # is in the pictures
            continue
        lines += [
            f"**{of['title']}** (`{name}.py`)",
            "",
            "| what | median | 95 % interval | 5 to 95 % of rounds | target | |",
            "|---|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |".replace("|   ", "| &emsp;") for row in of["rows"]),
            "",
        ]
    packages = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    about = (
        f"Measured on {when}: Python {machine['python']}, {machine['system']}, "
        f"{machine['processors']} processors, {of_devices()}; {packages}."
    )
    pictures = [f"![{title}]({name}.png)\n" for name, title in PICTURES.items()]
    return "\n".join([about, "", *lines, *pictures])


PICTURES = {
    "plugins": "What telling of a step costs, by the number of plugins",
    "size": "What a save takes, by the size of the state",
    "leaves": "What a save takes, by the number of leaves",
}


def of_devices() -> str:
    """Return what the arrays were on."""
    code = "import jax; print({d.device_kind for d in jax.devices()})"
    kinds = subprocess.check_output([sys.executable, "-c", code], text=True)  # noqa: S603
    return f"devices of JAX {kinds.strip()}"


@click.command()
@click.option("--short", is_flag=True, help="See that all of it runs; the numbers say nothing.")
@click.option("--write", is_flag=True, help="Put results and pictures beside this file.")
@click.argument("names", nargs=-1)
def main(short: bool, write: bool, names: tuple[str, ...]) -> None:
    """Run all benchmarks that have a target, or those of some NAMES; exit with 1 if one fails."""
    if write and short:
        raise click.UsageError("--write is for what was measured in full")
    results = HERE / "results.json"
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    if names and results.is_file():  # those of the others stay
        found = json.loads(results.read_text("utf-8"))
        found.pop("date")
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as folder:
        pictures = HERE if write else Path(folder)
        for name, options in (SHORT if short else SCRIPTS).items():
            if names and name not in names:
                continue
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(file), *options]
            command += ["--pictures", str(pictures)] if name == "scaling" else []
            code = subprocess.call(command, env=os.environ | {"TMPDIR": folder})  # noqa: S603
            if code:
                failed[name] = f"failed with exit code {code}"
            elif not file.is_file():
                failed[name] = "left no results"
            else:
                found[name] = json.loads(file.read_text("utf-8"))
    if write and found:
        today = datetime.now(UTC).strftime("%Y-%m-%d")
        results.write_text(json.dumps({"date": today, **found}) + "\n", "utf-8")
        readme = HERE / "README.md"
        text = readme.read_text("utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        readme.write_text(before + BEGIN + markdown(found, today) + END + after, "utf-8")
    for name, why in failed.items():
        click.echo(f"{name}.py {why}: there is nothing new of it", err=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
