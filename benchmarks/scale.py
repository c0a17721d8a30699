"""What a save costs a tracker, and what grows with leaves, checkpoints and runs.

Run it with a Python that has the package and its extra `wandb-testing`::

    python benchmarks/scale.py --json scale.json
    python benchmarks/scale.py --short

Four tables. Requests are counted in MLflow's own client, against a real `mlflow server` (sqlite and
a local folder), and at the stand-in for W&B's server. The long run is simulated: its states are a
few bytes that a stub writes in place of Orbax, its tracker is in memory, and its clock is set; the
directory, its records and every fsync are real. The runs at a time are threads of one process with
that stub and a real MLflow server, so clients and server share this machine's processors.
`docs/scale.md` says what was found.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import ckpt_callbacks as cc
import measure
import servers
from ckpt_callbacks import orbax_io
from ckpt_callbacks.stores import Checkpoint, Copy, Store
from ckpt_callbacks.testing import FakeClock, MemoryStore

KEEP = cc.LatestN(2) | cc.BestN(1, "score", mode="max")
LEAVES = (10, 100, 1000)
KEPT = (3, 30)
AT_A_TIME = (1, 2, 4, 8, 16)
FEW, MANY = 4, 12
"""Saves of two runs: what they differ by is what the saves cost, without the run's own begin."""


class StubSave:
    """Stands in for a save of Orbax: one small file, written aside and renamed."""

    def __init__(self, path: Path, items: object, about: Mapping[str, Any]) -> None:
        self._path = path
        self._aside = path.with_name(f"{path.name}{'.orbax-checkpoint-tmp'}")
        (self._aside / "state").mkdir(parents=True)
        text = json.dumps({"custom_metadata": dict(about)})
        (self._aside / "_CHECKPOINT_METADATA").write_text(text)
        (self._aside / "state" / "data").write_text(path.name)

    def result(self) -> None:
        """Commit."""
        self._aside.rename(self._path)


def stubbed() -> Any:
    """Let Orbax write nothing while the context lasts."""
    return mock.patch.object(orbax_io, "save", StubSave)


class Pace:
    """Lets a loop wait until a step has arrived, so that none drops out of the plan."""

    def __init__(self) -> None:
        self._arrived = threading.Event()

    @cc.hookimpl
    def on_mirrored(self, event: cc.Mirrored) -> None:
        """A step has arrived."""
        self._arrived.set()

    def wait(self) -> None:
        """Wait for it."""
        if not self._arrived.wait(120):
            raise RuntimeError("a checkpoint does not arrive within 120 s")
        self._arrived.clear()


def train(
    folder: Path, store: Store | None, saves: int, leaves: int = 10, keep: Any = KEEP, **run: Any
) -> None:
    """Save `saves` times, each with one metric of the loop and one of an evaluation."""
    pace = Pace()
    checkpoint = cc.OrbaxCheckpoint(folder, save=cc.EveryNSteps(1), keep=keep)
    plugins = [store, pace] if store else []
    state = {"params": {str(n): np.full(100, float(n), np.float32) for n in range(leaves)}}
    with cc.Callbacks(checkpoint, *plugins, drain_limit=600).run(state, **run) as entered:
        entered.state  # noqa: B018  # the run lets go of it
        for step in range(saves):
            entered.on_eval(step, {"score": float(step % 7)})
            entered.on_step(step, state, {"loss": 1.0 / (step + 1)})
            if store:
                pace.wait()


# Requests


@dataclass
class Traffic:
    """Requests of MLflow's client, those for files among them, and their bytes."""

    requests: int = 0
    of_artifacts: int = 0
    sent: int = 0
    received: int = 0

    def less(self, other: Traffic, saves: int) -> dict[str, float]:
        """Return what each save has added."""
        return {
            "requests": (self.requests - other.requests) / saves,
            "of artifacts": (self.of_artifacts - other.of_artifacts) / saves,
            "sent": (self.sent - other.sent) / saves,
            "received": (self.received - other.received) / saves,
        }


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what MLflow's client asks for and gets."""
    from requests.adapters import HTTPAdapter

    found, mutex, send = Traffic(), threading.Lock(), HTTPAdapter.send

    def counting(self: HTTPAdapter, request: Any, **options: Any) -> Any:
        reply = send(self, request, **options)
        with mutex:
            found.requests += 1
            found.of_artifacts += "/mlflow-artifacts/" in request.path_url
            found.sent += int(request.headers.get("Content-Length") or 0)
            found.received += int(reply.headers.get("Content-Length") or 0)
        return reply

    with mock.patch.object(HTTPAdapter, "send", counting):
        yield found


def of_mlflow(uri: str, folder: Path, **options: Any) -> dict[str, float]:
    """Return what a save asks of an MLflow server, and the bytes of its files."""
    from ckpt_callbacks_mlflow import MLflowTracker

    found: list[Traffic] = []
    low = options.pop("beyond", 0)
    for saves in (low + FEW, low + MANY):
        name = f"{folder.name}-{saves}"
        with counted() as traffic:
            train(
                folder / str(saves),
                MLflowTracker(name, register_as=name, tracking_uri=uri),
                saves,
                **options,
            )
        found.append(traffic)
    return found[1].less(found[0], MANY - FEW) | files_of(folder / str(low + MANY))


def of_wandb(folder: Path, **options: Any) -> dict[str, float]:
    """Return what a save asks of a W&B server."""
    import wandb

    from ckpt_callbacks_wandb import WandbTracker
    from ckpt_callbacks_wandb.testing import WandbServer

    low, counts = options.pop("beyond", 0), []
    for saves in (low + FEW, low + MANY):
        wandb.teardown()  # the client reads its settings once
        with WandbServer() as server, mock.patch.dict(os.environ, server.environment()):
            os.environ["WANDB_DIR"] = str(folder)
            train(folder / str(saves), WandbTracker("scale"), saves, **options)
            counts.append(Counter(name for name in server.requests if name != "other"))
            wandb.teardown()
    more = counts[1] - counts[0]
    files = sum(n for name, n in more.items() if name == "PUT file")
    return {
        "requests": more.total() / (MANY - FEW),
        "of artifacts": files / (MANY - FEW),
    } | files_of(folder / str(low + MANY))


def files_of(root: Path) -> dict[str, float]:
    """Return how many files the newest checkpoint of a run has, and of how many bytes."""
    newest = cc.checkpoints(root)[-1]
    return {
        "files": sum(p.is_file() for p in newest.path.rglob("*")),
        "bytes": newest.bytes,
    }


# A long run


class Blank(MemoryStore):
    """A tracker that keeps no bytes."""

    def put(self, checkpoint: Checkpoint, aliases: Any) -> Copy:
        self.copies[checkpoint.step] = {}
        return Copy("confirmed", f"{self.name}/{checkpoint.key}")


def long_run(folder: Path, saves: int, windows: int, keep: Any) -> list[dict[str, float]]:
    """Return, for each part of a run, what a save takes and how large its memory on disk is."""
    clock, pace, store = FakeClock(), Pace(), Blank()
    store.points = Swallow()
    checkpoint = cc.OrbaxCheckpoint(folder, save=cc.EveryNSteps(1), keep=keep)
    rows: list[dict[str, float]] = []
    state = {"w": np.zeros(1)}
    chance = np.random.default_rng(0)
    with (
        stubbed(),
        cc.Callbacks(checkpoint, store, pace, clock=clock, drain_limit=600).run(state) as run,
    ):
        run.state  # noqa: B018  # the run lets go of it
        for window in range(windows):
            first = window * saves // windows
            began, cpu = time.perf_counter(), time.process_time()
            for step in range(first, (window + 1) * saves // windows):
                clock.advance(60)
                run.on_eval(step, {"score": float(chance.random())})
                run.on_step(step, state, {"loss": 1.0 / (step + 1)})
                pace.wait()
            count = (window + 1) * saves // windows - first
            meta = folder / ".ckpt_callbacks"
            rows.append(
                {
                    "saves": first + count,
                    "ms": 1e3 * (time.perf_counter() - began) / count,
                    "cpu_ms": 1e3 * (time.process_time() - cpu) / count,
                    "memory": sum(p.stat().st_size for p in meta.rglob("*") if p.is_file()),
                    "kept": sum(p.name.isdecimal() for p in folder.iterdir()),
                }
            )
    began = time.perf_counter()
    with stubbed(), cc.Callbacks(checkpoint, store, clock=clock).run(state) as run:
        rows[-1]["restart_s"] = time.perf_counter() - began
    return rows


class Swallow(list[Any]):
    """Keeps no metrics."""

    def extend(self, values: object) -> None:
        """Forget them."""


# Many runs


def many_runs(uri: str, folder: Path, runs: int, saves: int) -> dict[str, float]:
    """Let several runs save to one server at the same time, and return what it bore."""
    from ckpt_callbacks_mlflow import MLflowTracker

    def one(number: int) -> None:
        name = f"{folder.name}-{number}"
        tracker = MLflowTracker(folder.name, register_as=name, tracking_uri=uri)
        train(folder / name, tracker, saves)

    with stubbed(), counted() as traffic, ThreadPoolExecutor(runs) as pool:
        began = time.perf_counter()
        for done in [pool.submit(one, number) for number in range(runs)]:
            done.result()
        taken = time.perf_counter() - began
    return {
        "runs": runs,
        "requests": traffic.requests / runs,
        "per_s": traffic.requests / taken,
        "saves_per_s": runs * saves / taken,
        "received": traffic.received / runs,
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_column(name, justify="right")
    for row in rows:
        names = [column.header for column in table.columns]
        table.add_row(*(_shown(row.get(str(name), "")) for name in names))
    Console().print(table)


def _shown(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


@click.command()
@click.option("--saves", default=10_000, show_default=True, help="Of the long run.")
@click.option("--short", is_flag=True, help="Only show that all of it runs.")
@click.option("--only", type=click.Choice(["requests", "long", "runs"]), help="One of the parts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
def main(saves: int, short: bool, only: str | None, file: Path | None) -> None:
    """Count and simulate."""
    servers.quiet()
    logging.getLogger("ckpt_callbacks").setLevel(logging.ERROR)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-") as name:
        folder = Path(name)
        if only in (None, "long"):
            found |= long_runs(folder, 200 if short else saves)
        if only in (None, "requests", "runs"):
            with servers.mlflow_server(folder / "server") as uri:
                if only in (None, "requests"):
                    found |= requests(uri, folder, short=short)
                if only in (None, "runs"):
                    sizes = AT_A_TIME[:2] if short else AT_A_TIME
                    found["runs at a time, MLflow"] = [
                        many_runs(uri, folder / f"runs-{n}", n, 3 if short else 10) for n in sizes
                    ]
    for title, rows in found.items():
        show(title, rows)
    measure.write(file, **found)


def long_runs(folder: Path, saves: int) -> dict[str, list[dict[str, Any]]]:
    """Return a run of which little is kept, and one of which all is."""
    gc.collect()
    few = long_run(folder / "few", saves, 10, KEEP)
    all_ = long_run(folder / "all", saves // 10, 10, cc.EveryNSteps(1) | KEEP)
    shutil.rmtree(folder / "all")
    return {"a run of which 3 are kept": few, "a run of which all are kept": all_}


def requests(uri: str, folder: Path, *, short: bool) -> dict[str, list[dict[str, Any]]]:
    """Return what a save asks for, by the number of leaves and of checkpoints that are kept."""
    leaves, kept = (LEAVES[:1], KEPT[:1]) if short else (LEAVES, KEPT)
    ways: dict[str, Callable[..., dict[str, float]]] = {
        "MLflow": lambda name, **o: of_mlflow(uri, folder / f"mlflow-{name}", **o),
        "W&B": lambda name, **o: of_wandb(folder / f"wandb-{name}", **o),
    }
    found: dict[str, list[dict[str, Any]]] = {"a save, by leaves": [], "a save, by checkpoints": []}
    for title, way in ways.items():
        for n in leaves:
            row = way(f"leaves-{n}", leaves=n)
            found["a save, by leaves"].append({"tracker": title, "leaves": n} | row)
        for n in kept:
            keep = cc.LatestN(n - 1) | cc.BestN(1, "score", mode="max")
            with stubbed():
                row = way(f"kept-{n}", keep=keep, beyond=n)
            found["a save, by checkpoints"].append({"tracker": title, "kept": n} | row)
    return found


if __name__ == "__main__":
    main()
