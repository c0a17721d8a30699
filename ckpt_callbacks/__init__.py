"""Checkpoints for JAX training loops: best and latest, decided once, kept in every store.

::

    import ckpt_callbacks as cc

    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint("runs/digits", save=cc.EveryNSteps(50),
                           keep=cc.LatestN(2) | cc.BestN(2, "val_accuracy", mode="max")),
    )
    with callbacks.run(state) as run:
        state = run.state
        for step in range(run.next_step, 1001):
            state, metrics = train_step(state, batch(step))
            if step % 50 == 0:
                run.on_eval(step, evaluate(state))
            run.on_step(step, state, metrics)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import ckpt_callbacks.orbax_policies  # noqa: F401  # so that policies of Orbax are understood
from ckpt_callbacks.callbacks import Callbacks
from ckpt_callbacks.checkpoint import OrbaxCheckpoint
from ckpt_callbacks.errors import (
    CheckpointNotFound,
    CkptCallbacksError,
    CkptCallbacksWarning,
    ConfigError,
    CorruptCheckpoint,
    DirectoryLocked,
    MissingExtra,
    NewerFormat,
    ProcessLost,
    RecordError,
    SaveError,
    StateMismatch,
    UsageError,
)
from ckpt_callbacks.events import (
    Eval,
    Event,
    Evicted,
    Mirrored,
    MirrorFailed,
    Promoted,
    RunEnded,
    RunStarted,
    Saved,
    SaveFailed,
    Step,
)
from ckpt_callbacks.hookspecs import hookimpl
from ckpt_callbacks.policy import Candidate, Custom, KeepPolicy, SaveContext, SavePolicy
from ckpt_callbacks.retention import BestN, LatestN
from ckpt_callbacks.schedule import (
    AtEnd,
    CustomSteps,
    EveryNSeconds,
    EveryNSteps,
    OnEval,
    OnImprovement,
)

if TYPE_CHECKING:
    from ckpt_callbacks.adapters import StateAdapter, register_adapter
    from ckpt_callbacks.adoption import adopt
    from ckpt_callbacks.exporting import export
    from ckpt_callbacks.forms import stack, strip, unstack
    from ckpt_callbacks.inspection import Inspection, inspect
    from ckpt_callbacks.loading import load_params
    from ckpt_callbacks.pictures import plot, write_report
    from ckpt_callbacks.profile import Profile
    from ckpt_callbacks.progress import ProgressBar
    from ckpt_callbacks.pruning import Goes, PrunePlan
    from ckpt_callbacks.published import Safetensors
    from ckpt_callbacks.pulling import pull
    from ckpt_callbacks.renaming import KeyMap, KeyPlan, Rule
    from ckpt_callbacks.report import CheckpointInfo, Summary, checkpoints, find
    from ckpt_callbacks.requests import pin, promote, prune, report_metrics, sync, unpin
    from ckpt_callbacks.restoring import Weights, restore
    from ckpt_callbacks.run import Run
    from ckpt_callbacks.verification import Problem, verify

__all__ = [
    "AtEnd",
    "BestN",
    "Callbacks",
    "Candidate",
    "CheckpointInfo",
    "CheckpointNotFound",
    "CkptCallbacksError",
    "CkptCallbacksWarning",
    "ConfigError",
    "CorruptCheckpoint",
    "Custom",
    "CustomSteps",
    "DirectoryLocked",
    "Eval",
    "Event",
    "EveryNSeconds",
    "EveryNSteps",
    "Evicted",
    "Goes",
    "Inspection",
    "KeepPolicy",
    "KeyMap",
    "KeyPlan",
    "LatestN",
    "MirrorFailed",
    "Mirrored",
    "MissingExtra",
    "NewerFormat",
    "OnEval",
    "OnImprovement",
    "OrbaxCheckpoint",
    "Problem",
    "ProcessLost",
    "Profile",
    "ProgressBar",
    "Promoted",
    "PrunePlan",
    "RecordError",
    "Rule",
    "Run",
    "RunEnded",
    "RunStarted",
    "Safetensors",
    "SaveContext",
    "SaveError",
    "SaveFailed",
    "SavePolicy",
    "Saved",
    "StateAdapter",
    "StateMismatch",
    "Step",
    "Summary",
    "UsageError",
    "Weights",
    "adopt",
    "checkpoints",
    "export",
    "find",
    "hookimpl",
    "inspect",
    "load_params",
    "pin",
    "plot",
    "promote",
    "prune",
    "pull",
    "register_adapter",
    "report_metrics",
    "restore",
    "stack",
    "strip",
    "sync",
    "unpin",
    "unstack",
    "verify",
    "write_report",
]

# What a training script may do without, or needs only once it runs, is loaded when it is used.
_LATER = {
    "adapters": ("StateAdapter", "register_adapter"),
    "adoption": ("adopt",),
    "exporting": ("export",),
    "forms": ("stack", "strip", "unstack"),
    "inspection": ("Inspection", "inspect"),
    "loading": ("load_params",),
    "pictures": ("plot", "write_report"),
    "profile": ("Profile",),
    "progress": ("ProgressBar",),
    "published": ("Safetensors",),
    "renaming": ("KeyMap", "KeyPlan", "Rule"),
    "report": ("CheckpointInfo", "Summary", "checkpoints", "find"),
    "pruning": ("Goes", "PrunePlan"),
    "pulling": ("pull",),
    "requests": ("pin", "promote", "prune", "report_metrics", "sync", "unpin"),
    "restoring": ("Weights", "restore"),
    "run": ("Run",),
    "verification": ("Problem", "verify"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
