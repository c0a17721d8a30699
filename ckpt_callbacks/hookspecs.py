r"""The hooks of ckpt_callbacks, and how to write a plugin.

A plugin is any object with methods marked `@hookimpl`, given to `Callbacks`::

    import ckpt_callbacks as cc

    class Bell:
        @cc.hookimpl
        def on_saved(self, event: cc.Saved) -> None:
            print("\a saved", event.step)

        @cc.hookimpl(every=100)
        def on_step(self, event: cc.Step) -> None:
            print("at step", event.step)

    callbacks = cc.Callbacks(Bell())

There is one hook a kind of event, and its one argument is the event. `on_step`, `on_eval`,
`on_run_started` and `on_run_ended` run on the loop's thread (`on_eval` on whichever thread called
it, and on a thread of the run for one that another process reported), and so does
`on_save_failed` when a save could not even begin; all others on background threads, one call at
a time.

For one checkpoint `on_eval` comes before `on_step` if the loop evaluates first, then `on_saved`,
and only then what stores do: `on_mirrored`, `on_promoted` for the aliases that move to it, and
`on_evicted` for what lost its place. Of several plugins the one that was given last is called
first, as pluggy has it; `tryfirst` and `trylast` go before and after all others.

A hook that raises is reported with its plugin's name, and the other plugins and the training go
on. Marked `critical=True` it ends the training: the call of the run that it happened in raises
what it raised, or the next one for a hook on a background thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import pluggy

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.events import (
    Eval,
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

__all__ = ["PROJECT", "Specs", "hookimpl"]

PROJECT: Literal["ckpt_callbacks"] = "ckpt_callbacks"
EVERY = "ckpt_callbacks_every"
"""Attribute of a hook implementation that holds its `every`."""
CRITICAL = "ckpt_callbacks_critical"
"""Attribute of a hook implementation that holds its `critical`."""

_spec = pluggy.HookspecMarker(PROJECT)
_impl = pluggy.HookimplMarker(PROJECT)
F = TypeVar("F", bound=Callable[..., Any])


@overload
def hookimpl(function: F) -> F: ...
@overload
def hookimpl(
    *,
    every: int = ...,
    critical: bool = ...,
    tryfirst: bool = ...,
    trylast: bool = ...,
    wrapper: bool = ...,
) -> Callable[[F], F]: ...
def hookimpl(
    function: F | None = None,
    *,
    every: int = 1,
    critical: bool = False,
    tryfirst: bool = False,
    trylast: bool = False,
    wrapper: bool = False,
) -> F | Callable[[F], F]:
    """Mark a method as the implementation of the hook of its name.

    Args:
        function: the method, when used without parentheses.
        every: for `on_step` only, take the first step in each bucket of this many steps;
            the other steps cost nothing.
        critical: what it raises ends the training instead of being logged only.
        tryfirst: call it before the others.
        trylast: call it after the others.
        wrapper: a generator around the others, as in pluggy; not for `on_step`.

    Raises:
        ConfigError: `every` is not a positive integer, or not on `on_step`; `on_step` is
            wrapped; or a wrapper is critical.
    """

    def mark(f: F) -> F:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"hookimpl: every must be an integer of at least 1, not {every!r}")
        if every != 1 and f.__name__ != "on_step":
            raise ConfigError(f"hookimpl: every= is for on_step only, not for {f.__name__}")
        if wrapper and f.__name__ == "on_step":
            raise ConfigError("hookimpl: on_step can not be wrapped: its plugins run at own steps")
        if wrapper and critical:
            raise ConfigError("hookimpl: a wrapper can not be critical; mark a plain hook")
        setattr(f, EVERY, every)
        setattr(f, CRITICAL, critical)
        return _impl(f, tryfirst=tryfirst, trylast=trylast, wrapper=wrapper)

    return mark if function is None else mark(function)


class Specs:
    """All hooks."""

    @_spec
    def on_run_started(self, event: RunStarted) -> None:
        """The run is open and recovered; before the first step."""

    @_spec
    def on_step(self, event: Step) -> None:
        """The loop finished a step; only those that `every=` asks for."""

    @_spec
    def on_eval(self, event: Eval) -> None:
        """The loop, or an evaluator, measured a step."""

    @_spec
    def on_saved(self, event: Saved) -> None:
        """A checkpoint is complete on disk, before any store has it."""

    @_spec
    def on_save_failed(self, event: SaveFailed) -> None:
        """A save failed and its leftovers are removed."""

    @_spec
    def on_mirrored(self, event: Mirrored) -> None:
        """A store holds a copy of a checkpoint."""

    @_spec
    def on_mirror_failed(self, event: MirrorFailed) -> None:
        """A store could not do what was asked; it is tried again."""

    @_spec
    def on_promoted(self, event: Promoted) -> None:
        """An alias names another step in a store."""

    @_spec
    def on_evicted(self, event: Evicted) -> None:
        """A copy is gone from the run directory or a store."""

    @_spec
    def on_run_ended(self, event: RunEnded) -> None:
        """The drain is over, or its limit reached, and the directory is released."""
