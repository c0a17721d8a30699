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
it), and so does `on_save_failed` when a save could not even begin; all others on background
threads, one call at a time. A hook that raises is reported with
its plugin's name, and the other plugins and the training go on.
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

_spec = pluggy.HookspecMarker(PROJECT)
_impl = pluggy.HookimplMarker(PROJECT)
F = TypeVar("F", bound=Callable[..., Any])


@overload
def hookimpl(function: F) -> F: ...
@overload
def hookimpl(
    *, every: int = ..., tryfirst: bool = ..., trylast: bool = ..., wrapper: bool = ...
) -> Callable[[F], F]: ...
def hookimpl(
    function: F | None = None,
    *,
    every: int = 1,
    tryfirst: bool = False,
    trylast: bool = False,
    wrapper: bool = False,
) -> F | Callable[[F], F]:
    """Mark a method as the implementation of the hook of its name.

    Args:
        function: the method, when used without parentheses.
        every: for `on_step` only, take the first step in each bucket of this many steps;
            the other steps cost nothing.
        tryfirst: call it before the others.
        trylast: call it after the others.
        wrapper: a generator around the others, as in pluggy; not for `on_step`.

    Raises:
        ConfigError: `every` is not a positive integer, or not on `on_step`; or `on_step` is
            wrapped.
    """

    def mark(f: F) -> F:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"hookimpl: every must be an integer of at least 1, not {every!r}")
        if every != 1 and f.__name__ != "on_step":
            raise ConfigError(f"hookimpl: every= is for on_step only, not for {f.__name__}")
        if wrapper and f.__name__ == "on_step":
            raise ConfigError("hookimpl: on_step can not be wrapped: its plugins run at own steps")
        setattr(f, EVERY, every)
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
