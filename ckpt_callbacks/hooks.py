"""Typed calls to the plugins: the only module that deals with pluggy at run time.

pluggy registers and validates. Its call path is flattened once: a call is a loop over bound
methods, in pluggy's order. A hook that some plugin wraps goes through pluggy itself.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pluggy

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.events import Eval, Event, RunEnded, RunStarted, Step
from ckpt_callbacks.hookspecs import CRITICAL, EVERY, PROJECT, Specs
from ckpt_callbacks.policy import NEVER
from ckpt_callbacks.timing import Timed, untimed

__all__ = ["Hooks"]

logger = logging.getLogger("ckpt_callbacks")
THREADS = "ckpt-"
"""How the names of our own threads begin."""

_ON_THE_LOOP = (RunStarted, Eval, RunEnded)
_NAMES = {name for name in vars(Specs) if name.startswith("on_")}


_Call = tuple[Callable[[Any], object], Callable[[BaseException], None]]
"""A hook of a plugin, and what gets that which it raises."""


@dataclass(slots=True)
class _StepCall:
    """One plugin's `on_step`, and the next step that it wants."""

    call: _Call
    every: int
    due: int = 0


class _Within(threading.local):
    """Counts, for each thread, how deep it is in calls of plugins."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


class Hooks:
    """The plugins of one run.

    Args:
        plugins: objects with marked methods.
        critical: gets what a hook marked `critical=True` raises, on the thread where it runs, and
            what would end a thread of ours, such as `SystemExit`.
        timed: stands around each hook of each plugin.

    Raises:
        ConfigError: a plugin has a hook that does not exist, one with a wrong signature,
            or a method that looks like a hook and is not marked.
    """

    def __init__(
        self,
        plugins: Iterable[object],
        critical: Callable[[BaseException], None] = lambda error: None,
        timed: Timed = untimed,
    ) -> None:
        self._critical = critical
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Specs)
        for plugin in plugins:
            _check_marked(plugin)
            if self._manager.is_registered(plugin):
                raise ConfigError(f"plugin {_plugin_name(plugin)} is given twice")
            try:
                self._manager.register(plugin)
                self._manager.check_pending()
            except (pluggy.PluginValidationError, ValueError) as error:
                raise ConfigError(_explain(plugin, error)) from error
        for name in _NAMES:
            impls: list[Any] = getattr(self._manager.hook, name).get_hookimpls()
            for impl in impls:  # here, so that it holds too where pluggy makes the calls
                impl.function = timed(f"{_plugin_name(impl.plugin)}.{name}")(impl.function)
        self._calls = {name: self._flatten(name) for name in _NAMES}
        self._steps = [_StepCall(call, every) for every, call in self._step_calls()]
        # Of all steps, if that is what all of them want.
        self._each = [listener.call for listener in self._steps]
        if any(listener.every != 1 for listener in self._steps):
            self._each = []
        self._stepping = 0
        # One background event at a time, and reentrant: a hook may cause an event.
        self._mutex = threading.RLock()
        self._within = _Within()

    def emit(self, event: Event) -> None:
        """Call the plugins that listen to this kind of event; what they raise is logged."""
        calls = self._calls[_hook_name(type(event))]
        if isinstance(event, _ON_THE_LOOP):  # these never wait for a slow background listener
            with self._within:
                _call(calls, event)
        elif calls:
            with self._mutex:
                _call(calls, event)

    def first_step(self, step: int) -> int:
        """Begin to count at `step`; return the first step that a plugin wants."""
        for listener in self._steps:
            listener.due = step
        return step if self._steps else NEVER

    def step(self, event: Step) -> int:
        """Call the plugins that want this step; return the next step that one wants."""
        self._stepping = threading.get_ident()
        try:
            if self._each:
                for function, failed in self._each:  # `_call`, in place since there may be many
                    try:
                        function(event)
                    except BaseException as error:
                        failed(error)
                return event.step + 1
            following = NEVER
            for listener in self._steps:
                if event.step >= listener.due:
                    listener.due = (event.step // listener.every + 1) * listener.every
                    _call([listener.call], event)
                following = min(following, listener.due)
            return following
        finally:
            self._stepping = 0

    @property
    def calling(self) -> bool:
        """Whether this thread is in a plugin's `on_step` or another hook of the loop."""
        return self._stepping == threading.get_ident() or self._within.depth > 0

    def _step_calls(self) -> list[tuple[int, _Call]]:
        caller = self._manager.hook.on_step
        impls = reversed(caller.get_hookimpls())
        return [(getattr(i.function, EVERY, 1), self._guarded("on_step", i)) for i in impls]

    def _flatten(self, name: str) -> list[_Call]:
        caller = getattr(self._manager.hook, name)
        impls = list(reversed(caller.get_hookimpls()))
        if not any(i.wrapper or i.hookwrapper for i in impls):
            return [self._guarded(name, impl) for impl in impls]

        def failed(error: BaseException) -> None:
            if not isinstance(error, Exception):
                raise error
            logger.error("a plugin failed in %s", name, exc_info=error)

        return [(lambda event: caller(event=event), failed)]

    def _guarded(self, name: str, impl: Any) -> _Call:
        function = impl.function
        who = _plugin_name(impl.plugin)
        critical = getattr(function, CRITICAL, False)

        def failed(error: BaseException) -> None:
            mine = threading.current_thread().name.startswith(THREADS)
            if not isinstance(error, Exception) and not mine:
                raise error
            logger.error("plugin %s failed in %s", who, name, exc_info=error)
            # What is no `Exception`, such as SystemExit, must end no thread of ours.
            if critical or not isinstance(error, Exception):
                self._critical(error)

        return (function if impl.argnames else lambda event: function()), failed


def _call(calls: Iterable[_Call], event: Event) -> None:
    for function, failed in calls:
        try:
            function(event)
        except BaseException as error:
            failed(error)


def _hook_name(kind: type[Event]) -> str:
    name = _HOOK_NAMES.get(kind)
    if name is None:
        name = "on" + re.sub("([A-Z])", r"_\1", kind.__name__).lower()
        _HOOK_NAMES[kind] = name
    return name


_HOOK_NAMES: dict[type[Event], str] = {}


def _check_marked(plugin: object) -> None:
    for name in dir(type(plugin)):
        method = getattr(type(plugin), name)
        if name.startswith("on_") and callable(method) and not hasattr(method, EVERY):
            raise ConfigError(
                f"plugin {_plugin_name(plugin)}: the method {name} is not marked with "
                "@ckpt_callbacks.hookimpl, so it would never be called; mark it or rename it"
            )


def _explain(plugin: object, error: Exception) -> str:
    who = _plugin_name(plugin)
    unknown = re.search(r"unknown hook '(\w+)'", str(error))
    if wrong := re.search(r"hook '(\w+)'\n.*Argument\(s\) (\{.*\})", str(error), re.DOTALL):
        return f"plugin {who}: {wrong[1]} has the parameters {wrong[2]}; its only one is `event`"
    if not unknown:
        return f"plugin {who}: {error}"
    import difflib

    close = difflib.get_close_matches(unknown[1], _NAMES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the hooks are {', '.join(sorted(_NAMES))}"
    return f"plugin {who}: there is no hook {unknown[1]!r}; {hint}"


def _plugin_name(plugin: object) -> str:
    kind = plugin if isinstance(plugin, type) else type(plugin)
    return f"{kind.__module__}.{kind.__qualname__}"
