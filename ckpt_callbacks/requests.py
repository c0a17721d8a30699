"""What a process that does not own a run directory may change: an evaluator, or a person.

Each function leaves a request. The owner applies it within a second; where nobody owns the
directory, the caller becomes the owner for a moment and does all that follows, in every store.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_callbacks.catalog import stores_of
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.engine import Engine
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError, DirectoryLocked
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.inbox import Measured, Named, Pinned, Pruned, Request, is_attended, submit
from ckpt_callbacks.metrics import host_floats
from ckpt_callbacks.policy import KeepPolicy, as_step
from ckpt_callbacks.pruning import PrunePlan, plan_prune
from ckpt_callbacks.remote import open_directory
from ckpt_callbacks.retention import policy_from_json, policy_to_json
from ckpt_callbacks.stores import Store
from ckpt_callbacks.text import listed, suggestion

__all__ = ["carry_out", "pin", "promote", "prune", "report_metrics", "sync", "unpin"]

_POLL = 0.05
"""Seconds between two looks at whether the owner has applied a request."""
_ALIAS = re.compile("[A-Za-z][A-Za-z0-9_-]{0,63}")
"""What MLflow and W&B both take."""
_TAKEN = re.compile(
    "best|best-.*|last|latest|step-.*|v[0-9]+|"
    "aliases|began|experiments|known|model|path|reason|run|step"
)
"""Ours by policy, theirs for versions, and names of our tags in MLflow."""


def report_metrics(
    directory: str | os.PathLike[str],
    step: int,
    metrics: Mapping[str, Any],
    *,
    stores: Sequence[Store] | None = None,
    timeout: float = 60.0,
) -> bool:
    """Tell how good the checkpoint of `step` is, from a process of its own.

    The checkpoints are ranked again: aliases move, and what lost its place goes.

    Args:
        directory: the run directory; training may be going on in it, or be over.
        step: the step that was measured.
        metrics: numbers.
        stores: the run's trackers, needed only where nobody owns the directory; those that the
            run used are made again if it is not given.
        timeout: seconds to wait for the owner, or for the stores.

    Returns:
        Whether it was applied in time. If not, it is applied later.

    Raises:
        ConfigError: it is no run directory, `step` is no step, or a metric is no number.
    """
    values, problems = host_floats(metrics)
    if problems:
        raise ConfigError(f"report_metrics: {'; '.join(problems.values())}")
    request = Measured(as_step("report_metrics", step), values, time.time())
    return _ask(open_directory(directory), request, stores, timeout)


def pin(
    directory: str | os.PathLike[str],
    step: int,
    *,
    stores: Sequence[Store] | None = None,
    timeout: float = 60.0,
) -> bool:
    """Keep the checkpoint of `step` whatever the policy says, in every store.

    The arguments and the result are those of `report_metrics`.

    Raises:
        ConfigError: it is no run directory.
        CheckpointNotFound: it holds no such step.
    """
    step, run_directory = as_step("pin", step), open_directory(directory)
    run_directory.open_run()
    _check_there(run_directory, step, "to pin")
    return _ask(run_directory, Pinned(step, pinned=True), stores, timeout)


def unpin(
    directory: str | os.PathLike[str],
    step: int,
    *,
    stores: Sequence[Store] | None = None,
    timeout: float = 60.0,
) -> bool:
    """Leave the checkpoint of `step` to the policy again.

    An alias that it was promoted to is no longer its own; in a tracker it stays where it is, with
    the copy, until another step is promoted to it.

    The arguments and the result are those of `report_metrics`.

    Raises:
        ConfigError: it is no run directory.
    """
    request = Pinned(as_step("unpin", step), pinned=False)
    return _ask(open_directory(directory), request, stores, timeout)


def promote(
    directory: str | os.PathLike[str],
    step: int,
    alias: str,
    *,
    stores: Sequence[Store] | None = None,
    timeout: float = 60.0,
) -> bool:
    """Let `alias` name the checkpoint of `step` in every store, such as `production`.

    It is pinned for as long as it has the alias: until another step is promoted to it, or until it
    is unpinned. The other arguments and the result are those of `report_metrics`.

    Raises:
        ConfigError: it is no run directory, or `alias` can not be an alias in all stores.
        CheckpointNotFound: it holds no such step.
    """
    step, run_directory = as_step("promote", step), open_directory(directory)
    if not _ALIAS.fullmatch(alias):
        raise ConfigError(
            f"promote: an alias is a letter and letters, digits, '_' or '-', not {alias!r}"
        )
    if _TAKEN.fullmatch(alias):
        raise ConfigError(
            f"promote: {alias!r} has a meaning of its own: choose another alias, such as production"
        )
    run_directory.open_run()
    _check_there(run_directory, step, f"to promote to {alias!r}")
    return _ask(run_directory, Named(step, alias, time.time()), stores, timeout)


def prune(
    directory: str | os.PathLike[str],
    keep: KeepPolicy | None = None,
    *,
    dry_run: bool = False,
    stores: Sequence[Store] | None = None,
    timeout: float = 60.0,
) -> PrunePlan:
    """Remove what a policy does not keep, from every store, now; return what goes, and why.

    The run's own policy stays in force for what is saved later. What is pinned or promoted stays,
    and so does the newest checkpoint.

    Args:
        directory: as `report_metrics` has it, like the arguments after it.
        keep: what to keep; that of the run if not given, without what it only keeps until a changed
            policy is in force.
        dry_run: change nothing.
        stores: see there.
        timeout: see there.

    Raises:
        ConfigError: it is no run directory, `keep` is no policy that can be written down, or it
            ranks by a metric that no checkpoint has.
        RecordError: a record in it cannot be read.
    """
    plan = plan_prune(directory, keep)
    if plan.goes and not dry_run:
        carry_out(directory, plan, stores=stores, timeout=timeout)
    return plan


def carry_out(
    directory: str | os.PathLike[str],
    plan: PrunePlan,
    *,
    stores: Sequence[Store] | None = None,
    timeout: float = 60.0,
) -> bool:
    """Remove what a plan shows, and nothing else; what it should keep by now stays.

    The arguments and the result are those of `report_metrics`.
    """
    request = Pruned([gone.step for gone in plan.goes], policy_to_json(plan.keep))
    return _ask(open_directory(directory), request, stores, timeout)


def sync(
    directory: str | os.PathLike[str],
    *,
    stores: Sequence[Store] | None = None,
    timeout: float = 3600.0,
) -> Mapping[str, str]:
    """Bring every store to what is decided, and send the metrics and files that are still there.

    For after a run that ended, or was killed, while a tracker was down; another run in the
    directory does the same.

    Args:
        directory: the run directory, in which no run is going on.
        stores: the run's trackers; those that the run used are made again if it is not given.
        timeout: seconds to wait for the stores.

    Returns:
        What each store still lacks, by name; empty if all is sent.

    Raises:
        ConfigError: it is no run directory.
        DirectoryLocked: a run is going on there, which sends everything itself.
    """
    run_directory, deadline = open_directory(directory), time.monotonic() + timeout
    run = run_directory.open_run()
    there = stores_of(run) if stores is None else stores
    lacking = {store.name: what for store in there if (what := store.missing())}
    there = [store for store in there if store.name not in lacking]
    made = {store.name for store in there} | lacking.keys()
    missing = run.stores.keys() - made if stores is None else set()
    unsent = dict.fromkeys(sorted(missing), "what there is: it can not be made again here")
    unsent |= {name: f"what there is: {what}" for name, what in lacking.items()}
    while True:
        try:
            return unsent | _act_as_owner(run_directory, there, deadline, sending=True)[1]
        except DirectoryLocked as error:
            # Another one that is there for a moment only, such as to pin a step, is waited for.
            if run_directory.is_taken() or time.monotonic() > deadline:
                raise DirectoryLocked(
                    f"there is nothing to sync, since the run in {run_directory} sends "
                    f"everything itself: {error}"
                ) from error
            time.sleep(_POLL)


def _check_there(directory: RunDirectory, step: int, why: str) -> None:
    if step not in (there := directory.known_records()):
        raise CheckpointNotFound(
            f"{directory.root} has no step {step} {why}; it has {listed(list(there))}"
            f"{suggestion(step, (), there)}"
        )


def _ask(
    directory: RunDirectory, request: Request, stores: Sequence[Store] | None, timeout: float
) -> bool:
    directory.open_run()  # before anything is written
    path = submit(directory, request)
    deadline = time.monotonic() + timeout
    while directory.is_posted(path.name):
        try:
            # Before stores are made, which takes a while and is in vain where there is an owner.
            directory.acquire(brief=True)
            directory.release()
            engine, unsent = _act_as_owner(directory, stores, deadline)
            engine.tell(unsent)
        except DirectoryLocked:
            # A plugin that asks at a moment when this process does not listen, such as the start
            # of the run, would wait for itself.
            deaf = directory.is_mine and not is_attended(directory)
            if deaf or time.monotonic() > deadline:
                return False
            time.sleep(max(_POLL, directory.interval / 5))
    return True


def _act_as_owner(
    directory: RunDirectory,
    stores: Sequence[Store] | None,
    deadline: float,
    *,
    sending: bool = False,
) -> tuple[Engine, dict[str, str]]:
    """Own the directory until all is done, and return what each store still lacks."""
    run = directory.open_run()
    engine = Engine(
        directory,
        policy_from_json(run.policy),
        stores_of(run) if stores is None else stores,
        {},
        Hooks([]),
        training=False,
        sending=sending,
        drain_limit=max(0.1, deadline - time.monotonic()),
    )
    # As the loop left it, or else it was killed: nobody is in it now.
    status = run.status if run.status != "running" else "killed"
    try:
        engine.begin()
    except BaseException:
        engine.close(status, lambda: 0.0)
        raise
    return engine, engine.close(status, lambda: deadline - time.monotonic())
