"""The run of W&B that a tracker logs to: one of its own, one by its id, or one that is open."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks_wandb._client import forget, has_key, hide

if TYPE_CHECKING:
    import wandb

__all__ = ["NEEDS_KEY", "NO_KEY", "adoptable", "begin", "end", "may_have_key"]

FLUSH_SECONDS = 0.1
"""How often W&B writes its log. Its default of 15 s is how much a kill may lose."""
NEEDS_KEY = "there is no API key for W&B: run `wandb login`, or set WANDB_API_KEY"
NO_KEY = (
    f"{NEEDS_KEY}, or give the tracker mode='offline' and send all later with `ckpt-callbacks sync`"
)
INIT_SECONDS = 30.0
"""How long to wait for the server when the run is opened, at most."""


@dataclass
class _Opened:
    run: wandb.Run
    users: int = 1


_opened: dict[str, _Opened] = {}
"""The runs that we have open in this process, by id. W&B opens none twice."""


def adoptable(project: str | None, run_id: str | None) -> wandb.Run | None:
    """Return the run that the user has open on this thread, if it is the one that is asked for.

    Raises:
        ConfigError: it is one that logs nothing.
    """
    # Where wandb is not imported there is none, and where it is just being imported, on a
    # worker's thread, it has none yet.
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is None or run_id not in (None, run.id) or project not in (None, run.project):
        return None
    if run.disabled:
        raise ConfigError(
            "WandbTracker: the run that is open logs nothing (wandb.init(mode='disabled')): leave "
            "the tracker out, or give it a project of its own"
        )
    found: wandb.Run = run
    return found


def begin(
    run_id: str, *, owned: bool, drain_limit: float, config: Mapping[str, Any], **options: Any
) -> wandb.Run:
    """Open a run of W&B, made if need be, beside those that the user has open.

    Args:
        run_id: its id.
        owned: whether no other tracker uses it, and it ends with us.
        drain_limit: seconds that its end may take.
        config: hyper-parameters.
        options: of `wandb.init`.

    Raises:
        wandb.errors.Error: W&B refuses it, or can not be reached.
    """
    import wandb

    if left := _opened.get(run_id):
        if not owned:  # another tracker's
            left.users += 1
            return left.run
        del _opened[run_id]  # the end of an earlier run did not wait for it
        with suppress(TimeoutError):
            left.run.finish()
    # The client reads the variable once a process.
    mode = options["mode"] or os.environ.get("WANDB_MODE") or None
    if mode != "offline" and not has_key():
        raise wandb.errors.UsageError(NO_KEY)
    limit = max(drain_limit, 1.0)
    try:
        run: wandb.Run = wandb.init(
            id=run_id,
            resume="allow",
            config=dict(config),
            reinit="create_new",
            settings=wandb.Settings(
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                x_update_finish_state=owned,
                # The client's end waits for it too; a server that is well needs less.
                init_timeout=min(INIT_SECONDS, max(limit, 5.0)),
                finish_timeout=limit,
                finish_timeout_raises=True,
                # The loop's output is the user's, and threads of ours must not capture it.
                console="off",
                # The same facts are in `hint` and in events.
                silent=True,
            ),
            **{**options, "mode": mode},
        )
    except wandb.errors.UsageError:
        raise  # before it began
    except Exception as error:
        if "in use" not in str(error):  # by the user, who has it open
            with suppress(Exception):  # the first error tells more
                forget(run_id)
        raise
    hide(run)
    _opened[run_id] = _Opened(run)
    return run


def end(run: wandb.Run, exit_code: int) -> None:
    """End a run of ours; one that another tracker uses goes on.

    Raises:
        TimeoutError: W&B has not taken all of it in time.
    """
    opened = _opened.get(run.id)
    if opened and opened.users > 1:
        opened.users -= 1
        return
    _opened.pop(run.id, None)
    run.finish(exit_code=exit_code)


def may_have_key() -> bool:
    """Return whether there may be a key where W&B's client looks for it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for place in filter(None, places):
        path = Path(place).expanduser()
        if path.exists():
            try:
                return bool(netrc.netrc(path).hosts)
            except netrc.NetrcParseError:
                return True  # W&B reads it its own way
    return False
