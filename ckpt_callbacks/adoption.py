"""Checkpoints that Orbax alone wrote, taken into a run directory so that a run goes on from them.

Their files are shared by hard links, or copied where that does not work. A link costs no disk and
needs no time, and takes nothing from the source: whichever side removes its name, the other keeps
the bytes. So unlike all other files of a run they are not made read-only, which would change the
source's too; a change made through it is found by their digests.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from ckpt_callbacks import orbax_io
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError, UsageError
from ckpt_callbacks.ledger import Ledger
from ckpt_callbacks.manifest import damage, fsync, link_tree, settle
from ckpt_callbacks.policy import as_step
from ckpt_callbacks.record import ADOPTED, RunFile
from ckpt_callbacks.recovery import recover
from ckpt_callbacks.retention import policy_from_json, policy_to_json
from ckpt_callbacks.schedule import EveryNSteps

__all__ = ["adopt"]

logger = logging.getLogger("ckpt_callbacks")


def adopt(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    steps: Collection[int] | None = None,
) -> list[int]:
    """Take checkpoints of Orbax's `CheckpointManager` or `Checkpointer` into a run directory.

    The next run there goes on from the newest, ranks all by the metrics that Orbax has stored with
    them, evicts what its policy does not keep, and sends the others to its trackers. The source
    stays as it is.

    It may be repeated, after a kill or at every start of a script: what was taken before, and maybe
    evicted since, is left out.

    Args:
        source: a directory with checkpoints by step.
        directory: the run directory; it is made if need be, and may hold older checkpoints.
        steps: which to take; all if not given.

    Returns:
        The steps that were taken now.

    Raises:
        ConfigError: `source` has no checkpoints, or very old ones, or is a run directory, or
            `directory` is in it.
        CheckpointNotFound: `source` has no such step, or it was removed while it was taken.
        UsageError: the run has one of the steps already, from elsewhere, or a newer one.
        DirectoryLocked: a run is going on in `directory`.
        RecordError: what is in it cannot be read.
    """
    root, target = RunDirectory(source).root, RunDirectory(directory)
    there = _found(root, target, steps)
    target.acquire()
    try:
        run = target.read_run()
        keep = policy_from_json(run.policy) if run else EveryNSteps(1)  # all of them
        if run is None:
            target.write_run(RunFile(os.urandom(6).hex(), policy_to_json(keep), status=ADOPTED))
        ledger = Ledger(target, keep)
        recover(ledger)  # what an earlier call began, too
        new = _new(ledger, there)
        for step in new:  # in order, so that a kill leaves none to be taken below the newest
            _take(ledger, step, there[step])
        ledger.close()
    finally:
        target.release()
    return new


def _found(root: Path, target: RunDirectory, steps: Collection[int] | None) -> dict[int, Path]:
    """Return the checkpoints to take, by ascending step."""
    if (root / ".ckpt_callbacks").exists():
        raise ConfigError(f"adopt: {root} is a run directory itself: give it to restore, or go on")
    if target.root.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"adopt: {target.root} is in {root}, which must not be changed")
    there = orbax_io.steps(root)
    if not there:
        raise ConfigError(f"adopt: {root} holds no checkpoints of Orbax by step")
    wanted = there.keys() if steps is None else {as_step("adopt", step) for step in steps}
    if absent := sorted(wanted - there.keys()):
        raise CheckpointNotFound(
            f"adopt: {root} has no step {', '.join(map(str, absent))}; it has "
            f"{', '.join(map(str, there))}"
        )
    if old := [s for s in sorted(wanted) if not (there[s] / "_CHECKPOINT_METADATA").is_file()]:
        raise ConfigError(
            f"adopt: an old version of Orbax wrote steps {', '.join(map(str, old))} of {root}, "
            "without _CHECKPOINT_METADATA: begin a new run with start_from= instead"
        )
    return {step: path for step, path in there.items() if step in wanted}


def _new(ledger: Ledger, there: Mapping[int, Path]) -> list[int]:
    """Return the steps that the run has not had yet.

    Raises:
        UsageError: it has others in their place.
    """
    root, newest = ledger.directory.root, ledger.newest()
    gone = {gone.step for gone in ledger.directory.read_evicted()}
    new: list[int] = []
    for step, path in there.items():
        record = ledger.record(step)
        if record and record.files:
            if any(damage(path, record.files)):
                raise UsageError(
                    f"adopt: {root} has a checkpoint of step {step} that is not the one in {path}"
                )
        elif step in gone:
            logger.info("adopt: step %d is left out: %s had it, and evicted it", step, root)
        elif newest and step < newest.step:
            raise UsageError(
                f"adopt: {root} has step {newest.step}, which is newer than step {step} of "
                f"{path.parent}: choose another directory"
            )
        else:
            new.append(step)
    return new


def _take(ledger: Ledger, step: int, path: Path) -> None:
    """Take in one checkpoint. A kill on the way leaves all of it, or what `recover` removes."""
    directory = ledger.directory
    try:
        saved, metrics = path.stat().st_mtime, _metrics(path)
        link_tree(path, directory.fetching(step))
        files = settle(directory.fetching(step))
        there = {p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"adopt: {path} was removed while it was taken") from error
    if files.keys() != {p.relative_to(path).as_posix() for p in there}:
        raise CheckpointNotFound(f"adopt: {path} holds links, or was changed while it was taken")
    whole = directory.fetching(step).rename(directory.fetched(step))
    ledger.adopt(step, files, metrics, saved)
    whole.rename(directory.path(step))  # after a kill before it `recover` does this
    fsync(directory.root)


def _metrics(path: Path) -> dict[str, float]:
    """Return the numbers that Orbax was given to rank a checkpoint by."""
    file = path / "metrics" / "metrics"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {k: float(v) for k, v in stored.items() if type(v) in (int, float)}
