"""What a training loop is given: all its plugins, checked and put together."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_callbacks.addresses import is_address
from ckpt_callbacks.checkpoint import OrbaxCheckpoint
from ckpt_callbacks.clock import Clock
from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.extras import require
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.policy import ANYWHERE, Resume
from ckpt_callbacks.stores import Store

if TYPE_CHECKING:
    from ckpt_callbacks.restoring import Weights
    from ckpt_callbacks.run import Run

__all__ = ["Callbacks"]

S = TypeVar("S")
_LONGEST = threading.TIMEOUT_MAX


class Callbacks:
    """The plugins of a training loop: checkpoints, trackers, and listeners of your own.

    Args:
        plugins: at most one `OrbaxCheckpoint`, any trackers, and any objects with methods
            marked `@hookimpl`. None at all is fine: the loop then runs as if nothing were there.
        drain_limit: seconds to wait at the end of a run for what trackers still have to get.
        grace: seconds from SIGTERM, the notice of a preemption, until the signal takes its usual
            course. The last checkpoint is saved and the run is left within it.
        system_metrics: seconds between two samples of the machine: processor, memory, disk,
            network and device memory, for the trackers, as metrics `system/…` of the step that
            the loop is at. `None` for none.
        profile: whether to measure where the time of the callbacks goes: each hook of each plugin,
            what the loop waits for, and the work in the background. The table is `run.profile`,
            which is logged at the end of the run. A call that is measured costs a few µs more;
            without it nothing is measured.
        process_timeout: where `jax.distributed` runs, seconds to wait for another process where
            all have to come; then `ProcessLost` names who is missing.
        clock: the clocks, which a test may replace.

    Raises:
        ConfigError: a plugin is no plugin, misspells a hook, or lacks what it needs.
        MissingExtra: `system_metrics` is given, and psutil is not installed.
    """

    def __init__(
        self,
        *plugins: object,
        drain_limit: float = 60.0,
        grace: float = 30.0,
        system_metrics: float | None = None,
        profile: bool = False,
        process_timeout: float = 300.0,
        clock: Clock | None = None,
    ) -> None:
        for plugin in plugins:
            if isinstance(plugin, type):
                raise ConfigError(
                    f"Callbacks: {plugin.__name__} is a class; give an object, "
                    f"{plugin.__name__}(...)"
                )
            if isinstance(plugin, list | tuple):
                raise ConfigError("Callbacks: give the plugins one by one, not as a list")
        for option, value in (("drain_limit", drain_limit), ("grace", grace)):
            if not isinstance(value, int | float) or not 0 <= value < _LONGEST:
                raise ConfigError(
                    f"Callbacks: {option} must be a number of seconds from 0, not {value!r}"
                )
        if system_metrics is not None:
            _check_interval(system_metrics)
        _check_timeout(process_timeout)
        checkpoints = [p for p in plugins if isinstance(p, OrbaxCheckpoint)]
        self._stores = [p for p in plugins if isinstance(p, Store)]
        if len(checkpoints) > 1:
            raise ConfigError("Callbacks: give one OrbaxCheckpoint; policies are joined with |")
        if self._stores and not checkpoints:
            raise ConfigError(
                f"Callbacks: {self._stores[0].title} mirrors a run directory, "
                "so an OrbaxCheckpoint must be given too"
            )
        _check_names(self._stores)
        self._checkpoint = checkpoints[0] if checkpoints else None
        self._plugins = [p for p in plugins if not isinstance(p, OrbaxCheckpoint)]
        self._drain_limit, self._grace, self._clock = drain_limit, grace, clock or Clock()
        self._system_metrics, self._profile = system_metrics, profile
        self._process_timeout = process_timeout
        # Registering checks every hook, now rather than when the first one is called.
        if idle := [p for p in self._plugins if not isinstance(p, Store) and not _has_hooks(p)]:
            raise ConfigError(
                f"Callbacks: {idle[0]!r} is no plugin: it has no method marked "
                "@ckpt_callbacks.hookimpl, and is neither an OrbaxCheckpoint nor a store"
            )
        Hooks(self._plugins)

    def run(
        self,
        state: S,
        *,
        config: Mapping[str, Any] | None = None,
        resume: Resume = "last",
        run_id: str | None = None,
        start_from: str | os.PathLike[str] | Weights | None = None,
        init: Callable[[], S] | None = None,
        discard_newer: bool = False,
    ) -> Run[S]:
        """Return a run, to be used in a `with` statement.

        It goes on from the newest complete checkpoint in the directory, if there is one. Its
        files are checked; a damaged one is repaired from a tracker's copy, or left out with a
        message. Then the run goes on from the one before.

        Args:
            state: what is to be saved, and the template for what is restored. It may be abstract,
                with `jax.ShapeDtypeStruct` for arrays, so that no array is made only to be
                replaced; a run that may have to begin needs `init` then.
            config: hyper-parameters, for the trackers and `inspect`: JSON values by name.
            resume: `last`, `best`, a step, or `None` to start over. Where newer checkpoints
                exist, entering the run is an error that names the choices. An address in a tracker,
                such as `mlflow:/digits@last`, is for a machine that has lost its disk: where the
                directory holds no run, the one that saved that checkpoint goes on there, with all
                that the tracker has of it; else it is `last`. `anywhere` looks for the newest
                checkpoint of the run `run_id` in the directory and in every tracker, on whatever
                machine, and begins a new run where there is none.
            run_id: what names the run in every tracker, such as the name of the job; a random one
                if not given. A directory holds one run: another `run_id` is an error there. Only
                one process may have it at a time, which nobody checks between machines.
            start_from: where a new run gets its weights from: a run directory, a checkpoint or an
                address, or `Weights` to say which and how. The rest of the state stays as it is,
                and the first step is 0. When the run goes on after a restart it is not looked at.
            init: makes the state that a new run begins with, if `state` is abstract.
            discard_newer: remove those newer ones, in every store. Give it once: a restart with
                it would discard again.

        Raises:
            ConfigError: `config` is not JSON, `resume`, `run_id` or `start_from` is none of those,
                or `init` is no function.
        """
        # Here and not above: a script that imports the package may not train.
        from ckpt_callbacks.beginning import Beginning
        from ckpt_callbacks.entering import Terms
        from ckpt_callbacks.restoring import Weights
        from ckpt_callbacks.run import Run

        _check_resume(resume, run_id, self._checkpoint)
        if init is not None and not callable(init):
            raise ConfigError(f"run: init must be a function that makes a state, not {init!r}")
        if start_from is not None and not isinstance(start_from, Weights):
            start_from = Weights(start_from)
        try:
            json.dumps(dict(config or {}))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"run: config must hold JSON values only: {error}") from error
        if odd := [key for key in config or {} if not isinstance(key, str)]:
            raise ConfigError(f"run: the keys of config must be strings, not {odd[0]!r}")
        terms = None
        if self._checkpoint:
            terms = Terms(
                checkpoint=self._checkpoint,
                stores=self._stores,
                config=dict(config or {}),
                resume=resume,
                run_id=run_id,
                discard_newer=discard_newer,
                drain_limit=self._drain_limit,
                system_metrics=self._system_metrics,
                process_timeout=self._process_timeout,
                clock=self._clock,
            )
        beginning = Beginning(state, start_from, init)
        if self._profile:
            from ckpt_callbacks.profiled import ProfiledRun

            return ProfiledRun(beginning, terms, self._plugins, self._grace, clock=self._clock)
        return Run(beginning, terms, self._plugins, self._grace)


def _check_resume(resume: Resume, run_id: str | None, checkpoint: OrbaxCheckpoint | None) -> None:
    if run_id is not None:
        from ckpt_callbacks.anywhere import check_run_id  # what it needs takes a while to import

        check_run_id(run_id)
    is_step = isinstance(resume, int) and not isinstance(resume, bool) and resume >= 0
    if not is_step and resume not in ("last", "best", ANYWHERE, None) and not is_address(resume):
        raise ConfigError(
            "run: resume must be 'last', 'best', a step, None, or 'anywhere', or an address such "
            f"as 'mlflow:/digits@last', not {resume!r}"
        )
    if is_address(resume) and run_id is not None:
        raise ConfigError(f"run: resume={resume!r} says which run it is: leave out run_id")
    if resume == ANYWHERE and run_id is None:
        raise ConfigError(
            "run: resume='anywhere' needs run_id=, a name by which an empty machine finds the run, "
            "such as the name of the job"
        )
    if (is_address(resume) or resume == ANYWHERE) and checkpoint is None:
        raise ConfigError(f"run: resume={resume!r} needs an OrbaxCheckpoint to go on in")


def _check_timeout(seconds: float) -> None:
    if not isinstance(seconds, int | float) or not 0 < seconds < _LONGEST:
        raise ConfigError(
            f"Callbacks: process_timeout must be a number of seconds above 0, not {seconds!r}"
        )


def _check_interval(seconds: float) -> None:
    if not isinstance(seconds, int | float) or not 0 < seconds < threading.TIMEOUT_MAX:
        raise ConfigError(
            f"Callbacks: system_metrics must be a number of seconds above 0, or None, not "
            f"{seconds!r}"
        )
    require("psutil", extra="system", who="Callbacks(system_metrics=...)")


def _check_names(stores: list[Store]) -> None:
    """Check what becomes the name of a folder, and a key in records."""
    names = [store.name for store in stores]
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name) or name == "local":
            raise ConfigError(
                "Callbacks: the name of a store must be lower-case letters, digits, '-' and '_', "
                f"and not 'local', which {name!r} is not"
            )
    if twice := {n for n in names if names.count(n) > 1}:
        raise ConfigError(f"Callbacks: two stores have the name {', '.join(twice)}")


def _has_hooks(plugin: object) -> bool:
    return any(name.startswith("on_") for name in dir(type(plugin)))
