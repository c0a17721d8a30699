"""A run directory as a training would leave it, made without one: small, known, or very large."""

import math
from pathlib import Path

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.history import Entry, entry_to_json
from ckpt_callbacks.policy import Candidate
from ckpt_callbacks.record import (
    Copy,
    File,
    Gone,
    Record,
    RunFile,
    gone_to_json,
    record_to_json,
    run_to_json,
)
from ckpt_callbacks.retention import decide, explain, policy_to_json

KEEP = cc.LatestN(2) | cc.BestN(2, "val_accuracy", mode="max")
BEGIN, EVERY, SIZE = 1.7e9, 60.0, 25 << 20
TITLES = {"mlflow": "MLflow", "wandb": "W&B"}


def accuracy(number: int, count: int) -> float:
    """Return something that rises, wavers and falls again at the end."""
    part = number / count
    return 0.98 - 0.6 * math.exp(-5 * part) + 0.02 * math.sin(11 * part) - 0.05 * part**6


def make_run(
    root: Path, count: int = 20, keep: cc.KeepPolicy = KEEP, more: tuple[str, ...] = ()
) -> Path:
    """Save `count` checkpoints, every 50 steps and 60 s; the W&B tracker is down for a while.

    They have the metrics `val_accuracy` and `loss`, and those that are called `more`.
    """
    directory = RunDirectory(root)
    directory.records.mkdir(parents=True)
    history: list[Entry] = []
    gone: list[str] = []
    there: dict[int, Candidate] = {}
    down = range(count * 4 // 10, count * 6 // 10)
    waiting: list[int] = []
    begun: dict[int, float] = {}
    for number in range(1, count + 1):
        step, at = 50 * number, BEGIN + EVERY * number
        metrics = {
            "val_accuracy": accuracy(number, count),
            "loss": 3 * math.exp(-3 * number / count),
        }
        metrics |= {name: math.sin(number * 0.37 + len(name)) for name in more}
        there[step] = Candidate(step, metrics, at)
        seconds = (0.004 + 0.001 * (number % 3), 0.7 + 0.3 * math.sin(number))
        begun[step] = at
        history.append(Entry(at + sum(seconds), "saved", "local", step, SIZE, seconds))
        took = 6 + 2 * math.cos(number)
        history.append(Entry(at + 2 + took, "copied", "mlflow", step, SIZE, (took,)))
        waiting.append(step)
        if number not in down:
            for late in waiting:
                history.append(Entry(at + 5 + took, "copied", "wandb", late, SIZE, (1.5 * took,)))
            waiting = []
        if isinstance(keep, cc.LatestN) and number <= keep.n:
            continue  # to decide takes as long as there are many
        recent = list(there.values())
        for old in sorted(there.keys() - decide(keep, recent).kept.keys()):
            reason = explain(keep, recent, old)
            gone.append(gone_to_json(Gone(old, begun[old], there.pop(old).metrics, reason)))
            waiting = [s for s in waiting if s != old]
            for wait, place in ((20, "local"), (25, "mlflow"), (30, "wandb")):
                history.append(Entry(at + wait, "gone", place, old))
    copies = {name: Copy("confirmed", name) for name in TITLES}
    for step, found in there.items():
        files = {"state/data": File(SIZE, "xxh3:0")}
        record = Record(
            step, "complete", "known", found.time, found.metrics, files=files, copies=copies
        )
        (directory.records / f"{step}.json").write_text(record_to_json(record))
        directory.path(step).mkdir()
        (directory.path(step) / "_CHECKPOINT_METADATA").touch()
    stores = {name: {"title": title} for name, title in TITLES.items()}
    run = RunFile("known", policy_to_json(keep), stores, status="finished")
    (directory.meta / "run.json").write_text(run_to_json(run))
    (directory.meta / "evicted.jsonl").write_text("".join(f"{line}\n" for line in gone))
    history.sort(key=lambda entry: entry.time)
    lines = "".join(f"\n{entry_to_json(entry)}" for entry in history)
    (directory.meta / "history.jsonl").write_text(lines)
    return root
