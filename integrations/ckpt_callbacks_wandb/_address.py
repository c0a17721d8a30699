"""Checkpoints in W&B by their address.

`wandb:ENTITY/PROJECT/NAME:ALIAS` names a version of an artifact by an alias, such as `best`, or by
its version, such as `v3`. Without the entity, and without the project, W&B's own defaults are
meant; `wandb:wandb-registry-model/NAME:ALIAS` is a collection of the registry. The server is the
one that W&B's own settings name, such as `WANDB_BASE_URL`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_callbacks.errors import (
    CheckpointNotFound,
    CkptCallbacksError,
    ConfigError,
    UsageError,
)
from ckpt_callbacks.extras import load, require
from ckpt_callbacks.paths import Selection
from ckpt_callbacks.record import Record
from ckpt_callbacks.stores import Store, redact
from ckpt_callbacks_wandb._fetch import fetch as fetch_files
from ckpt_callbacks_wandb._fetch import known_of, manifest
from ckpt_callbacks_wandb._versions import versions_in

if TYPE_CHECKING:
    import wandb

__all__ = ["QUERY_SECONDS", "fetch"]

logger = logging.getLogger("ckpt_callbacks")

QUERY_SECONDS = 20
"""How long to wait for the answer to a query."""
_FORM = "wandb:ENTITY/PROJECT/NAME:ALIAS"


def fetch(
    address: str,
    into: Path,
    *,
    only: Selection | None = None,
    tracker: Store | None = None,
    go_on: bool = False,
) -> Record:
    """Copy the files of the checkpoint at `address` into the empty folder `into`.

    Where a run of W&B is open (`wandb.run`), it is recorded there that the version was used.

    Args:
        address: of the form above.
        into: an empty folder.
        only: the leaves that are wanted, of which the items are fetched; all if not given.
        tracker: the `WandbTracker` of the run, whose project is meant where none is named.
        go_on: whether its run is to go on from it.

    Raises:
        ConfigError: it is not of the form above.
        CheckpointNotFound: there is no such checkpoint, it has no such item, or W&B can not be
            asked.
        UsageError: the run is to go on, and has newer checkpoints.
    """
    require("wandb", extra="wandb", who=address)
    path = re.sub(r"^wandb:/*", "", address)
    if not re.fullmatch(r"([^/:]+/){0,2}[^/:]+:[^/:]+", path):
        raise ConfigError(f"{address!r} is not {_FORM}, such as wandb:me/digits/run:best")
    load("wandb")
    import wandb

    given = (tracker.settings() or {}) if tracker else {}
    defaults = {k: v for k in ("entity", "project") if (v := given.get(k))}
    try:
        api = wandb.Api(overrides=defaults, timeout=QUERY_SECONDS)
        version = api.artifact(path)
        record = manifest(version)
        if go_on:
            _check_newest(api, version, address)
        fetch_files(version, into, only, or_weights=True)
    except (CkptCallbacksError, OSError):
        raise
    except Exception as error:  # W&B's errors have no class in common
        # Without the cause, whose text may hold what it asked with.
        raise CheckpointNotFound(f"W&B does not give {address}: {redact(str(error))}") from None
    if wandb.run is not None and not wandb.run.offline and not go_on:
        try:
            wandb.run.use_artifact(version)
        except Exception as error:  # it is read all the same
            logger.warning(
                "W&B: that %s was used could not be recorded: %s", address, redact(str(error))
            )
    # What was measured since the record was sent.
    return replace(record, metrics={**record.metrics, **known_of(version).metrics})


def _check_newest(api: wandb.Api, version: wandb.Artifact, address: str) -> None:
    """Check that a run has no newer checkpoint, which would be taken for one of this way.

    Raises:
        UsageError: it has.
    """
    about, source = version.metadata, version.source_qualified_name.rpartition(":")[0]
    own = [v for v in versions_in(api, source) if v.metadata.get("run") == about.get("run")]
    newer = {v.metadata["step"]: v for v in own if v.metadata["step"] > about.get("step", 0)}
    if newer:
        last = newer[max(newer)].qualified_name
        raise UsageError(
            f"{address} is step {about.get('step')}, and its run has newer checkpoints there: "
            f"{', '.join(map(str, sorted(newer)))}. A run can only go on from its newest one, "
            f"wandb:{last}; to begin a new run with the weights of this one, give the address to "
            "`restore`"
        )
