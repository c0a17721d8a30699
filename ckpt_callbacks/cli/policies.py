"""Keep policies as text, such as `latest:2,best:3:val_accuracy:max`."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.policy import AnyOf, KeepPolicy
from ckpt_callbacks.retention import BestN, LatestN
from ckpt_callbacks.schedule import CustomSteps, EveryNSeconds, EveryNSteps
from ckpt_callbacks.text import suggestion

__all__ = ["policy_from_text"]

_FORMS = "latest:N, best:N:METRIC:min or :max, every:N, seconds:N, step:N"


def policy_from_text(text: str) -> KeepPolicy:
    """Return the policy that a text means.

    Raises:
        ConfigError: it means none; the message has the forms.
    """
    return AnyOf(tuple(_one(part.strip()) for part in text.split(",")))


def _one(text: str) -> KeepPolicy:
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise ConfigError(f"--keep: {text!r} is none of {_FORMS}{suggestion(kind, _KINDS)}")
    try:
        return _KINDS[kind](rest)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"--keep: {text!r} is none of {_FORMS}") from None


def _best(rest: str) -> BestN:
    count, _, rest = rest.partition(":")
    metric, _, mode = rest.rpartition(":")  # a name may have colons
    if mode == "min":
        return BestN(int(count), metric, mode="min")
    if mode == "max":
        return BestN(int(count), metric, mode="max")
    raise ValueError(mode)


_KINDS: dict[str, Callable[[str], KeepPolicy]] = {
    "latest": lambda rest: LatestN(int(rest)),
    "best": _best,
    "every": lambda rest: EveryNSteps(int(rest)),
    "seconds": lambda rest: EveryNSeconds(float(rest)),
    "step": lambda rest: CustomSteps([int(rest)]),
}
