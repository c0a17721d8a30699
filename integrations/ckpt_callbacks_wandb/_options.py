"""What the options of `WandbTracker` may be."""

from __future__ import annotations

import re
from datetime import timedelta
from importlib.util import find_spec

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.payload import Send
from ckpt_callbacks.stores import redact

__all__ = ["as_reference", "as_ttl", "check_link"]

_CLIENTS = {"gs": ("google.cloud.storage", "gcp"), "s3": ("boto3", "aws")}
"""What W&B's client needs for references to a kind of place, and its extra."""


def as_reference(reference: str | None, send: Send) -> str | None:
    """Return the URI of the run directory as it is sent.

    Raises:
        ConfigError: it is none, is not asked for, is secret, or needs a package that is not there.
    """
    if reference is not None and (send != "reference" or "://" not in reference):
        raise ConfigError(
            "WandbTracker: reference must be a URI such as 'gs://bucket/runs/digits', and "
            f"needs send='reference'; it is {redact(reference)!r} with send={send!r}"
        )
    if reference and redact(reference) != reference:
        raise ConfigError(
            "WandbTracker: reference must not hold a password or a key, which W&B would show"
        )
    if reference and (needed := _CLIENTS.get(reference.partition(":")[0])):
        module, extra = needed
        if find_spec(module) is None:
            raise ConfigError(
                f"WandbTracker: for a reference to {reference} W&B's client needs the package "
                f"{module}: pip install 'wandb[{extra}]'"
            )
    return reference and reference.rstrip("/")


def as_ttl(ttl: timedelta | float | None) -> timedelta | None:
    """Return a time to live; a number is of seconds.

    Raises:
        ConfigError: it is none, or not positive.
    """
    if not isinstance(ttl, timedelta | float | int | None) or isinstance(ttl, bool):
        raise ConfigError(f"WandbTracker: ttl must be a timedelta or seconds, not {ttl!r}")
    found = timedelta(seconds=ttl) if isinstance(ttl, float | int) else ttl
    if found is not None and found <= timedelta():
        raise ConfigError(f"WandbTracker: ttl must be positive, not {ttl!r}")
    return found


def check_link(link_to: str | None, link: str) -> None:
    """Check where to link what.

    Raises:
        ConfigError: it is no collection, or an alias that no checkpoint ever has.
    """
    if link_to is not None and not re.fullmatch(r"([^/:]+/){1,2}[\w.-]+", link_to):
        raise ConfigError(
            "WandbTracker: link_to must be a collection such as "
            f"'wandb-registry-model/digits', not {link_to!r}"
        )
    if not re.fullmatch(r"last|best(-[\w-]+)?", link):
        raise ConfigError(
            f"WandbTracker: link must be an alias, 'best', 'best-METRIC' or 'last', not {link!r}"
        )
