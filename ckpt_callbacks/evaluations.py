"""Evaluations on their way to the checkpoints that they rank."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any

from ckpt_callbacks.checkpoint import OrbaxCheckpoint
from ckpt_callbacks.errors import CkptCallbacksWarning
from ckpt_callbacks.retention import ranked_metrics

__all__ = ["Evaluations"]

_MISSES = 3
"""After this many evaluations in a row that met no checkpoint, and as many checkpoints that met no
evaluation, a warning tells of it."""


class Evaluations:
    """Those of steps that are not saved yet, and whether evaluations and checkpoints ever meet.

    Args:
        checkpoint: says by which metrics checkpoints are ranked.
    """

    def __init__(self, checkpoint: OrbaxCheckpoint) -> None:
        self.mutex = threading.RLock()
        """Held while a step is saved or evaluated: one may come in the midst of the other."""
        self._save = checkpoint.save
        self._keep = checkpoint.keep
        self._ranked = ranked_metrics(checkpoint.keep)
        self._waiting: dict[int, dict[str, float]] = {}
        self._missed: list[int] = []
        self._unmet: list[int] = []
        self._warned: set[str] = set()

    def of(self, step: int) -> dict[str, float]:
        """Return what was measured of a step that is not saved yet."""
        with self.mutex:
            return dict(self._waiting.get(step, {}))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step was measured that may yet be saved."""
        self._waiting.setdefault(step, {}).update(metrics)

    def take(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return what was measured of a step that is being saved; the loop gave `metrics` for it.

        Evaluations of steps that passed without a save rank nothing.
        """
        evaluated = self._waiting.pop(step, {})
        if evaluated:
            self._check_names(step, {*evaluated, *metrics})
        self._missed += sorted(s for s in self._waiting if s < step)
        self._waiting = {s: m for s, m in self._waiting.items() if s > step}
        self._unmet.append(step)
        if evaluated:
            self.met()
        self._check_met()
        return evaluated

    def met(self) -> None:
        """An evaluation has a checkpoint."""
        self._missed.clear()
        self._unmet.clear()

    def missed(self, step: int) -> None:
        """A step was measured that is past and has no checkpoint."""
        self._missed.append(step)
        self._check_met()

    def _check_names(self, step: int, seen: set[str]) -> None:
        if missing := set(self._ranked) - seen:
            self._warn(
                "names",
                f"the evaluation of step {step} has no {', '.join(sorted(missing))}, which "
                f"{self._keep} ranks by, so it can not be best; "
                f"the metrics were {', '.join(sorted(seen))}",
            )

    def _check_met(self) -> None:
        if self._ranked and min(len(self._missed), len(self._unmet)) >= _MISSES:
            self._warn(
                "met",
                "evaluations and checkpoints never meet, so nothing ranks: evaluated were steps "
                f"{_few(self._missed)}, saved were steps {_few(self._unmet)} ({self._save}). "
                "Evaluate at steps that are saved, before on_step, or save on evaluations with "
                "OnEval()",
            )

    def _warn(self, kind: str, text: str) -> None:
        """Warn once, in the name of the loop."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, CkptCallbacksWarning, stacklevel=9)


def _few(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:_MISSES])) + "…" * (len(steps) > _MISSES)
