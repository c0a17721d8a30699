"""The processes of `jax.distributed` in one run: process 0 decides, and the others follow.

What they tell each other goes through the key-value store of JAX's coordination service. It has
timeouts, tells who is missing, and does not wait for what the devices are computing. Only the
thread that entered the run calls it.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ckpt_callbacks import errors
from ckpt_callbacks.errors import CkptCallbacksError, ConfigError, ProcessLost, SaveError
from ckpt_callbacks.sharing import VALUES

__all__ = ["Processes", "here", "own_index"]

logger = logging.getLogger("ckpt_callbacks")

_PIECE = 1.0
"""Seconds to wait at a time, so that Ctrl-C is heard."""
_MOST = 5000
"""How many words of process 0 the service keeps, before all meet and they can go."""
_OPENING = "the opening of the run directory"
_runs = itertools.count()


def here(timeout: float) -> Processes | None:
    """Return the processes of `jax.distributed`; `None` where there is only this one."""
    if (state := _state()) is None:
        return None
    return Processes(state.client, state.process_id, state.num_processes, timeout)


def own_index() -> int | None:
    """Return which process of `jax.distributed` this is; `None` where there is only this one."""
    state = _state()
    return None if state is None else int(state.process_id)


def _state() -> Any:
    jax = sys.modules.get("jax")
    if not (jax and jax.distributed.is_initialized()):
        return None
    from jax._src.distributed import global_state  # the only way to the client

    return global_state if global_state.num_processes > 1 else None


class Processes:
    """All processes of a run, seen from one of them; all make the same calls in the same order.

    Args:
        client: of the coordination service.
        index: of this process.
        count: how many there are.
        timeout: seconds to wait for another one.
    """

    def __init__(self, client: Any, index: int, count: int, timeout: float) -> None:
        self.index, self.count, self.timeout = index, count, timeout
        self.decides = index == 0
        """Whether this one decides."""
        self._client = client
        self._run = next(_runs)
        self._round = self._calls = self._words = 0

    def agree(self, topic: str, decide: Callable[[], Any]) -> Any:
        """Return in every process what `decide` returns in process 0: a JSON value.

        Raises:
            ProcessLost: process 0 did not come to it in time.
            ConfigError: it is at another point.
            CkptCallbacksError: what `decide` raised in process 0.
        """
        self._words += 1
        if self._words > _MOST:
            self.meet(topic)
        key = self._next()
        if not self.decides:
            return self._told(key, topic)
        try:
            value = decide()
        except BaseException as error:
            self._tell(key, topic, error=error)
            raise
        return self._tell(key, topic, value)

    def meet(
        self, topic: str, card: Any = None, judge: Callable[[list[Any]], Any] = lambda cards: None
    ) -> Any:
        """Return in every process what process 0 makes of the cards that all hand in.

        Raises:
            ProcessLost: some process did not come in time.
            ConfigError: some process is at another point.
            CkptCallbacksError: what `judge` raised in process 0.
        """
        self._round += 1
        self._words = 0
        key = self._next()
        self._client.key_value_set(f"{key}/card/{self.index}", json.dumps([topic, card]))
        if not self.decides:
            return self._told(key, topic)
        try:
            value = judge(self._cards(key, topic))
        except BaseException as error:
            self._tell(key, topic, error=error)
            raise
        # All are here, so what was told before has been read.
        self._client.key_value_delete(self._folder(self._round - 1))
        return self._tell(key, topic, value)

    def compare(self, card: Mapping[str, str]) -> None:
        """Check that all processes hand in the same.

        Raises:
            ConfigError: they do not, in all processes; the message names which.
            ProcessLost: some process did not come in time.
        """
        self.meet("the start of the run", dict(card), _compared)

    @contextmanager
    def opening(self, word: Callable[[], Any]) -> Iterator[None]:
        """Let process 0 open the run directory; the others learn of it by `opened`.

        Args:
            word: returns what they are told.
        """
        if not self.decides:
            yield
            return
        key = self._next()
        try:
            yield
            value = word()
        except BaseException as error:
            self._tell(key, _OPENING, error=error)
            raise
        self._tell(key, _OPENING, value)

    def opened(self) -> Any:
        """Return what process 0 tells of the run directory, however long it takes.

        It may have to fetch a checkpoint before; if it dies, the runtime ends this process too.
        """
        key = self._next()
        while True:
            try:
                return self._read(key, _OPENING)
            except TimeoutError:
                logger.warning("waiting for process 0, which opens the run directory")

    def share(self, unseen: str | None) -> None:
        """Check that all see the directory which process 0 has opened.

        Args:
            unseen: what is wrong with it in this process.

        Raises:
            ConfigError: some process does not see it, in all processes.
        """
        self.meet("the run directory", unseen, _shared)

    def before_save(self, step: int, error: Exception | None) -> Exception | None:
        """Return why no process is to save a step, though it be for the sake of one; or `None`.

        Args:
            step: which all are about to save.
            error: what keeps this process from it.
        """
        card = error and f"{type(error).__name__}: {error}"
        refused = self.meet(f"the save of step {step}", card, _complaints)
        return (error or SaveError(refused)) if refused else None

    def _next(self) -> str:
        self._calls += 1
        return f"{self._folder(self._round)}/{self._calls}"

    def _folder(self, number: int) -> str:
        return f"ckpt_callbacks/{self._run}/{number}"

    def _tell(
        self, key: str, topic: str, value: Any = None, error: BaseException | None = None
    ) -> Any:
        raised = None if error is None else [type(error).__name__, str(error)]
        self._client.key_value_set(f"{key}/word", json.dumps([topic, value, raised]))
        return value

    def _told(self, key: str, topic: str) -> Any:
        try:
            return self._read(key, topic)
        except TimeoutError:
            there = self._listed(key)
            missing = [i for i in range(self.count) if i not in there] if there else []
            raise self._lost(missing or [0], topic) from None

    def _read(self, key: str, topic: str) -> Any:
        at, value, raised = json.loads(self._wait(f"{key}/word", self.timeout))
        if at != topic and not raised:
            raise ConfigError(_apart({0: at, self.index: topic}))
        if raised:
            raise _error(*raised)
        return value

    def _cards(self, key: str, topic: str) -> list[Any]:
        deadline = time.monotonic() + self.timeout
        there = self._listed(key)
        while missing := [i for i in range(self.count) if i not in there]:
            try:
                self._wait(f"{key}/card/{missing[0]}", deadline - time.monotonic())
            except TimeoutError:
                raise self._lost(missing, topic) from None
            there = self._listed(key)
        topics = {i: there[i][0] for i in range(self.count)}
        if set(topics.values()) != {topic}:
            raise ConfigError(_apart(topics))
        return [there[i][1] for i in range(self.count)]

    def _listed(self, key: str) -> dict[int, Any]:
        cards = self._client.key_value_dir_get(f"{key}/card/")
        return {int(name.rpartition("/")[2]): json.loads(card) for name, card in cards}

    def _wait(self, key: str, timeout: float) -> str:
        """Return the value of a key once it is there.

        Raises:
            TimeoutError: it is not there in time.
            ProcessLost: the service cannot be asked any more.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            piece = max(1, round(1000 * min(left, _PIECE)))
            try:
                return str(self._client.blocking_key_value_get(key, piece))
            except RuntimeError as error:  # of JAX
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise ProcessLost(f"JAX's coordination service fails: {error}") from error
                if left <= piece / 1000:
                    raise TimeoutError from None

    def _lost(self, missing: Sequence[int], topic: str) -> ProcessLost:
        return ProcessLost(
            f"{_named(missing)} of {self.count} did not come to {topic} within {self.timeout:g} s "
            f"after process {self.index} did: see the output there. Where it only takes longer, "
            "give Callbacks(process_timeout=...) more seconds"
        )


def _named(indices: Sequence[int]) -> str:
    return f"process{'es' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def _grouped(values: Mapping[int, str]) -> str:
    """Return in words which processes have which value."""
    groups: dict[str, list[int]] = {}
    for index, value in values.items():
        groups.setdefault(value, []).append(index)
    return "; ".join(f"{_named(group)}: {value}" for value, group in groups.items())


def _apart(topics: Mapping[int, str]) -> str:
    return f"the processes of this run are not at the same point: {_grouped(topics)}"


def _complaints(cards: list[str | None]) -> str:
    return "; ".join(f"process {i}: {card}" for i, card in enumerate(cards) if card)


def _shared(cards: list[str | None]) -> None:
    if complaints := _complaints(cards):
        raise ConfigError(complaints)


def _compared(cards: list[dict[str, str]]) -> None:
    names = dict.fromkeys(name for card in cards for name in card)
    found = {name: {i: card.get(name, "none") for i, card in enumerate(cards)} for name in names}
    wrong = [name for name, values in found.items() if len(set(values.values())) > 1]
    if not wrong:
        return
    lines = "\n  ".join(f"{name}: {_grouped(found[name])}" for name in wrong)
    hint = (
        "\nOf what is not a global array a checkpoint holds the value of process 0 only: let all "
        "have the same, make it a global array, or leave it out of the state"
    )
    values = any(name.startswith(VALUES) for name in wrong)
    raise ConfigError(f"the processes of this run disagree:\n  {lines}{hint * values}")


def _error(kind: str, text: str) -> CkptCallbacksError:
    """Return what another process has raised."""
    known = getattr(errors, kind) if kind in errors.__all__ else None
    if known is None or not issubclass(known, CkptCallbacksError):
        return ProcessLost(f"process 0 failed: {kind}: {text}")
    made: CkptCallbacksError = known(text)
    return made
