"""Whether a machine and a run directory are fit for training: `doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import click

from ckpt_callbacks.catalog import info_of, stores_of
from ckpt_callbacks.cli.listing import state_of
from ckpt_callbacks.cli.output import emit, json_option
from ckpt_callbacks.cli.places import Directory
from ckpt_callbacks.cli.plugins import installed
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CkptCallbacksError, RecordError
from ckpt_callbacks.policy import KeepPolicy, leaves
from ckpt_callbacks.record import Record, RunFile
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.report import size
from ckpt_callbacks.retention import BestN, LatestN, policy_from_json, ranked_metrics
from ckpt_callbacks.schedule import CustomSteps
from ckpt_callbacks.situation import is_away
from ckpt_callbacks.stores import redact
from ckpt_callbacks.text import counted, suggestion

__all__ = ["Check", "checks", "doctor_command"]

_PACKAGES = (
    *("ckpt-callbacks", "jax", "jaxlib", "orbax-checkpoint", "numpy", "pluggy", "xxhash"),
    *("flax", "equinox", "optax", "mlflow", "wandb", "psutil", "safetensors"),
)
_CREDENTIALS = (
    *("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS"),
    "AZURE_STORAGE_CONNECTION_STRING",
)
_FILES = ("~/.netrc", "~/.mlflow/credentials", "~/.aws/credentials")
_SETTINGS = ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "MLFLOW_TRACKING_URI", "JAX_PLATFORMS")
_MODES = ("", "online", "offline", "shared")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    what: str
    status: Literal["ok", "warning", "problem"]
    text: str


def checks(directory: Path | str | None) -> Iterator[Check]:
    """Yield what there is to say of this machine, and of a run directory."""
    yield from _machine()
    if directory is None:
        return
    damaged: list[RecordError] = []
    try:
        root = open_directory(directory)
        run = root.open_run()
        records = root.read_records(on_damage=lambda path, error: damaged.append(error))
    except CkptCallbacksError as error:
        yield Check("directory", "problem", str(error))
        return
    except OSError as error:
        closed = isinstance(error, PermissionError) and error.filename
        text = f"{error.filename} may not be read" if closed else str(error)
        yield Check("permissions" if closed else "directory", "problem", text)
        return
    yield from _directory(root, run, records, damaged)
    yield from _policy(root, run, records)
    yield from _stores(root, run, records)


def _machine() -> Iterator[Check]:
    found = [f"Python {platform.python_version()}", f"{platform.system()} {platform.machine()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    supported = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Check("versions", "ok" if supported else "problem", ", ".join(found))
    plugins = list(installed())
    names = sorted({f"{p.name} ({p.package})" for p in plugins if not p.error})
    yield Check("plugins", "ok", ", ".join(names) or "none")
    for plugin in plugins:
        if plugin.error:
            yield Check("plugins", "problem", f"{plugin.kind} {plugin.name}: {plugin.error}")
    there = [name for name in _CREDENTIALS if os.environ.get(name)]
    there += [name for name in _FILES if Path(name).expanduser().exists()]
    yield Check("credentials", "ok", f"present: {', '.join(there) or 'none'}")
    told = {name: redact(value) for name in _SETTINGS if (value := os.environ.get(name))}
    yield Check("settings", "ok", ", ".join(f"{n}={v}" for n, v in told.items()) or "none set")
    if (mode := os.environ.get("WANDB_MODE", "")) not in _MODES:
        hint = suggestion(mode, _MODES)
        text = f"WANDB_MODE={mode}: nothing can be sent to W&B. Take online or offline{hint}"
        yield Check("settings", "problem", text)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redact(uri) != uri:
        text = "MLFLOW_TRACKING_URI holds a password: MLFLOW_TRACKING_PASSWORD is the place for it"
        yield Check("settings", "warning", text)


def _directory(
    root: RunDirectory, run: RunFile, records: dict[int, Record], damaged: list[RecordError]
) -> Iterator[Check]:
    owner = root.owner()
    text = f"{root}, {counted(len(records), 'checkpoint')}, {state_of(run, owner)}"
    yield Check("directory", "ok", text)
    for error in damaged:
        yield Check("directory", "problem", f"{error}; the next run makes it again")
    unfit = root.unfit()
    yield Check("permissions", "problem" if unfit else "ok", unfit or "it can be written")
    away = sum(map(is_away, records.values()))
    if away:
        yield Check("directory", "ok", f"{counted(away, 'checkpoint')} only in a tracker")
    if lost := sum(record.lost for record in records.values()) - away:
        text = f"{counted(lost, 'checkpoint')} removed by somebody, and not whole in a tracker"
        yield Check("directory", "warning", text)
    if not owner and (waiting := root.posted()):
        text = f"{counted(len(waiting), 'request')} that the next run, or `sync`, applies"
        yield Check("directory", "warning", text)


def _policy(root: RunDirectory, run: RunFile, records: dict[int, Record]) -> Iterator[Check]:
    policy = policy_from_json(run.policy)
    measured = {name for record in records.values() for name in record.metrics}
    for name in ranked_metrics(policy):
        if measured and name not in measured:
            there = ", ".join(sorted(measured))
            text = f"the policy ranks by {name!r}, which no checkpoint has; they have {there}"
            yield Check("policy", "problem", text + suggestion(name, measured))
    if run.change:
        yield Check("policy", "warning", f"{policy} is not in force until a newer one is complete")
    free = _free(root.root)
    sizes = [record.bytes for record in records.values() if record.files]
    most = _most(policy)
    if not sizes:
        yield Check("disk", "ok", f"{size(free)} free; no checkpoint yet to say how much it needs")
        return
    one, here = max(sizes), sum(record.bytes for record in records.values() if not record.lost)
    if root.kind != "local":
        text = f"{size(free)} free at {root.root}, where two checkpoints of {size(one)} need room"
        yield Check("disk", "ok" if 2 * one < free else "problem", text)
        return
    if most is None:
        fits = int(free // one)
        status: Literal["ok", "warning"] = "ok" if fits > 10 else "warning"
        text = f"{size(free)} free, room for {counted(fits, 'more checkpoint')} of {size(one)}: "
        yield Check("disk", status, text + f"{policy} sets no limit")
        return
    # One more, since a new one is complete before an old one goes.
    need = max(0, (most + 1 + len(run.pinned)) * one - here)
    text = f"{size(free)} free; {policy} needs up to {size(need)} more"
    yield Check("disk", "ok" if need < free else "problem", text)


def _free(path: Path) -> int:
    """Return the bytes that are free where `path` is, or will be."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free


def _most(policy: KeepPolicy) -> int | None:
    """Return how many checkpoints a policy keeps at most, or `None` where there is no limit."""
    total = 0
    for leaf in leaves(policy):
        match leaf:
            case LatestN(n):
                total += n
            case BestN(n, pending=int(pending)):
                total += n + pending
            case CustomSteps(steps):
                total += len(steps)
            case _:
                return None
    return total


def _stores(root: RunDirectory, run: RunFile, records: dict[int, Record]) -> Iterator[Check]:
    made = {store.name: store for store in stores_of(run)}
    for name, known in run.stores.items():
        title = known.get("title", name)
        store = made.get(name)
        if store is None:
            text = "it can not be made again here, so only the run itself sends to it"
            yield Check(title, "warning", text)
        elif what := store.missing():
            offline = {r.copies[name].state for r in records.values() if name in r.copies}
            yield Check(title, "warning" if offline == {"staged"} else "problem", what)
        else:
            yield _asked(title, partial(store.ping, info_of(root, run, name, None)))


def _asked(title: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(title, "ok", redact(ask()))
    except Exception as error:  # whatever the library of a service raises
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(title, "problem", redact(text)[:500])


@click.command(short_help="Look for what may go wrong, on this machine or with a run.")
@click.argument("directory", type=Directory(buckets=True), required=False)
@json_option
def doctor_command(directory: Path | str | None, *, as_json: bool) -> None:
    """Look for what may go wrong here, and with DIRECTORY; exit with 1 if something does.

    Versions, plugins, credentials (present or not, never their values), settings; of DIRECTORY its
    records, permissions, the free disk against what its policy needs, and whether its trackers
    answer.
    """
    found = list(checks(directory))
    facts = {"checks": [{"what": c.what, "status": c.status, "text": c.text} for c in found]}
    problems = sum(c.status == "problem" for c in found)
    said = [f"{c.status:8} {c.what}: {c.text}" for c in found]  # whole lines, to be copied
    said.append(counted(problems, "problem") if problems else "no problem was found")
    emit(facts, "\n".join(said), as_json=as_json)
    if problems:
        raise SystemExit(1)
