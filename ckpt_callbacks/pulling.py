"""A checkpoint that comes from a tracker into a run directory of its own."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace

from ckpt_callbacks.addresses import bring, brought, install, is_address, take_over
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.progress import growing
from ckpt_callbacks.record import ADOPTED, RunFile
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.schedule import EveryNSteps
from ckpt_callbacks.stores import redact

__all__ = ["pull"]

logger = logging.getLogger("ckpt_callbacks")
_ALL = EveryNSteps(1)


def pull(address: str, directory: str | os.PathLike[str], *, go_on: bool = False) -> int:
    """Fetch a checkpoint from a tracker into a new run directory, and return its step.

    All of its files are verified. A run in the directory is a new one, and begins after that step.

    Args:
        address: such as `mlflow:/digits@best`.
        directory: holds no run yet; it is made if need be.
        go_on: let the checkpoint's own run go on there, as `callbacks.run(resume=address)` does: it
            must be the newest of it.

    Raises:
        ConfigError: nothing that is installed understands the address, or the directory holds
            checkpoints.
        CheckpointNotFound: there is no such checkpoint.
        UsageError: only a part of it was sent, or its run is to go on, but has newer ones.
        CorruptCheckpoint: a file is damaged.
        DirectoryLocked: a run is going on in `directory`.
    """
    if not is_address(address):
        raise ConfigError(
            f"pull: {address!r} is no address in a tracker, such as mlflow:/digits@best or "
            "wandb:me/digits/run:best"
        )
    target = RunDirectory(directory)
    there = target.root.iterdir() if target.root.exists() else ()
    steps = [int(path.name) for path in there if path.name.isdecimal()]
    if any(target.read_record(step) is None for step in steps):
        raise ConfigError(f"pull: {target.root} holds checkpoints already: choose a new directory")
    new = [path for path in (target.root, target.meta) if not path.exists()]
    target.acquire()
    try:
        if target.read_run() is not None:
            raise ConfigError(f"pull: {target.root} holds a run already: choose a new directory")
        for step in {*steps, *target.read_records()}:  # of a call that was killed
            target.to_trash(step)
            target.remove_record(step)
        if go_on:
            take_over(target, address, _ALL, [])
            run = target.open_run()
            target.write_run(replace(run, status=ADOPTED))  # so that any policy is its first
            return max(target.read_records())
        return _take(target, address)
    except BaseException:
        for path in new[:1]:  # else a misspelt address would leave a directory without a run
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        target.release()


def _take(target: RunDirectory, address: str) -> int:
    """Take in the first one of a new run. A kill on the way leaves what the next call removes."""
    with growing(f"fetching {redact(address)}", brought(target).parent):
        record = bring(target, address, None, go_on=False)
    run_id = os.urandom(6).hex()
    install(target, replace(record, owner=run_id, discarded=""))
    # Last: until it is there, nothing is.
    target.write_run(RunFile(run_id, policy_to_json(_ALL), status=ADOPTED))
    return record.step
