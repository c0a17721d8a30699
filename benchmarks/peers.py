"""What other libraries take to tell their callbacks of a step, where they are installed.

Each is called as its own training loop calls it, with callbacks that do nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import pluggy

__all__ = ["PACKAGES", "impl", "tellers", "through_pluggy"]

os.environ.setdefault("KERAS_BACKEND", "jax")
PACKAGES = {
    "pluggy": "pluggy",
    "keras": "keras",
    "transformers": "transformers",
    "ignite": "pytorch-ignite",
    "lightning": "lightning",
}
"""What each module is installed by."""

Teller = Callable[[Iterable[int]], object]
"""Tells of each of some steps."""
spec, impl = pluggy.HookspecMarker("benchmark"), pluggy.HookimplMarker("benchmark")


class Specs:
    """What the plugins are called with in pluggy's own way."""

    @spec
    def on_step(self, event: Any) -> None:
        """The loop finished a step."""

    @spec
    def on_saved(self, event: Any) -> None:
        """A checkpoint is complete."""


class Idle:
    """A plugin that does nothing."""

    @impl
    def on_step(self, event: Any) -> None:
        """Do nothing."""


def through_pluggy(plugins: Iterable[object]) -> Any:
    """Return pluggy's callers of the hooks."""
    manager = pluggy.PluginManager("benchmark")
    manager.add_hookspecs(Specs)
    for plugin in plugins:
        manager.register(plugin)
    return manager.hook


def tellers(count: int) -> dict[str, Teller]:
    """Return what tells `count` callbacks of steps, for each library that is installed."""
    makers = (_pluggy, _keras, _transformers, _ignite, _lightning)
    known = dict(zip(PACKAGES, makers, strict=True))
    return {name: make(count) for name, make in known.items() if find_spec(name)}


def _pluggy(count: int) -> Teller:
    hook = through_pluggy(Idle() for _ in range(count))
    event = object()  # made once: the least that pluggy can cost

    def tell(steps: Iterable[int]) -> None:
        for _ in steps:
            hook.on_step(event=event)

    return tell


def _keras(count: int) -> Teller:
    from keras.callbacks import Callback, CallbackList

    class Quiet(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            """Do nothing."""

    callbacks = CallbackList([Quiet() for _ in range(count)])

    def tell(steps: Iterable[int]) -> None:
        for step in steps:
            callbacks.on_train_batch_end(step)

    return tell


def _transformers(count: int) -> Teller:
    import transformers

    transformers.logging.set_verbosity_error()
    from transformers.trainer_callback import (
        CallbackHandler,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )

    class Quiet(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Do nothing."""

    handler = CallbackHandler([Quiet() for _ in range(count)], None, None, None, None)
    state, control = TrainerState(), TrainerControl()

    def tell(steps: Iterable[int]) -> None:
        for _ in steps:
            handler.on_step_end(None, state, control)

    return tell


def _ignite(count: int) -> Teller:
    from ignite.engine import Engine, Events

    engine = Engine(lambda engine, batch: None)
    for _ in range(count):
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: None)

    def tell(steps: Iterable[int]) -> None:
        for _ in steps:
            engine.fire_event(Events.ITERATION_COMPLETED)

    return tell


def _lightning(count: int) -> Teller:
    from lightning.pytorch import Callback, Trainer

    # Private: what its loop calls for each batch. An import that fails tells of a change.
    from lightning.pytorch.trainer.call import _call_callback_hooks

    class Quiet(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *arguments: Any) -> None:
            """Do nothing."""

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[Quiet() for _ in range(count)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )

    def tell(steps: Iterable[int]) -> None:
        for step in steps:
            _call_callback_hooks(trainer, "on_train_batch_end", None, None, step)

    return tell
