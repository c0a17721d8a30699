"""The W&B tracker: one run of W&B, and what is held there or for later."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ckpt_callbacks import page
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError, UsageError
from ckpt_callbacks.extras import load, require
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.payload import Send, as_send, weights_among
from ckpt_callbacks.policy import KeepPolicy, as_keep
from ckpt_callbacks.published import Safetensors, as_payload
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.stores import (
    Checkpoint,
    Copy,
    Found,
    Listing,
    MetricPoint,
    Overview,
    RunInfo,
    Tracker,
    redact,
)
from ckpt_callbacks_wandb._address import QUERY_SECONDS
from ckpt_callbacks_wandb._fetch import fetch, whole
from ckpt_callbacks_wandb._files import Files
from ckpt_callbacks_wandb._held import Held
from ckpt_callbacks_wandb._link import Link
from ckpt_callbacks_wandb._log import Log
from ckpt_callbacks_wandb._offline import Offline
from ckpt_callbacks_wandb._online import Online
from ckpt_callbacks_wandb._options import as_reference, as_ttl, check_link
from ckpt_callbacks_wandb._rows import Rows
from ckpt_callbacks_wandb._run import NEEDS_KEY, NO_KEY, adoptable, begin, end, may_have_key
from ckpt_callbacks_wandb._starts import Starts
from ckpt_callbacks_wandb._versions import Versions

if TYPE_CHECKING:
    import wandb

__all__ = ["WandbTracker"]

Mode = Literal["online", "offline"]
PAGE_KEY = "checkpoints/report"
"""Under which the page of a run is logged: the panel `report` of the section `checkpoints`."""

_EXIT_CODE = {"finished": 0, "failed": 1, "killed": 255, "preempted": 255}


class WandbTracker(Tracker):
    """Logs metrics and kept checkpoints to W&B.

    A run that is open on the thread of the loop (`wandb.init()`) is used and left open, if it is
    of the same project; so is the one named by `run_id`. Else one is made, and goes on when
    training does. Of metrics in a run that you opened a kill may lose what W&B has not written to
    its own log yet: 15 s, unless you gave it another `x_transaction_log_flush_interval`.

    Args:
        project: name of the project; that of the run that is used, or else W&B's own default
            (`WANDB_PROJECT`), if not given.
        mode: `online`, or `offline` to hold all for `ckpt-callbacks sync` or the next online run;
            W&B's own default (`WANDB_MODE`, or `online`) if not given.
        entity: user or team; W&B's default if not given.
        artifact: name of the artifact, which several runs may share; `model-` and the id of the run
            if not given.
        link_to: collection of the registry that has a link to what `link` names, such as
            `wandb-registry-model/digits`.
        link: the alias that is followed there.
        run_name: name of the run; that of the run directory if not given.
        run_id: of the run of W&B to use.
        group: of the run.
        job_type: of the run.
        tags: of the run.
        dir: where W&B keeps its files; `WANDB_DIR`, or else the run directory, if not given. What
            was not sent is there.
        send: of a checkpoint, all of it (`checkpoint`), its items that are weights (`weights`:
            those named `model`, `params` or `weights`), or where it is and no bytes (`reference`).
        payload: what is published besides, such as `cc.Safetensors(only="params")`; with
            `send="reference"` it is all that is sent.
        reference: for `send="reference"`, the URI at which others find the run directory, such as
            `gs://bucket/runs/digits`; its path on this machine if not given.
        metrics: whether to log metrics. In a run that you opened and log to with `step=`, W&B drops
            those of your values that are below the step to which our rows have brought it: say
            `False`, or log without `step=`. `False` leaves out the report too.
        ttl: how long W&B keeps a version, in seconds if it is a number, as a safety net: what is
            kept that long is gone then.
        keep: of the checkpoints that are kept, hold only those that this policy keeps, such as
            `BestN(1, "val_accuracy", mode="max", pending=0)`; all if not given.

    Raises:
        MissingExtra: wandb is not installed.
        ConfigError: an option is not as said above.
    """

    name = "wandb"
    title = "W&B"
    put_moves_aliases = False

    def __init__(
        self,
        project: str | None = None,
        *,
        mode: Mode | None = None,
        entity: str | None = None,
        artifact: str | None = None,
        link_to: str | None = None,
        link: str = "best",
        run_name: str | None = None,
        run_id: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        dir: str | os.PathLike[str] | None = None,
        send: Send = "checkpoint",
        payload: Safetensors | Mapping[str, Any] | None = None,
        reference: str | None = None,
        metrics: bool = True,
        ttl: timedelta | float | None = None,
        keep: KeepPolicy | None = None,
    ) -> None:
        require("wandb", extra="wandb", who="WandbTracker")
        names = {"project": project, "entity": entity, "run_id": run_id, "link": link}
        for option, name in names.items():
            if name is not None and (not isinstance(name, str) or not name.strip()):
                raise ConfigError(f"WandbTracker: {option} must be a name, not {name!r}")
        if mode is not None and mode not in get_args(Mode):
            raise ConfigError(f"WandbTracker: mode must be one of {get_args(Mode)}, not {mode!r}")
        if project is not None and "/" in project:
            raise ConfigError(
                f"WandbTracker: project {project!r} must be a name alone; give the user or team as "
                "entity"
            )
        if isinstance(tags, str):
            raise ConfigError(f"WandbTracker: tags must be a list of names, not {tags!r}")
        if artifact is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", artifact):
            raise ConfigError(
                f"WandbTracker: artifact {artifact!r} must be letters, digits, '_', '-' and '.'"
            )
        check_link(link_to, link)
        self.keep = as_keep("WandbTracker", keep)
        self._ttl = as_ttl(ttl)
        self._send = as_send("WandbTracker", send)
        self._payload = as_payload("WandbTracker", payload)
        self.reads_files = send != "reference" or self._payload is not None
        self.refers_here = send == "reference"
        self._metrics = metrics
        self._project = project
        self._entity = entity
        self._mode = mode
        self._artifact = artifact
        self._link_to, self._link = link_to, link
        self._run_name = run_name
        self._run_id = run_id
        self._group, self._job_type, self._tags = group, job_type, [*tags]
        self._reference = as_reference(reference, send)
        self._dir = None if dir is None else Path(dir).absolute()
        # From here on what `entered` and `open` find out.
        self._adopts: wandb.Run | None = None
        """The run that the user has open."""
        self._found = {"project": project, "entity": entity}
        self._info: RunInfo
        self._held: Held
        self._run: wandb.Run
        self._log: Log
        self._rows: Rows
        self._files: Files
        self._there: Online | Offline | None = None
        self._overview: Overview | None = None
        """What is to be shown when the run ends."""
        self._late: TimeoutError | None = None

    def settings(self) -> Mapping[str, Any]:
        return {
            **self._found,
            "mode": self._mode,
            "artifact": self._artifact,
            "link_to": self._link_to,
            "link": self._link,
            "run_name": self._run_name,
            "run_id": self._adopts.id if self._adopts else self._run_id,
            "group": self._group,
            "job_type": self._job_type,
            "tags": self._tags,
            "dir": self._dir and str(self._dir),
            "send": self._send,
            "payload": self._payload and self._payload.to_json(),
            "metrics": self._metrics,
            "reference": self._reference,
            "ttl": self._ttl and self._ttl.total_seconds(),
            "keep": self.keep and policy_to_json(self.keep),
        }

    def missing(self) -> str | None:
        # A key may have been given to the client in this process.
        return None if "wandb" in sys.modules or may_have_key() else NEEDS_KEY

    def ping(self, run: RunInfo) -> str:
        if (self._mode or os.environ.get("WANDB_MODE")) == "offline":
            return "nothing is asked offline: all is held until a sync"
        if what := self.missing():
            raise ConfigError(what)
        load("wandb")
        api = self._api()
        user = api.viewer  # asks the server
        return f"{redact(str(api.settings['base_url']))} answers {user.username}"

    def address(self, step: int, copy: Copy, remembered: Mapping[str, str]) -> str | None:
        if copy.state != "confirmed":
            return None
        place = [self._found["entity"], self._found["project"], copy.ref]
        return f"wandb:{'/'.join(filter(None, place))}"

    def entered(self, items: Sequence[str]) -> None:
        if self._send == "weights":
            weights_among("WandbTracker", items)
        if self._payload:
            self._payload.check("WandbTracker", items)
        client = sys.modules.get("wandb")
        self._adopts = adoptable(self._project, self._run_id)
        if self._adopts:
            self._found = {"project": self._adopts.project, "entity": self._adopts.entity}
        mode = self._mode or os.environ.get("WANDB_MODE") or "online"
        if mode not in ("online", "offline", "shared") and not self._adopts:
            raise ConfigError(
                f"WandbTracker: W&B's mode is {mode!r} (WANDB_MODE); to train without it leave the "
                "tracker out, and to send all later give it mode='offline'"
            )
        if mode == "online" and client is None and not may_have_key():
            raise ConfigError(f"WandbTracker: {NO_KEY}")

    def fits(self, leaves: Mapping[tuple[str, ...], Leaf]) -> None:
        if self._payload:
            self._payload.fits("WandbTracker", leaves)

    def find(self, run_id: str) -> Mapping[int, Found]:
        mode = self._mode or os.environ.get("WANDB_MODE")
        if self._adopts.offline if self._adopts else mode == "offline":
            return {}  # what is held for later is in the directory
        load("wandb")
        return whole(self._versions(run_id))

    def open(self, run: RunInfo) -> Mapping[str, str]:
        self._info = run
        # Not of the directory, many of which are called the same, and which may be renamed.
        name = self._name(run.run_id)
        self._held = Held(run.scratch, name, self._send, self._reference, self._ttl, self._payload)
        if run.reading:
            return run.remembered
        # Here and not above: it takes a second, and this is the worker's thread.
        load("wandb")
        self._late = self._overview = None
        starts = Starts(self._held.folder, run.config)
        if self._adopts:
            self._run = self._adopts
            self._run.config.setdefaults(starts.config)
        else:
            self._run = self._begin(run, starts.config)
        self._found = {"project": self._run.project, "entity": self._run.entity or self._entity}
        started = Path(self._run.dir).parent
        self._log = Log(started / f"run-{self._run.id}.wandb")
        logs = starts.add(started, self._run.id)
        there: Online | Offline
        api: wandb.Api | None = None  # which needs a key
        if self._run.offline:
            there = Offline(self._run, self._held, self._log, logs, starts.began)
        else:
            api = self._api()
            path = f"{self._run.path.rpartition('/')[0]}/{name}"
            versions = Versions(api, path, run.run_id, starts.began, run.rank)
            link = Link(versions, self._link_to, self._link) if self._link_to else None
            there = Online(self._run, self._held, versions, link)
        self._there = there
        self.put_moves_aliases = there.moves_aliases
        self._files = Files(self._run, self._log, api)
        self._files.resume(logs)
        owned = self._adopts is None and self._run_id is None
        self._rows = Rows(
            self._run, self._log, waits=self._adopts is None, api=None if owned else api
        )
        self._rows.resume(logs, starts)
        if owned and api and self._run.resumed and not run.remembered:
            self._rows.go_on(api)
        return {"run_id": run.run_id}

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        return self._opened.put(checkpoint, aliases)

    def listing(self) -> Listing | None:
        return self._opened.listing()

    def get(self, step: int, into: Path) -> None:
        if self._held.about(step):
            self._held.get(step, into)
        elif self._info.reading and self._mode == "offline":
            raise CheckpointNotFound(f"no files of step {step} are held for W&B")
        elif self._info.reading:
            load("wandb")
            fetch(self._versions(self._info.run_id).of(step), into)
        else:
            self._opened.get(step, into)

    def alias(self, name: str, step: int) -> bool:
        return self._opened.alias(name, step)

    def delete(self, step: int) -> bool:
        return self._opened.delete(step)

    def show(self, overview: Overview) -> None:
        self._opened.show(overview)
        self._overview = overview

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        if self._metrics:
            self._rows.log(points)

    def log_artifact(self, path: Path, name: str) -> None:
        self._files.log(path, name)

    def close(self, status: str) -> None:
        shown = self._log_page()
        if not self._adopts:
            self._end(status)
        if shown:
            self._page_mark.write_text(shown)

    def _end(self, status: str) -> None:
        try:
            if self._late:  # of a run that is finished a second `finish` says nothing
                raise self._late
            end(self._run, _EXIT_CODE[status])
        except TimeoutError as error:
            self._late = error
            raise TimeoutError(
                "W&B has not taken all in time; the next run in this directory, or "
                "`ckpt-callbacks sync`, sends the rest"
            ) from error

    @property
    def _page_mark(self) -> Path:
        """The file that tells which page W&B has got."""
        return self._info.scratch / "page"

    def _log_page(self) -> str:
        """Log the page of the checkpoints if W&B has another; return what tells which one it is."""
        overview, self._overview = self._overview, None
        if overview is None or not self._metrics:
            return ""
        import wandb

        text = page.html(overview)
        where = "offline" if self._run.offline else "online"
        this = f"{where} {hashlib.sha256(text.encode()).hexdigest()}"
        if self._page_mark.exists() and self._page_mark.read_text() == this:
            return ""
        self._run.log({PAGE_KEY: wandb.Html(text, inject=False, data_is_not_path=True)})
        return this

    @property
    def _opened(self) -> Online | Offline:
        if self._there is None:
            raise UsageError("the WandbTracker is not open: give it to Callbacks")
        return self._there

    def hint(self) -> str:
        if self._there is None:
            return "it was not opened"
        if self._run.offline:
            return f"ckpt-callbacks sync {self._info.scratch.parents[2]}"
        return str(self._run.url)

    def _begin(self, run: RunInfo, config: Mapping[str, Any]) -> wandb.Run:
        """Open the run of W&B that belongs to this one, or that is named by its id."""
        # In the run directory, with which it moves: what was not sent is there.
        folder = self._dir or os.environ.get("WANDB_DIR") or self._held.folder
        Path(folder).mkdir(parents=True, exist_ok=True)
        return begin(
            self._run_id or run.run_id,
            owned=self._run_id is None,
            drain_limit=run.drain_limit,
            config=config,
            project=self._project,
            entity=self._entity,
            name=self._run_name or (None if self._run_id else run.name),
            mode="online" if run.sending else self._mode,
            dir=folder,
            group=self._group,
            job_type=self._job_type,
            tags=self._tags or None,
        )

    def _name(self, run_id: str) -> str:
        return self._artifact or f"model-{run_id}"

    def _versions(self, run_id: str) -> Versions:
        """Return what the server has of a run, to read only: it need not be open."""
        parts = [self._found["entity"], self._found["project"], self._name(run_id)]
        return Versions(self._api(), "/".join(filter(None, parts)), run_id, 0.0, lambda a, s: None)

    def _api(self) -> wandb.Api:
        import wandb

        entity = self._found["entity"]  # whose organization has the registry
        return wandb.Api(overrides={"entity": entity} if entity else {}, timeout=QUERY_SECONDS)
